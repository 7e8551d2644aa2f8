//! Plaintext from outside the pods, as the kernel half reports it: a ring buffer in, [`Event`]s out.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, SystemTime};

use aya::maps::{MapData, RingBuf};
use mtls_common::event;
use tokio::io::unix::AsyncFd;

use super::address::socket_addr;
use super::sys;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Event {
    pub kind: EventKind,
    /// The pod's side.
    pub local: SocketAddr,
    pub remote: SocketAddr,
    pub at: SystemTime,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EventKind {
    PlaintextAccepted,
    PlaintextRefused,
}

/// Reads the kernel half's events, and passes what it logs on to the process's log. Dropped, both are lost.
pub struct Events {
    ring: RingBuf<MapData>,
    log: Log,
    /// Made when first awaited: it needs the context of a tokio runtime.
    readiness: Option<Readiness>,
}

/// The kernel half's log: when it is readable, and what passes it on.
pub(super) struct Log {
    pub fd: OwnedFd,
    pub flush: Box<dyn FnMut() + Send>,
}

/// Duplicates of the descriptors, to wait on.
struct Readiness {
    ring: AsyncFd<OwnedFd>,
    log: AsyncFd<OwnedFd>,
}

impl Events {
    pub(super) fn new(ring: RingBuf<MapData>, log: Log) -> Self {
        Self { ring, log, readiness: None }
    }

    /// An event that is there already.
    pub(super) fn take(&mut self) -> Option<Event> {
        std::iter::from_fn(|| self.ring.next().map(|record| parse(&record))).flatten().next()
    }

    /// The next event. Cancel safe.
    pub async fn next(&mut self) -> io::Result<Event> {
        let readiness = match &mut self.readiness {
            Some(readiness) => readiness,
            none => none.insert(Readiness {
                ring: sys::readable(self.ring.as_fd().try_clone_to_owned()?)?,
                log: sys::readable(self.log.fd.try_clone()?)?,
            }),
        };
        loop {
            // Read first: readiness says that something came, not that something is left.
            if let Some(event) = self.ring.next().map(|record| parse(&record)) {
                match event {
                    Some(event) => return Ok(event),
                    None => continue,
                }
            }
            (self.log.flush)();
            tokio::select! {
                ready = readiness.ring.readable() => ready?.clear_ready(),
                ready = readiness.log.readable() => ready?.clear_ready(),
            }
        }
    }
}

/// None for a kind that this version doesn't know.
fn parse(record: &[u8]) -> Option<Event> {
    let raw: mtls_common::Event = sys::record(record)?;
    let kind = match raw.kind {
        event::PLAINTEXT_ACCEPTED => EventKind::PlaintextAccepted,
        event::PLAINTEXT_REFUSED => EventKind::PlaintextRefused,
        _ => return None,
    };
    let age = sys::monotonic().saturating_sub(Duration::from_nanos(raw.time_ns));
    let at = SystemTime::now().checked_sub(age)?;
    Some(Event { kind, local: socket_addr(raw.local), remote: socket_addr(raw.remote), at })
}
