//! From the tunnel to the application.

use std::io::{self, IoSlice};
use std::net::Shutdown;
use std::task::{Context, Poll, ready};

use socket2::SockRef;

use super::steady::Steady;
use super::{End, Relay, Step, TURN};
use crate::relay::pipe::Pipe;
use crate::relay::yield_turn;
use crate::tunnel::{
    Incoming, MAX_RANGES, Pulled, RecordError, Size, is_reset, send, send_now, send_vectored,
};

/// Taken from the kernel at once; one record in fact.
const SPLICED: usize = 64 * 1024;

#[derive(Default)]
pub(super) struct Down {
    /// Ranges of the incoming buffer already delivered, and bytes of the next one.
    delivered: usize,
    offset: usize,
    /// The buffer to receive into next, by what was received last.
    size: Size,
    pub steady: Steady,
    /// A FIN waits for the ranges before it.
    pub fin: bool,
    /// The application was written to before. Of a socket just made tokio has not heard yet that there is room.
    begun: bool,
    /// The application can't be written to any more.
    dead: bool,
    /// The tunnel's connection has ended after the raw direction had: there is nothing to read but a reset to notice.
    pub over: bool,
    pub turn: usize,
    /// Handing this direction to the kernel was tried.
    tried: bool,
    /// There when the kernel opens this direction.
    kernel: Option<Box<InKernel>>,
}

/// A direction whose records the kernel opens.
struct InKernel {
    pipe: Pipe,
    /// An error of the tunnel's that waits for what came before it: the kernel tells it once.
    cut: Option<io::Error>,
}

impl Down {
    /// Leaves to another relay what the application has not taken.
    pub fn leave(&mut self, incoming: &mut Incoming) {
        incoming.delivered(self.delivered, self.offset);
    }

    /// Whether another relay can go on with it.
    pub fn can_leave(&self) -> bool {
        !self.fin && !self.dead && !self.over && self.kernel.is_none()
    }

    /// Whether something waits in a pipe for the application, so that the tunnel is not read.
    pub fn holds(&self) -> bool {
        self.kernel.as_ref().is_some_and(|kernel| kernel.pipe.held() > 0)
    }
}

impl Relay<'_> {
    pub(super) fn poll_down(&mut self, cx: &mut Context<'_>) -> Step {
        if self.down.dead || self.down.over {
            return Poll::Pending;
        }
        loop {
            if let Err(end) = ready!(self.poll_deliver(cx)) {
                if self.codec.order.outbound_ended() {
                    return Poll::Ready(Err(end));
                }
                (self.app_failed, self.down.dead) = (true, true);
                self.codec.incoming = Default::default();
                self.down.kernel = None;
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
            if self.down.kernel.is_some() {
                ready!(self.poll_splice_tunnel(cx))?;
                continue;
            }
            match self.codec.pull().map_err(End::Tunnel)? {
                Pulled::Fin => self.down.fin = true,
                Pulled::Reject(rejection) => {
                    self.rejection = Some(rejection);
                    return Poll::Pending;
                }
                Pulled::Closed => return Poll::Ready(Err(self.tunnel_end(End::Truncated))),
                // Records of the raw direction may stand behind it already.
                Pulled::Raw => continue,
                // Of an idle tunnel, which the order knows.
                Pulled::Data | Pulled::Open(_) | Pulled::Share(_) | Pulled::Adopt(_) | Pulled::Adopted => {}
            }
            if self.hand_over_receiving()? {
                continue;
            }
            if !self.down.fin && !self.codec.incoming.has_plaintext() {
                ready!(self.poll_receive(cx))?;
            }
        }
    }

    /// Receives more records. After our peer's end there should be none, but its reset must be noticed.
    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Step {
        // What the kernel is to open must not be taken from it; the record that was begun is finished here.
        let limit = match self.codec.missing().map_err(End::Tunnel)? {
            missing if missing > 0 && !self.down.tried && self.codec.wants_kernel_to_receive() => missing,
            _ => usize::MAX,
        };
        loop {
            self.codec.incoming.release_if_empty();
            let readable = self.tunnel.poll_read_ready(cx);
            if readable.is_pending() {
                self.down.steady.poll_pause(self.tunnel, cx);
            }
            ready!(readable).map_err(End::Io)?;
            let incoming = &mut self.codec.incoming;
            match incoming.receive(self.tunnel, self.down.size, limit) {
                Ok(0) if self.codec.order.inbound_closed() => {
                    self.down.over = true;
                    return Poll::Pending;
                }
                Ok(0) => return Poll::Ready(Err(self.tunnel_end(End::Truncated))),
                Ok(n) => {
                    self.down.size = incoming.size_after(n).min(self.progress.largest());
                    if self.down.size > Size::Small {
                        let most = self.progress.largest().content();
                        self.down.steady.received(self.tunnel, n, most);
                    }
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
        if self.down.kernel.is_some() {
            return self.poll_drain(cx);
        }
        let at_client = self.codec.order.is_client();
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
            let written = if count == 1 && !std::mem::replace(&mut self.down.begun, true) {
                send_now(self.app, first)
            } else if count == 1 {
                send(self.app, first)
            } else {
                places[0] = IoSlice::new(first);
                send_vectored(self.app, &places[..count])
            };
            match written {
                Ok(n) => {
                    self.progress.went_down(at_client, n);
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

    /// Hands this direction's records to the kernel once it is raw and nothing of it is left here. Says whether it did.
    /// Tried once: where it fails, userspace goes on.
    fn hand_over_receiving(&mut self) -> Result<bool, End> {
        if self.down.tried || !self.codec.wants_kernel_to_receive() || !self.codec.incoming.is_empty() {
            return Ok(false);
        }
        self.down.tried = true;
        self.down.steady.end(self.tunnel);
        let handed = Pipe::new().and_then(|pipe| self.codec.hand_over_receiving(self.tunnel).map(|()| pipe));
        match handed {
            Ok(pipe) => {
                self.codec.incoming.release_if_empty();
                self.down.kernel = Some(Box::new(InKernel { pipe, cut: None }));
                self.progress.kernel_receives();
                Ok(true)
            }
            Err(error) => {
                tracing::debug!(%error, "the kernel does not take over receiving: userspace goes on");
                Ok(false)
            }
        }
    }

    /// Moves opened records into the empty pipe, or takes the one that is no data.
    fn poll_splice_tunnel(&mut self, cx: &mut Context<'_>) -> Step {
        let mut records = 0;
        while let Some(InKernel { pipe, cut }) = self.down.kernel.as_deref_mut() {
            let filled = match cut.take() {
                Some(error) => Err(error),
                None => pipe.fill(self.tunnel, SPLICED),
            };
            match filled {
                Ok(n) if n > 0 => {
                    self.codec.opened_in_kernel();
                    records += 1;
                    if records >= pipe.records {
                        break;
                    }
                }
                // First what came before it. An end is met again; so are no record, and one that is no data.
                Ok(_) if pipe.held() > 0 => break,
                Err(error) if pipe.held() > 0 => {
                    let again = error.kind() == io::ErrorKind::WouldBlock
                        || error.raw_os_error() == Some(libc::EINVAL);
                    *cut = (!again).then_some(error);
                    break;
                }
                Ok(_) if self.codec.order.inbound_closed() => {
                    self.down.over = true;
                    return Poll::Pending;
                }
                Ok(_) => return Poll::Ready(Err(self.tunnel_end(End::Truncated))),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    ready!(self.tunnel.poll_read_ready(cx)).map_err(End::Io)?;
                }
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                    return Poll::Ready(match self.codec.control_from_kernel(self.tunnel) {
                        Ok(Pulled::Data) => Ok(()),
                        Ok(Pulled::Fin) => {
                            self.down.fin = true;
                            Ok(())
                        }
                        Ok(_) => Err(self.tunnel_end(End::Truncated)),
                        Err(error) => Err(End::Tunnel(error)),
                    });
                }
                Err(error) if is_reset(&error) => return Poll::Ready(Err(self.tunnel_end(End::PeerReset))),
                // A record that does not authenticate.
                Err(error) if error.raw_os_error() == Some(libc::EBADMSG) => {
                    return Poll::Ready(Err(End::Tunnel(RecordError::Forged.into())));
                }
                Err(error) => return Poll::Ready(Err(End::Io(error))),
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Gives the application what the pipe holds.
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Step {
        while let Some(InKernel { pipe, .. }) = self.down.kernel.as_deref_mut()
            && pipe.held() > 0
        {
            match pipe.drain(self.app) {
                Ok(n) => {
                    self.progress.went_down(self.codec.order.is_client(), n);
                    self.down.turn += n;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    ready!(self.app.poll_write_ready(cx)).map_err(End::Io)?;
                }
                Err(error) if is_reset(&error) => return Poll::Ready(Err(End::AppReset)),
                Err(error) => return Poll::Ready(Err(End::Io(error))),
            }
        }
        Poll::Ready(Ok(()))
    }
}
