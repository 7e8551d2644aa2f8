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

use std::future::poll_fn;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustls::{AlertDescription, SupportedCipherSuite};
use tokio::time::sleep;

use self::core::{Core, Event, Link};
use super::frame::{Open, RETIRE, SharedId, encode_share};
use super::order::Role;
use super::peers::Peer;
use super::stream::Session;
use super::{Error, Violation, socket};
use seat::Seat;

mod core;
mod lane;
mod outgoing;
mod seat;
mod server;
mod shares;

pub(crate) use lane::{Ending, LaneState};
pub use lane::{Lane, LaneRequest};
pub(crate) use seat::Heard;
pub use server::{Served, SharedTunnel};
pub(super) use shares::{Shares, Way};

/// Streams that one tunnel carries.
pub const MAX_LANES: usize = 256;
/// No lane, but the tunnel itself.
const TUNNEL: u32 = u32::MAX;

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
        // A socket that cannot be moved is closed, which its client notices.
        if let Ok(moving) = session.depart() {
            seat.adopted = Some(moving);
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

#[cfg(test)]
mod tests;
