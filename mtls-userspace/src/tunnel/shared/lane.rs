//! The handle of one stream on a shared tunnel, which the relay holds.

use std::io;
use std::sync::Arc;
use std::task::{Context, Poll};

use rustls::SupportedCipherSuite;

use super::{Core, Failure, Heard, Seat, Shared, Sink};
use crate::drain::Working;
use crate::identity::SpiffeId;
use crate::tunnel::frame::{ADOPTED, FIN, LEAVE, MAX_REJECT, Open, Place, RESET, Rejection};
use crate::tunnel::peers::Peer;
use crate::tunnel::{Stream, socket};

/// One stream on a shared tunnel. Dropped before our direction has ended, the stream is reset; the tunnel stays.
pub struct Lane {
    shared: Arc<Shared>,
    number: u32,
    /// Whether its tunnel was there before.
    reused: bool,
}

/// How our direction ends on a lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    Fin,
    /// The stream goes on elsewhere.
    Leave,
}

/// What a lane has to say to its relay.
pub(crate) struct LaneState {
    /// Nothing waits for the application.
    pub delivered: bool,
    pub sink_failed: bool,
    pub heard: Option<Heard>,
    pub outbound_ended: bool,
    /// The stream needs a tunnel of its own.
    pub fast: bool,
    /// The peer made one for it.
    pub adopted: bool,
    pub failure: Option<Failure>,
}

impl Lane {
    pub(super) fn new(shared: Arc<Shared>, number: u32, reused: bool) -> Self {
        Self { shared, number, reused }
    }

    pub fn peer(&self) -> &SpiffeId {
        self.shared.peer.id()
    }

    /// The peer, to be asked whether it is still trusted.
    pub fn proof(&self) -> Peer {
        self.shared.peer.clone()
    }

    pub fn cipher(&self) -> SupportedCipherSuite {
        self.shared.cipher
    }

    /// Whether this stream runs on a tunnel that was there before it.
    pub fn reused(&self) -> bool {
        self.reused
    }

    /// Whether the tunnel's handshake resumed an earlier session.
    pub fn resumed(&self) -> bool {
        self.shared.resumed
    }

    /// Where the stream is, to be adopted by a tunnel of its own.
    pub fn place(&self) -> Place {
        Place { tunnel: self.shared.id, lane: self.number }
    }

    /// What must not end before this stream's last bytes have left.
    pub fn hold(&self, working: Working) {
        self.with(|_, seat| seat.working = Some(working));
    }

    /// Gives back what was [held](Self::hold).
    pub fn let_go(&self) -> Option<Working> {
        self.with(|_, seat| seat.working.take())
    }

    /// Where the peer's bytes go from here on.
    pub(crate) fn attach(&self, sink: Arc<dyn Sink>) {
        self.with(|_, seat| seat.sink = Some(sink));
    }

    /// Leaves the waker, gives the application what waits for it, and tells how things stand.
    pub(crate) fn state(&self, cx: &Context<'_>) -> LaneState {
        self.with(|core, seat| {
            if !seat.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
                seat.waker = Some(cx.waker().clone());
            }
            let (delivered, granted) = seat.deliver();
            if let Some(more) = granted {
                core.grant(self.number, more);
            }
            LaneState {
                delivered,
                sink_failed: seat.sink_failed,
                heard: seat.heard.clone(),
                outbound_ended: seat.order.outbound_ended(),
                fast: seat.fast,
                adopted: seat.adopted.is_some(),
                failure: core.end.clone(),
            }
        })
    }

    /// Sends what `read` puts into the room it is given; 0 is passed on as it is. Pending while the lane's credit or
    /// the tunnel's room is used up.
    pub(crate) fn poll_send(
        &self,
        cx: &Context<'_>,
        read: impl FnOnce(&mut [u8]) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        self.with(|core, seat| {
            if seat.credit == 0 {
                seat.hurry();
                return Poll::Pending;
            }
            if core.out.room().is_none() && !core.flush() {
                if core.end.is_some() {
                    cx.waker().wake_by_ref();
                } else {
                    core.waiting.push(cx.waker().clone());
                }
                return Poll::Pending;
            }
            let Some(room) = core.out.room() else { return Poll::Pending };
            let length = room.len().min(seat.credit as usize);
            let read = read(&mut room[..length]);
            match read {
                Ok(n) if n > 0 => {
                    core.out.commit(self.number, n);
                    seat.credit -= n as u32;
                    seat.order.sent_data();
                    seat.count(n);
                    core.wake_driver();
                }
                _ => core.out.release_if_empty(),
            }
            Poll::Ready(read)
        })
    }

    /// Ends our direction.
    pub(crate) fn end(&self, ending: Ending) {
        self.with(|core, seat| {
            if !seat.order.outbound_ended() {
                seat.order.sent_end();
                core.push(self.number, &[if ending == Ending::Fin { FIN } else { LEAVE }]);
            }
        });
    }

    /// The stream was refused or given a second chance: it may ask for a tunnel of its own again.
    pub(crate) fn calm(&self) {
        self.with(|_, seat| seat.fast = false);
    }

    /// The tunnel that the peer made for this stream, and the answer to it. From here on this end sends on that.
    pub(crate) fn take_adopted(&self) -> Option<Stream> {
        let mut session = self.with(|_, seat| seat.adopted.take())?.arrive().ok()?;
        let (record, n) = session.codec.seal_frame(&[ADOPTED]).ok()?;
        session.codec.order.sent_data();
        // An idle connection has room for it.
        match socket::send_now(&session.tcp, &record[..n]) {
            Ok(sent) if sent == n => Some(Stream::serve(session)),
            _ => None,
        }
    }

    fn with<T>(&self, act: impl FnOnce(&mut Core, &mut Seat) -> T) -> T {
        let mut core = self.shared.lock();
        // Taken out for the time being, so that both can be changed.
        let mut seat = core.lift(self.number).expect("kept while its handle lives");
        let done = act(&mut core, &mut seat);
        core.put_back(seat);
        done
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.with(|core, seat| {
            // Whoever has ended may still have been listening.
            if !seat.order.is_over() {
                seat.order.sent_reset();
                core.push(self.number, &[RESET]);
            }
            (seat.sink, seat.waker, seat.adopted) = (None, None, None);
            seat.queue = Default::default();
            seat.abandoned = true;
            if let Some(working) = seat.working.take()
                && !core.out.is_empty()
            {
                core.leaving.push(working);
            }
        });
        self.shared.lock().vacate(self.number);
    }
}

/// A stream that a peer asks for on a shared tunnel.
pub struct LaneRequest {
    pub open: Open,
    pub lane: Lane,
}

impl LaneRequest {
    /// Refuses the stream.
    pub fn reject(self, rejection: &Rejection) {
        let mut frame = [0; MAX_REJECT];
        let n = rejection.encode(&mut frame);
        let number = self.lane.number;
        self.lane.with(|core, seat| {
            seat.order.sent_end();
            core.push(number, &frame[..n]);
        });
    }
}
