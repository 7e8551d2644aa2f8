//! A stream's place on a shared tunnel, as the tunnel keeps it: its order, its credit, what waits for its application.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::task::Waker;
use std::time::{Duration, Instant};

use super::Sink;
use crate::drain::Working;
use crate::tunnel::frame::{Frame, FrameError, Rejection, WINDOW};
use crate::tunnel::order::{Order, Role};
use crate::tunnel::stream::Moving;

/// Bytes an application has taken before they are granted again.
const GRANT: u32 = WINDOW / 2;
/// A stream that moves so many bytes in less than [`FAST`] is worth a tunnel of its own.
const STRETCH: u32 = 64 * 1024;
const FAST: Duration = Duration::from_millis(5);

/// How the peer's direction ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Heard {
    Fin,
    Reset,
    Rejected(Rejection),
    /// It goes on where the stream was adopted.
    Left,
}

pub(super) struct Seat {
    pub lane: u32,
    pub order: Order,
    /// Where the peer's bytes go at once; none before the application is connected.
    pub sink: Option<Arc<dyn Sink>>,
    /// What the application could not take.
    pub queue: VecDeque<u8>,
    /// Writing to the application failed.
    pub sink_failed: bool,
    pub heard: Option<Heard>,
    /// Bytes we may send.
    pub credit: u32,
    /// Bytes the peer may send.
    granted: u32,
    /// Bytes the application has taken since the last grant.
    taken: u32,
    /// Whether the stream has shown that it needs a tunnel of its own.
    pub fast: bool,
    moved: u32,
    since: Instant,
    pub waker: Option<Waker>,
    /// Its handle is gone; it waits for the peer's end.
    pub abandoned: bool,
    /// The tunnel on which the stream is to go on.
    pub adopted: Option<Box<Moving>>,
    pub working: Option<Working>,
}

impl Seat {
    pub fn new(lane: u32, role: Role) -> Self {
        Self {
            lane,
            order: Order::of_lane(role),
            sink: None,
            queue: VecDeque::new(),
            sink_failed: false,
            heard: None,
            credit: WINDOW,
            granted: WINDOW,
            taken: 0,
            fast: false,
            moved: 0,
            since: Instant::now(),
            waker: None,
            abandoned: false,
            adopted: None,
            working: None,
        }
    }

    /// Nothing follows in either direction, and nobody holds it.
    pub fn is_over(&self) -> bool {
        self.abandoned && self.order.is_over()
    }

    pub fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    /// Counts bytes that moved either way, and notices when they are many.
    pub fn count(&mut self, n: usize) {
        self.moved += n as u32;
        if self.moved >= STRETCH {
            let now = Instant::now();
            if now - self.since < FAST {
                self.hurry();
            }
            (self.moved, self.since) = (0, now);
        }
    }

    /// The stream wants more than a lane gives.
    pub fn hurry(&mut self) {
        if !self.fast {
            self.fast = true;
            self.wake();
        }
    }

    /// Takes a frame of the peer's. Returns bytes to be granted again.
    pub fn receive(&mut self, frame: Frame<'_>) -> Result<Option<u32>, FrameError> {
        self.order.received(&frame)?;
        let heard = match frame {
            Frame::Data(data) => return self.receive_data(data),
            Frame::Grant(more) => {
                self.credit =
                    self.credit.checked_add(more).filter(|it| *it <= WINDOW).ok_or(FrameError::Window)?;
                self.wake();
                return Ok(None);
            }
            Frame::Fin => Heard::Fin,
            Frame::Reset => Heard::Reset,
            Frame::Leave => Heard::Left,
            Frame::Reject(rejection) => Heard::Rejected(rejection),
            other => return Err(FrameError::OutOfOrder(other.name())),
        };
        if heard == Heard::Reset {
            self.queue = VecDeque::new();
        }
        // A server that refuses resets as well.
        if !matches!(self.heard, Some(Heard::Rejected(_))) {
            self.heard = Some(heard);
        }
        self.wake();
        Ok(None)
    }

    fn receive_data(&mut self, data: &[u8]) -> Result<Option<u32>, FrameError> {
        self.granted = self.granted.checked_sub(data.len() as u32).ok_or(FrameError::Window)?;
        if self.granted == 0 {
            self.hurry();
        }
        if self.abandoned {
            return Ok(None);
        }
        let mut rest = data;
        let mut granted = None;
        if self.queue.is_empty()
            && let Some(sink) = &self.sink
        {
            match sink.take(data) {
                Ok(n) => {
                    rest = data.get(n..).unwrap_or_default();
                    granted = self.took(n);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => self.fail_sink(),
            }
        }
        if !rest.is_empty() && !self.sink_failed {
            self.queue.extend(rest);
            self.wake();
        }
        Ok(granted)
    }

    fn fail_sink(&mut self) {
        (self.sink_failed, self.queue) = (true, VecDeque::new());
        self.wake();
    }

    /// Gives the application what waits for it. Says whether nothing waits any more, and what to grant again.
    pub fn deliver(&mut self) -> (bool, Option<u32>) {
        let mut taken = 0;
        while let Some(sink) = self.sink.as_ref().filter(|_| !self.queue.is_empty()) {
            match sink.take(self.queue.as_slices().0) {
                Ok(n) => {
                    self.queue.drain(..n);
                    taken += n;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => self.fail_sink(),
            }
        }
        if self.queue.is_empty() {
            // Most streams never need one again.
            self.queue = VecDeque::new();
        }
        let granted = self.took(taken);
        (self.queue.is_empty(), granted)
    }

    fn took(&mut self, n: usize) -> Option<u32> {
        self.count(n);
        self.taken += n as u32;
        if self.taken < GRANT || self.order.inbound_ended() {
            return None;
        }
        self.granted += self.taken;
        Some(std::mem::take(&mut self.taken))
    }
}
