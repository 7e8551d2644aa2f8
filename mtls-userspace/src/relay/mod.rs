//! The relay: two streams in, their bytes moved both ways until both have ended, a [`Report`] out.
//!
//! Keeps what TCP promises across the two connections: FIN becomes FIN, RST becomes RST, half-close lasts as long as
//! the applications want, a slow reader slows its writer. It never decides who may speak, and it closes nothing: the
//! caller drops the sockets at once when the report is there, and a socket that must be reset is marked so that its
//! close sends RST.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::tunnel::{self, Rejection};

mod plain;
mod tunnelled;

pub use plain::plain;
pub use tunnelled::tunnelled;

/// Application bytes moved so far, as seen from the connection's source; readable from anywhere while the relay runs.
#[derive(Debug, Default)]
pub struct Progress {
    sent: AtomicU64,
    received: AtomicU64,
}

impl Progress {
    /// From source to destination.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// From destination to source.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    // One task writes: a plain load and store cost less than an atomic addition.
    pub fn add_sent(&self, n: usize) {
        self.sent.store(self.sent() + n as u64, Ordering::Relaxed);
    }

    pub fn add_received(&self, n: usize) {
        self.received.store(self.received() + n as u64, Ordering::Relaxed);
    }
}

/// How a relayed connection ended.
#[derive(Debug)]
pub enum End {
    /// Both directions ended by FIN.
    Clean,
    /// The application's socket was reset or failed (for [`plain`]: `a`'s).
    AppReset,
    /// The far side was reset (for [`plain`]: `b`'s).
    PeerReset,
    /// The far agent refused the stream.
    Rejected(Rejection),
    /// `stop` resolved: policy no longer allows the connection.
    Revoked,
    /// The tunnel's connection ended without the stream's end.
    Truncated,
    /// The tunnel failed otherwise: an alert, a protocol violation.
    Tunnel(tunnel::Error),
    /// A socket failed with something else than a reset.
    Io(io::Error),
}

/// What was relayed and how it ended.
#[derive(Debug)]
pub struct Report {
    pub sent: u64,
    pub received: u64,
    pub end: End,
}

impl Report {
    fn new(progress: &Progress, end: End) -> Self {
        Self { sent: progress.sent(), received: progress.received(), end }
    }
}

/// Whether an error on a socket says that its other end is gone.
fn is_reset(error: &io::Error) -> bool {
    use io::ErrorKind::*;
    matches!(error.kind(), ConnectionReset | BrokenPipe | ConnectionAborted | NotConnected | TimedOut)
}
