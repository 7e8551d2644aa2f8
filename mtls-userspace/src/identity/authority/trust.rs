//! What the authority says of trust: its roots and revocation lists, as they change.
//!
//! `mtls ca` serves this beside the certificates, to the same callers over the same TLS. Another authority doesn't;
//! roots then come with each certificate, and revocation lists from a file. What can't be read, or comes from nobody,
//! changes nothing.

use std::sync::Arc;
use std::time::Duration;

use rustls_pki_types::CertificateDer;
use tokio::sync::mpsc;

use super::trust_wire::{Trust, WatchRequest, trust_service_client::TrustServiceClient};
use super::{News, RemoteAuthority};
use crate::identity::{InvalidCertificate, InvalidRevocations, Revocations, pem_certificates};

const RETRY_MIN: Duration = Duration::from_millis(500);
const RETRY_MAX: Duration = Duration::from_secs(15);
/// Before an authority that does not serve this is asked again: it may have become one that does.
const NOT_SERVED: Duration = Duration::from_secs(600);
const CONNECT: Duration = Duration::from_secs(10);
/// A list of 100 000 revoked certificates has some 4 MiB, and a third more as PEM.
const MAX_MESSAGE: usize = 64 << 20;

/// Watches until dropped.
pub(super) async fn follow(authority: &RemoteAuthority, news: &mpsc::Sender<News>) {
    let mut watch = Watch { authority, news, roots: None, revocations: Arc::default() };
    let mut pause = RETRY_MIN;
    let mut complained = None;
    loop {
        pause = match watch.once().await {
            Ok(()) => {
                complained = None;
                RETRY_MIN
            }
            Err(Fault::Call(status)) if status.code() == tonic::Code::Unimplemented => {
                tracing::debug!(address = authority.address, "the authority tells of no revocation lists");
                NOT_SERVED
            }
            Err(fault) => {
                let fault = fault.to_string();
                // Its absence is told by every renewal that fails; here once is enough.
                if complained.as_ref() != Some(&fault) {
                    tracing::warn!(
                        address = authority.address,
                        fault,
                        "no news of roots and revocation lists; the last stay in force"
                    );
                    complained = Some(fault);
                }
                (pause * 2).min(RETRY_MAX)
            }
        };
        tokio::time::sleep(pause.mul_f64(rand::random_range(0.5..=1.0))).await;
    }
}

struct Watch<'a> {
    authority: &'a RemoteAuthority,
    news: &'a mpsc::Sender<News>,
    /// As last told; nothing before the first message, which is no change.
    roots: Option<Vec<CertificateDer<'static>>>,
    revocations: Arc<Revocations>,
}

#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error(transparent)]
    Identity(#[from] crate::identity::Error),
    #[error("no connection within {} s", CONNECT.as_secs())]
    TimedOut,
    #[error("{}", .0.message())]
    Call(#[from] tonic::Status),
    #[error("its roots are unusable: {0}")]
    Roots(#[from] InvalidCertificate),
    #[error("its revocation lists are unusable: {0}")]
    Revocations(#[from] InvalidRevocations),
}

impl Watch<'_> {
    /// One connection's time.
    async fn once(&mut self) -> Result<(), Fault> {
        let RemoteAuthority { credential, .. } = self.authority;
        let open = async {
            let channel = self.authority.connect(&self.authority.roots().await?).await?;
            let mut client = TrustServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE);
            Ok::<_, Fault>(client.watch(credential.send(WatchRequest {}).await?).await?.into_inner())
        };
        let mut messages = tokio::time::timeout(CONNECT, open).await.map_err(|_| Fault::TimedOut)??;
        while let Some(trust) = messages.message().await? {
            self.heed(&trust).await?;
        }
        Ok(())
    }

    async fn heed(&mut self, trust: &Trust) -> Result<(), Fault> {
        let roots = pem_certificates(trust.roots.as_bytes())?;
        let revocations = match trust.revocations.as_str() {
            "" => Revocations::default(),
            pem => Revocations::from_pem(pem.as_bytes(), &roots)?,
        };
        if revocations != *self.revocations {
            self.revocations = Arc::new(revocations);
            // Fails only when nobody polls this any more; so below.
            let _ = self.news.send(News::Revocations(self.revocations.clone())).await;
        }
        let before = self.roots.replace(roots);
        if before.is_some() && before != self.roots {
            let _ = self.news.send(News::Renew { why: "the authority's roots have changed" }).await;
        }
        Ok(())
    }
}
