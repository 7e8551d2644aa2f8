//! An application's socket and a tunnel's stream, both directions in one task.
//!
//! Application bytes are read straight into record slots, sealed there and sent in one call; records are received
//! many at a time, opened in place, and their plaintext goes to the application in one call. Buffers are on loan only
//! while something is in them.
//!
//! A direction that became raw may be the kernel's (see `tunnel::kernel`): then a pipe stands where the buffer stood,
//! bytes move by splice(2), and all else, endings above all, stays as it is.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::net::TcpStream;

use crate::tunnel::{Codec, Rejection, Stream, failed, finish_on_close, reset_on_close};

use super::watch::Watch;
use super::{End, Progress, Relayed, Report, TURN};

mod down;
mod steady;
mod up;

use down::Down;
use up::Up;

/// Relays until both directions have ended, one side is reset, or `stop` resolves.
///
/// Until a clean end `app` is marked to be reset when it is closed, by the caller who drops it and `stream` right after
/// or by the end of the process: an agent that is killed never makes a cut transfer look complete. `stream` is marked by
/// itself: clean and rejected ends leave its tunnel usable, unless a direction was raw.
pub async fn tunnelled(
    app: &TcpStream,
    stream: &mut Stream,
    progress: &Progress,
    mut stop: impl Future<Output = ()> + Unpin,
) -> Report {
    loop {
        if let Relayed::Ended(report) = tunnelled_while_light(app, stream, progress, &mut stop).await {
            return report;
        }
    }
}

/// As [`tunnelled`], but of a connection whose [pace is watched](Progress::watch_pace) only as long as it can stay among
/// others.
pub async fn tunnelled_while_light(
    app: &TcpStream,
    stream: &mut Stream,
    progress: &Progress,
    mut stop: impl Future<Output = ()> + Unpin,
) -> Relayed {
    reset_on_close(app);
    let end = {
        let (tunnel, codec) = stream.split();
        let up = Up::resume(codec.unsent.take());
        let mut relay = Relay {
            app,
            tunnel,
            codec,
            progress,
            up,
            down: Down::default(),
            app_failed: false,
            tunnel_failed: None,
            rejection: None,
        };
        let mut watch = None;
        let end = std::future::poll_fn(|cx| {
            if Pin::new(&mut stop).poll(cx).is_ready() {
                return Poll::Ready(Some(End::Revoked));
            }
            let polled = relay.poll(cx);
            if polled.is_pending() && watch.is_none() && !relay.reads_both() {
                watch = Some(Watch::new([app, tunnel], cx));
                // The failure may have come before the watch.
                return relay.poll(cx);
            }
            polled
        })
        .await;
        relay.down.steady.end(relay.tunnel);
        end
    };
    let Some(end) = end else { return Relayed::Bulk };
    match end {
        End::Clean => finish_on_close(app),
        End::Rejected(_) => {}
        _ => stream.reset(),
    }
    Relayed::Ended(Report::new(progress, end))
}

struct Relay<'a> {
    app: &'a TcpStream,
    tunnel: &'a TcpStream,
    codec: &'a mut Codec,
    progress: &'a Progress,
    up: Up,
    down: Down,
    /// Writing to the application failed: its bytes are still read to their end, which is then a reset.
    app_failed: bool,
    /// Writing to the tunnel failed: what the peer said before is still read, for it may say why.
    tunnel_failed: Option<End>,
    rejection: Option<Rejection>,
}

type Step = Poll<Result<(), End>>;

impl Relay<'_> {
    /// Ready without an end when the connection is to go on elsewhere.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<End>> {
        (self.up.turn, self.down.turn) = (0, 0);
        let before = self.progress.moved();
        let ended = self.poll_ended(cx).map(Some);
        let bulk = self.progress.pace.moved(before, self.progress.moved());
        if bulk && ended.is_pending() && self.can_leave() {
            self.leave();
            return Poll::Ready(None);
        }
        ended
    }

    /// Leaves all there is to know about the connection in its sockets and its codec.
    fn leave(&mut self) {
        self.codec.unsent = self.up.leave();
        self.down.leave(&mut self.codec.incoming);
        self.progress.pace.leave();
    }

    /// Whether another relay can go on with the connection. It may hold what it can't write yet: one that moves much does
    /// most of the time.
    fn can_leave(&self) -> bool {
        let failed = self.app_failed || self.tunnel_failed.is_some() || self.rejection.is_some();
        !failed && self.up.can_leave() && self.down.can_leave()
    }

    fn poll_ended(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        let outcome = self.poll_both(cx);
        let waiting = self.up.turn < TURN && self.down.turn < TURN;
        match outcome {
            Poll::Ready(Ok(())) => Poll::Ready(match self.rejection.take() {
                Some(rejection) => End::Rejected(rejection),
                None => End::Clean,
            }),
            Poll::Ready(Err(end)) => Poll::Ready(end),
            // Whoever still reads a failed socket meets its error there, behind its last bytes. Here nobody does.
            Poll::Pending if waiting && failed(self.app) => Poll::Ready(End::AppReset),
            Poll::Pending if waiting && failed(self.tunnel) => {
                Poll::Ready(self.tunnel_failed.take().unwrap_or(End::PeerReset))
            }
            Poll::Pending => Poll::Pending,
        }
    }

    /// Whether both sockets are being read, so that a reset is met there.
    fn reads_both(&self) -> bool {
        let up = !self.up.holds() && !self.codec.order.outbound_ended();
        up && !self.down.holds() && !self.down.over && !self.codec.incoming.has_plaintext()
    }

    /// What gives the other direction something to do when it comes to be.
    fn news(&self) -> [bool; 4] {
        let key = self.up.kernel.is_some() && self.codec.key_update_owed();
        [self.rejection.is_some(), self.app_failed, self.codec.raw_owed(), key]
    }

    fn poll_both(&mut self, cx: &mut Context<'_>) -> Step {
        loop {
            self.codec.moved(self.progress.sent() + self.progress.received());
            let before = self.news();
            let up = self.poll_up(cx)?;
            let _ = self.poll_down(cx)?;
            if up.is_ready() && self.codec.order.inbound_ended() && !self.down.fin {
                return Poll::Ready(Ok(()));
            }
            if before.iter().zip(self.news()).all(|(before, after)| *before || !after) {
                return Poll::Pending;
            }
        }
    }
}

#[cfg(test)]
pub(super) fn size_of_future() -> usize {
    fn of<'a, F>(_: impl FnOnce(&'a TcpStream, &'a mut Stream, &'a Progress) -> F) -> usize {
        size_of::<F>()
    }
    of(|app, stream, progress| tunnelled_while_light(app, stream, progress, std::future::pending()))
}
