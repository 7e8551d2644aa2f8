//! What comes out of a tunnel: a peer that has proven who it is, policy, the application.

use std::future::Future;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;

use rustls::SupportedCipherSuite;
use tokio::net::TcpStream;

use super::{bulk, deliver, finish, reset, stopped_by_either};
use crate::addr::canonical;
use crate::drain::Working;
use crate::identity::SpiffeId;
use crate::mesh::{Mesh, Workload};
use crate::observe::{Connection, Direction, Flow, Party, Path, Refusal};
use crate::outcome;
use crate::policy::{Authorized, Peer, Request};
use crate::relay::{self, App, Laned, Relayed};
use crate::tunnel::{self, Asked, LaneRequest, ServerTunnel, SharedTunnel};
use crate::unplaced;
use crate::worker::{Pod, Worker};

/// A peer agent dialled an enrolled pod's tunnel port. One tunnel carries one connection after another.
#[expect(clippy::manual_async_fn, reason = "an async fn keeps its arguments twice")]
pub fn inbound(
    worker: Arc<Worker>,
    pod: Arc<Pod>,
    working: Working,
    peer: TcpStream,
) -> impl Future<Output = ()> + Send {
    async move {
        let Ok(from) = peer.peer_addr().map(canonical) else { return };
        let workload = pod.workload.load_full();
        let Some(identity) = worker.identities.current(&workload.identity) else {
            tracing::warn!(pod = pod.socket.name(), %from, "tunnel refused: no certificate for this pod yet");
            return reset(peer);
        };
        let accepted = Box::pin(worker.acceptor.accept(peer, &identity)).await;
        drop(identity);
        match accepted {
            Ok(tunnel) => serve(worker, pod, working, from, tunnel, None).await,
            Err(error) => {
                tracing::info!(pod = pod.socket.name(), %from, %error, "tunnel refused");
                worker.count_failure(Direction::Inbound, &error);
            }
        }
    }
}

/// One connection after the other out of a tunnel, and first one that was `moved` to it from a lane.
#[expect(clippy::manual_async_fn, reason = "as above")]
pub(super) fn serve(
    worker: Arc<Worker>,
    pod: Arc<Pod>,
    mut working: Working,
    from: SocketAddr,
    mut tunnel: ServerTunnel,
    moved: Option<Box<(TcpStream, Connection)>>,
) -> impl Future<Output = ()> + Send {
    async move {
        let resumed = tunnel.resumed();
        let mut admitted = moved.map(|moved| *moved);
        let mut stopping = false;
        loop {
            if let Some((app, open)) = admitted.take() {
                // Not `alone`, which every idle tunnel would pay for with 16 bytes.
                let stream = tunnel.stream();
                let peer = stream.proof();
                let relayed = {
                    worker.bulk.watch(open.progress());
                    let stopped = pin!(stopped_by_either(&open, &peer));
                    relay::tunnelled_while_light(&app, stream, open.progress(), stopped).await
                };
                let Relayed::Ended(report) = relayed else {
                    return bulk::inbound(worker, pod, working, from, tunnel, (app, open));
                };
                if !finish(open, report) {
                    return;
                }
            }
            let asked = tokio::select! {
                asked = tunnel.ask() => asked,
                // A client that does not know it yet may be about to use the tunnel.
                () = working.stopping(), if !stopping => {
                    stopping = true;
                    if tunnel.retire() {
                        continue;
                    }
                    return tunnel.close();
                }
            };
            match asked {
                Ok(Some(Asked::Open(open))) => {
                    worker.count_tunnel(Direction::Inbound, tunnel.used(), resumed);
                    let request = tunnel.request(open);
                    match Box::pin(accept_or_reject(&worker, &pod, from, request)).await {
                        Ok(accepted) => admitted = accepted,
                        // The tunnel can carry no other.
                        Err(_) => return,
                    }
                }
                Ok(Some(Asked::Share(id))) => {
                    worker.count_tunnel(Direction::Inbound, tunnel.used(), resumed);
                    if let Some(shared) = tunnel.share(id) {
                        Box::pin(serve_shared(&worker, &pod, working, from, shared)).await;
                    }
                    return;
                }
                Ok(Some(Asked::Adopt(place))) => {
                    if !tunnel.used() {
                        worker.count_tunnel(Direction::Inbound, false, resumed);
                    }
                    match Box::pin(tunnel.adopt(place)).await {
                        Ok(Some(refused)) => tunnel = refused,
                        Ok(None) => return,
                        Err(error) => {
                            tracing::info!(pod = pod.socket.name(), %from, %error, "tunnel ended");
                            return;
                        }
                    }
                }
                Ok(None) => return,
                Err(error) => {
                    tracing::info!(pod = pod.socket.name(), %from, %error, "tunnel ended");
                    if matches!(error, tunnel::Error::Protocol(_)) {
                        unplaced::broke_protocol(&worker, &pod, from, tunnel.peer(), tunnel.cipher());
                    }
                    return;
                }
            }
        }
    }
}

/// Every connection out of a shared tunnel, each a task of its own.
async fn serve_shared(
    worker: &Arc<Worker>,
    pod: &Arc<Pod>,
    mut working: Working,
    from: SocketAddr,
    mut shared: SharedTunnel,
) {
    let share = working.clone();
    let mut stopping = false;
    let mut reused = false;
    loop {
        let next = tokio::select! {
            next = shared.next() => next,
            () = working.stopping(), if !stopping => {
                stopping = true;
                shared.retire();
                continue;
            }
        };
        match next {
            Ok(Some(request)) => {
                if std::mem::replace(&mut reused, true) {
                    worker.count_tunnel(Direction::Inbound, true, false);
                }
                worker.observer.lane_opened(Direction::Inbound);
                tokio::spawn(inbound_lane(worker.clone(), pod.clone(), share.clone(), from, request));
            }
            Ok(None) => return,
            Err(error) => {
                tracing::info!(pod = pod.socket.name(), %from, %error, "shared tunnel ended");
                if matches!(error, tunnel::Error::Protocol(_)) {
                    unplaced::broke_protocol(worker, pod, from, shared.peer(), shared.cipher());
                }
                return;
            }
        }
    }
}

/// One connection on a lane of a shared tunnel.
#[expect(clippy::manual_async_fn, reason = "as above")]
fn inbound_lane(
    worker: Arc<Worker>,
    pod: Arc<Pod>,
    working: Working,
    from: SocketAddr,
    request: LaneRequest,
) -> impl Future<Output = ()> + Send {
    async move {
        let asking = Asking { open: &request.open, peer: request.lane.peer(), cipher: request.lane.cipher() };
        let (app, open) = match Box::pin(admit(&worker, &pod, from, asking)).await {
            Ok(admitted) => admitted,
            Err(rejection) => return request.reject(&rejection),
        };
        let lane = request.lane;
        lane.hold(working);
        let app = App::new(app, open.counts(), false);
        let laned = {
            let peer = lane.proof();
            let stopped = pin!(stopped_by_either(&open, &peer));
            relay::laned(&app, &lane, || None, stopped).await
        };
        match laned {
            Laned::Ended(report) => {
                finish(open, report);
            }
            Laned::Moved(stream) => {
                worker.observer.lane_left(Direction::Inbound);
                let Some(working) = lane.let_go() else { return };
                drop(lane);
                let Some(app) = app.into_socket() else { return };
                let mut tunnel = worker.acceptor.resume(stream, &pod.workload.load().identity);
                tunnel.used();
                Box::pin(serve(worker, pod, working, from, tunnel, Some(Box::new((app, open))))).await;
            }
        }
    }
}

/// What a peer asks for, and who it has proven to be.
struct Asking<'a> {
    open: &'a tunnel::Open,
    peer: &'a SpiffeId,
    cipher: SupportedCipherSuite,
}

/// One connection out of a tunnel: authorize and deliver. An error is what the client is told.
async fn admit(
    worker: &Worker,
    pod: &Pod,
    from: SocketAddr,
    asking: Asking<'_>,
) -> Result<(TcpStream, Connection), tunnel::Rejection> {
    let workload = pod.workload.load_full();
    let (source, address) = (asking.open.source, asking.open.destination);
    let claimed = worker.mesh.current().workload(source.ip()).cloned();
    let flow = Flow {
        direction: Direction::Inbound,
        path: Path::Tunnel,
        source: Party { workload: claimed, identity: Some(asking.peer.clone()) },
        destination: Party { identity: Some(workload.identity.clone()), workload: Some(workload.clone()) },
        original_dst: None,
        address,
        original_src: source,
        service: None,
        cipher: asking.cipher.suite().as_str(),
    };
    let judged = judge(&worker.mesh.current(), &flow, &workload, from);
    let delivered = match judged {
        Ok(permit) => {
            deliver(worker, pod, address, source, permit).await.map_err(|e| outcome::unreachable(&e))
        }
        Err(refusal) => Err(refusal),
    };
    match delivered {
        Ok(app) => Ok((app, worker.observer.open(flow))),
        Err(refusal) => {
            let rejection = outcome::rejection(&refusal);
            worker.observer.refused(flow, refusal);
            Err(rejection)
        }
    }
}

/// As [`admit`], and the client is told.
async fn accept_or_reject(
    worker: &Worker,
    pod: &Pod,
    from: SocketAddr,
    request: tunnel::Request<'_>,
) -> Result<Option<(TcpStream, Connection)>, tunnel::Error> {
    let asking = Asking { open: request.open(), peer: request.peer(), cipher: request.cipher() };
    match admit(worker, pod, from, asking).await {
        Ok(admitted) => {
            request.accept();
            Ok(Some(admitted))
        }
        Err(rejection) => request.reject(&rejection).await.map(|()| None),
    }
}

/// Whether a peer whose identity is proven may have what it asks for.
fn judge(mesh: &Mesh, flow: &Flow, workload: &Workload, from: SocketAddr) -> Result<Authorized, Refusal> {
    let (Some(peer), source) = (&flow.source.identity, flow.original_src) else {
        return Err(Refusal::NoCertificate);
    };
    if !workload.addresses.contains(&flow.address.ip()) {
        return Err(Refusal::WrongPod);
    }
    // The identity is proven, the address only claimed: it must be the tunnel's own or one of that identity's pods.
    let claimed = flow.source.workload.as_ref().is_some_and(|workload| workload.identity == *peer);
    if source.ip() != from.ip() && !claimed {
        return Err(Refusal::ForgedSource);
    }
    let request = Request {
        destination: workload,
        address: flow.address,
        source_ip: source.ip(),
        peer: Peer::Verified(peer),
    };
    mesh.policies.authorize(&request).map_err(Refusal::Denied)
}

#[cfg(test)]
pub(super) fn size_of_lane() -> usize {
    fn size_of_future<F>(_: impl Fn(Arc<Worker>, Arc<Pod>, Working, SocketAddr, LaneRequest) -> F) -> usize {
        size_of::<F>()
    }
    size_of_future(inbound_lane)
}
