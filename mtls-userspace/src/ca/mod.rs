//! The certificate authority: signing requests of known callers in, workload certificates out.
//!
//! A caller gets certificates only for identities that pods on its own node really have. The authority's key
//! leaves memory only when the operator asks for a directory or a Secret to keep it in; workloads' keys never come here.

use std::path::PathBuf;
use std::time::SystemTime;

use crate::identity::{InvalidCertificate, InvalidRevocations, timestamp};

mod authority;
mod callers;
mod client_certificate;
mod cluster;
mod directory;
mod in_force;
mod request;
mod server;
mod service;
mod trust;

pub use authority::CertificateAuthority;
pub use callers::{
    AnyOf, Caller, Callers, InvalidNodeCa, InvalidTokens, JoinTokens, NodeCertificates, Proof, ReviewFailed,
    ServiceAccount, ServiceAccounts, TokenReviews, Unidentified,
};
pub use cluster::{Published, Secret, published_in, reviewed_by};
pub use directory::write_root_bundle;
pub use in_force::InForce;
pub use server::serve;
pub use service::{NodeAuthorization, Service};

/// Why the authority cannot start, or stopped. What is wrong with a caller's request is told to the caller instead.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot {attempt} {path}: {source}", path = path.display())]
    File { attempt: &'static str, path: PathBuf, source: std::io::Error },

    #[error(
        "{dir} is incomplete: as the authority's place it must have all or none of four files, and it has {found:?} but not \
         {missing:?}. Add what is missing, or take the others away to have a root made there", dir = dir.display()
    )]
    Incomplete { dir: PathBuf, found: Vec<&'static str>, missing: Vec<&'static str> },

    #[error(
        "the CA directory {dir} has lost all its files; put them back, or restart the authority to have a new root made \
         there", dir = dir.display()
    )]
    Emptied { dir: PathBuf },

    #[error("{path} is unusable: {source}", path = path.display())]
    Certificates { path: PathBuf, source: InvalidCertificate },

    #[error("{path} is unusable: {source}", path = path.display())]
    Revocations { path: PathBuf, source: InvalidRevocations },

    #[error("{path} is unusable: {reason}; it must be one unencrypted private key in PEM", path = path.display())]
    Key { path: PathBuf, reason: String },

    #[error(
        "{path} holds {count} certificates; it must be the signing certificate alone, with its issuers in \
         cert-chain.pem", path = path.display()
    )]
    SeveralSigners { path: PathBuf, count: usize },

    #[error(
        "{path} holds a certificate (serial {serial}) that may not sign others: its basicConstraints must say CA, \
         and its keyUsage keyCertSign", path = path.display()
    )]
    NotAnAuthority { path: PathBuf, serial: String },

    #[error(
        "{path} holds a certificate (serial {serial}) that another authority issued; it must hold self-signed roots, \
         and intermediates belong in cert-chain.pem", path = path.display()
    )]
    NotARoot { path: PathBuf, serial: String },

    #[error(
        "{path} is valid from {} to {}, and now it is {}: renew it, or set the clock", timestamp(*not_before),
        timestamp(*not_after), timestamp(SystemTime::now()), path = path.display()
    )]
    Validity { path: PathBuf, not_before: SystemTime, not_after: SystemTime },

    #[error(
        "{key} is not the key of {certificate}: put the key there that the certificate was issued for",
        key = key.display(), certificate = certificate.display()
    )]
    KeyMismatch { certificate: PathBuf, key: PathBuf },

    #[error(
        "in {dir}, what ca-cert.pem signs doesn't lead through cert-chain.pem to a valid root in \
         root-cert.pem ({source}): compare each certificate's issuer with the next one's subject, and dates and \
         path lengths", dir = dir.display()
    )]
    Chain { dir: PathBuf, source: webpki::Error },

    #[error("cannot make {what}: {source}")]
    Make { what: &'static str, source: rcgen::Error },

    #[error("the authority's certificate expired at {}; nothing can be signed until it is replaced", timestamp(*not_after))]
    Expired { not_after: SystemTime },

    #[error("the token file {path} is unusable: {fault}; it is a YAML map, node name to token", path = path.display())]
    Tokens { path: PathBuf, fault: InvalidTokens },

    #[error("the file of nodes' authorities {path} is unusable: {fault}", path = path.display())]
    NodeCa { path: PathBuf, fault: InvalidNodeCa },

    #[error("cannot {attempt} {what}: {reason}")]
    Api { attempt: &'static str, what: String, reason: String },

    #[error("cannot set up TLS for the authority's own address: {0}")]
    Tls(#[from] rustls::Error),

    #[error("{name:?} can stand in no certificate: give a DNS name or an IP address")]
    Name { name: String },

    #[error("the certificate service stopped: {0}")]
    Serve(#[from] tonic::transport::Error),
}
