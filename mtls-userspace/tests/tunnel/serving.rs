//! The server agent's half of every connection: what it does with its tunnels.

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;

use mtls::identity::SpiffeId;
use mtls::relay::{App, End, Laned, Progress, Relayed, Report, laned, prepare, tunnelled_while_light};
use mtls::tunnel::{Acceptor, Asked, Lane, Peer, RejectReason, Rejection, ServerTunnel, SharedTunnel};
use tokio::net::TcpStream;
use tokio::sync::{Notify, mpsc};

use crate::wandering::Wandering;
use crate::world::{DENIED_PORT, dial};

async fn dial_application(to: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = dial()?;
    prepare(&socket)?;
    tokio::net::TcpSocket::from_std_stream(socket.into()).connect(to).await
}

/// What the server agent does with its tunnels.
#[derive(Clone)]
pub struct Serving {
    pub acceptor: Acceptor,
    pub id: SpiffeId,
    pub reports: mpsc::UnboundedSender<Report>,
    pub revoked: Arc<Notify>,
    pub drained: Arc<Notify>,
    pub wandering: Arc<Wandering>,
}

impl Serving {
    /// The application behind a request, or why there is none.
    async fn admit(&self, destination: SocketAddr) -> Result<TcpStream, Rejection> {
        if destination.port() == DENIED_PORT {
            return Err(Rejection::new(RejectReason::Denied, "shop/only-front"));
        }
        let refused = |_| Rejection::new(RejectReason::ConnectionRefused, "port closed");
        dial_application(destination).await.map_err(refused)
    }

    pub async fn tunnel(self, mut tunnel: ServerTunnel, moved: Option<(Arc<App>, Arc<Progress>)>) {
        let mut admitted = moved;
        let mut draining = false;
        loop {
            if let Some((app, progress)) = admitted.take() {
                let peer = tunnel.stream().proof();
                let mut stop = pin!(self.stop(&peer));
                let driven = self.wandering.drive(&progress);
                let report = loop {
                    match tunnelled_while_light(&app.socket, tunnel.stream(), &progress, &mut stop).await {
                        Relayed::Ended(report) => break report,
                        Relayed::Bulk => {
                            self.wandering.departs(1);
                            tunnel = tunnel.depart().unwrap()().unwrap();
                        }
                    }
                };
                drop((app, driven));
                let clean = matches!(report.end, End::Clean);
                let _ = self.reports.send(report);
                if !clean {
                    return;
                }
            }
            let asked = tokio::select! {
                asked = tunnel.ask() => asked,
                () = self.drained.notified(), if !draining => {
                    draining = true;
                    if tunnel.retire() {
                        continue;
                    }
                    return tunnel.close();
                }
            };
            match asked {
                Ok(Some(Asked::Open(open))) => {
                    let request = tunnel.request(open);
                    match self.admit(request.open().destination).await {
                        Ok(app) => {
                            request.accept();
                            let progress = Arc::new(Progress::default());
                            admitted = Some((App::new(app, progress.clone(), false), progress));
                        }
                        Err(rejection) => request.reject(&rejection).await.unwrap(),
                    }
                }
                Ok(Some(Asked::Share(id))) => {
                    return self.shared(tunnel.share(id).unwrap()).await;
                }
                Ok(Some(Asked::Adopt(place))) => match tunnel.adopt(place).await {
                    Ok(Some(refused)) => tunnel = refused,
                    _ => return,
                },
                _ => return,
            }
        }
    }

    async fn shared(self, mut shared: SharedTunnel) {
        let mut draining = false;
        loop {
            let request = tokio::select! {
                request = shared.next() => request,
                () = self.drained.notified(), if !draining => {
                    draining = true;
                    shared.retire();
                    continue;
                }
            };
            let Ok(Some(request)) = request else { return };
            let serving = self.clone();
            tokio::spawn(async move {
                match serving.admit(request.open.destination).await {
                    Ok(app) => serving.lane(app, request.lane).await,
                    Err(rejection) => request.reject(&rejection),
                }
            });
        }
    }

    #[expect(clippy::manual_async_fn, reason = "it ends in what began it, which must be known to be Send")]
    fn lane(self, app: TcpStream, lane: Lane) -> impl Future<Output = ()> + Send {
        async move {
            let progress = Arc::new(Progress::default());
            let app = App::new(app, progress.clone(), false);
            let peer = lane.proof();
            let laned = laned(&app, &lane, || None, pin!(self.stop(&peer))).await;
            drop(lane);
            match laned {
                Laned::Ended(report) => {
                    drop(app);
                    let _ = self.reports.send(report);
                }
                Laned::Moved(stream) => {
                    let tunnel = self.acceptor.resume(stream, &self.id);
                    Box::pin(self.tunnel(tunnel, Some((app, progress)))).await;
                }
            }
        }
    }

    async fn stop(&self, peer: &Peer) {
        tokio::select! {
            () = self.revoked.notified() => {}
            _ = peer.until_distrusted() => {}
        }
    }
}
