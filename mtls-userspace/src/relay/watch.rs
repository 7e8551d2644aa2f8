//! Notices that a socket was reset while nobody reads or writes it.
//!
//! A direction that waits for bytes meets a reset where it reads; one that is blocked, or has ended, does not. Tokio
//! tells of errors through a future of its own, which is made only when a connection first needs it: most never do,
//! and an idle connection's memory counts.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::Context;

use tokio::io::{Interest, Ready};
use tokio::net::TcpStream;

type Error<'a> = Pin<Box<dyn Future<Output = io::Result<Ready>> + Send + 'a>>;

/// Wakes the task when one of its sockets fails.
pub(super) struct Watch<'a, const N: usize>([Error<'a>; N]);

impl<'a, const N: usize> Watch<'a, N> {
    pub fn new(sockets: [&'a TcpStream; N], cx: &mut Context<'_>) -> Self {
        let mut watch = Self(sockets.map(|socket| Box::pin(socket.ready(Interest::ERROR)) as Error<'a>));
        for error in &mut watch.0 {
            // Who asks looks at the socket itself; this only leaves the waker.
            let _ = error.as_mut().poll(cx);
        }
        watch
    }
}
