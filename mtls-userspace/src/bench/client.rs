//! The load client: opens connections and hands them to the workload.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Instant;

use super::{Load, Purpose, Report, Workload, bulk, connect, idle, paced, request, verify};

/// Runs one load against a server and reports.
///
/// # Errors
///
/// The first error of any connection: a load that lost a connection measured something else.
pub fn run(to: SocketAddr, load: Load) -> io::Result<Report> {
    match load.workload {
        Workload::Upload => bulk::upload(to, &load),
        Workload::Download => bulk::download(to, &load),
        Workload::Request => request::run(to, &load),
        Workload::Paced => paced::run(to, &load),
        Workload::Connect => connect::run(to, &load),
        Workload::First => first(to, load.size),
        Workload::Idle => idle::run(to, &load),
        Workload::Verify => verify::run(to, &load),
    }
}

fn first(to: SocketAddr, size: usize) -> io::Result<Report> {
    let mut tally = super::tally::Tally::new()?;
    let start = Instant::now();
    let mut stream = open(to, Purpose::Echo)?;
    // One byte of the answer is what is waited for.
    stream.write_all(&vec![0x5a; size])?;
    stream.read_exact(&mut [0])?;
    tally.record(start.elapsed());
    Ok(tally.report(start.elapsed(), size))
}

/// A connection that still blocks, its purpose said.
pub(super) fn open(to: SocketAddr, purpose: Purpose) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect(to)?;
    stream.set_nodelay(true)?;
    stream.write_all(&[purpose as u8])?;
    Ok(stream)
}

/// Connections that have answered once, so that opening them is not part of what follows.
pub(super) fn open_echoes(to: SocketAddr, load: &Load) -> io::Result<Vec<TcpStream>> {
    let mut buffer = vec![0x5a; load.size];
    let mut streams = Vec::with_capacity(load.connections);
    for _ in 0..load.connections {
        let mut stream = open(to, Purpose::Echo)?;
        exchange(&mut stream, &mut buffer)?;
        streams.push(stream);
    }
    Ok(streams)
}

pub(super) fn exchange(stream: &mut TcpStream, buffer: &mut [u8]) -> io::Result<()> {
    stream.write_all(buffer)?;
    stream.read_exact(buffer)
}

/// A request goes into an empty socket buffer, whole: one that doesn't is an error, not a measurement.
pub(super) fn send(mut stream: &TcpStream, request: &[u8]) -> io::Result<()> {
    match stream.write(request)? {
        n if n == request.len() => Ok(()),
        _ => Err(io::Error::other("the socket did not take a whole request: use a smaller --size")),
    }
}

/// Reads what is there; 0 if nothing was.
pub(super) fn receive(mut stream: &TcpStream, buffer: &mut [u8]) -> io::Result<usize> {
    match stream.read(buffer) {
        Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
        Ok(n) => Ok(n),
        Err(error) if super::poll::not_ready(&error) => Ok(0),
        Err(error) => Err(error),
    }
}
