//! Bytes there and back, each compared: tells whether a path keeps what passes it, not how fast it is.

use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::time::Instant;

use super::client::open;
use super::{Load, MAX_SIZE, Purpose, Report};

/// Blocks per connection, of the largest size that an echo takes.
const BLOCKS: usize = 64;

pub(super) fn run(to: SocketAddr, load: &Load) -> io::Result<Report> {
    let start = Instant::now();
    let mut bytes = 0;
    let (mut sent, mut back) = (vec![0; MAX_SIZE], vec![0; MAX_SIZE]);
    for _ in 0..load.connections {
        let mut stream = open(to, Purpose::Echo)?;
        let mut word = 0x9e37_79b9_7f4a_7c15_u64;
        for _ in 0..BLOCKS {
            for place in sent.chunks_exact_mut(size_of::<u64>()) {
                // xorshift: no two blocks are alike, so that one that is lost, doubled or late is noticed.
                word ^= word << 13;
                word ^= word >> 7;
                word ^= word << 17;
                place.copy_from_slice(&word.to_le_bytes());
            }
            stream.write_all(&sent)?;
            stream.read_exact(&mut back)?;
            if let Some(at) = sent.iter().zip(&back).position(|(sent, back)| sent != back) {
                let at = bytes + at as u64;
                return Err(io::Error::other(format!("byte {at} came back as another than was sent")));
            }
            bytes += sent.len() as u64;
        }
    }
    Ok(Report { seconds: start.elapsed().as_secs_f64(), bytes, ..Report::default() })
}
