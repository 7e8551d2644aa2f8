//! Certificate authorities, as an agent sees them: a signing request in, a chain and its roots out.

use std::sync::Arc;
use std::time::Duration;

use rustls_pki_types::CertificateDer;
use tokio::sync::mpsc;

use super::{Certificate, Csr, Error, InvalidCertificate, Revocations, SpiffeId, pem_certificates};

mod remote;
mod root_file;
mod signer;
mod trust;

pub use remote::{Credential, RemoteAuthority};
pub use signer::Signer;

/// Signs certificates for the workloads of this node.
#[tonic::async_trait]
pub trait Authority: Send + Sync {
    /// One attempt. The caller repeats and limits the time; dropping the future ends the attempt.
    async fn sign(&self, id: &SpiffeId, csr: Csr, lifetime: Duration) -> Result<Issued, Error>;

    /// Tells what changes in what is trusted, for as long as it is polled; never completes.
    async fn follow(&self, _news: &mpsc::Sender<News>) {
        std::future::pending().await
    }
}

/// What changed where identities come from.
#[derive(Debug)]
pub enum News {
    /// What was obtained is no longer what would be obtained now: waiting for half life would be too long.
    Renew { why: &'static str },
    /// These revocation lists count from now on, and no others of the same origin.
    Revocations(Arc<Revocations>),
}

/// What an authority answers.
#[derive(Debug, Clone)]
pub struct Issued {
    /// Leaf first, then intermediates; no root.
    pub chain: Vec<CertificateDer<'static>>,
    /// The roots that vouch for peers, each once.
    pub roots: Vec<CertificateDer<'static>>,
}

/// Messages and service of `mtls.v1`, generated from `proto/trust.proto`.
#[allow(clippy::all, clippy::pedantic)]
pub mod trust_wire {
    tonic::include_proto!("mtls.v1");
}

/// Messages and service of `istio.v1.auth`, generated from `proto/ca.proto`.
#[allow(clippy::all, clippy::pedantic)]
pub mod wire {
    tonic::include_proto!("istio.v1.auth");

    /// Where a node agent writes the workload's SPIFFE ID in the request's metadata.
    pub const IMPERSONATED_IDENTITY: &str = "ImpersonatedIdentity";
}

/// Istio's order is leaf, intermediates, roots. Self-issued certificates are the roots; `trusted` joins them.
fn take_apart<'a>(
    answer: impl IntoIterator<Item = &'a [u8]>,
    trusted: Vec<CertificateDer<'static>>,
) -> Result<Issued, InvalidCertificate> {
    let mut issued = Issued { chain: Vec::new(), roots: Vec::new() };
    let mut received = Vec::new();
    for pem in answer {
        received.extend(pem_certificates(pem)?);
    }
    for certificate in received {
        let root = Certificate::parse(&certificate)?.self_issued;
        let list = if root { &mut issued.roots } else { &mut issued.chain };
        if !list.contains(&certificate) {
            list.push(certificate);
        }
    }
    for root in trusted {
        if !issued.roots.contains(&root) {
            issued.roots.push(root);
        }
    }
    Ok(issued)
}
