//! Bytes of a buffer that wait to be sent.

use std::io;
use std::task::{Context, Poll, ready};

use tokio::net::TcpStream;

use super::buffer::Buffer;
use super::socket::send;

pub(crate) struct Unsent {
    pub buffer: Buffer,
    pub start: usize,
    pub end: usize,
}

impl Unsent {
    /// Sends all of it; `sent` is told of each part.
    pub fn poll_send(
        &mut self,
        to: &TcpStream,
        cx: &mut Context<'_>,
        mut sent: impl FnMut(usize),
    ) -> Poll<io::Result<()>> {
        while self.start < self.end {
            match send(to, &self.buffer[self.start..self.end]) {
                Ok(n) => {
                    self.start += n;
                    sent(n);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready!(to.poll_write_ready(cx))?,
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        Poll::Ready(Ok(()))
    }
}
