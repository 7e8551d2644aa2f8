//! Identities: SPIFFE IDs in, current certificates, keys and trust bundles out.
//!
//! Keys are made in memory and never leave it. Renewal happens here; established connections never notice.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use zeroize::Zeroize;

mod authority;
mod certificate;
mod issuing;
mod revocation;
mod revocation_file;
mod rotation;
mod secret;
mod slot;
mod spiffe;
mod verdict;
mod workload_api;

pub use authority::{Authority, Credential, Issued, News, RemoteAuthority, Signer, trust_wire, wire};
pub use certificate::InvalidCertificate;
pub(crate) use certificate::{Certificate, pem_certificates, to_pem};
pub use issuing::Csr;
pub use revocation::{InvalidList, InvalidRevocations, RevocationList, Revocations};
pub use rotation::{Config, Identities};
pub(crate) use secret::certified;
pub use slot::IdentityStatus;
pub use spiffe::{InvalidSpiffeId, SpiffeId, TrustDomain};
pub use workload_api::WorkloadApi;

/// What the tunnel needs to speak for a workload; replaced whole at each renewal or root change.
#[derive(Debug)]
pub struct Identity {
    /// Rises with every replacement in this process: TLS configurations are cached by it.
    pub version: u64,
    pub svid: Arc<Svid>,
    pub bundle: Arc<TrustBundle>,
}

/// One identity's certificate chain (leaf first, intermediates after) and key, as the authority issued it.
///
/// The key is overwritten when this is dropped, and `Debug` doesn't show it.
#[derive(Debug)]
pub struct Svid {
    pub id: SpiffeId,
    pub chain: Vec<CertificateDer<'static>>,
    pub key: PrivatePkcs8KeyDer<'static>,
    /// Hex, as `openssl x509 -serial` prints it.
    pub serial: String,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
}

impl Drop for Svid {
    fn drop(&mut self) {
        self.key.zeroize();
    }
}

/// What peers are judged by: roots that vouch for them, more than one during a rotation, and what revokes them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TrustBundle {
    pub roots: Vec<CertificateDer<'static>>,
    pub revocations: Arc<Revocations>,
}

impl TrustBundle {
    /// These roots, and nothing revoked.
    pub fn new(roots: Vec<CertificateDer<'static>>) -> Self {
        Self { roots, revocations: Arc::default() }
    }

    fn with(&self, revocations: Arc<Revocations>) -> Self {
        Self { roots: self.roots.clone(), revocations }
    }
}

/// Why an identity could not be had. Every attempt is repeated with back-off; none of these is final.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot make a key and signing request for {id}: {source}")]
    Request { id: SpiffeId, source: rcgen::Error },

    #[error("{address:?} is no address of a certificate authority; it is written https://HOST:PORT")]
    Address { address: String },

    #[error("cannot read {what} {path}: {source}; the certificate authority is not called without it", path = path.display())]
    File { what: &'static str, path: PathBuf, source: std::io::Error },

    #[error("the certificate authority's root file {path} is unusable: {source}", path = path.display())]
    RootFile { path: PathBuf, source: InvalidCertificate },

    #[error("the token file {path} holds no token: it must be one line of printable ASCII", path = path.display())]
    Token { path: PathBuf },

    #[error("the node's certificate file {path} is unusable: {source}", path = path.display())]
    NodeCertificate { path: PathBuf, source: InvalidCertificate },

    #[error(
        "the node's key file {path} is unusable: {reason}; it must be the one unencrypted private key, in PEM, that \
         the node's certificate was issued for", path = path.display()
    )]
    NodeKey { path: PathBuf, reason: String },

    #[error("cannot set up TLS for calls to the certificate authority: {0}")]
    Tls(rustls::Error),

    #[error("cannot reach the certificate authority at {address}: {source}")]
    Unreachable { address: String, source: std::io::Error },

    #[error(
        "the certificate authority at {address} failed the TLS handshake: {source}; the roots it must prove \
         itself with are in {root}", root = root.display()
    )]
    Handshake { address: String, root: PathBuf, source: std::io::Error },

    #[error("the connection to the certificate authority at {address} failed: {source}")]
    Transport { address: String, source: tonic::transport::Error },

    #[error("the certificate authority at {address} refused to sign for {id}: {code:?}: {message}")]
    Refused { address: String, id: SpiffeId, code: tonic::Code, message: String },

    #[error("cannot {attempt} a signing request to {signer} for {id}: {reason}")]
    SigningRequest { attempt: &'static str, signer: String, id: SpiffeId, reason: String },

    #[error("the signing request to {signer} for {id} is {condition}: {message}")]
    NotSigned { signer: String, id: SpiffeId, condition: String, message: String },

    #[error("the certificate authority did not answer for {id} within {} s", waited.as_secs_f32())]
    TimedOut { id: SpiffeId, waited: Duration },

    #[error("the certificate authority answered for {id} with something else than certificates: {source}")]
    Answer { id: SpiffeId, source: InvalidCertificate },

    #[error("the certificate authority gave a certificate that cannot be used for {id}: {fault}")]
    Unusable { id: SpiffeId, fault: Fault },

    #[error("no identities from the SPIFFE Workload API at {socket}: {reason}")]
    NoWorkloadApi { socket: String, reason: String },

    #[error(
        "the SPIFFE Workload API at {socket} gives this agent no {id}, but {}; register an entry for it whose selectors \
         match this agent's process",
        listed(given)
    )]
    Withdrawn { socket: String, id: SpiffeId, given: Vec<String> },

    #[error(
        "no certificate for {id} after {} s: {}", waited.as_secs_f32(),
        last.as_deref().unwrap_or("nothing was tried, because no workload of this node has this identity")
    )]
    NotReady { id: SpiffeId, waited: Duration, last: Option<String> },
}

/// Every [`Error::reason`].
pub(crate) const REASONS: [&str; 7] =
    ["configuration", "handshake", "internal", "refused", "timeout", "unreachable", "unusable"];

impl Error {
    /// The metrics label.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Request { .. } | Self::Tls(_) => "internal",
            Self::Address { .. }
            | Self::File { .. }
            | Self::RootFile { .. }
            | Self::Token { .. }
            | Self::NodeCertificate { .. }
            | Self::NodeKey { .. } => "configuration",
            Self::Unreachable { .. } | Self::Transport { .. } | Self::NoWorkloadApi { .. } => "unreachable",
            // Whether it is away or forbids it, the API server is the way to the signer.
            Self::SigningRequest { .. } => "unreachable",
            // gRPC's words for a connection that broke, and for "try again later".
            Self::Refused { code: tonic::Code::Unknown | tonic::Code::Unavailable, .. } => "unreachable",
            Self::Handshake { .. } => "handshake",
            Self::Refused { .. } | Self::Withdrawn { .. } | Self::NotSigned { .. } => "refused",
            Self::TimedOut { .. } | Self::NotReady { .. } => "timeout",
            Self::Answer { .. } | Self::Unusable { .. } => "unusable",
        }
    }
}

/// What is wrong with a certificate that an authority issued.
#[derive(Debug)]
pub enum Fault {
    /// It has no SPIFFE ID, several, or another's.
    Identity {
        found: Vec<String>,
    },
    /// It certifies a key that we didn't send.
    Key,
    /// Clocks differ, or the authority answered with an old certificate.
    Validity {
        not_before: SystemTime,
        not_after: SystemTime,
    },
    /// It doesn't lead to a root of the bundle.
    Chain(webpki::Error),
    Malformed(InvalidCertificate),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Identity { found } => write!(f, "its SPIFFE IDs are {found:?}"),
            Self::Key => f.write_str("it is for another key than ours"),
            Self::Validity { not_before, not_after } => write!(
                f,
                "it is valid from {} to {}, and now it is {}: compare the clocks of this node and the authority",
                timestamp(*not_before),
                timestamp(*not_after),
                timestamp(SystemTime::now())
            ),
            Self::Malformed(error) => error.fmt(f),
            Self::Chain(webpki::Error::CertRevoked) => {
                f.write_str("it, or an intermediate of its chain, is revoked")
            }
            Self::Chain(error) => {
                write!(f, "its chain leads to no root that came with it or stands in the root file ({error})")
            }
        }
    }
}

/// The first of what may be many.
fn listed(given: &[String]) -> String {
    const SHOWN: usize = 5;
    match given.get(..SHOWN) {
        _ if given.is_empty() => "no identity at all".into(),
        Some(first) if given.len() > SHOWN => {
            format!("{} and {} more", first.join(", "), given.len() - SHOWN)
        }
        _ => given.join(", "),
    }
}

/// RFC 3339 in UTC, whole seconds, for people.
pub(crate) fn timestamp(at: SystemTime) -> String {
    jiff::Timestamp::try_from(at)
        .and_then(|at| at.round(jiff::Unit::Second))
        .map_or_else(|_| "a date out of range".into(), |at| at.to_string())
}
