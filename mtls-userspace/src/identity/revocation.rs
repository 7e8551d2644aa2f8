//! Revocation: certificate revocation lists (RFC 5280) in, whether a proven path holds a revoked certificate out.
//!
//! A list counts for what its issuer signed, told by name *and* key: after a rotation two authorities may have one name,
//! and the new one's list says nothing of what the old one signed. Signatures are checked once for each issuer, not for
//! each handshake. What no list speaks of is not revoked; a list that is past its time still counts, because nothing
//! that it revoked becomes good again.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer};
use webpki::{CertRevocationList, OwnedCertRevocationList, VerifiedPath};
use x509_parser::prelude::{CertificateRevocationList, FromDer, SubjectPublicKeyInfo, X509Version};

use super::certificate::at;
use super::{Certificate, timestamp};

/// The lists in force together. None at all is the usual case.
#[derive(Default)]
pub struct Revocations {
    lists: Vec<Arc<List>>,
}

struct List {
    der: CertificateRevocationListDer<'static>,
    content: CertRevocationList<'static>,
    facts: RevocationList,
    /// Keys of authorities with the issuer's name, and whether this list is theirs.
    issuers: Mutex<HashMap<Vec<u8>, bool>>,
}

/// What people and metrics get to see of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RevocationList {
    /// The issuer's distinguished name.
    pub issuer: String,
    /// Certificates revoked.
    pub revoked: usize,
    /// When the issuer promised the next list.
    pub next_update: Option<SystemTime>,
}

impl Revocations {
    /// Reads every list in a PEM text. Each whose issuer has the name of one of `authorities` must be that one's.
    ///
    /// # Errors
    ///
    /// Names the list, by its position, and what is wrong with it.
    pub fn from_pem(pem: &[u8], authorities: &[CertificateDer<'_>]) -> Result<Self, InvalidRevocations> {
        let lists = CertificateRevocationListDer::pem_slice_iter(pem)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| InvalidRevocations::Pem { reason: error.to_string() })?;
        if lists.is_empty() {
            return Err(InvalidRevocations::None);
        }
        let list = |(position, der): (usize, CertificateRevocationListDer<'static>)| {
            let list = List::parse(der).and_then(|list| list.proven(authorities).map(|()| Arc::new(list)));
            list.map_err(|source| InvalidRevocations::At { position: position + 1, source })
        };
        Ok(Self { lists: lists.into_iter().enumerate().map(list).collect::<Result<_, _>>()? })
    }

    /// Demands that each list is one of these authorities'.
    ///
    /// # Errors
    ///
    /// Names the first list that is nobody's.
    pub fn issued_by(&self, authorities: &[CertificateDer<'_>]) -> Result<(), InvalidRevocations> {
        for (position, list) in self.lists.iter().enumerate() {
            if !authorities.iter().any(|authority| list.has_name_of(authority)) {
                let issuer = list.facts.issuer.clone();
                let source = InvalidList::Stranger { issuer };
                return Err(InvalidRevocations::At { position: position + 1, source });
            }
        }
        Ok(())
    }

    /// Both sets' lists, each once.
    pub fn join(&self, other: &Self) -> Self {
        let mut lists = self.lists.clone();
        lists
            .extend(other.lists.iter().filter(|list| !self.lists.iter().any(|l| l.der == list.der)).cloned());
        Self { lists }
    }

    pub fn lists(&self) -> impl Iterator<Item = &RevocationList> {
        self.lists.iter().map(|list| &list.facts)
    }

    pub fn is_empty(&self) -> bool {
        self.lists.is_empty()
    }

    /// As a PEM text, which [`Self::from_pem`] reads.
    pub fn to_pem(&self) -> String {
        self.lists.iter().map(|list| super::certificate::pem_block("X509 CRL", &list.der)).collect()
    }

    /// For [`webpki::EndEntityCert::verify_for_usage`]: refuses a path with a revoked certificate in it.
    pub fn check(&self, path: &VerifiedPath<'_>) -> Result<(), webpki::Error> {
        if self.lists.is_empty() {
            return Ok(());
        }
        let mut links = vec![&**path.end_entity()];
        links.extend(path.intermediate_certificates());
        for (position, link) in links.iter().enumerate() {
            let issuer = links.get(position + 1);
            for list in self.lists.iter().filter(|list| list.content.issuer() == link.issuer()) {
                let theirs = match issuer {
                    Some(issuer) => list.is_of(&issuer.subject_public_key_info(), Some(&issuer.der())),
                    None => list.is_of(&webpki::spki_for_anchor(path.anchor()), None),
                };
                if theirs && list.content.find_serial(link.serial())?.is_some() {
                    return Err(webpki::Error::CertRevoked);
                }
            }
        }
        Ok(())
    }
}

impl PartialEq for Revocations {
    fn eq(&self, other: &Self) -> bool {
        self.lists.len() == other.lists.len()
            && self.lists.iter().zip(&other.lists).all(|(a, b)| a.der == b.der)
    }
}

impl Eq for Revocations {}

impl fmt::Debug for Revocations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.lists()).finish()
    }
}

impl List {
    fn parse(der: CertificateRevocationListDer<'static>) -> Result<Self, InvalidList> {
        let malformed = InvalidList::Der(webpki::Error::BadDer);
        let Ok((_, parsed)) = CertificateRevocationList::from_der(&der) else { return Err(malformed) };
        if parsed.version() != Some(X509Version::V2) {
            return Err(InvalidList::Version);
        }
        let content = OwnedCertRevocationList::from_der(&der).map_err(InvalidList::Der)?;
        let facts = RevocationList {
            issuer: parsed.issuer().to_string(),
            revoked: parsed.iter_revoked_certificates().count(),
            next_update: parsed.next_update().map(|time| at(time.timestamp())),
        };
        if let Some(next) = facts.next_update.filter(|next| *next <= SystemTime::now()) {
            tracing::warn!(
                issuer = facts.issuer,
                next_update = timestamp(next),
                "a revocation list is past its time: it still counts, but its issuer owes the next"
            );
        }
        Ok(Self { der, content: content.into(), facts, issuers: Mutex::default() })
    }

    /// That it is really from one of the authorities that have its issuer's name, if there are any.
    fn proven(&self, authorities: &[CertificateDer<'_>]) -> Result<(), InvalidList> {
        let issuer = || self.facts.issuer.clone();
        let mut named = false;
        for authority in authorities.iter().filter(|authority| self.has_name_of(authority)) {
            named = true;
            let Ok(certificate) = Certificate::parse(authority) else { continue };
            if self.signature_is_by(&certificate.public_key) {
                return if certificate.may_revoke {
                    Ok(())
                } else {
                    Err(InvalidList::Usage { issuer: issuer() })
                };
            }
        }
        if named { Err(InvalidList::Signature { issuer: issuer() }) } else { Ok(()) }
    }

    fn has_name_of(&self, authority: &CertificateDer<'_>) -> bool {
        webpki::EndEntityCert::try_from(authority)
            .is_ok_and(|certificate| certificate.subject() == self.content.issuer())
    }

    /// Whether the authority with this key, and this certificate unless it is a root, made the list.
    fn is_of(&self, key: &[u8], certificate: Option<&CertificateDer<'_>>) -> bool {
        /// Authorities of one name; more are no rotation.
        const ISSUERS: usize = 64;
        let mut known = self.issuers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(theirs) = known.get(key) {
            return *theirs;
        }
        let may = || certificate.is_none_or(|der| Certificate::parse(der).is_ok_and(|c| c.may_revoke));
        let theirs = self.signature_is_by(key) && may();
        if !theirs {
            tracing::warn!(
                issuer = self.facts.issuer,
                "a revocation list is not by the authority of its issuer's name: it revokes nothing of that one"
            );
        }
        if known.len() >= ISSUERS {
            known.clear();
        }
        known.insert(key.to_vec(), theirs);
        theirs
    }

    fn signature_is_by(&self, key: &[u8]) -> bool {
        let (Ok((_, list)), Ok((_, key))) =
            (CertificateRevocationList::from_der(&self.der), SubjectPublicKeyInfo::from_der(key))
        else {
            return false;
        };
        list.verify_signature(&key).is_ok()
    }
}

/// Why a text is no set of revocation lists.
#[derive(Debug, thiserror::Error)]
pub enum InvalidRevocations {
    #[error("no PEM block \"X509 CRL\" in it")]
    None,
    #[error("malformed PEM: {reason}")]
    Pem { reason: String },
    #[error("list {position} of it {source}")]
    At { position: usize, source: InvalidList },
}

/// What is wrong with one list.
#[derive(Debug, thiserror::Error)]
pub enum InvalidList {
    #[error("cannot be read: {0}")]
    Der(webpki::Error),
    #[error(
        "is of version 1; it must be of version 2, which `openssl ca -gencrl` makes when crl_extensions are configured"
    )]
    Version,
    #[error("is not signed by {issuer:?}, whose name it carries")]
    Signature { issuer: String },
    #[error("is by {issuer:?}, which may not sign revocation lists: its keyUsage lacks cRLSign")]
    Usage { issuer: String },
    #[error("is by {issuer:?}, which is none of the authorities here")]
    Stranger { issuer: String },
}
