//! Shared tunnels: a tunnel that carries many small streams at once, each on a lane of its own.
//!
//! What costs time when many connections exchange little is not crypto but TCP: a send per message, and a wake-up at
//! its other end. On a shared tunnel whatever the connections of one pod say to another within one round of the event
//! loop leaves in one record and one send. A stream that turns out to be fast is moved to a tunnel of its own, where
//! nothing stands in its way and it is in nobody's: see `Connector::adopt`.
//!
//! One task drives the tunnel at each end: it receives, gives applications what is theirs at once (and queues what
//! they can't take, which credit bounds), and flushes what the lanes have gathered. It runs after the lanes that were
//! ready in the same round, so that they leave together.

use std::collections::{HashMap, VecDeque};
use std::future::poll_fn;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use rustls::{AlertDescription, SupportedCipherSuite};
use tokio::net::TcpStream;
use tokio::time::sleep;

use super::buffer::Size;
use super::codec::{Codec, Pulled};
use super::frame::{
    Frame, FrameError, Open, Place, RETIRE, RejectReason, Rejection, SharedId, encode_grant, encode_share,
};
use super::order::Role;
use super::peers::Peer;
use super::stream::Session;
use super::{Error, SLOT, Violation, socket};
use crate::drain::Working;
use crate::identity::SpiffeId;
use outgoing::{LANE_HEAD, Outgoing};
use seat::Seat;

mod lane;
mod outgoing;
mod seat;
mod shares;

pub(crate) use lane::{Ending, LaneState};
pub use lane::{Lane, LaneRequest};
pub(crate) use seat::Heard;
pub(super) use shares::{Live, Shares};

/// Streams that one tunnel carries.
pub const MAX_LANES: usize = 256;
/// No lane, but the tunnel itself.
const TUNNEL: u32 = u32::MAX;
/// Bytes received after which a tunnel lets the worker's other tasks have their turn.
const TURN: usize = 128 * 1024;
/// How long a retired tunnel without streams waits for its client to close it, whose OPEN may be under way.
const LINGER: Duration = Duration::from_secs(2);

/// Where a lane's bytes go: an application, without waiting.
pub(crate) trait Sink: Send + Sync {
    /// Takes what it can; `WouldBlock` if nothing.
    fn take(&self, bytes: &[u8]) -> io::Result<usize>;
}

/// How a shared tunnel ended, as each of its lanes is told.
#[derive(Debug, Clone)]
pub(crate) enum Failure {
    /// Politely, by either end.
    Closed,
    Reset,
    Truncated,
    Violation(Violation),
    Refused(AlertDescription),
    Other(Arc<str>),
}

impl From<&Error> for Failure {
    fn from(error: &Error) -> Self {
        match error {
            Error::Io(error) if socket::is_reset(error) => Self::Reset,
            Error::Protocol(violation) => Self::Violation(*violation),
            Error::Refused { alert } => Self::Refused(*alert),
            other => Self::Other(other.to_string().into()),
        }
    }
}

pub(crate) struct Shared {
    pub id: SharedId,
    pub peer: Peer,
    cipher: SupportedCipherSuite,
    resumed: bool,
    role: Role,
    core: Mutex<Core>,
}

struct Core {
    /// None once the tunnel has ended.
    link: Option<Box<Link>>,
    out: Outgoing,
    slots: Vec<Slot>,
    /// Seats that are taken.
    taken: usize,
    /// No stream begins any more.
    retired: bool,
    end: Option<Failure>,
    opened: VecDeque<(u32, Open)>,
    /// Nobody has looked at what was received before.
    fresh: bool,
    large: bool,
    driver: Option<Waker>,
    /// Lanes that wait for room to send.
    waiting: Vec<Waker>,
    /// Released once everything has left.
    leaving: Vec<Working>,
    /// Since when no seat is taken.
    idle_since: Instant,
}

/// Where one stream after the other has its seat.
#[derive(Default)]
struct Slot {
    /// The lane of the last one.
    last: Option<u32>,
    seat: Option<Box<Seat>>,
    /// Of streams before it that are over, but whose handles have not been dropped yet.
    #[expect(clippy::vec_box, reason = "a seat is lifted out of here and put back as it is")]
    over: Vec<Box<Seat>>,
}

fn slot_of(lane: u32) -> usize {
    (lane as u8).into()
}

struct Link {
    tcp: TcpStream,
    codec: Codec,
}

/// A tunnel on its way to another thread.
struct Moving {
    tcp: std::net::TcpStream,
    codec: Codec,
    peer: Peer,
    resumed: bool,
}

impl Moving {
    fn arrive(self: Box<Self>) -> io::Result<Box<Session>> {
        let Self { tcp, codec, peer, resumed } = *self;
        Ok(Box::new(Session { tcp: TcpStream::from_std(tcp)?, codec, peer, resumed }))
    }
}

impl Shared {
    /// Makes an idle tunnel a shared one, as its client.
    pub async fn begin(mut session: Box<Session>) -> Result<Arc<Self>, Error> {
        let mut id = SharedId::default();
        aws_lc_rs::rand::fill(&mut id).map_err(|_| Error::Busy)?;
        let (record, n) = session.codec.seal_frame(&encode_share(&id))?;
        session.codec.order.sent_share();
        socket::send_all(&session.tcp, &record[..n]).await?;
        Ok(Self::new(id, session, Role::Client))
    }

    /// What a client has made a shared tunnel.
    pub fn serve(id: SharedId, session: Box<Session>) -> Arc<Self> {
        Self::new(id, session, Role::Server)
    }

    fn new(id: SharedId, session: Box<Session>, role: Role) -> Arc<Self> {
        let Session { tcp, codec, peer, resumed } = *session;
        let cipher = codec.suite();
        let core = Core::new(Some(Box::new(Link { tcp, codec })));
        Arc::new(Self { id, peer, cipher, resumed, role, core: Mutex::new(core) })
    }

    fn lock(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a stream, if one may begin here.
    pub fn open(self: &Arc<Self>, open: &Open, reused: bool) -> Option<Lane> {
        let mut core = self.lock();
        if core.retired || core.end.is_some() || core.taken >= MAX_LANES {
            return None;
        }
        if self.peer.unfit().is_some() {
            core.retire();
            return None;
        }
        let slot = core.slots.iter().position(|slot| slot.seat.is_none()).unwrap_or(core.slots.len());
        let number = match core.slots.get(slot).and_then(|slot| slot.last) {
            None => Some(slot as u32),
            Some(last) => last.checked_add(MAX_LANES as u32),
        };
        // One of its slots has had all the streams that can be counted.
        let Some(number) = number.filter(|number| *number != TUNNEL) else {
            core.retire();
            return None;
        };
        let mut seat = Seat::new(number, Role::Client);
        seat.order.opened();
        core.sit(seat);
        let mut frame = [0; super::MAX_OPEN];
        let n = open.encode(&mut frame);
        core.push(number, &frame[..n]);
        Some(Lane::new(self.clone(), number, reused))
    }

    /// Begins no more streams, and closes the tunnel when the last is over.
    pub fn retire(&self) {
        self.lock().retire();
    }

    /// As its server, who has no say in it: asks the client to.
    fn ask_to_retire(&self) {
        let mut core = self.lock();
        if !core.retired {
            core.push(TUNNEL, &[RETIRE]);
            core.retire();
        }
    }

    pub fn has_ended(&self) -> bool {
        self.lock().end.is_some()
    }

    /// Gives a stream the tunnel on which its client wants it to go on; gives it back if there is no such stream. For any
    /// thread: the tunnel moves to the stream's.
    pub fn adopt(&self, lane: u32, session: Box<Session>) -> Result<(), Box<Session>> {
        let mut core = self.lock();
        let seat = match core.seat(lane) {
            Some(seat) if !seat.abandoned && seat.adopted.is_none() => seat,
            _ => return Err(session),
        };
        let Session { tcp, codec, peer, resumed } = *session;
        // A socket that cannot be moved is closed, which its client notices.
        if let Ok(tcp) = tcp.into_std() {
            seat.adopted = Some(Box::new(Moving { tcp, codec, peer, resumed }));
            seat.wake();
        }
        Ok(())
    }

    /// Drives a client's tunnel until it has ended.
    pub async fn drive(self: Arc<Self>, idle: Duration) {
        loop {
            tokio::select! {
                event = self.event() => match event {
                    Ok(Event::Ended) => return,
                    // A client's order has no OPEN.
                    Ok(Event::Opened(..)) => {}
                    Err(error) => {
                        tracing::info!(peer = %self.peer.id(), %error, "a shared tunnel ended");
                        return self.lock().fail(Failure::from(&error));
                    }
                },
                () = self.wait(idle) => {}
                _ = self.peer.until_distrusted(), if self.peer.distrusted().is_none() => self.retire(),
            }
            if self.has_ended() {
                return;
            }
        }
    }

    /// Waits until the tunnel should be looked at: closes it if it has been idle for so long, and resets it if its peer
    /// is no longer trusted and its streams had time to say so.
    async fn wait(&self, idle: Duration) {
        let distrusted = self.peer.distrusted().is_some();
        let limit = if distrusted { Duration::from_millis(100) } else { idle };
        sleep(limit).await;
        let mut core = self.lock();
        if distrusted {
            core.fail(Failure::Reset);
        } else if core.taken == 0 && core.idle_since.elapsed() >= limit {
            core.close();
        }
    }

    async fn event(&self) -> Result<Event, Error> {
        poll_fn(|cx| self.lock().poll(cx, self.role)).await
    }
}

enum Event {
    Opened(u32, Open),
    Ended,
}

impl Core {
    fn new(link: Option<Box<Link>>) -> Self {
        Self {
            link,
            out: Outgoing::default(),
            slots: Vec::new(),
            taken: 0,
            retired: false,
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

    fn push(&mut self, lane: u32, content: &[u8]) {
        self.out.push(lane, content);
        self.wake_driver();
    }

    fn grant(&mut self, lane: u32, bytes: u32) {
        self.push(lane, &encode_grant(bytes));
    }

    fn wake_driver(&mut self) {
        if let Some(driver) = self.driver.take() {
            driver.wake();
        }
    }

    fn seat(&mut self, lane: u32) -> Option<&mut Seat> {
        let Slot { seat, over, .. } = self.slots.get_mut(slot_of(lane))?;
        seat.iter_mut().chain(over).find(|seat| seat.lane == lane).map(|seat| &mut **seat)
    }

    /// Takes a seat out, to be put back.
    fn lift(&mut self, lane: u32) -> Option<Box<Seat>> {
        let Slot { seat, over, .. } = self.slots.get_mut(slot_of(lane))?;
        seat.take_if(|seat| seat.lane == lane).or_else(|| {
            let at = over.iter().position(|seat| seat.lane == lane)?;
            Some(over.swap_remove(at))
        })
    }

    fn put_back(&mut self, seat: Box<Seat>) {
        let slot = &mut self.slots[slot_of(seat.lane)];
        if slot.last == Some(seat.lane) {
            slot.seat = Some(seat);
        } else {
            slot.over.push(seat);
        }
    }

    fn sit(&mut self, seat: Seat) {
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
    fn vacate(&mut self, lane: u32) {
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

    fn retire(&mut self) {
        self.retired = true;
        self.wake_driver();
    }

    /// Ends the tunnel, whose lanes are told so.
    fn fail(&mut self, failure: Failure) {
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
    fn close(&mut self) {
        if let Some(Link { tcp, codec }) = self.link.as_deref_mut()
            && let Ok((record, n)) = codec.seal_close_notify()
        {
            let _ = socket::send(tcp, &record[..n]);
        }
        self.fail(Failure::Closed);
    }

    /// Sends what was gathered; says whether all of it has left. A failure is the tunnel's end.
    fn flush(&mut self) -> bool {
        let Some(Link { tcp, codec }) = self.link.as_deref_mut() else { return false };
        match self.out.flush(codec, tcp) {
            Ok(true) => {
                self.leaving.clear();
                self.waiting.drain(..).for_each(Waker::wake);
                true
            }
            Ok(false) => false,
            Err(error) => {
                tracing::debug!(%error, "a shared tunnel cannot send");
                self.fail(Failure::from(&error));
                false
            }
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>, role: Role) -> Poll<Result<Event, Error>> {
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
    fn hand_out(&mut self, mut content: &[u8], role: Role) -> Result<(), FrameError> {
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

    fn receive(&mut self, lane: u32, frame: Frame<'_>, role: Role) -> Result<(), FrameError> {
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

/// The server's end of a shared tunnel. Dropped, it resets what is still on it.
pub struct SharedTunnel {
    shared: Arc<Shared>,
    idle: Duration,
}

impl SharedTunnel {
    pub(super) fn new(shared: Arc<Shared>, idle: Duration) -> Self {
        Self { shared, idle }
    }

    pub fn peer(&self) -> &SpiffeId {
        self.shared.peer.id()
    }

    pub fn cipher(&self) -> SupportedCipherSuite {
        self.shared.cipher
    }

    /// The next stream, or `None` when the tunnel has ended. Everything else on it goes on while this is polled.
    /// Nothing is lost if the future is dropped.
    pub async fn next(&mut self) -> Result<Option<LaneRequest>, Error> {
        let Self { shared, idle } = self;
        loop {
            let retired = shared.lock().retired;
            let event = tokio::select! {
                event = shared.event() => event,
                () = shared.wait(if retired { LINGER } else { *idle }) => continue,
                _ = shared.peer.until_distrusted(), if shared.peer.distrusted().is_none() => continue,
            };
            match event {
                Ok(Event::Ended) => return Ok(None),
                Ok(Event::Opened(number, open)) => {
                    let lane = Lane::new(shared.clone(), number, true);
                    let request = LaneRequest { open, lane };
                    if shared.peer.unfit().is_none() {
                        return Ok(Some(request));
                    }
                    let detail = "the certificate that this tunnel began with counts no more";
                    request.reject(&Rejection::new(RejectReason::Unavailable, detail));
                    shared.ask_to_retire();
                }
                Err(error) => {
                    shared.lock().fail(Failure::from(&error));
                    return Err(error);
                }
            }
        }
    }

    /// Asks the client to begin no more streams here; those that are open go on, and so does [`Self::next`].
    pub fn retire(&mut self) {
        self.shared.ask_to_retire();
    }
}

impl Drop for SharedTunnel {
    fn drop(&mut self) {
        self.shared.lock().fail(Failure::Reset);
    }
}

/// The shared tunnels that this process serves, to be found by who adopts a stream of theirs.
#[derive(Default)]
pub struct Served(Mutex<Known>);

#[derive(Default)]
struct Known {
    /// By whom each leads to, who shares it, and what that calls it.
    tunnels: HashMap<(SpiffeId, SpiffeId, SharedId), Weak<Shared>>,
    /// Entries at which those of tunnels that have ended are dropped.
    sweep_at: usize,
}

impl std::fmt::Debug for Served {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Served").finish_non_exhaustive()
    }
}

impl Served {
    /// A client that uses an id twice gets what it asks for from the later one.
    pub(super) fn insert(&self, ours: &SpiffeId, shared: &Arc<Shared>) {
        let mut known = self.lock();
        if known.tunnels.len() >= known.sweep_at {
            known.tunnels.retain(|_, shared| shared.strong_count() > 0);
            known.sweep_at = (2 * known.tunnels.len()).max(64);
        }
        let key = (ours.clone(), shared.peer.id().clone(), shared.id);
        known.tunnels.insert(key, Arc::downgrade(shared));
    }

    pub(super) fn find(&self, ours: &SpiffeId, peer: &SpiffeId, place: &Place) -> Option<Arc<Shared>> {
        self.lock().tunnels.get(&(ours.clone(), peer.clone(), place.tunnel)).and_then(Weak::upgrade)
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
