//! Callers: what somebody shows of itself in, the node that it speaks for out. Says nothing of what that node may ask
//! for.
//!
//! | proof | for | revoked by |
//! |---|---|---|
//! | [`JoinTokens`] | machines outside a cluster | removing the node from the file |
//! | [`NodeCertificates`] | machines that have a certificate already, as every kubelet does | another node CA: revocation lists are not read here |
//! | [`ServiceAccounts`] | agents that run as pods | deleting the pod |

use std::sync::Arc;

use rustls_pki_types::CertificateDer;

mod followed;
mod join_tokens;
mod node_certificates;
mod service_accounts;

pub use join_tokens::{InvalidTokens, JoinTokens};
pub use node_certificates::{InvalidNodeCa, NodeCertificates};
pub use service_accounts::{ReviewFailed, ServiceAccount, ServiceAccounts, TokenReviews};

/// Who is calling, proven.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    pub node: Arc<str>,
}

/// What a caller showed. Nothing of it is believed yet.
#[derive(Clone, Copy, Default)]
pub struct Proof<'a> {
    /// From `authorization: Bearer …`.
    pub token: Option<&'a str>,
    /// From the TLS handshake, leaf first; the caller has the leaf's key, nothing else was checked.
    pub certificates: &'a [CertificateDer<'static>],
}

impl Proof<'_> {
    pub fn is_empty(&self) -> bool {
        self.token.is_none() && self.certificates.is_empty()
    }
}

/// Knows callers by one kind of proof.
#[tonic::async_trait]
pub trait Callers: Send + Sync {
    async fn identify(&self, proof: &Proof<'_>) -> Result<Caller, Unidentified>;
}

/// Why a caller is not known. What comes later says more: it is what a caller with several proofs is told.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Unidentified {
    /// It showed nothing of this kind.
    #[error("no proof of who calls that this certificate authority takes")]
    Absent,
    #[error("the token is not one of this certificate authority's")]
    Unknown,
    /// Of this kind, but not good.
    #[error("{reason}")]
    Refused { reason: String },
    /// Worth a retry: whoever knows the callers can't be asked now.
    #[error("callers cannot be checked now: {reason}")]
    Unavailable { reason: String },
}

/// Several kinds of proof: the first that holds says who calls.
pub struct AnyOf(pub Vec<Box<dyn Callers>>);

#[tonic::async_trait]
impl Callers for AnyOf {
    async fn identify(&self, proof: &Proof<'_>) -> Result<Caller, Unidentified> {
        let mut refusal = Unidentified::Absent;
        for kind in &self.0 {
            match kind.identify(proof).await {
                Ok(caller) => return Ok(caller),
                Err(why) => refusal = refusal.max(why),
            }
        }
        Err(refusal)
    }
}
