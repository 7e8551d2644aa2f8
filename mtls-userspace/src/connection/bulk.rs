//! Connections that move much go on here, on a thread of their own kind: whoever says little never waits behind them,
//! neither for the worker's turn nor, since its thread mostly sleeps, for the scheduler's.
//!
//! A connection that came here stays to its end. Its tunnel then goes back to the worker it came from.

use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;

use tokio::net::TcpStream;
use tokio::runtime::Handle;

use super::inbound::serve;
use super::{finish, stopped, stopped_by_either};
use crate::drain::Working;
use crate::observe::Connection;
use crate::relay::{self, End, Report, Unwritten};
use crate::tunnel::{ServerTunnel, Stream};
use crate::worker::{Pod, Worker};

/// Two plain sockets.
pub(super) fn plain(
    worker: &Worker,
    working: Working,
    (a, b): (TcpStream, TcpStream),
    unwritten: Unwritten,
    open: Connection,
) {
    let Some(((a, b), open)) = both(depart(a), || depart(b), open) else { return };
    worker.hand_over_bulk(open.flow().direction, async move {
        let _working = working;
        let Some(((a, b), open)) = both(a(), b, open) else { return };
        let report = relay::plain(&a, &b, unwritten, open.progress(), pin!(stopped(&open))).await;
        finish(open, report);
    });
}

/// The source's end of a connection in a tunnel of its own.
pub(super) fn outbound(worker: &Worker, working: Working, app: TcpStream, stream: Stream, open: Connection) {
    let home = Handle::current();
    let Some(((app, stream), open)) = both(depart(app), || stream.depart(), open) else { return };
    worker.hand_over_bulk(open.flow().direction, async move {
        let Some(((app, mut stream), open)) = both(app(), || stream.arrive(), open) else { return };
        let report = alone(&app, &mut stream, &open).await;
        finish(open, report);
        drop(app);
        // Where it ended well its tunnel is used again, by that worker.
        if let Ok(stream) = stream.depart() {
            home.spawn(async move { drop((stream.arrive(), working)) });
        }
    });
}

/// The destination's end of a connection in a tunnel of its own.
pub(super) fn inbound(
    worker: Arc<Worker>,
    pod: Arc<Pod>,
    working: Working,
    from: SocketAddr,
    tunnel: ServerTunnel,
    (app, open): (TcpStream, Connection),
) {
    let home = Handle::current();
    let Some(((app, tunnel), open)) = both(depart(app), || tunnel.depart(), open) else { return };
    worker.clone().hand_over_bulk(open.flow().direction, async move {
        let Some(((app, mut tunnel), open)) = both(app(), tunnel, open) else { return };
        let report = alone(&app, tunnel.stream(), &open).await;
        let clean = finish(open, report);
        drop(app);
        if clean && let Ok(tunnel) = tunnel.depart() {
            home.spawn(async move {
                if let Ok(tunnel) = tunnel() {
                    serve(worker, pod, working, from, tunnel, None).await;
                }
            });
        }
    });
}

async fn alone(app: &TcpStream, stream: &mut Stream, open: &Connection) -> Report {
    let peer = stream.proof();
    let stopped = pin!(stopped_by_either(open, &peer));
    relay::tunnelled(app, stream, open.progress(), stopped).await
}

/// Takes a socket off this thread's event loop; what is returned adds it to that of whoever calls it.
fn depart(socket: TcpStream) -> io::Result<impl FnOnce() -> io::Result<TcpStream> + Send> {
    let socket = socket.into_std()?;
    Ok(move || TcpStream::from_std(socket))
}

/// Two sockets that left an event loop or came to one. Where one did not, both are dropped with it, which resets the
/// applications'.
fn both<A, B>(
    first: io::Result<A>,
    second: impl FnOnce() -> io::Result<B>,
    open: Connection,
) -> Option<((A, B), Connection)> {
    match first.and_then(|first| Ok((first, second()?))) {
        Ok(both) => Some((both, open)),
        Err(error) => {
            let report = Report::new(open.progress(), End::Io(error));
            finish(open, report);
            None
        }
    }
}
