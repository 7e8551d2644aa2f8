//! One connection, top to bottom. The file to read first.
//!
//! ```text
//! outbound:   capture ─► mesh (who is the destination) ─► tunnel ─► relay
//! inbound:    capture ─► tunnel (who is calling) ─► policy ─► relay
//! plaintext:  capture ─► policy ─► relay
//! ```
//!
//! What comes out of a tunnel is in `inbound`, what becomes of connections that move much in `bulk`. Each `pub` function
//! here is a task on one data worker. An error anywhere ends the connection with a reset to the application and one line in
//! the access log; no path falls back to plaintext.

use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::net::TcpStream;

use crate::addr::{OriginalDst, OriginalSrc, canonical};
use crate::capture;
use crate::drain::Working;
use crate::identity::{Identity, SpiffeId};
use crate::mesh::{Destination, Workload};
use crate::observe::{Connection, Direction, Flow, Party, Path, Refusal};
use crate::outcome;
use crate::plaintext::Seen;
use crate::policy::{Authorized, Peer, Request};
use crate::relay::{self, App, End, Growing, Laned, Relayed, Report, Unwritten};
use crate::tunnel::{self, Carried, Lane};
use crate::unplaced;
use crate::worker::{Pod, Worker};

mod bulk;
mod inbound;

pub use inbound::inbound;

/// A TCP handshake with an application or a peer agent that takes longer has failed.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// An enrolled application dialled something in the mesh.
#[expect(
    clippy::manual_async_fn,
    reason = "an async fn keeps its arguments twice: 80 bytes of every idle connection"
)]
pub fn outbound(
    worker: Arc<Worker>,
    pod: Arc<Pod>,
    working: Working,
    app: TcpStream,
) -> impl Future<Output = ()> + Send {
    async move {
        // Boxed, here and below: what it takes to open a connection is not kept while the connection lives.
        let Some(Opened { open, far }) = Box::pin(open_outbound(&worker, &pod, &app)).await else {
            return reset(app);
        };
        match far {
            Far::Plain(far) => plain(&worker, working, app, far, open).await,
            Far::Tunnel(Carried::Alone(mut stream)) => match alone(&worker, &app, &mut stream, &open).await {
                Relayed::Ended(report) => _ = finish(open, report),
                Relayed::Bulk => bulk::outbound(&worker, working, app, stream, open),
            },
            // A task of its own is half as large as this one.
            Far::Tunnel(Carried::Shared(lane)) => {
                worker.observer.lane_opened(Direction::Outbound);
                tokio::spawn(outbound_lane(worker, pod, working, app, lane, open));
            }
        }
    }
}

/// An outbound connection on a lane of a shared tunnel.
#[expect(clippy::manual_async_fn, reason = "as above")]
fn outbound_lane(
    worker: Arc<Worker>,
    pod: Arc<Pod>,
    working: Working,
    app: TcpStream,
    lane: Lane,
    open: Connection,
) -> impl Future<Output = ()> + Send {
    async move {
        lane.hold(working);
        let app = App::new(app, open.counts(), true);
        let laned = {
            let peer = lane.proof();
            let stopped = pin!(stopped_by_either(&open, &peer));
            let grow = || Some(Box::pin(grow(&worker, &pod, &open, lane.place())) as Growing<'_>);
            relay::laned(&app, &lane, grow, stopped).await
        };
        match laned {
            Laned::Ended(report) => {
                finish(open, report);
            }
            Laned::Moved(mut stream) => {
                worker.observer.lane_left(Direction::Outbound);
                let working = lane.let_go();
                drop(lane);
                let (Some(app), Some(working)) = (app.into_socket(), working) else { return };
                match Box::pin(alone(&worker, &app, &mut stream, &open)).await {
                    Relayed::Ended(report) => _ = finish(open, report),
                    Relayed::Bulk => bulk::outbound(&worker, working, app, stream, open),
                }
            }
        }
    }
}

/// Relays over a tunnel that no other connection uses.
fn alone<'a>(
    worker: &'a Worker,
    app: &'a TcpStream,
    stream: &'a mut tunnel::Stream,
    open: &'a Connection,
) -> impl Future<Output = Relayed> + Send + 'a {
    worker.bulk.watch(open.progress());
    async move {
        let peer = stream.proof();
        let stopped = pin!(stopped_by_either(open, &peer));
        relay::tunnelled_while_light(app, stream, open.progress(), stopped).await
    }
}

/// Relays between two plain sockets.
async fn plain(worker: &Worker, working: Working, a: TcpStream, b: TcpStream, open: Connection) {
    worker.bulk.watch(open.progress());
    let mut unwritten = Unwritten::default();
    let relayed = {
        let stopping = pin!(stopped(&open));
        relay::plain_while_light(&a, &b, &mut unwritten, open.progress(), stopping).await
    };
    match relayed {
        Relayed::Ended(report) => _ = finish(open, report),
        Relayed::Bulk => bulk::plain(worker, working, (a, b), unwritten, open),
    }
}

/// A tunnel of its own for a connection that needs more than its lane.
async fn grow(
    worker: &Worker,
    pod: &Pod,
    open: &Connection,
    place: tunnel::Place,
) -> Result<tunnel::Stream, tunnel::Error> {
    let Flow { source, destination, address, .. } = open.flow();
    let identity = source.identity.as_ref().and_then(|id| worker.identities.current(id));
    let (Some(identity), Some(expected)) = (identity, &destination.identity) else {
        return Err(tunnel::Error::NotAdopted("there is no certificate for it now".into()));
    };
    let target = target(pod, &identity, expected, *address);
    let adopted = worker.connector.adopt(target, place, || pod.socket.socket(target.address)).await;
    match &adopted {
        Ok(stream) if stream.reused() => {}
        Ok(stream) => worker.count_tunnel(Direction::Outbound, false, stream.resumed()),
        Err(error) => worker.count_failure(Direction::Outbound, error),
    }
    adopted
}

fn target<'a>(
    pod: &Pod,
    identity: &'a Arc<Identity>,
    expected: &'a SpiffeId,
    address: SocketAddr,
) -> tunnel::Target<'a> {
    tunnel::Target {
        identity,
        expected,
        netns: pod.socket.netns_cookie(),
        address: SocketAddr::new(address.ip(), capture::TUNNEL_PORT),
    }
}

/// A connection that may carry bytes, and where they go.
struct Opened {
    open: Connection,
    far: Far,
}

enum Far {
    Plain(TcpStream),
    Tunnel(Carried),
}

/// From a captured socket to the far side; `None` once the refusal is recorded.
async fn open_outbound(worker: &Worker, pod: &Arc<Pod>, app: &TcpStream) -> Option<Opened> {
    let captured = match Captured::identify(pod, app) {
        Ok(captured) => captured,
        Err(error) => {
            tracing::debug!(pod = pod.socket.name(), %error, "not a captured connection");
            unplaced::not_captured(worker, pod, app);
            return None;
        }
    };
    // A snapshot is never held while a connection lives: a long one would keep an old mesh in memory.
    let destination = worker.mesh.current().resolve(captured.destination, &worker.node);
    match destination {
        Destination::Nowhere { service } => {
            let flow = captured.flow(
                Path::Passthrough,
                Party::default(),
                captured.destination.addr(),
                Some(service),
            );
            refuse(worker, flow, Refusal::NoEndpoint)
        }
        Destination::Plain { workload, address, service } => {
            let destination = Party { workload, identity: None };
            let flow = captured.flow(Path::Passthrough, destination, address, service);
            pass_through(worker, pod, flow).await
        }
        Destination::Workload { workload, address, service } => match worker.neighbour(&workload) {
            Some(neighbour) => same_node(worker, pod, captured, neighbour, address, service).await,
            None => through_tunnel(worker, pod, captured, workload, address, service).await,
        },
    }
}

/// The destination is not ours to protect: plain TCP from the pod's own namespace, counted as such.
async fn pass_through(worker: &Worker, pod: &Pod, flow: Flow) -> Option<Opened> {
    match dial(pod, flow.address).await {
        Ok(far) => Some(Opened { open: worker.observer.open(flow), far: Far::Plain(far) }),
        Err(error) => refuse(worker, flow, outcome::unreachable(&error)),
    }
}

/// Both ends live on this node: the kernel says who is calling, policy judges as it would for a tunnel, and the
/// bytes go from loopback to loopback.
async fn same_node(
    worker: &Worker,
    pod: &Arc<Pod>,
    captured: Captured,
    neighbour: Arc<Pod>,
    address: SocketAddr,
    service: Option<Arc<str>>,
) -> Option<Opened> {
    let workload = neighbour.workload.load_full();
    let destination = Party { identity: Some(workload.identity.clone()), workload: Some(workload.clone()) };
    let flow = captured.flow(Path::SameNode, destination, address, service);
    let request = Request {
        destination: &workload,
        address,
        source_ip: captured.source.ip(),
        peer: Peer::Verified(&captured.workload.identity),
    };
    let judged = worker.mesh.current().policies.authorize(&request);
    let permit = match judged {
        Ok(permit) => permit,
        Err(denied) => return refuse(worker, flow, Refusal::Denied(denied)),
    };
    worker.direct.offer(pod, captured.destination, address);
    match deliver(worker, &neighbour, address, captured.source, permit).await {
        Ok(far) => Some(Opened { open: worker.observer.open(flow), far: Far::Plain(far) }),
        Err(error) => refuse(worker, flow, outcome::unreachable(&error)),
    }
}

/// The destination lives elsewhere: mutual TLS to the agent there, from this pod's own namespace and address.
async fn through_tunnel(
    worker: &Worker,
    pod: &Pod,
    captured: Captured,
    workload: Arc<Workload>,
    address: SocketAddr,
    service: Option<Arc<str>>,
) -> Option<Opened> {
    let expected = workload.identity.clone();
    let destination = Party { workload: Some(workload), identity: Some(expected.clone()) };
    let mut flow = captured.flow(Path::Tunnel, destination, address, service);
    let Some(identity) = worker.identities.current(&captured.workload.identity) else {
        return refuse(worker, flow, Refusal::NoCertificate);
    };
    let target = target(pod, &identity, &expected, address);
    let open = tunnel::Open::new(address, captured.source);
    match worker.connector.carry(target, open, || pod.socket.socket(target.address)).await {
        Ok(carried) => {
            flow.cipher = carried.cipher().suite().as_str();
            worker.count_tunnel(Direction::Outbound, carried.reused(), carried.resumed());
            Some(Opened { open: worker.observer.open(flow), far: Far::Tunnel(carried) })
        }
        Err(error) => {
            worker.count_failure(Direction::Outbound, &error);
            tracing::info!(pod = pod.socket.name(), %address, %error, "no tunnel");
            refuse(worker, flow, outcome::no_tunnel(&error))
        }
    }
}

/// Plaintext from outside the mesh that policy must judge before the application sees it.
pub async fn plaintext(worker: Arc<Worker>, pod: Arc<Pod>, working: Working, client: TcpStream) {
    let Some((open, app)) = Box::pin(open_plaintext(&worker, &pod, &client)).await else {
        return reset(client);
    };
    plain(&worker, working, client, app, open).await;
}

async fn open_plaintext(worker: &Worker, pod: &Pod, client: &TcpStream) -> Option<(Connection, TcpStream)> {
    let from = client.peer_addr().map(canonical).ok()?;
    let to = client.local_addr().map(canonical).ok()?;
    let workload = pod.workload.load_full();
    let client_pod = worker.mesh.current().workload(from.ip()).cloned();
    let flow = Flow {
        direction: Direction::Inbound,
        path: Path::Plaintext,
        source: Party { workload: client_pod, identity: None },
        destination: Party { identity: Some(workload.identity.clone()), workload: Some(workload.clone()) },
        original_dst: None,
        address: to,
        original_src: OriginalSrc::new(from),
        service: None,
        cipher: None,
    };
    let request =
        Request { destination: &workload, address: to, source_ip: from.ip(), peer: Peer::Plaintext };
    let judged = worker.mesh.current().policies.authorize(&request);
    let permit = match judged {
        Ok(permit) => permit,
        Err(denied) => return refuse(worker, flow, Refusal::Denied(denied)),
    };
    match deliver(worker, pod, to, flow.original_src, permit).await {
        Ok(app) => {
            let (source, at) = (from.ip(), SystemTime::now());
            worker.plaintext.put(Seen { destination: to, source, at, refused: false });
            Some((worker.observer.open(flow), app))
        }
        Err(error) => refuse(worker, flow, outcome::unreachable(&error)),
    }
}

/// A connection the kernel half redirected, with what it recorded about it.
struct Captured {
    workload: Arc<Workload>,
    source: OriginalSrc,
    destination: OriginalDst,
}

impl Captured {
    fn identify(pod: &Pod, app: &TcpStream) -> Result<Self, capture::Error> {
        let peer = app.peer_addr().map_err(capture::Error::from)?;
        let local = app.local_addr().map_err(capture::Error::from)?;
        let destination = pod.socket.original_destination(peer, local)?;
        Ok(Self { workload: pod.workload.load_full(), source: OriginalSrc::new(peer), destination })
    }

    fn flow(&self, path: Path, destination: Party, address: SocketAddr, service: Option<Arc<str>>) -> Flow {
        Flow {
            direction: Direction::Outbound,
            path,
            source: Party {
                identity: Some(self.workload.identity.clone()),
                workload: Some(self.workload.clone()),
            },
            destination,
            original_dst: Some(self.destination),
            address,
            original_src: self.source,
            service,
            cipher: None,
        }
    }
}

/// Dials the application inside its pod, which will see `source` as its client. Takes the permit by value: what
/// policy did not let through cannot be delivered.
async fn deliver(
    worker: &Worker,
    pod: &Pod,
    address: SocketAddr,
    source: OriginalSrc,
    _permit: Authorized,
) -> io::Result<TcpStream> {
    // Nobody's application: behind these ports the agent would meet itself.
    if [capture::OUTBOUND_PORT, capture::PLAINTEXT_PORT, capture::TUNNEL_PORT].contains(&address.port()) {
        return Err(io::ErrorKind::ConnectionRefused.into());
    }
    let socket = pod.socket.socket(address)?;
    pod.socket.announce_source(&socket, address, source).map_err(io::Error::other)?;
    worker.prepare_leg(&socket)?;
    connect(socket, address).await
}

/// Dials a plain destination from inside the pod.
async fn dial(pod: &Pod, address: SocketAddr) -> io::Result<TcpStream> {
    let socket = pod.socket.socket(address)?;
    socket.set_tcp_nodelay(true)?;
    connect(socket, address).await
}

async fn connect(socket: socket2::Socket, address: SocketAddr) -> io::Result<TcpStream> {
    let connecting = tunnel::connect(socket, address);
    tokio::time::timeout(CONNECT_TIMEOUT, connecting).await.map_err(|_| io::ErrorKind::TimedOut)?
}

/// Writes the connection's one line. True if both directions ended cleanly.
fn finish(open: Connection, report: Report) -> bool {
    let clean = matches!(report.end, End::Clean | End::Rejected(_));
    let ending = outcome::ending(report.end, open.flow(), open.stop_reason());
    open.close(ending);
    clean
}

/// Resolves when policy no longer allows the connection.
async fn stopped(open: &Connection) {
    open.stopped().await;
}

/// Resolves also when what proved the peer no longer counts.
async fn stopped_by_either(open: &Connection, peer: &tunnel::Peer) {
    tokio::select! {
        _ = open.stopped() => {}
        failure = peer.until_distrusted() => open.revoke(format!("the peer is no longer trusted: {failure}").into()),
    }
}

/// Records a refusal; the application's side is then reset.
fn refuse<T>(worker: &Worker, flow: Flow, refusal: Refusal) -> Option<T> {
    worker.observer.refused(flow, refusal);
    None
}

/// Closes with RST: the application learns of a refusal as an error, never as a clean end of stream.
fn reset(app: TcpStream) {
    let _ = socket2::SockRef::from(&app).set_linger(Some(Duration::ZERO));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size_of_future<F>(_: impl Fn(Arc<Worker>, Arc<Pod>, Working, TcpStream) -> F) -> usize {
        size_of::<F>()
    }

    #[test]
    fn a_connection_costs_little_memory_besides_its_sockets() {
        let (outbound, inbound) = (size_of_future(outbound), size_of_future(inbound));
        assert!(outbound <= 1024, "outbound is {outbound} bytes");
        assert!(inbound <= 1472, "inbound is {inbound} bytes");
        fn size_of_lane<F>(
            _: impl Fn(Arc<Worker>, Arc<Pod>, Working, TcpStream, Lane, Connection) -> F,
        ) -> usize {
            size_of::<F>()
        }
        let (outbound, inbound) = (size_of_lane(outbound_lane), inbound::size_of_lane());
        assert!(outbound <= 904, "outbound on a lane is {outbound} bytes");
        assert!(inbound <= 1024, "inbound on a lane is {inbound} bytes");
    }
}
