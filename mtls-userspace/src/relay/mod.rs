//! The relay: two streams in, their bytes moved both ways until both have ended, a [`Report`] out.
//!
//! Keeps what TCP promises across the two connections: FIN becomes FIN, RST becomes RST, half-close lasts as long as
//! the applications want, a slow reader slows its writer. It never decides who may speak, and it closes nothing: the
//! caller drops the sockets at once when the report is there, and a socket that must be reset is marked so that its
//! close sends RST.

use std::future::Future;
use std::io;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};

use crate::tunnel::{self, Rejection, Size, TURN, UNSENT, bound_receive};

mod laned;
mod pace;
mod pipe;
mod plain;
mod tunnelled;
mod watch;

use pace::Pace;

pub use laned::{App, Counts, Growing, Laned, laned};
pub(crate) use pipe::Pipe;
pub use plain::{Unwritten, plain, plain_while_light};
pub use tunnelled::{tunnelled, tunnelled_while_light};

/// Application bytes moved so far, as seen from the connection's source; readable from anywhere while the relay runs.
#[derive(Debug, Default)]
pub struct Progress {
    sent: AtomicU64,
    received: AtomicU64,
    kernel_sends: AtomicBool,
    kernel_receives: AtomicBool,
    pace: Pace,
}

/// Which record layer carries a tunnel's bytes at this end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Records {
    Userspace,
    KernelSends,
    KernelReceives,
    Kernel,
}

impl Records {
    pub const ALL: [Self; 4] = [Self::Userspace, Self::KernelSends, Self::KernelReceives, Self::Kernel];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Userspace => "userspace",
            Self::KernelSends => "kernel_sends",
            Self::KernelReceives => "kernel_receives",
            Self::Kernel => "kernel",
        }
    }
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

    /// Counts an application's bytes that left for the tunnel. The application is the connection's source where the
    /// tunnel's client is.
    fn went_up(&self, at_client: bool, n: usize) {
        if at_client { self.add_sent(n) } else { self.add_received(n) }
    }

    /// Counts bytes out of the tunnel that an application took.
    fn went_down(&self, at_client: bool, n: usize) {
        if at_client { self.add_received(n) } else { self.add_sent(n) }
    }

    /// Who carries the records, where there are any; a long stream may pass from userspace to the kernel.
    pub fn records(&self) -> Records {
        match (self.kernel_sends.load(Ordering::Relaxed), self.kernel_receives.load(Ordering::Relaxed)) {
            (false, false) => Records::Userspace,
            (true, false) => Records::KernelSends,
            (false, true) => Records::KernelReceives,
            (true, true) => Records::Kernel,
        }
    }

    fn kernel_sends(&self) {
        self.kernel_sends.store(true, Ordering::Relaxed);
    }

    fn kernel_receives(&self) {
        self.kernel_receives.store(true, Ordering::Relaxed);
    }

    /// Raises both to what somebody else has counted.
    pub fn reach(&self, sent: u64, received: u64) {
        self.sent.fetch_max(sent, Ordering::Relaxed);
        self.received.fetch_max(received, Ordering::Relaxed);
    }

    /// Asks the relay to say when the connection turns out to be one that moves much.
    pub fn watch_pace(&self) {
        self.pace.watch();
    }

    /// Has the relay say so as soon as it can, whatever was moved: for tests of what comes after.
    pub fn take_for_bulk(&self) {
        self.pace.take_for_bulk();
    }

    /// The largest buffer to read into: among others a huge one would make them wait.
    fn largest(&self) -> Size {
        if self.pace.is_among_bulk() { Size::Huge } else { Size::Large }
    }

    fn moved(&self) -> u64 {
        self.sent() + self.received()
    }

    // One task writes: a plain load and store cost less than an atomic addition.
    pub fn add_sent(&self, n: usize) {
        self.sent.store(self.sent() + n as u64, Ordering::Relaxed);
    }

    pub fn add_received(&self, n: usize) {
        self.received.store(self.received() + n as u64, Ordering::Relaxed);
    }
}

/// Prepares a socket towards an application: one that is dialled, or a listener, whose accepted sockets inherit this.
///
/// Such a socket runs over loopback: it needs no window for long distances, which a sleeping reader's peer would fill.
pub fn prepare(socket: &socket2::Socket) -> io::Result<()> {
    /// As much as one huge read takes: each read wakes the application, which on a fast machine costs more than that
    /// its bytes have left the core's cache by then.
    const RECEIVE: usize = 1024 * 1024;
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_notsent_lowat(UNSENT)?;
    bound_receive(socket, RECEIVE)
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

/// What becomes of a connection while it is relayed among others.
pub enum Relayed {
    Ended(Report),
    /// It moves so much that others should not have to wait behind it. Nothing has ended and nothing is lost: it is to be
    /// relayed again, elsewhere, with what it has read and not yet written.
    Bulk,
}

/// What was relayed and how it ended.
#[derive(Debug)]
pub struct Report {
    pub sent: u64,
    pub received: u64,
    pub records: Records,
    pub end: End,
}

impl Report {
    pub(crate) fn new(progress: &Progress, end: End) -> Self {
        Self { sent: progress.sent(), received: progress.received(), records: progress.records(), end }
    }
}

/// Lets the worker's other tasks run and its sockets be polled before this one goes on.
fn yield_turn<T>(cx: &mut Context<'_>) -> Poll<T> {
    let _ = pin!(tokio::task::yield_now()).poll(cx);
    Poll::Pending
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What each connection costs while nothing happens on it, besides its sockets.
    #[tokio::test]
    async fn an_idle_relay_is_small() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let socket = tokio::net::TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let progress = Progress::default();
        let mut unwritten = Unwritten::default();
        let future = plain_while_light(&socket, &socket, &mut unwritten, &progress, std::future::pending());
        assert!(size_of_val(&future) <= 400, "{}", size_of_val(&future));
        let size = tunnelled::size_of_future();
        assert!(size <= 400, "{size}");
        assert!(tunnel::session_size() <= 480, "{}", tunnel::session_size());
    }
}
