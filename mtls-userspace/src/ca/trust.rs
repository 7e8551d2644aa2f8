//! Whom to trust, and whom no longer: told to every agent that proves who it is, at once and at each change.

use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::server::until;
use super::{CertificateAuthority, Service};
use crate::identity::trust_wire::trust_service_server::TrustService;
use crate::identity::trust_wire::{Trust, WatchRequest};

/// `mtls.v1.TrustService`.
pub(super) struct Announcer {
    pub service: Service,
    /// Agents that follow would keep a stopping server waiting.
    pub stopped: watch::Receiver<bool>,
}

#[tonic::async_trait]
impl TrustService for Announcer {
    type WatchStream = ReceiverStream<Result<Trust, Status>>;

    async fn watch(&self, request: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let (caller, peer) = self.service.identify(&request).await?;
        tracing::debug!(?peer, node = %caller.node, "an agent follows roots and revocation lists");
        let (messages, stream) = mpsc::channel(1);
        // Before the first look, so that no change falls between.
        let changes = self.service.authority.subscribe();
        let (authority, stopped) = (self.service.authority.clone(), self.stopped.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = tell(messages, changes, || message(&authority.current())) => {}
                () = until(stopped) => {}
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

/// Until the agent or the authority goes away.
async fn tell(
    messages: mpsc::Sender<Result<Trust, Status>>,
    mut changes: watch::Receiver<u64>,
    message: impl Fn() -> Trust,
) {
    loop {
        changes.mark_unchanged();
        if messages.send(Ok(message())).await.is_err() {
            return;
        }
        tokio::select! {
            () = messages.closed() => return,
            changed = changes.changed() => if changed.is_err() { return },
        }
    }
}

fn message(authority: &CertificateAuthority) -> Trust {
    Trust { roots: authority.root_bundle(), revocations: authority.revocations().to_pem() }
}
