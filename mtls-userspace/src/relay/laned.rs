//! An application's socket and a lane of a shared tunnel.
//!
//! What comes for the application is given to it by the tunnel's own task, as soon as it is opened; this one wakes for
//! what the application says, for endings, and for what it could not take. A stream that turns out to be fast leaves
//! for a tunnel of its own: its client makes one, the server hands it to the stream, and each end says LEAVE behind its
//! last bytes here. What follows is [`super::tunnelled`]'s.

use std::future::Future;
use std::io;
use std::net::Shutdown;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use socket2::SockRef;
use tokio::net::TcpStream;

use crate::tunnel::{
    self, Ending, Failure, Heard, Lane, LaneState as State, Sink, Stream, failed, finish_on_close, is_reset,
    receive, reset_on_close, send, send_now,
};

use super::watch::Watch;
use super::{End, Progress, Report, TURN, yield_turn};

/// After a tunnel of its own could not be had, a fast stream stays on its lane for so long.
const CONTENT: Duration = Duration::from_secs(1);

/// Whose bytes are counted where.
pub trait Counts: Send + Sync {
    fn progress(&self) -> &Progress;
}

impl Counts for Progress {
    fn progress(&self) -> &Progress {
        self
    }
}

/// An application's socket and its connection's counts, shared with the tunnel's task.
pub struct App {
    pub socket: TcpStream,
    counts: Arc<dyn Counts>,
    at_client: bool,
    /// It was written to before. Of a socket just made tokio has not heard yet that there is room.
    begun: AtomicBool,
}

impl App {
    /// `at_client` where the application is the connection's source.
    pub fn new(socket: TcpStream, counts: Arc<dyn Counts>, at_client: bool) -> Arc<Self> {
        Arc::new(Self { socket, counts, at_client, begun: AtomicBool::new(false) })
    }

    fn progress(&self) -> &Progress {
        self.counts.progress()
    }

    /// Its socket, once its lane is gone.
    pub fn into_socket(self: Arc<Self>) -> Option<TcpStream> {
        Arc::into_inner(self).map(|app| app.socket)
    }
}

impl Sink for App {
    fn take(&self, bytes: &[u8]) -> io::Result<usize> {
        let begun = self.begun.swap(true, Ordering::Relaxed);
        let n = if begun { send(&self.socket, bytes)? } else { send_now(&self.socket, bytes)? };
        self.progress().went_down(self.at_client, n);
        Ok(n)
    }
}

/// What becomes of a stream on a lane.
pub enum Laned {
    Ended(Report),
    /// It goes on on a tunnel of its own.
    Moved(Stream),
}

/// A tunnel of its own in the making.
pub type Growing<'a> = Pin<Box<dyn Future<Output = Result<Stream, tunnel::Error>> + Send + 'a>>;

/// Relays until both directions have ended, one side is reset, `stop` resolves, or the stream has left the lane for
/// the tunnel that `grow` (a client's) made or that the peer gave it.
///
/// Until a clean end the application's socket is marked to be reset when it is closed.
pub async fn laned<'a>(
    app: &'a Arc<App>,
    lane: &'a Lane,
    grow: impl Fn() -> Option<Growing<'a>>,
    mut stop: impl Future<Output = ()> + Unpin,
) -> Laned {
    reset_on_close(&app.socket);
    lane.attach(app.clone());
    let mut relay =
        Relay { app, lane, growing: None, content_until: None, finished: false, reads: true, turn: 0 };
    let mut watch = None;
    let done = std::future::poll_fn(|cx| {
        if Pin::new(&mut stop).poll(cx).is_ready() {
            return Poll::Ready(Err(End::Revoked));
        }
        let polled = relay.poll(cx, &grow);
        if polled.is_pending() && watch.is_none() && !relay.reads {
            watch = Some(Watch::new([&app.socket], cx));
            // The failure may have come before the watch.
            return relay.poll(cx, &grow);
        }
        polled
    })
    .await;
    drop(watch);
    let end = match done {
        Ok(None) => {
            finish_on_close(&app.socket);
            End::Clean
        }
        Ok(Some(mut stream)) => match Box::pin(leave(app, lane, &mut stream, stop)).await {
            Ok(()) => return Laned::Moved(stream),
            Err(end) => end,
        },
        Err(end) => end,
    };
    Laned::Ended(Report::new(app.progress(), end))
}

/// Waits for the peer's end on the lane, and until the application has taken what came before it. Nobody reads the
/// stream's new tunnel meanwhile, or the application.
async fn leave(
    app: &App,
    lane: &Lane,
    stream: &mut Stream,
    mut stop: impl Future<Output = ()> + Unpin,
) -> Result<(), End> {
    let (tunnel, _) = stream.split();
    let mut watch = None;
    std::future::poll_fn(|cx| {
        watch.get_or_insert_with(|| Watch::new([&app.socket, tunnel], cx));
        if Pin::new(&mut stop).poll(cx).is_ready() {
            return Poll::Ready(Err(End::Revoked));
        }
        loop {
            let state = lane.state(cx);
            if let Some(end) = state.end() {
                return Poll::Ready(Err(end));
            }
            if state.delivered && state.heard.is_some() {
                return Poll::Ready(Ok(()));
            }
            if state.sink_failed || failed(&app.socket) {
                return Poll::Ready(Err(End::AppReset));
            }
            if failed(tunnel) {
                return Poll::Ready(Err(End::PeerReset));
            }
            if state.delivered || app.socket.poll_write_ready(cx).is_pending() {
                return Poll::Pending;
            }
        }
    })
    .await
}

struct Relay<'a> {
    app: &'a App,
    lane: &'a Lane,
    growing: Option<Growing<'a>>,
    /// No tunnel of its own is asked for until then.
    content_until: Option<Instant>,
    /// The application was told of the peer's end.
    finished: bool,
    /// The application is read, so that its reset is met there.
    reads: bool,
    /// Bytes moved in this turn.
    turn: usize,
}

/// `Ok` when our direction is over here: the tunnel on which the stream goes on, or none when both are.
type Done = Result<Option<Stream>, End>;

impl<'a> Relay<'a> {
    fn poll(&mut self, cx: &mut Context<'_>, grow: &impl Fn() -> Option<Growing<'a>>) -> Poll<Done> {
        self.turn = 0;
        loop {
            let state = self.lane.state(cx);
            if let Some(end) = state.end() {
                return Poll::Ready(Err(end));
            }
            if state.heard == Some(Heard::Fin) && state.delivered && !self.finished {
                self.finished = true;
                // Fails only if the application is gone, which reading it will tell.
                let _ = SockRef::from(&self.app.socket).shutdown(Shutdown::Write);
            }
            if let Some(stream) = self.poll_grown(cx, state.adopted, state.fast, grow) {
                self.lane.end(Ending::Leave);
                return Poll::Ready(Ok(Some(stream)));
            }
            // It went on without us.
            if state.heard == Some(Heard::Left) && self.growing.is_none() {
                return Poll::Ready(Err(End::PeerReset));
            }
            // What the application said before it went has been read to its end.
            if state.sink_failed && state.outbound_ended {
                return Poll::Ready(Err(End::AppReset));
            }
            let sent =
                if state.outbound_ended { Sent::Blocked } else { self.poll_up(cx, state.sink_failed)? };
            match sent {
                Sent::Ended => continue,
                Sent::Yielded => return yield_turn(cx),
                Sent::Blocked => self.reads = false,
                Sent::Drained => self.reads = true,
            }
            if !state.delivered && self.app.socket.poll_write_ready(cx).is_ready() {
                continue;
            }
            if state.outbound_ended && state.heard == Some(Heard::Fin) && state.delivered {
                return Poll::Ready(Ok(None));
            }
            // Whoever still reads a failed socket meets its error there, behind its last bytes. Here nobody does.
            if !self.reads && failed(&self.app.socket) {
                return Poll::Ready(Err(End::AppReset));
            }
            return Poll::Pending;
        }
    }

    /// Sends what the application says.
    fn poll_up(&mut self, cx: &mut Context<'_>, sink_failed: bool) -> Result<Sent, End> {
        loop {
            if self.turn >= TURN {
                return Ok(Sent::Yielded);
            }
            match self.lane.poll_send(cx, |room| receive(&self.app.socket, room)) {
                Poll::Pending => return Ok(Sent::Blocked),
                Poll::Ready(Ok(0)) if sink_failed => return Err(End::AppReset),
                Poll::Ready(Ok(0)) => {
                    self.lane.end(Ending::Fin);
                    return Ok(Sent::Ended);
                }
                Poll::Ready(Ok(n)) => {
                    self.app.progress().went_up(self.app.at_client, n);
                    self.turn += n;
                }
                Poll::Ready(Err(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                    match self.app.socket.poll_read_ready(cx) {
                        Poll::Pending => return Ok(Sent::Drained),
                        Poll::Ready(ready) => ready.map_err(End::Io)?,
                    }
                }
                Poll::Ready(Err(error)) if is_reset(&error) => return Err(End::AppReset),
                Poll::Ready(Err(error)) => return Err(End::Io(error)),
            }
        }
    }

    /// The tunnel of its own for a fast stream, when there is one.
    fn poll_grown(
        &mut self,
        cx: &mut Context<'_>,
        adopted: bool,
        fast: bool,
        grow: &impl Fn() -> Option<Growing<'a>>,
    ) -> Option<Stream> {
        if adopted {
            return self.lane.take_adopted();
        }
        let wants = fast && self.content_until.is_none_or(|until| Instant::now() >= until);
        if wants && self.growing.is_none() {
            self.growing = grow();
        }
        let Poll::Ready(grown) = self.growing.as_mut()?.as_mut().poll(cx) else { return None };
        self.growing = None;
        if let Err(error) = &grown {
            tracing::debug!(peer = %self.lane.peer(), %error, "a fast stream stays on its lane");
            self.content_until = Some(Instant::now() + CONTENT);
            self.lane.calm();
        }
        grown.ok()
    }
}

enum Sent {
    /// All the application has said so far.
    Drained,
    Ended,
    /// The peer must take something first.
    Blocked,
    /// Others have their turn.
    Yielded,
}

impl State {
    /// How the stream has ended, if not by both its ends.
    fn end(&self) -> Option<End> {
        match (&self.failure, &self.heard) {
            (Some(failure), _) => Some(ended_by(failure)),
            (None, Some(Heard::Reset)) => Some(End::PeerReset),
            (None, Some(Heard::Rejected(rejection))) => Some(End::Rejected(rejection.clone())),
            _ => None,
        }
    }
}

fn ended_by(failure: &Failure) -> End {
    match failure {
        Failure::Reset => End::PeerReset,
        Failure::Closed | Failure::Truncated => End::Truncated,
        Failure::Violation(violation) => End::Tunnel(tunnel::Error::Protocol(*violation)),
        Failure::Refused(alert) => End::Tunnel(tunnel::Error::Refused { alert: *alert }),
        Failure::Other(text) => End::Io(io::Error::other(&**text)),
    }
}
