//! What has come from a peer: bytes that have not been opened yet, and plaintext that has not been delivered.

use std::io;

use tokio::net::TcpStream;

use super::buffer::{Buffer, Size};
use super::socket;

/// Received bytes that have not been opened yet, on loan from the thread's buffers while there are any.
#[derive(Default)]
pub(crate) struct Incoming {
    pub buffer: Option<Buffer>,
    pub start: usize,
    pub end: usize,
}

impl Incoming {
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    pub fn unread(&self) -> &[u8] {
        self.buffer.as_ref().and_then(|buffer| buffer.get(self.start..self.end)).unwrap_or_default()
    }

    /// The first `length` unread bytes.
    pub fn head(&mut self, length: usize) -> &mut [u8] {
        let head = self.start..self.start + length;
        self.buffer.as_mut().and_then(|buffer| buffer.get_mut(head)).unwrap_or_default()
    }

    pub fn consume(&mut self, length: usize) {
        self.start = (self.start + length).min(self.end);
        self.release_if_empty();
    }

    /// Whether no byte more can be received before something is taken out.
    pub fn is_full(&self) -> bool {
        self.start == 0 && self.buffer.as_ref().is_some_and(|buffer| buffer.len() == self.end)
    }

    /// The size of buffer that suits who has just received so many bytes.
    pub fn size_after(&self, received: usize) -> Size {
        let fitting = Size::after(received);
        match &self.buffer {
            Some(buffer) if self.is_full() => fitting.max(buffer.size().larger()),
            _ => fitting,
        }
    }

    /// Waits for more bytes and receives them; 0 is the peer's end. Holds no buffer while it waits with none used.
    pub async fn fill(&mut self, tcp: &TcpStream) -> io::Result<usize> {
        self.release_if_empty();
        loop {
            tcp.readable().await?;
            match self.receive(tcp, Size::Small, usize::MAX) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.release_if_empty(),
                other => return other,
            }
        }
    }

    /// Receives what is there, at most `limit` bytes, into a buffer of the wanted size if one must be taken; moves what
    /// is unread to the front first.
    pub fn receive(&mut self, tcp: &TcpStream, size: Size, limit: usize) -> io::Result<usize> {
        let room = self.room(size);
        let limit = limit.min(room.len());
        let n = socket::receive(tcp, &mut room[..limit])?;
        self.end += n;
        Ok(n)
    }

    /// As [`Incoming::receive`], whether or not tokio has heard of anything to read.
    pub fn receive_now(&mut self, tcp: &TcpStream) -> io::Result<usize> {
        let n = socket::receive_now(tcp, self.room(Size::Small))?;
        self.end += n;
        Ok(n)
    }

    fn room(&mut self, size: Size) -> &mut [u8] {
        let buffer = self.buffer.get_or_insert_with(|| Buffer::take(size));
        if self.start > 0 {
            buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        if size > buffer.size() {
            let mut larger = Buffer::take(size);
            if larger.size() > buffer.size() {
                larger[..self.end].copy_from_slice(&buffer[..self.end]);
                *buffer = larger;
            }
        }
        &mut buffer[self.end..]
    }

    /// Whether plaintext was found that has not been delivered.
    pub fn has_plaintext(&self) -> bool {
        self.buffer.as_ref().is_some_and(|buffer| !buffer.ranges.is_empty())
    }

    /// Forgets plaintext that was delivered: so many pieces, and so many bytes of the next one.
    pub fn delivered(&mut self, pieces: usize, bytes: usize) {
        let Some(buffer) = &mut self.buffer else { return };
        buffer.ranges.drain(..pieces);
        if let Some((at, length)) = buffer.ranges.first_mut() {
            *at += bytes as u32;
            *length -= bytes as u32;
        }
    }

    /// Throws away the plaintext found; returns how many pieces it was.
    pub fn discard(&mut self) -> usize {
        let ranges = self.buffer.as_mut().map(|buffer| &mut buffer.ranges);
        ranges.map_or(0, |ranges| ranges.drain(..).len())
    }

    /// Gives the buffer back if nothing is left in it.
    pub fn release_if_empty(&mut self) {
        if self.is_empty() {
            (self.buffer, self.start, self.end) = (None, 0, 0);
        }
    }
}
