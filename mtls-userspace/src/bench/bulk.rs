//! Bytes as fast as they go, one way.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use super::client::{open, receive};
use super::poll::{Interest, Poll, Ready, not_ready};
use super::{CHUNK, Load, Purpose, Report};

/// What servers that read on have received, and the time until they said so: not what socket buffers took.
pub(super) fn upload(to: SocketAddr, load: &Load) -> io::Result<Report> {
    let streams = open_all(to, load, Purpose::Sink)?;
    let chunk = vec![0x5a; CHUNK];
    let start = Instant::now();
    until(start + load.duration, &streams, Interest::Write, |mut stream| match stream.write(&chunk) {
        Err(error) if !not_ready(&error) => Err(error),
        _ => Ok(()),
    })?;
    for stream in &streams {
        stream.shutdown(Shutdown::Write)?;
        stream.set_nonblocking(false)?;
    }
    let mut bytes = 0;
    for mut stream in streams {
        let mut count = [0; 8];
        stream.read_exact(&mut count)?;
        bytes += u64::from_be_bytes(count);
    }
    Ok(report(start.elapsed(), bytes))
}

pub(super) fn download(to: SocketAddr, load: &Load) -> io::Result<Report> {
    let streams = open_all(to, load, Purpose::Source)?;
    let mut chunk = vec![0; CHUNK];
    let mut bytes = 0;
    let start = Instant::now();
    until(start + load.duration, &streams, Interest::Read, |stream| {
        bytes += receive(stream, &mut chunk)? as u64;
        Ok(())
    })?;
    Ok(report(start.elapsed(), bytes))
}

fn open_all(to: SocketAddr, load: &Load, purpose: Purpose) -> io::Result<Vec<TcpStream>> {
    let streams: Vec<TcpStream> =
        (0..load.connections).map(|_| open(to, purpose)).collect::<io::Result<_>>()?;
    for stream in &streams {
        stream.set_nonblocking(true)?;
    }
    Ok(streams)
}

/// Works on whichever connection is ready, until the time is over.
fn until(
    end: Instant,
    streams: &[TcpStream],
    interest: Interest,
    mut work: impl FnMut(&TcpStream) -> io::Result<()>,
) -> io::Result<()> {
    let poll = Poll::new()?;
    for (key, stream) in streams.iter().enumerate() {
        poll.add(stream, key, interest)?;
    }
    let mut ready = Ready::new();
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        poll.wait(&mut ready, Some(left))?;
        for key in ready.keys() {
            if let Some(stream) = streams.get(key) {
                work(stream)?;
            }
        }
    }
}

fn report(elapsed: Duration, bytes: u64) -> Report {
    Report { seconds: elapsed.as_secs_f64(), bytes, ..Report::default() }
}
