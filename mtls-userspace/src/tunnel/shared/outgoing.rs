//! What leaves on a shared tunnel: lane frames of many streams, gathered into one record until it is flushed.

use tokio::net::TcpStream;

use crate::tunnel::buffer::{Buffer, HEADROOM, Size};
use crate::tunnel::codec::Codec;
use crate::tunnel::frame::DATA;
use crate::tunnel::record::{HEADER, MAX_CONTENT};
use crate::tunnel::{Error, socket};

/// A lane and a length stand before each frame.
pub(super) const LANE_HEAD: usize = 6;
/// Where a record's content begins in the buffer.
const CONTENT: usize = HEADROOM + HEADER;
/// Data are not read into less room than this: the record is sent first.
const LEAST: usize = 1024;

#[derive(Default)]
pub(super) struct Outgoing {
    buffer: Option<Buffer>,
    /// Content gathered in `buffer`.
    filled: usize,
    /// What is sealed in `buffer` and not yet sent; while there is any, nothing is gathered.
    start: usize,
    end: usize,
    /// Frames that found no room.
    later: Vec<u8>,
}

impl Outgoing {
    /// Whether everything has been given to the kernel.
    pub fn is_empty(&self) -> bool {
        self.filled == 0 && !self.is_blocked()
    }

    fn is_blocked(&self) -> bool {
        self.start < self.end || !self.later.is_empty()
    }

    /// Adds a frame that must not wait for its sender.
    pub fn push(&mut self, lane: u32, content: &[u8]) {
        let length = LANE_HEAD + content.len();
        if self.is_blocked() || self.filled + length > MAX_CONTENT {
            self.later.extend_from_slice(&head(lane, content.len()));
            self.later.extend_from_slice(content);
            return;
        }
        let room = &mut self.buffer.get_or_insert_with(|| Buffer::take(Size::Small))[CONTENT + self.filled..];
        room[..LANE_HEAD].copy_from_slice(&head(lane, content.len()));
        room[LANE_HEAD..length].copy_from_slice(content);
        self.filled += length;
    }

    /// Where to read an application's bytes to, to be [committed](Self::commit); `None` before what is there is sent.
    pub fn room(&mut self) -> Option<&mut [u8]> {
        if self.is_blocked() || self.filled + LANE_HEAD + 1 + LEAST > MAX_CONTENT {
            return None;
        }
        let buffer = self.buffer.get_or_insert_with(|| Buffer::take(Size::Small));
        buffer.get_mut(CONTENT + self.filled + LANE_HEAD + 1..CONTENT + MAX_CONTENT)
    }

    /// Makes a DATA frame of the first `length` bytes of the room.
    pub fn commit(&mut self, lane: u32, length: usize) {
        if let Some(buffer) = &mut self.buffer {
            let room = &mut buffer[CONTENT + self.filled..];
            room[..LANE_HEAD].copy_from_slice(&head(lane, length + 1));
            room[LANE_HEAD] = DATA;
            self.filled += LANE_HEAD + 1 + length;
        }
    }

    /// Gives the buffer back if nothing is in it.
    pub fn release_if_empty(&mut self) {
        if self.is_empty() {
            self.buffer = None;
        }
    }

    /// Seals and sends what is there; says whether all of it has left.
    pub fn flush(&mut self, codec: &mut Codec, tcp: &TcpStream) -> Result<bool, Error> {
        loop {
            if self.start == self.end {
                self.gather_later();
                if self.filled == 0 {
                    self.buffer = None;
                    return Ok(true);
                }
            }
            let Some(buffer) = &mut self.buffer else { return Ok(true) };
            if self.start == self.end {
                self.start = codec.seal_head(&mut buffer[..HEADROOM])?;
                self.end = HEADROOM + codec.seal_lanes(&mut buffer[HEADROOM..], self.filled)?;
                self.filled = 0;
            }
            match socket::send(tcp, &buffer[self.start..self.end]) {
                Ok(n) => self.start += n,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Everything that would leave, record after record, without their seals.
    #[cfg(test)]
    pub fn gathered(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            self.gather_later();
            let Some(buffer) = self.buffer.as_ref().filter(|_| self.filled > 0) else { return all };
            all.extend_from_slice(&buffer[CONTENT..CONTENT + self.filled]);
            self.filled = 0;
        }
    }

    /// Moves as many whole frames that had no room as a record takes.
    fn gather_later(&mut self) {
        if self.later.is_empty() {
            return;
        }
        let mut length = 0;
        while let Some(&[_, _, _, _, high, low]) =
            self.later.get(length..).and_then(|rest| rest.first_chunk())
        {
            let next = length + LANE_HEAD + usize::from(u16::from_be_bytes([high, low]));
            if self.filled + next > MAX_CONTENT {
                break;
            }
            length = next;
        }
        let buffer = self.buffer.get_or_insert_with(|| Buffer::take(Size::Small));
        let at = CONTENT + self.filled;
        buffer[at..at + length].copy_from_slice(&self.later[..length]);
        self.filled += length;
        self.later.drain(..length);
        if self.later.is_empty() {
            self.later = Vec::new();
        }
    }
}

fn head(lane: u32, length: usize) -> [u8; LANE_HEAD] {
    let mut head = [0; LANE_HEAD];
    head[..4].copy_from_slice(&lane.to_be_bytes());
    head[4..].copy_from_slice(&(length as u16).to_be_bytes());
    head
}
