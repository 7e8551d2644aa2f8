//! The values a policy compares with: text in, a checked pattern out. Compares; never decides.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net};
use serde::Deserialize;

use super::Invalid;

/// `abc`, `abc*`, `*abc` or `*`. The wildcard stands for any text, the empty one included; `*` alone asks only that
/// there is a value.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Deserialize)]
#[serde(try_from = "String")]
pub enum Pattern {
    Exact(Arc<str>),
    Prefix(Arc<str>),
    Suffix(Arc<str>),
    Present,
}

impl Pattern {
    /// `value` is `None` when the connection has no such attribute: then no pattern matches.
    pub fn matches(&self, value: Option<&str>) -> bool {
        let Some(value) = value else { return false };
        match self {
            Self::Exact(text) => **text == *value,
            Self::Prefix(text) => value.starts_with(&**text),
            Self::Suffix(text) => value.ends_with(&**text),
            Self::Present => true,
        }
    }

    /// A service account as policies write it, `account` or `namespace/account`, as a pattern over
    /// `namespace/account`. Without a slash it means the policy's own namespace, as Istio's `serviceAccounts` does.
    pub(super) fn in_namespace(&self, namespace: &str) -> Self {
        match self {
            Self::Exact(text) if !text.contains('/') => Self::Exact(format!("{namespace}/{text}").into()),
            Self::Prefix(text) if !text.contains('/') => Self::Prefix(format!("{namespace}/{text}").into()),
            other => other.clone(),
        }
    }
}

impl FromStr for Pattern {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        if text.is_empty() {
            return Err(Invalid::EmptyValue);
        }
        let pattern = match (text.strip_prefix('*'), text.strip_suffix('*')) {
            (Some(""), _) => return Ok(Self::Present),
            (Some(suffix), _) => Self::Suffix(suffix.into()),
            (None, Some(prefix)) => Self::Prefix(prefix.into()),
            (None, None) => Self::Exact(text.into()),
        };
        match &pattern {
            // A pattern that can never match is never what its author meant, and in a DENY it would fail open.
            Self::Exact(rest) | Self::Prefix(rest) | Self::Suffix(rest) if rest.contains('*') => {
                Err(Invalid::Wildcard { text: text.into() })
            }
            _ => Ok(pattern),
        }
    }
}

impl TryFrom<String> for Pattern {
    type Error = Invalid;

    fn try_from(text: String) -> Result<Self, Invalid> {
        text.parse()
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(text) => f.write_str(text),
            Self::Prefix(text) => write!(f, "{text}*"),
            Self::Suffix(text) => write!(f, "*{text}"),
            Self::Present => f.write_str("*"),
        }
    }
}

/// A principal pattern: a SPIFFE ID without its scheme.
pub(super) fn principal(text: &str) -> Result<Pattern, Invalid> {
    if text.trim_start_matches('*').starts_with("spiffe://") {
        return Err(Invalid::PrincipalScheme { text: text.into() });
    }
    text.parse()
}

/// A service account pattern, still relative to the policy's namespace.
pub(super) fn service_account(text: &str) -> Result<Pattern, Invalid> {
    let pattern: Pattern = text.parse()?;
    let well_formed = match &pattern {
        Pattern::Present => true,
        Pattern::Exact(t) => match t.split_once('/') {
            None => true,
            Some((namespace, account)) => {
                !namespace.is_empty() && !account.is_empty() && !account.contains('/')
            }
        },
        Pattern::Prefix(t) => !t.starts_with('/') && t.matches('/').count() <= 1,
        // `*abc` would reach accounts of every namespace, where a name without a slash means the policy's own.
        Pattern::Suffix(t) => t.matches('/').count() == 1 && !t.ends_with('/'),
    };
    if well_formed { Ok(pattern) } else { Err(Invalid::ServiceAccount { text: text.into() }) }
}

/// A CIDR block or one address. Host bits are cut off; v4-mapped IPv6 becomes IPv4.
pub(super) fn ip_block(text: &str) -> Result<IpNet, Invalid> {
    let invalid = || Invalid::IpBlock { text: text.into() };
    let block = match text.split_once('/') {
        None => IpNet::from(text.parse::<IpAddr>().map_err(|_| invalid())?.to_canonical()),
        Some(_) => text.parse::<IpNet>().map_err(|_| invalid())?,
    };
    Ok(match block {
        IpNet::V6(v6) => match (v6.addr().to_ipv4_mapped(), v6.prefix_len().checked_sub(96)) {
            (Some(address), Some(length)) => Ipv4Net::new(address, length).map_err(|_| invalid())?.into(),
            _ => block,
        },
        IpNet::V4(_) => block,
    }
    .trunc())
}

/// A port number as Istio writes it: text.
pub(super) fn port(text: &str) -> Result<u16, Invalid> {
    match text.parse::<u16>() {
        Ok(number) if number > 0 => Ok(number),
        _ => Err(Invalid::Port { text: text.into() }),
    }
}
