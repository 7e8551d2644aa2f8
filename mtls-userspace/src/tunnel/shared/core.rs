//! What both ends of a shared tunnel are: its link, the seats of its streams, and what waits to leave.

use std::collections::VecDeque;
use std::io;
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use tokio::net::TcpStream;

use super::outgoing::{LANE_HEAD, Outgoing};
use super::seat::Seat;
use super::{Failure, TUNNEL};
use crate::drain::Working;
use crate::tunnel::buffer::Size;
use crate::tunnel::codec::{Codec, Pulled};
use crate::tunnel::frame::{Frame, FrameError, Open, encode_grant};
use crate::tunnel::order::Role;
use crate::tunnel::{Error, SLOT, TURN, Violation, socket};

pub(super) struct Core {
    /// None once the tunnel has ended.
    link: Option<Box<Link>>,
    pub out: Outgoing,
    pub slots: Vec<Slot>,
    /// Seats that are taken.
    pub taken: usize,
    /// No stream begins any more.
    pub retired: bool,
    /// It can't send any more; what the peer said before may still be read.
    broken: Option<Failure>,
    pub end: Option<Failure>,
    pub opened: VecDeque<(u32, Open)>,
    /// Nobody has looked at what was received before.
    fresh: bool,
    large: bool,
    driver: Option<Waker>,
    /// Lanes that wait for room to send.
    pub waiting: Vec<Waker>,
    /// Released once everything has left.
    pub leaving: Vec<Working>,
    /// Since when no seat is taken.
    pub idle_since: Instant,
}

/// Where one stream after the other has its seat.
#[derive(Default)]
pub(super) struct Slot {
    /// The lane of the last one.
    pub last: Option<u32>,
    pub seat: Option<Box<Seat>>,
    /// Of streams before it that are over, but whose handles have not been dropped yet.
    #[expect(clippy::vec_box, reason = "a seat is lifted out of here and put back as it is")]
    pub over: Vec<Box<Seat>>,
}

fn slot_of(lane: u32) -> usize {
    (lane as u8).into()
}

pub(super) struct Link {
    pub tcp: TcpStream,
    pub codec: Codec,
}

/// What a tunnel's driver is told.
pub(super) enum Event {
    Opened(u32, Open),
    Ended,
}

impl Core {
    pub fn new(link: Option<Box<Link>>) -> Self {
        Self {
            link,
            out: Outgoing::default(),
            slots: Vec::new(),
            taken: 0,
            retired: false,
            broken: None,
            end: None,
            opened: VecDeque::new(),
            fresh: true,
            large: false,
            driver: None,
            waiting: Vec::new(),
            leaving: Vec::new(),
            idle_since: Instant::now(),
        }
    }

    pub fn push(&mut self, lane: u32, content: &[u8]) {
        self.out.push(lane, content);
        self.wake_driver();
    }

    pub fn grant(&mut self, lane: u32, bytes: u32) {
        self.push(lane, &encode_grant(bytes));
    }

    pub fn wake_driver(&mut self) {
        if let Some(driver) = self.driver.take() {
            driver.wake();
        }
    }

    pub fn seat(&mut self, lane: u32) -> Option<&mut Seat> {
        let Slot { seat, over, .. } = self.slots.get_mut(slot_of(lane))?;
        seat.iter_mut().chain(over).find(|seat| seat.lane == lane).map(|seat| &mut **seat)
    }

    /// Takes a seat out, to be put back.
    pub fn lift(&mut self, lane: u32) -> Option<Box<Seat>> {
        let Slot { seat, over, .. } = self.slots.get_mut(slot_of(lane))?;
        seat.take_if(|seat| seat.lane == lane).or_else(|| {
            let at = over.iter().position(|seat| seat.lane == lane)?;
            Some(over.swap_remove(at))
        })
    }

    pub fn put_back(&mut self, seat: Box<Seat>) {
        let slot = &mut self.slots[slot_of(seat.lane)];
        if slot.last == Some(seat.lane) {
            slot.seat = Some(seat);
        } else {
            slot.over.push(seat);
        }
    }

    pub fn sit(&mut self, seat: Seat) {
        let at = slot_of(seat.lane);
        if self.slots.len() <= at {
            self.slots.resize_with(at + 1, Slot::default);
        }
        let slot = &mut self.slots[at];
        slot.over.extend(slot.seat.take());
        slot.last = Some(seat.lane);
        slot.seat = Some(Box::new(seat));
        self.taken += 1;
    }

    /// Frees the seat of a stream that is over in both directions, or whose tunnel is.
    pub fn vacate(&mut self, lane: u32) {
        let ended = self.end.is_some();
        if self.seat(lane).is_some_and(|seat| seat.is_over() || (seat.abandoned && ended)) {
            self.lift(lane);
            self.taken -= 1;
            if self.taken == 0 {
                self.idle_since = Instant::now();
            }
            if self.retired {
                self.wake_driver();
            }
        }
    }

    pub fn retire(&mut self) {
        self.retired = true;
        self.wake_driver();
    }

    /// Ends the tunnel, whose lanes are told so.
    pub fn fail(&mut self, failure: Failure) {
        let Some(link) = self.link.take() else { return };
        if !matches!(failure, Failure::Closed) {
            socket::reset_on_close(&link.tcp);
        }
        self.end = Some(failure);
        self.out = Outgoing::default();
        self.leaving.clear();
        self.slots
            .iter_mut()
            .flat_map(|slot| slot.seat.iter_mut().chain(&mut slot.over))
            .for_each(|seat| seat.wake());
        self.waiting.drain(..).for_each(Waker::wake);
        self.wake_driver();
    }

    /// Ends an idle tunnel politely.
    pub fn close(&mut self) {
        if let Some(Link { tcp, codec }) = self.link.as_deref_mut()
            && let Ok((record, n)) = codec.seal_close_notify()
        {
            let _ = socket::send(tcp, &record[..n]);
        }
        self.fail(Failure::Closed);
    }

    /// Sends what was gathered; says whether all of it has left. After a failure the driver ends the tunnel.
    pub fn flush(&mut self) -> bool {
        let Some(Link { tcp, codec }) = self.link.as_deref_mut() else { return false };
        if self.broken.is_some() {
            return false;
        }
        match self.out.flush(codec, tcp) {
            Ok(true) => {
                self.leaving.clear();
                self.waiting.drain(..).for_each(Waker::wake);
                true
            }
            Ok(false) => false,
            Err(error) => {
                tracing::debug!(%error, "a shared tunnel cannot send");
                self.broken = Some(Failure::from(&error));
                self.wake_driver();
                false
            }
        }
    }

    /// Why the peer does not listen any more, if it said so.
    fn last_words(&mut self, role: Role) -> Option<Error> {
        loop {
            let Link { tcp, codec } = self.link.as_deref_mut()?;
            // Asks the kernel: that there was nothing more is all that tokio knows here.
            match codec.incoming.receive_now(tcp) {
                Ok(0) | Err(_) => return None,
                Ok(_) => {}
            }
            if let Err(error) = self.open_records(role) {
                return Some(error);
            }
        }
    }

    pub fn poll(&mut self, cx: &mut Context<'_>, role: Role) -> Poll<Result<Event, Error>> {
        if !self.driver.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            self.driver = Some(cx.waker().clone());
        }
        // Behind what made the tunnel a shared one.
        if std::mem::take(&mut self.fresh) {
            self.open_records(role)?;
        }
        let mut received = 0;
        loop {
            if let Some((lane, open)) = self.opened.pop_front() {
                return Poll::Ready(Ok(Event::Opened(lane, open)));
            }
            if self.end.is_some() {
                return Poll::Ready(Ok(Event::Ended));
            }
            let more = if received < TURN {
                self.poll_receive(cx, role, &mut received)?
            } else {
                cx.waker().wake_by_ref();
                Poll::Pending
            };
            if more.is_ready() {
                continue;
            }
            if self.flush() {
                if self.retired && self.taken == 0 && role == Role::Client {
                    self.close();
                    continue;
                }
                return Poll::Pending;
            }
            if let Some(failure) = self.broken.take() {
                let said = self.last_words(role);
                self.fail(said.as_ref().map_or(failure, Failure::from));
                continue;
            }
            let Some(link) = &self.link else { continue };
            match link.tcp.poll_write_ready(cx) {
                Poll::Ready(ready) => ready?,
                Poll::Pending => return Poll::Pending,
            }
        }
    }

    /// Receives and hands out what is there; ready if there was anything.
    fn poll_receive(
        &mut self,
        cx: &mut Context<'_>,
        role: Role,
        received: &mut usize,
    ) -> Result<Poll<()>, Error> {
        let Some(Link { tcp, codec }) = self.link.as_deref_mut() else { return Ok(Poll::Pending) };
        codec.incoming.release_if_empty();
        match tcp.poll_read_ready(cx) {
            Poll::Ready(ready) => ready?,
            Poll::Pending => return Ok(Poll::Pending),
        }
        let size = if self.large { Size::Large } else { Size::Small };
        match codec.incoming.receive(tcp, size, usize::MAX) {
            Ok(0) => {
                self.fail(Failure::Truncated);
                return Ok(Poll::Ready(()));
            }
            Ok(n) => {
                self.large = codec.incoming.is_full() || n > SLOT;
                *received += n;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Poll::Ready(())),
            Err(error) => return Err(error.into()),
        }
        self.open_records(role).map(Poll::Ready)
    }

    /// Hands out the whole records received.
    fn open_records(&mut self, role: Role) -> Result<(), Error> {
        loop {
            let Some(Link { codec, .. }) = self.link.as_deref_mut() else { return Ok(()) };
            match codec.pull()? {
                Pulled::Closed => {
                    self.fail(Failure::Closed);
                    return Ok(());
                }
                _ if !codec.incoming.has_plaintext() => return Ok(()),
                _ => {}
            }
            // Lent out, so that the seats can be changed while it is read.
            let Some(mut buffer) = codec.incoming.buffer.take() else { return Ok(()) };
            let (bytes, ranges) = buffer.parts();
            let handed = ranges.drain(..).try_for_each(|(at, length)| {
                let content = bytes.get(at as usize..(at + length) as usize).unwrap_or_default();
                self.hand_out(content, role)
            });
            if let Some(Link { codec, .. }) = self.link.as_deref_mut() {
                codec.incoming.buffer = Some(buffer);
            }
            handed.map_err(Violation::Frame)?;
        }
    }

    /// Takes a record's lane frames.
    pub(super) fn hand_out(&mut self, mut content: &[u8], role: Role) -> Result<(), FrameError> {
        if content.is_empty() {
            return Err(FrameError::Empty);
        }
        while let Some((&[a, b, c, slot, high, low], rest)) = content.split_first_chunk::<LANE_HEAD>() {
            let lane = u32::from_be_bytes([a, b, c, slot]);
            let length = usize::from(u16::from_be_bytes([high, low]));
            let (frame, rest) = rest.split_at_checked(length).ok_or(FrameError::Malformed("lane"))?;
            content = rest;
            self.receive(lane, Frame::decode(frame)?, role)?;
        }
        if content.is_empty() { Ok(()) } else { Err(FrameError::Malformed("lane")) }
    }

    pub(super) fn receive(&mut self, lane: u32, frame: Frame<'_>, role: Role) -> Result<(), FrameError> {
        if lane == TUNNEL {
            return match frame {
                Frame::Retire if role == Role::Client => {
                    self.retire();
                    Ok(())
                }
                other => Err(FrameError::OutOfOrder(other.name())),
            };
        }
        if let Some(seat) = self.seat(lane) {
            let granted = seat.receive(frame)?;
            let over = seat.is_over();
            if let Some(more) = granted {
                self.grant(lane, more);
            }
            if over {
                self.vacate(lane);
            }
            return Ok(());
        }
        let slot = self.slots.get(slot_of(lane));
        let had = slot.and_then(|slot| slot.last).is_some_and(|last| last >= lane);
        let taken = slot.and_then(|slot| slot.seat.as_ref()).is_some_and(|seat| !seat.order.is_over());
        match frame {
            Frame::Open(open) if !had && !taken => {
                let mut seat = Seat::new(lane, role);
                seat.order.received(&Frame::Open(open.clone()))?;
                self.sit(seat);
                self.opened.push_back((lane, open));
                Ok(())
            }
            // They were under way when both directions had ended.
            Frame::Reset | Frame::Grant(_) if had => Ok(()),
            other => Err(FrameError::OutOfOrder(other.name())),
        }
    }
}
