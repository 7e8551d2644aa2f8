//! Two plain sockets: same-node connections between pods, and plaintext that policy lets pass.

use std::future::Future;
use std::io;
use std::net::Shutdown;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};

use socket2::SockRef;
use tokio::net::TcpStream;

use crate::tunnel::{Buffer, Size, Unsent, failed, finish_on_close, is_reset, receive, reset_on_close};

use super::watch::Watch;
use super::{End, Progress, Relayed, Report, TURN};

/// What a connection has read and could not write yet when it goes on elsewhere: from `a` to `b`, and back.
#[derive(Default)]
pub struct Unwritten(Option<Box<(Option<Unsent>, Option<Unsent>)>>);

/// Relays until both directions have ended, one side is reset, or `stop` resolves. Until a clean end both sockets are
/// marked to be reset when they are closed, by the caller who drops them right after or by the end of the process: an
/// agent that is killed never makes a cut transfer look complete.
pub async fn plain(
    a: &TcpStream,
    b: &TcpStream,
    mut unwritten: Unwritten,
    progress: &Progress,
    mut stop: impl Future<Output = ()> + Unpin,
) -> Report {
    loop {
        if let Relayed::Ended(report) = plain_while_light(a, b, &mut unwritten, progress, &mut stop).await {
            return report;
        }
    }
}

/// As [`plain`], but of a connection whose [pace is watched](Progress::watch_pace) only as long as it can stay among others;
/// what it then leaves unwritten goes along.
pub async fn plain_while_light(
    a: &TcpStream,
    b: &TcpStream,
    unwritten: &mut Unwritten,
    progress: &Progress,
    mut stop: impl Future<Output = ()> + Unpin,
) -> Relayed {
    reset_on_close(a);
    reset_on_close(b);
    let end = {
        let mut watch = None;
        let largest = progress.largest();
        let (mut forth, mut back) = (Copy::new(a, b, largest), Copy::new(b, a, largest));
        if let Some(held) = unwritten.0.take() {
            (forth.held, back.held) = *held;
        }
        std::future::poll_fn(|cx| {
            if Pin::new(&mut stop).poll(cx).is_ready() {
                return Poll::Ready(Some(End::Revoked));
            }
            let before = progress.moved();
            let mut polled = poll_both(&mut forth, &mut back, progress, cx);
            if polled.is_pending() && watch.is_none() && !(forth.reads() && back.reads()) {
                watch = Some(Watch::new([a, b], cx));
                // The failure may have come before the watch.
                polled = poll_both(&mut forth, &mut back, progress, cx);
            }
            let bulk = progress.pace.moved(before, progress.moved());
            if bulk && polled.is_pending() && forth.can_leave() && back.can_leave() {
                if forth.held.is_some() || back.held.is_some() {
                    unwritten.0 = Some(Box::new((forth.held.take(), back.held.take())));
                }
                progress.pace.leave();
                return Poll::Ready(None);
            }
            polled.map(Some)
        })
        .await
    };
    let Some(end) = end else { return Relayed::Bulk };
    if matches!(end, End::Clean) {
        finish_on_close(a);
        finish_on_close(b);
    }
    Relayed::Ended(Report::new(progress, end))
}

fn poll_both<'a>(
    forth: &mut Copy<'a>,
    back: &mut Copy<'a>,
    progress: &Progress,
    cx: &mut Context<'_>,
) -> Poll<End> {
    (forth.turn, back.turn) = (0, 0);
    loop {
        let before = (forth.source_failed, back.source_failed);
        let went = match forth.poll(cx, back, |n| progress.add_sent(n)) {
            Poll::Ready(Err(fault)) => return Poll::Ready(fault.seen_from_a(true)),
            went => went.is_ready(),
        };
        let came = match back.poll(cx, forth, |n| progress.add_received(n)) {
            Poll::Ready(Err(fault)) => return Poll::Ready(fault.seen_from_a(false)),
            came => came.is_ready(),
        };
        if went && came {
            return Poll::Ready(End::Clean);
        }
        if before == (forth.source_failed, back.source_failed) {
            break;
        }
    }
    let waiting = forth.turn < TURN && back.turn < TURN;
    if waiting && failed(forth.source) {
        return Poll::Ready(End::AppReset);
    }
    if waiting && failed(back.source) {
        return Poll::Ready(End::PeerReset);
    }
    Poll::Pending
}

/// Which end of a direction failed.
enum Fault {
    SourceReset,
    SinkReset,
    Io(io::Error),
}

impl Fault {
    fn seen_from_a(self, source_is_a: bool) -> End {
        match (self, source_is_a) {
            (Self::Io(error), _) => End::Io(error),
            (Self::SourceReset, true) | (Self::SinkReset, false) => End::AppReset,
            (Self::SourceReset, false) | (Self::SinkReset, true) => End::PeerReset,
        }
    }
}

/// One direction.
struct Copy<'a> {
    source: &'a TcpStream,
    sink: &'a TcpStream,
    held: Option<Unsent>,
    /// The buffer to take next, by what the last read brought; at most `largest`.
    size: Size,
    largest: Size,
    ended: bool,
    /// Writing to this direction's source failed: its bytes are read to their end, which is then a reset.
    source_failed: bool,
    /// The sink can't be written to any more.
    dead: bool,
    turn: usize,
}

impl<'a> Copy<'a> {
    fn new(source: &'a TcpStream, sink: &'a TcpStream, largest: Size) -> Self {
        Self {
            source,
            sink,
            held: None,
            size: Size::Small,
            largest,
            ended: false,
            source_failed: false,
            dead: false,
            turn: 0,
        }
    }

    /// Whether another relay can go on with it.
    fn can_leave(&self) -> bool {
        !self.dead && !self.source_failed
    }

    /// Whether the source is being read, so that its reset is met there.
    fn reads(&self) -> bool {
        self.held.is_none() && !self.ended && !self.dead
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        opposite: &mut Self,
        moved: impl Fn(usize),
    ) -> Poll<Result<(), Fault>> {
        loop {
            if self.dead {
                return Poll::Pending;
            }
            if let Err(fault) = ready!(self.poll_flush(cx, &moved)) {
                // The sink may have said something before it went: the opposite direction reads it to the end.
                if opposite.ended {
                    return Poll::Ready(Err(fault));
                }
                (self.held, self.dead, opposite.source_failed) = (None, true, true);
                return Poll::Pending;
            }
            if self.ended {
                return Poll::Ready(Ok(()));
            }
            if self.turn >= TURN {
                let _ = pin!(tokio::task::yield_now()).poll(cx);
                return Poll::Pending;
            }
            let mut buffer = Buffer::take(self.size);
            match receive(self.source, &mut buffer) {
                Ok(0) if self.source_failed => return Poll::Ready(Err(Fault::SourceReset)),
                Ok(0) => {
                    self.ended = true;
                    // Fails only if the sink is gone, which reading it will tell.
                    let _ = SockRef::from(self.sink).shutdown(Shutdown::Write);
                }
                Ok(n) => {
                    self.size = Size::after(n).min(self.largest);
                    self.turn += n;
                    self.held = Some(Unsent { buffer, start: 0, end: n });
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    drop(buffer);
                    ready!(self.source.poll_read_ready(cx)).map_err(Fault::Io)?;
                }
                Err(error) if is_reset(&error) => return Poll::Ready(Err(Fault::SourceReset)),
                Err(error) => return Poll::Ready(Err(Fault::Io(error))),
            }
        }
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>, moved: &impl Fn(usize)) -> Poll<Result<(), Fault>> {
        let Some(held) = &mut self.held else { return Poll::Ready(Ok(())) };
        ready!(held.poll_send(self.sink, cx, moved)).map_err(|error| match error {
            error if is_reset(&error) => Fault::SinkReset,
            error => Fault::Io(error),
        })?;
        self.held = None;
        Poll::Ready(Ok(()))
    }
}
