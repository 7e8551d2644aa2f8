//! SPIFFE IDs of the form `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`: text in, parts out.
//!
//! Strict: what isn't exactly of this form is refused with the part that is wrong, never normalised. An ID that
//! parses prints as the very text it was parsed from.

use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// A workload identity. Cheap to clone, to compare and to hash.
#[derive(Clone, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct SpiffeId(Arc<Parts>);

struct Parts {
    /// The whole ID with its scheme; the other fields are its parts.
    uri: Box<str>,
    trust_domain: TrustDomain,
    namespace: Arc<str>,
    service_account: Arc<str>,
}

impl SpiffeId {
    /// # Errors
    ///
    /// Names the part that isn't a valid path segment, or says that the whole is too long.
    pub fn new(
        trust_domain: &TrustDomain,
        namespace: &str,
        service_account: &str,
    ) -> Result<Self, InvalidSpiffeId> {
        segment("namespace", namespace)?;
        segment("service account", service_account)?;
        let uri = format!("{SCHEME}{trust_domain}/ns/{namespace}/sa/{service_account}");
        if uri.len() > MAX_ID {
            return Err(InvalidSpiffeId::TooLong { bytes: uri.len() });
        }
        Ok(Self(Arc::new(Parts {
            uri: uri.into(),
            trust_domain: trust_domain.clone(),
            namespace: namespace.into(),
            service_account: service_account.into(),
        })))
    }

    /// Whether anybody else holds this very value.
    pub(crate) fn is_shared(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }

    pub fn trust_domain(&self) -> &TrustDomain {
        &self.0.trust_domain
    }

    pub fn namespace(&self) -> &Arc<str> {
        &self.0.namespace
    }

    pub fn service_account(&self) -> &Arc<str> {
        &self.0.service_account
    }

    /// The whole ID, `spiffe://` included: how certificates carry it.
    pub fn uri(&self) -> &str {
        &self.0.uri
    }

    /// The ID without `spiffe://`: how Istio's policies, metrics and logs write a principal.
    pub fn principal(&self) -> &str {
        self.0.uri.strip_prefix(SCHEME).unwrap_or(&self.0.uri)
    }
}

impl FromStr for SpiffeId {
    type Err = InvalidSpiffeId;

    fn from_str(text: &str) -> Result<Self, InvalidSpiffeId> {
        // Before anything else, so that no error has to carry an unbounded text.
        if text.len() > MAX_ID {
            return Err(InvalidSpiffeId::TooLong { bytes: text.len() });
        }
        let rest = text.strip_prefix(SCHEME).ok_or_else(|| InvalidSpiffeId::Scheme { id: text.into() })?;
        let (trust_domain, path) = rest.split_once('/').unwrap_or((rest, ""));
        let trust_domain: TrustDomain = trust_domain.parse()?;
        let mut segments = path.split('/');
        match (segments.next(), segments.next(), segments.next(), segments.next(), segments.next()) {
            (Some("ns"), Some(namespace), Some("sa"), Some(service_account), None) => {
                Self::new(&trust_domain, namespace, service_account)
            }
            _ => Err(InvalidSpiffeId::Path { id: text.into() }),
        }
    }
}

/// The name of a set of identities that share roots, for example `cluster.local`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TrustDomain {
    type Err = InvalidSpiffeId;

    fn from_str(name: &str) -> Result<Self, InvalidSpiffeId> {
        if name.is_empty() {
            return Err(InvalidSpiffeId::EmptyTrustDomain);
        }
        if name.len() > MAX_TRUST_DOMAIN {
            return Err(InvalidSpiffeId::LongTrustDomain { bytes: name.len() });
        }
        let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-._".contains(c);
        match name.chars().find(|c| !allowed(*c)) {
            Some(character) => Err(InvalidSpiffeId::TrustDomain { name: name.into(), character }),
            None => Ok(Self(name.into())),
        }
    }
}

/// Why a text is no SPIFFE ID of a workload, or no trust domain. The fault is always the text's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidSpiffeId {
    #[error("a SPIFFE ID starts with \"spiffe://\", in lower case; this doesn't: {id:?}")]
    Scheme { id: String },
    #[error(
        "the trust domain is empty; it is a name such as \"cluster.local\", and SPIFFE IDs carry it after \"spiffe://\""
    )]
    EmptyTrustDomain,
    #[error("a trust domain has at most {MAX_TRUST_DOMAIN} bytes, this one has {bytes}")]
    LongTrustDomain { bytes: usize },
    #[error(
        "the trust domain {name:?} contains {character:?}; it may have lower-case letters, digits, '.', '-' and '_'"
    )]
    TrustDomain { name: String, character: char },
    #[error(
        "a workload's SPIFFE ID has the path /ns/<namespace>/sa/<service account>; this has another: {id:?}"
    )]
    Path { id: String },
    #[error("the {part} of a SPIFFE ID may not be empty")]
    EmptySegment { part: &'static str },
    #[error("the {part} of a SPIFFE ID may not be {segment:?}: SPIFFE has no relative paths")]
    RelativeSegment { part: &'static str, segment: String },
    #[error(
        "the {part} {segment:?} contains {character:?}; in a SPIFFE ID it may have letters, digits, '.', '-' and '_'"
    )]
    Segment { part: &'static str, segment: String, character: char },
    #[error("a SPIFFE ID has at most {MAX_ID} bytes, this one has {bytes}")]
    TooLong { bytes: usize },
}

// SPIFFE-ID, sections 2.1 to 2.3: https://github.com/spiffe/spiffe/blob/main/standards/SPIFFE-ID.md
const SCHEME: &str = "spiffe://";
const MAX_TRUST_DOMAIN: usize = 255;
const MAX_ID: usize = 2048;

fn segment(part: &'static str, segment: &str) -> Result<(), InvalidSpiffeId> {
    match segment {
        "" => return Err(InvalidSpiffeId::EmptySegment { part }),
        "." | ".." => return Err(InvalidSpiffeId::RelativeSegment { part, segment: segment.into() }),
        long if long.len() > MAX_ID => return Err(InvalidSpiffeId::TooLong { bytes: long.len() }),
        _ => {}
    }
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    match segment.chars().find(|c| !allowed(*c)) {
        Some(character) => Err(InvalidSpiffeId::Segment { part, segment: segment.into(), character }),
        None => Ok(()),
    }
}

impl PartialEq for SpiffeId {
    fn eq(&self, other: &Self) -> bool {
        self.0.uri == other.0.uri
    }
}

impl Eq for SpiffeId {}

impl Hash for SpiffeId {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.uri.hash(state);
    }
}

impl Ord for SpiffeId {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.uri.cmp(&other.0.uri)
    }
}

impl PartialOrd for SpiffeId {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0.uri)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl From<SpiffeId> for String {
    fn from(id: SpiffeId) -> Self {
        id.uri().into()
    }
}

impl TryFrom<String> for SpiffeId {
    type Error = InvalidSpiffeId;

    fn try_from(text: String) -> Result<Self, InvalidSpiffeId> {
        text.parse()
    }
}

impl From<TrustDomain> for String {
    fn from(name: TrustDomain) -> Self {
        name.as_str().into()
    }
}

impl TryFrom<String> for TrustDomain {
    type Error = InvalidSpiffeId;

    fn try_from(name: String) -> Result<Self, InvalidSpiffeId> {
        name.parse()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_id_is_taken_apart() {
        let id: SpiffeId = "spiffe://cluster.local/ns/shop/sa/cart-v2".parse().unwrap();
        assert_eq!(id.trust_domain(), &"cluster.local".parse().unwrap());
        assert_eq!(&**id.namespace(), "shop");
        assert_eq!(&**id.service_account(), "cart-v2");
        assert_eq!(id.principal(), "cluster.local/ns/shop/sa/cart-v2");
    }

    #[test]
    fn each_fault_is_named() {
        use InvalidSpiffeId as E;
        type Expected = fn(&E) -> bool;
        let cases: Vec<(&str, Expected)> = vec![
            ("", |e| matches!(e, E::Scheme { .. })),
            ("cluster.local/ns/a/sa/b", |e| matches!(e, E::Scheme { .. })),
            ("SPIFFE://cluster.local/ns/a/sa/b", |e| matches!(e, E::Scheme { .. })),
            ("https://cluster.local/ns/a/sa/b", |e| matches!(e, E::Scheme { .. })),
            (" spiffe://cluster.local/ns/a/sa/b", |e| matches!(e, E::Scheme { .. })),
            ("spiffe:///ns/a/sa/b", |e| matches!(e, E::EmptyTrustDomain)),
            ("spiffe://Cluster.local/ns/a/sa/b", |e| matches!(e, E::TrustDomain { character: 'C', .. })),
            ("spiffe://user@td/ns/a/sa/b", |e| matches!(e, E::TrustDomain { character: '@', .. })),
            ("spiffe://td:8080/ns/a/sa/b", |e| matches!(e, E::TrustDomain { character: ':', .. })),
            ("spiffe://td", |e| matches!(e, E::Path { .. })),
            ("spiffe://td/", |e| matches!(e, E::Path { .. })),
            ("spiffe://td/ns/a", |e| matches!(e, E::Path { .. })),
            ("spiffe://td/ns/a/sa/b/", |e| matches!(e, E::Path { .. })),
            ("spiffe://td/ns/a/sa/b/c", |e| matches!(e, E::Path { .. })),
            ("spiffe://td//ns/a/sa/b", |e| matches!(e, E::Path { .. })),
            ("spiffe://td/sa/b/ns/a", |e| matches!(e, E::Path { .. })),
            ("spiffe://td/NS/a/sa/b", |e| matches!(e, E::Path { .. })),
            ("spiffe://td/ns//sa/b", |e| matches!(e, E::EmptySegment { part: "namespace" })),
            ("spiffe://td/ns/a/sa/", |e| matches!(e, E::EmptySegment { part: "service account" })),
            ("spiffe://td/ns/../sa/b", |e| matches!(e, E::RelativeSegment { part: "namespace", .. })),
            ("spiffe://td/ns/a/sa/.", |e| matches!(e, E::RelativeSegment { part: "service account", .. })),
            ("spiffe://td/ns/a%2e/sa/b", |e| matches!(e, E::Segment { character: '%', .. })),
            ("spiffe://td/ns/a/sa/b?x", |e| matches!(e, E::Segment { character: '?', .. })),
            ("spiffe://td/ns/a/sa/b#x", |e| matches!(e, E::Segment { character: '#', .. })),
            ("spiffe://td/ns/a/sa/b ", |e| matches!(e, E::Segment { character: ' ', .. })),
            ("spiffe://td/ns/a\0/sa/b", |e| matches!(e, E::Segment { character: '\0', .. })),
            ("spiffe://td/ns/ä/sa/b", |e| matches!(e, E::Segment { character: 'ä', .. })),
        ];
        for (text, expected) in cases {
            let error = text.parse::<SpiffeId>().expect_err(text);
            assert!(expected(&error), "{text:?}: {error:?}");
        }
    }

    #[test]
    fn lengths_are_limited() {
        let longest = "d".repeat(255);
        assert!(longest.parse::<TrustDomain>().is_ok());
        assert_eq!(
            format!("{longest}d").parse::<TrustDomain>(),
            Err(InvalidSpiffeId::LongTrustDomain { bytes: 256 })
        );

        let account = "s".repeat(2048 - "spiffe://td/ns/n/sa/".len());
        let id = format!("spiffe://td/ns/n/sa/{account}");
        assert!(id.parse::<SpiffeId>().is_ok());
        assert_eq!(format!("{id}s").parse::<SpiffeId>(), Err(InvalidSpiffeId::TooLong { bytes: 2049 }));
        let td = "td".parse().unwrap();
        assert!(SpiffeId::new(&td, "n", &account).is_ok());
        assert!(SpiffeId::new(&td, "n", &format!("{account}s")).is_err());
    }

    #[test]
    fn parts_cannot_smuggle_a_separator() {
        let td = "td".parse().unwrap();
        assert!(SpiffeId::new(&td, "a/sa/b", "c").is_err());
        assert!(SpiffeId::new(&td, "a", "b/../c").is_err());
        assert!("td/ns/a".parse::<TrustDomain>().is_err());
    }

    #[test]
    fn json_is_the_text_and_is_checked() {
        let id: SpiffeId = "spiffe://td/ns/a/sa/b".parse().unwrap();
        assert_eq!(serde_json::to_string(&id).unwrap(), "\"spiffe://td/ns/a/sa/b\"");
        assert_eq!(serde_json::from_str::<SpiffeId>("\"spiffe://td/ns/a/sa/b\"").unwrap(), id);
        assert!(serde_json::from_str::<SpiffeId>("\"spiffe://td/ns/a\"").is_err());
    }

    proptest! {
        #[test]
        fn parts_round_trip(
            td in "[a-z0-9._-]{1,255}",
            ns in "[a-zA-Z0-9_-][a-zA-Z0-9._-]{0,62}",
            sa in "[a-zA-Z0-9_-][a-zA-Z0-9._-]{0,252}",
        ) {
            let id = SpiffeId::new(&td.parse().unwrap(), &ns, &sa).unwrap();
            let again: SpiffeId = id.to_string().parse().unwrap();
            prop_assert_eq!(again.namespace().as_ref(), ns.as_str());
            prop_assert_eq!(again.service_account().as_ref(), sa.as_str());
            prop_assert_eq!(again.trust_domain().as_str(), td.as_str());
            prop_assert_eq!(format!("spiffe://{}", id.principal()), id.to_string());
            prop_assert_eq!(again, id);
        }

        #[test]
        fn what_parses_prints_as_it_was(text in "spiffe://[a-z./]{0,8}(/ns/|/)[a-z./%]{0,5}(/sa/|/)\\PC{0,5}") {
            if let Ok(id) = text.parse::<SpiffeId>() {
                prop_assert_eq!(id.to_string(), text);
            }
        }

        #[test]
        fn arbitrary_text_never_panics(text in "\\PC{0,300}") {
            let _ = text.parse::<SpiffeId>();
            let _ = text.parse::<TrustDomain>();
        }

        #[test]
        fn one_foreign_character_anywhere_is_refused(at in 0usize..33, c in "[ /%@:?#\\\\\u{0}\u{e4}]") {
            let mut id = "spiffe://cluster.local/ns/a/sa/bc".to_string();
            id.insert_str(at, &c);
            prop_assert!(id.parse::<SpiffeId>().is_err(), "{id:?}");
        }
    }
}
