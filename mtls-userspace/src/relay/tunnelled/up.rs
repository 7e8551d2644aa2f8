//! From the application to the tunnel.

use std::io::{self, IoSliceMut};
use std::task::{Context, Poll, ready};

use super::{End, Relay, Step, TURN};
use crate::relay::pipe::Pipe;
use crate::relay::yield_turn;
use crate::tunnel::{
    Buffer, HEADROOM, MAX_DATA, RECORD_END, SLOT, SLOTS, Size, Unsent, is_reset, receive, receive_vectored,
};

/// What a last DATA record and a FIN need besides the data.
const OVERHEAD: usize = (SLOT - MAX_DATA) + (SLOT - MAX_DATA);
/// Taken from the application at once where bytes move by splice.
const SPLICED: usize = 256 * 1024;

/// Calls between two looks at the kernel's record counter, which a key may be about to run out of.
const MOST_CALLS: u64 = 4096;

#[derive(Default)]
pub(super) struct Up {
    /// What is sealed and not yet sent.
    unsent: Option<Unsent>,
    /// The buffer to take next, by what the last read brought.
    size: Size,
    /// Bytes moved in this turn.
    pub turn: usize,
    /// Handing this direction to the kernel was tried.
    tried: bool,
    /// There when the kernel seals this direction.
    pub kernel: Option<Box<InKernel>>,
}

/// A direction whose records the kernel seals.
pub(super) struct InKernel {
    pipe: Pipe,
    /// The application has ended; our end of direction must still be sent.
    ending: bool,
    /// Calls before the kernel's record counter must be looked at.
    calls_left: u64,
}

impl Up {
    /// Goes on with what another relay has left.
    pub fn resume(unsent: Option<Box<Unsent>>) -> Self {
        Self { unsent: unsent.map(|unsent| *unsent), ..Self::default() }
    }

    /// What is to be sent by another relay.
    pub fn leave(&mut self) -> Option<Box<Unsent>> {
        self.unsent.take().map(Box::new)
    }

    /// Whether another relay can go on with it.
    pub fn can_leave(&self) -> bool {
        self.kernel.is_none()
    }

    /// Whether something waits to be sent, so that the application is not read.
    pub fn holds(&self) -> bool {
        self.unsent.is_some() || self.kernel.as_ref().is_some_and(|kernel| kernel.pipe.held() > 0)
    }
}

impl Relay<'_> {
    pub(super) fn poll_up(&mut self, cx: &mut Context<'_>) -> Step {
        loop {
            if self.tunnel_failed.is_some() {
                return Poll::Pending;
            }
            if let Err(end) = ready!(self.poll_flush(cx)) {
                self.up.unsent = None;
                // Only a peer that is gone may have said why.
                if self.codec.order.inbound_ended() || matches!(end, End::Tunnel(_)) {
                    return Poll::Ready(Err(end));
                }
                self.tunnel_failed = Some(end);
                continue;
            }
            if self.codec.order.outbound_ended() {
                return Poll::Ready(Ok(()));
            }
            if self.rejection.is_some() {
                self.end_refused()?;
                continue;
            }
            if self.up.turn >= TURN {
                return yield_turn(cx);
            }
            self.hand_over_sending();
            let read = if self.up.kernel.is_some() { self.splice_app()? } else { self.read_app()? };
            if read {
                continue;
            }
            if self.codec.head_unsent() {
                // A server that speaks first must hear of the stream at once, and a raw stream goes both ways.
                let mut buffer = Buffer::take(Size::Small);
                let start = self.codec.seal_head(&mut buffer[..HEADROOM]).map_err(End::Tunnel)?;
                self.up.unsent = Some(Unsent { buffer, start, end: HEADROOM });
                continue;
            }
            ready!(self.app.poll_read_ready(cx)).map_err(End::Io)?;
        }
    }

    /// Sends what is sealed.
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Step {
        if self.up.kernel.is_some() {
            return self.poll_flush_kernel(cx);
        }
        let Some(unsent) = &mut self.up.unsent else { return Poll::Ready(Ok(())) };
        ready!(unsent.poll_send(self.tunnel, cx, |_| {})).map_err(|error| match error {
            error if is_reset(&error) => End::PeerReset,
            error => End::Io(error),
        })?;
        self.up.unsent = None;
        Poll::Ready(Ok(()))
    }

    /// Reads what the application has written, and seals it. Says whether there was anything.
    fn read_app(&mut self) -> Result<bool, End> {
        let mut buffer = Buffer::take(self.up.size);
        let slots = buffer.slots();
        let data_at = self.codec.data_at();
        let received = match slots {
            1 => receive(self.app, &mut buffer[HEADROOM + data_at..][..MAX_DATA]),
            _ => {
                let mut places = buffer[HEADROOM..].chunks_exact_mut(data_at + MAX_DATA + RECORD_END);
                let mut places: [IoSliceMut<'_>; SLOTS] = std::array::from_fn(|_| {
                    let place = places.next().and_then(|slot| slot.get_mut(data_at..data_at + MAX_DATA));
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
        self.up.size = Size::after(received).min(self.progress.largest());
        let start = self.codec.seal_head(&mut buffer[..HEADROOM]).map_err(End::Tunnel)?;
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
            _ => receive(self.app, &mut buffer[end + data_at..][..room]),
        };
        let mut total = received;
        match behind {
            Ok(0) if self.app_failed => {}
            Ok(0) => end += self.codec.seal_end(&mut buffer[end..]).map_err(End::Tunnel)?,
            Ok(n) => {
                end += self.codec.seal_data(&mut buffer[end..], n).map_err(End::Tunnel)?;
                total += n;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // Told once by the kernel: the next read would look like an end.
            Err(_) => self.app_failed = true,
        }
        self.progress.went_up(self.codec.order.is_client(), total);
        self.up.turn += total;
        self.up.unsent = Some(Unsent { buffer, start, end });
        Ok(true)
    }

    /// Answers a rejection with the end of our direction. A raw one ends with its tunnel, where nobody reads any more.
    fn end_refused(&mut self) -> Result<(), End> {
        if self.codec.order.outbound_raw() {
            self.codec.order.sent_end();
            return Ok(());
        }
        let mut buffer = Buffer::take(Size::Small);
        let start = self.codec.seal_head(&mut buffer[..HEADROOM]).map_err(End::Tunnel)?;
        let n = self.codec.seal_end(&mut buffer[HEADROOM..]).map_err(End::Tunnel)?;
        self.up.unsent = Some(Unsent { buffer, start, end: HEADROOM + n });
        Ok(())
    }

    /// Hands this direction's records to the kernel once it is raw and nothing sealed here is unsent. Tried once: where
    /// it fails, userspace goes on.
    fn hand_over_sending(&mut self) {
        if self.up.tried || !self.codec.may_hand_over_sending() {
            return;
        }
        self.up.tried = true;
        // The pipe first: from a socket that was handed over there is no way back.
        let handed = Pipe::new().and_then(|pipe| self.codec.hand_over_sending(self.tunnel).map(|()| pipe));
        match handed {
            Ok(pipe) => {
                self.up.kernel = Some(Box::new(InKernel { pipe, ending: false, calls_left: 0 }));
                self.progress.kernel_sends();
            }
            Err(error) => tracing::debug!(%error, "the kernel does not take over sending: userspace goes on"),
        }
    }

    /// Moves what the application has written into the pipe. Says whether there was anything.
    fn splice_app(&mut self) -> Result<bool, End> {
        let Some(kernel) = &mut self.up.kernel else { return Ok(false) };
        match kernel.pipe.fill(self.app, SPLICED) {
            Ok(0) if self.app_failed => Err(End::AppReset),
            Ok(0) => {
                kernel.ending = true;
                Ok(true)
            }
            Ok(n) => {
                self.progress.went_up(self.codec.order.is_client(), n);
                self.up.turn += n;
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) if is_reset(&error) => Err(End::AppReset),
            Err(error) => Err(End::Io(error)),
        }
    }

    /// Gives the kernel what the pipe holds, and the end of our direction behind it.
    fn poll_flush_kernel(&mut self, cx: &mut Context<'_>) -> Step {
        loop {
            let Some(kernel) = &mut self.up.kernel else { return Poll::Ready(Ok(())) };
            let done = if self.codec.key_update_owed() {
                let changed = self.codec.change_key_in_kernel(self.tunnel).map_err(End::Tunnel)?;
                changed.inspect(|()| kernel.calls_left = 1)
            } else if kernel.pipe.held() > 0 {
                if kernel.calls_left == 0 {
                    let calls = self.codec.judge_kernel_key(self.tunnel).map_err(End::Tunnel)?;
                    kernel.calls_left = calls.clamp(1, MOST_CALLS);
                    continue;
                }
                kernel.calls_left -= 1;
                kernel.pipe.drain(self.tunnel).map(|_| ())
            } else if std::mem::take(&mut kernel.ending) {
                let ended = self.codec.end_in_kernel(self.tunnel);
                kernel.ending = ended.is_err();
                ended
            } else {
                return Poll::Ready(Ok(()));
            };
            match done {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    ready!(self.tunnel.poll_write_ready(cx)).map_err(End::Io)?;
                }
                Err(error) if is_reset(&error) => return Poll::Ready(Err(End::PeerReset)),
                Err(error) => return Poll::Ready(Err(End::Io(error))),
            }
        }
    }
}
