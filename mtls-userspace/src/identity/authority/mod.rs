//! Certificate authorities, as an agent sees them: a signing request in, a chain and its roots out.

use std::time::Duration;

use rustls_pki_types::CertificateDer;

use super::{Csr, Error, SpiffeId};

mod remote;

pub use remote::{Credential, RemoteAuthority};

/// Signs certificates for the workloads of this node.
#[tonic::async_trait]
pub trait Authority: Send + Sync {
    /// One attempt. The caller repeats and limits the time; dropping the future ends the attempt.
    async fn sign(&self, id: &SpiffeId, csr: Csr, lifetime: Duration) -> Result<Issued, Error>;

    /// Completes when the roots to trust have changed, so that waiting for half life would be too long. Dropping the
    /// future loses nothing.
    async fn roots_changed(&self) {
        std::future::pending().await
    }
}

/// What an authority answers.
#[derive(Debug, Clone)]
pub struct Issued {
    /// Leaf first, then intermediates; no root.
    pub chain: Vec<CertificateDer<'static>>,
    /// The roots that vouch for peers, each once.
    pub roots: Vec<CertificateDer<'static>>,
}

/// Messages and service of `istio.v1.auth`, generated from `proto/ca.proto`.
#[allow(clippy::all, clippy::pedantic)]
pub mod wire {
    tonic::include_proto!("istio.v1.auth");

    /// Where a node agent writes the workload's SPIFFE ID in the request's metadata.
    pub const IMPERSONATED_IDENTITY: &str = "ImpersonatedIdentity";
}
