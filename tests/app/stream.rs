//! A stream of bytes that both ends can compute: a length in, bytes on a socket and an order-sensitive sum out.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::time::Duration;

/// Makes the same endless stream everywhere.
#[derive(Default)]
pub struct Source {
    word: u64,
}

impl Source {
    /// Fills a buffer whose length is a multiple of eight.
    pub fn fill(&mut self, buffer: &mut [u8]) {
        for chunk in buffer.chunks_exact_mut(8) {
            self.word = self.word.wrapping_add(0x9e37_79b9_7f4a_7c15);
            chunk.copy_from_slice(&(self.word ^ (self.word >> 29)).to_le_bytes());
        }
    }
}

/// A sum over bytes that depends on their order, whatever pieces they arrive in.
#[derive(Default)]
pub struct Sum {
    state: u64,
    rest: Vec<u8>,
    pub bytes: u64,
}

impl Sum {
    pub fn add(&mut self, mut bytes: &[u8]) {
        self.bytes += bytes.len() as u64;
        if !self.rest.is_empty() {
            let n = (8 - self.rest.len()).min(bytes.len());
            self.rest.extend_from_slice(&bytes[..n]);
            bytes = &bytes[n..];
            if self.rest.len() < 8 {
                return;
            }
            let word = std::mem::take(&mut self.rest);
            self.mix(&word);
        }
        let whole = bytes.len() & !7;
        for chunk in bytes[..whole].chunks_exact(8) {
            self.mix(chunk);
        }
        self.rest.extend_from_slice(&bytes[whole..]);
    }

    pub fn finish(&self) -> String {
        let mut state = self.state;
        for byte in &self.rest {
            state = (state ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        }
        format!("{:016x}", state ^ self.bytes)
    }

    fn mix(&mut self, word: &[u8]) {
        let word = u64::from_le_bytes(word.try_into().unwrap_or_default());
        self.state = (self.state ^ word).wrapping_mul(0xff51_afd7_ed55_8ccd).rotate_left(29);
    }
}

/// Reads to the end of the peer's direction.
pub fn drain(mut stream: &TcpStream, sum: &mut Sum) -> io::Result<usize> {
    let mut buffer = vec![0; 256 << 10];
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(0),
            n => sum.add(&buffer[..n]),
        }
    }
}

/// Sends the first bytes of the stream that [`Source`] makes.
pub fn send(mut stream: &TcpStream, bytes: u64, sum: &mut Sum) -> io::Result<()> {
    let mut source = Source::default();
    let mut buffer = vec![0; 256 << 10];
    let mut left = bytes;
    while left > 0 {
        source.fill(&mut buffer);
        let n = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        stream.write_all(&buffer[..n])?;
        sum.add(&buffer[..n]);
        left -= n as u64;
    }
    Ok(())
}

/// Waits until the peer's kernel has acknowledged everything (SIOCOUTQ), for at most ten seconds.
pub fn await_sent(stream: &TcpStream) {
    for _ in 0..2000 {
        let mut queued = 0i32;
        // SAFETY: TIOCOUTQ writes one int.
        let result = unsafe { libc::ioctl(stream.as_raw_fd(), libc::TIOCOUTQ, &raw mut queued) };
        if result < 0 || queued == 0 {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_does_not_depend_on_the_pieces_but_on_the_order() {
        let mut bytes = vec![0; 4096];
        Source::default().fill(&mut bytes);
        let mut whole = Sum::default();
        whole.add(&bytes);
        for piece in [1, 3, 7, 8, 13, 1000] {
            let mut pieces = Sum::default();
            bytes.chunks(piece).for_each(|chunk| pieces.add(chunk));
            assert_eq!(pieces.finish(), whole.finish(), "pieces of {piece}");
        }
        bytes.swap(16, 24);
        let mut swapped = Sum::default();
        swapped.add(&bytes);
        assert_ne!(swapped.finish(), whole.finish());
    }
}
