//! An application's socket and a tunnel's stream, both directions in one task.
//!
//! Application bytes are read straight into record slots, sealed there and sent in one call; records are received
//! many at a time, opened in place, and their plaintext goes to the application in one call. Buffers are on loan only
//! while something is in them.

use std::future::Future;
use std::io::{self, IoSlice, IoSliceMut};
use std::net::Shutdown;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};

use socket2::SockRef;
use tokio::net::TcpStream;

use crate::tunnel::{
    Buffer, Codec, HEADROOM, MAX_DATA, MAX_RANGES, Pulled, Rejection, SLOT, SLOT_DATA, SLOTS, Size, Stream,
    failed, finish_on_close, receive, receive_vectored, reset_on_close, send, send_vectored,
};

use super::watch::Watch;
use super::{End, Progress, Report, is_reset};

/// Bytes after which a connection lets the worker's others have their turn.
const TURN: usize = 512 * 1024;
/// What a last DATA record and a FIN need besides the data.
const OVERHEAD: usize = (SLOT - MAX_DATA) + (SLOT - MAX_DATA);

/// Relays until both directions have ended, one side is reset, or `stop` resolves.
///
/// Until a clean end `app` is marked to be reset when it is closed, by the caller who drops it and `stream` right after
/// or by the end of the process: an agent that is killed never makes a cut transfer look complete. `stream` is marked by itself: clean and rejected ends leave its tunnel usable.
pub async fn tunnelled(
    app: &TcpStream,
    stream: &mut Stream,
    progress: &Progress,
    mut stop: impl Future<Output = ()> + Unpin,
) -> Report {
    reset_on_close(app);
    let end = {
        let (tunnel, codec) = stream.split();
        let mut relay = Relay {
            app,
            tunnel,
            codec,
            progress,
            up: Up::default(),
            down: Down::default(),
            app_failed: false,
            tunnel_failed: None,
            rejection: None,
        };
        let mut watch = None;
        std::future::poll_fn(|cx| {
            if Pin::new(&mut stop).poll(cx).is_ready() {
                return Poll::Ready(End::Revoked);
            }
            let polled = relay.poll(cx);
            if polled.is_pending() && watch.is_none() && !relay.reads_both() {
                watch = Some(Watch::new(app, tunnel, cx));
                // The failure may have come before the watch.
                return relay.poll(cx);
            }
            polled
        })
        .await
    };
    match end {
        End::Clean => finish_on_close(app),
        End::Rejected(_) => {}
        _ => stream.reset(),
    }
    Report::new(progress, end)
}

/// From the application to the tunnel.
#[derive(Default)]
struct Up {
    buffer: Option<Buffer>,
    /// What is sealed in `buffer` and not yet sent.
    start: usize,
    end: usize,
    /// The last read filled its buffer: take a large one next.
    large: bool,
    /// Bytes moved in this turn.
    turn: usize,
}

/// From the tunnel to the application.
#[derive(Default)]
struct Down {
    /// Ranges of the incoming buffer already delivered, and bytes of the next one.
    delivered: usize,
    offset: usize,
    large: bool,
    /// A FIN waits for the ranges before it.
    fin: bool,
    /// The application can't be written to any more.
    dead: bool,
    turn: usize,
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
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        (self.up.turn, self.down.turn) = (0, 0);
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
        let up = self.up.buffer.is_none() && !self.codec.order.outbound_ended();
        up && !self.codec.incoming.has_plaintext()
    }

    fn poll_both(&mut self, cx: &mut Context<'_>) -> Step {
        loop {
            let before = (self.rejection.is_some(), self.app_failed);
            let up = self.poll_up(cx)?;
            let _ = self.poll_down(cx)?;
            if up.is_ready() && self.codec.order.inbound_ended() && !self.down.fin {
                return Poll::Ready(Ok(()));
            }
            // Either of these gives the other direction something to do.
            if before == (self.rejection.is_some(), self.app_failed) {
                return Poll::Pending;
            }
        }
    }

    fn poll_up(&mut self, cx: &mut Context<'_>) -> Step {
        loop {
            if self.tunnel_failed.is_some() {
                return Poll::Pending;
            }
            if let Err(end) = ready!(self.poll_flush(cx)) {
                self.up.buffer = None;
                if self.codec.order.inbound_ended() {
                    return Poll::Ready(Err(end));
                }
                self.tunnel_failed = Some(end);
                continue;
            }
            if self.codec.order.outbound_ended() {
                return Poll::Ready(Ok(()));
            }
            if self.rejection.is_some() {
                self.seal_fin()?;
                continue;
            }
            if self.up.turn >= TURN {
                return yield_turn(cx);
            }
            if self.read_app()? {
                continue;
            }
            if self.codec.open_unsent() {
                // A server that speaks first must hear of the stream at once.
                let buffer = self.up.buffer.insert(Buffer::take(Size::Small));
                self.up.start = self.codec.seal_head(&mut buffer[..HEADROOM]).map_err(End::Tunnel)?;
                self.up.end = HEADROOM;
                continue;
            }
            ready!(self.app.poll_read_ready(cx)).map_err(End::Io)?;
        }
    }

    /// Sends what is sealed.
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Step {
        let Up { buffer: waiting, start, end, .. } = &mut self.up;
        let Some(buffer) = waiting else { return Poll::Ready(Ok(())) };
        while start < end {
            match send(self.tunnel, &buffer[*start..*end]) {
                Ok(n) => *start += n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    ready!(self.tunnel.poll_write_ready(cx)).map_err(End::Io)?;
                }
                Err(error) if is_reset(&error) => return Poll::Ready(Err(End::PeerReset)),
                Err(error) => return Poll::Ready(Err(End::Io(error))),
            }
        }
        *waiting = None;
        Poll::Ready(Ok(()))
    }

    /// Reads what the application has written, and seals it. Says whether there was anything.
    fn read_app(&mut self) -> Result<bool, End> {
        let mut buffer = Buffer::take(if self.up.large { Size::Large } else { Size::Small });
        let slots = buffer.slots();
        let received = match slots {
            1 => receive(self.app, &mut buffer[HEADROOM + SLOT_DATA..][..MAX_DATA]),
            _ => {
                let mut places = buffer[HEADROOM..].chunks_exact_mut(SLOT);
                let mut places: [IoSliceMut<'_>; SLOTS] = std::array::from_fn(|_| {
                    let place = places.next().and_then(|slot| slot.get_mut(SLOT_DATA..SLOT_DATA + MAX_DATA));
                    IoSliceMut::new(place.unwrap_or_default())
                });
                receive_vectored(self.app, &mut places)
            }
        };
        let received = match received {
            Ok(0) if self.app_failed => return Err(End::AppReset),
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) if is_reset(&error) => return Err(End::AppReset),
            Err(error) => return Err(End::Io(error)),
        };
        self.up.large = received == slots * MAX_DATA || received > SLOTS / 2 * MAX_DATA;
        self.up.start = self.codec.seal_head(&mut buffer[..HEADROOM]).map_err(End::Tunnel)?;
        let mut end = HEADROOM;
        let mut left = received;
        while left > 0 {
            let length = left.min(MAX_DATA);
            end += self.codec.seal_data(&mut buffer[end..], length).map_err(End::Tunnel)?;
            left -= length;
        }
        // The end often stands right behind the last bytes; tokio knows without asking the kernel, and then both
        // leave together.
        let room = (buffer.len() - end).saturating_sub(OVERHEAD).min(MAX_DATA);
        let behind = match received {
            0 => Ok(0),
            _ if room == 0 => Err(io::ErrorKind::WouldBlock.into()),
            _ => receive(self.app, &mut buffer[end + SLOT_DATA..][..room]),
        };
        let mut total = received;
        match behind {
            Ok(0) if self.app_failed => {}
            Ok(0) => end += self.codec.seal_fin(&mut buffer[end..]).map_err(End::Tunnel)?,
            Ok(n) => {
                end += self.codec.seal_data(&mut buffer[end..], n).map_err(End::Tunnel)?;
                total += n;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // Told once by the kernel: the next read would look like an end.
            Err(_) => self.app_failed = true,
        }
        self.up.turn += total;
        // The application is the connection's source where the tunnel's client is.
        if self.codec.order.is_client() {
            self.progress.add_sent(total)
        } else {
            self.progress.add_received(total)
        }
        self.up.end = end;
        self.up.buffer = Some(buffer);
        Ok(true)
    }

    fn seal_fin(&mut self) -> Result<(), End> {
        let mut buffer = Buffer::take(Size::Small);
        self.up.start = self.codec.seal_head(&mut buffer[..HEADROOM]).map_err(End::Tunnel)?;
        let n = self.codec.seal_fin(&mut buffer[HEADROOM..]).map_err(End::Tunnel)?;
        self.up.end = HEADROOM + n;
        self.up.buffer = Some(buffer);
        Ok(())
    }

    fn poll_down(&mut self, cx: &mut Context<'_>) -> Step {
        if self.down.dead {
            return Poll::Pending;
        }
        loop {
            if let Err(end) = ready!(self.poll_deliver(cx)) {
                if self.codec.order.outbound_ended() {
                    return Poll::Ready(Err(end));
                }
                (self.app_failed, self.down.dead) = (true, true);
                self.codec.incoming = Default::default();
                return Poll::Pending;
            }
            if std::mem::take(&mut self.down.fin) {
                // Fails only if the application is gone, which reading it will tell.
                let _ = SockRef::from(self.app).shutdown(Shutdown::Write);
            }
            if self.codec.order.inbound_ended() && self.codec.order.outbound_ended() {
                return Poll::Ready(Ok(()));
            }
            if self.down.turn >= TURN {
                return yield_turn(cx);
            }
            match self.codec.pull().map_err(End::Tunnel)? {
                Pulled::Fin => self.down.fin = true,
                Pulled::Reject(rejection) => {
                    self.rejection = Some(rejection);
                    return Poll::Pending;
                }
                Pulled::Closed => return Poll::Ready(Err(self.tunnel_end(End::Truncated))),
                Pulled::Data | Pulled::Open(_) => {}
            }
            if !self.down.fin && !self.codec.incoming.has_plaintext() {
                ready!(self.poll_receive(cx))?;
            }
        }
    }

    /// Receives more records. After our peer's end there should be none, but its reset must be noticed.
    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Step {
        let incoming = &mut self.codec.incoming;
        loop {
            incoming.release_if_empty();
            ready!(self.tunnel.poll_read_ready(cx)).map_err(End::Io)?;
            let size = if self.down.large { Size::Large } else { Size::Small };
            match incoming.receive(self.tunnel, size) {
                Ok(0) => return Poll::Ready(Err(self.tunnel_end(End::Truncated))),
                Ok(n) => {
                    self.down.large = incoming.is_full() || n > SLOTS / 2 * SLOT;
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if is_reset(&error) => return Poll::Ready(Err(self.tunnel_end(End::PeerReset))),
                Err(error) => return Poll::Ready(Err(End::Io(error))),
            }
        }
    }

    /// How the tunnel ended: what was met first.
    fn tunnel_end(&mut self, otherwise: End) -> End {
        self.tunnel_failed.take().unwrap_or(otherwise)
    }

    /// Writes the plaintext found to the application.
    fn poll_deliver(&mut self, cx: &mut Context<'_>) -> Step {
        let Some(buffer) = &mut self.codec.incoming.buffer else { return Poll::Ready(Ok(())) };
        let (bytes, ranges) = buffer.parts();
        while self.down.delivered < ranges.len() {
            let mut waiting = ranges[self.down.delivered..]
                .iter()
                .map(|&(at, length)| bytes.get(at as usize..(at + length) as usize).unwrap_or_default());
            let mut places = [IoSlice::new(&[]); MAX_RANGES];
            let first = waiting.next().and_then(|first| first.get(self.down.offset..)).unwrap_or_default();
            let mut count = 1;
            for (place, range) in places[1..].iter_mut().zip(waiting) {
                *place = IoSlice::new(range);
                count += 1;
            }
            let written = if count == 1 {
                send(self.app, first)
            } else {
                places[0] = IoSlice::new(first);
                send_vectored(self.app, &places[..count])
            };
            match written {
                Ok(n) => {
                    if self.codec.order.is_client() {
                        self.progress.add_received(n)
                    } else {
                        self.progress.add_sent(n)
                    }
                    self.down.turn += n;
                    let mut offset = self.down.offset + n;
                    while let Some(&(_, length)) = ranges.get(self.down.delivered)
                        && offset >= length as usize
                    {
                        offset -= length as usize;
                        self.down.delivered += 1;
                    }
                    self.down.offset = offset;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    ready!(self.app.poll_write_ready(cx)).map_err(End::Io)?;
                }
                Err(error) if is_reset(&error) => return Poll::Ready(Err(End::AppReset)),
                Err(error) => return Poll::Ready(Err(End::Io(error))),
            }
        }
        ranges.clear();
        (self.down.delivered, self.down.offset) = (0, 0);
        Poll::Ready(Ok(()))
    }
}

/// Lets the worker's other tasks run and its sockets be polled before this one goes on.
fn yield_turn(cx: &mut Context<'_>) -> Step {
    let _ = pin!(tokio::task::yield_now()).poll(cx);
    Poll::Pending
}

#[cfg(test)]
pub(super) fn size_of_future() -> usize {
    fn of<'a, F>(_: impl FnOnce(&'a TcpStream, &'a mut Stream, &'a Progress) -> F) -> usize {
        size_of::<F>()
    }
    of(|app, stream, progress| tunnelled(app, stream, progress, std::future::pending()))
}
