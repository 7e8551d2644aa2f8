//! The signing requests of a Kubernetes API server (`certificates.k8s.io`): a request is put there, and whoever signs
//! for the name it carries puts the certificate there.
//!
//! For those who must have one place where every certificate of a cluster is approved. What the signer checks is the
//! signer's: the API server tells it which ServiceAccount asked, not on which node the identity's pods run.

use std::path::PathBuf;
use std::time::Duration;

use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestSpec};
use kube::api::{Api, DeleteParams, ObjectMeta, PostParams};
use rustls_pki_types::CertificateDer;
use tokio::sync::mpsc;

use super::root_file::RootFile;
use super::{Authority, Issued, News, take_apart};
use crate::identity::{Csr, Error, SpiffeId};
use crate::kubernetes::{Cluster, chain};

/// Between looks at a request that nobody has answered yet.
const GLANCE: Duration = Duration::from_millis(500);
/// The API server refuses shorter ones.
const SHORTEST: Duration = Duration::from_secs(600);
const PREFIX: &str = "mtls-";

pub struct Signer {
    api: Api<CertificateSigningRequest>,
    name: String,
    roots: RootFile,
}

impl Signer {
    /// How long a request may wait for somebody who approves it.
    pub const PATIENCE: Duration = Duration::from_secs(120);

    /// `name` is the `signerName` of requests; what it signs must lead to a root in `root_file` (PEM).
    pub fn new(cluster: &Cluster, name: String, root_file: PathBuf) -> Self {
        Self { api: Api::all(cluster.client.clone()), name, roots: RootFile::new(root_file) }
    }

    async fn ask(&self, id: &SpiffeId, csr: &Csr, lifetime: Duration) -> Result<Asked, Error> {
        let seconds = i32::try_from(lifetime.max(SHORTEST).as_secs()).unwrap_or(i32::MAX);
        let usages = ["digital signature", "client auth", "server auth"];
        let object = CertificateSigningRequest {
            metadata: ObjectMeta { generate_name: Some(PREFIX.into()), ..ObjectMeta::default() },
            spec: CertificateSigningRequestSpec {
                request: ByteString(csr.pem().into()),
                signer_name: self.name.clone(),
                usages: Some(usages.map(str::to_owned).into()),
                expiration_seconds: Some(seconds),
                ..CertificateSigningRequestSpec::default()
            },
            status: None,
        };
        let made = self.api.create(&PostParams::default(), &object).await;
        let made = made.map_err(|error| self.failed("make", id, &error))?;
        Ok(Asked { api: self.api.clone(), name: made.metadata.name.unwrap_or_default() })
    }

    async fn answer(
        &self,
        id: &SpiffeId,
        asked: &Asked,
        roots: Vec<CertificateDer<'static>>,
    ) -> Result<Issued, Error> {
        loop {
            let now = self.api.get(&asked.name).await.map_err(|error| self.failed("read", id, &error))?;
            let status = now.status.unwrap_or_default();
            let against =
                status.conditions.iter().flatten().find(|it| matches!(&*it.type_, "Denied" | "Failed"));
            if let Some(against) = against {
                return Err(Error::NotSigned {
                    signer: self.name.clone(),
                    id: id.clone(),
                    condition: against.type_.clone(),
                    message: against.message.clone().unwrap_or_default(),
                });
            }
            if let Some(ByteString(pem)) = status.certificate.filter(|pem| !pem.0.is_empty()) {
                return take_apart([pem.as_slice()], roots)
                    .map_err(|source| Error::Answer { id: id.clone(), source });
            }
            tokio::time::sleep(GLANCE).await;
        }
    }

    fn failed(&self, attempt: &'static str, id: &SpiffeId, error: &kube::Error) -> Error {
        let reason = match error {
            kube::Error::Api(status) => format!("{} ({})", status.message, status.code),
            error => chain(error),
        };
        Error::SigningRequest { attempt, signer: self.name.clone(), id: id.clone(), reason }
    }
}

#[tonic::async_trait]
impl Authority for Signer {
    async fn sign(&self, id: &SpiffeId, csr: Csr, lifetime: Duration) -> Result<Issued, Error> {
        let roots = self.roots.read().await?;
        let asked = self.ask(id, &csr, lifetime).await?;
        self.answer(id, &asked, roots).await
    }

    async fn follow(&self, news: &mpsc::Sender<News>) {
        self.roots.follow(news).await;
    }
}

/// A request that is there. It goes when this is dropped: answered, given up or timed out, nobody needs it any more.
struct Asked {
    api: Api<CertificateSigningRequest>,
    name: String,
}

impl Drop for Asked {
    fn drop(&mut self) {
        let (api, name) = (self.api.clone(), std::mem::take(&mut self.name));
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                if let Err(error) = api.delete(&name, &DeleteParams::default()).await {
                    // The API server removes it by itself within the hour.
                    tracing::debug!(%error, name, "signing request left behind");
                }
            });
        }
    }
}
