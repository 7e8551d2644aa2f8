//! New connections: connect, one exchange, close, one after another on each of the parallel slots.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::time::Instant;

use socket2::{Domain, Protocol, Socket, Type};

use super::client::{receive, send};
use super::poll::{Interest, Poll, Ready};
use super::tally::Tally;
use super::{Load, MAX_SIZE, Purpose, Report};

struct Slot {
    stream: TcpStream,
    begun: Instant,
    connected: bool,
    received: usize,
}

pub(super) fn run(to: SocketAddr, load: &Load) -> io::Result<Report> {
    let poll = Poll::new()?;
    let mut request = vec![0x5a; load.size + 1];
    request[0] = Purpose::Echo as u8;
    let mut buffer = vec![0; MAX_SIZE];
    let mut tally = Tally::new()?;
    let start = Instant::now();
    let end = start + load.duration;
    let mut slots = Vec::with_capacity(load.connections);
    for key in 0..load.connections {
        slots.push(Some(begin(&poll, to, key)?));
    }
    let mut ready = Ready::new();
    while slots.iter().any(Option::is_some) {
        poll.wait(&mut ready, None)?;
        for key in ready.keys() {
            let Some(slot) = slots.get_mut(key) else { continue };
            let Some(open) = slot else { continue };
            if !advance(open, &poll, key, &request, &mut buffer)? {
                continue;
            }
            let now = Instant::now();
            // Those that were open when the time ran out took part, but their rate isn't known.
            if now < end {
                tally.record(now - open.begun);
            } else {
                tally.untimed += 1;
            }
            *slot = None;
            if now < end {
                *slot = Some(begin(&poll, to, key)?);
            }
        }
    }
    Ok(tally.report(load.duration, load.size))
}

fn begin(poll: &Poll, to: SocketAddr, key: usize) -> io::Result<Slot> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    socket.set_tcp_nodelay(true)?;
    let begun = Instant::now();
    match socket.connect(&to.into()) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => return Err(error),
        _ => {}
    }
    poll.add(&socket, key, Interest::Write)?;
    Ok(Slot { stream: socket.into(), begun, connected: false, received: 0 })
}

/// Takes the next step; whether that was the last.
fn advance(slot: &mut Slot, poll: &Poll, key: usize, request: &[u8], buffer: &mut [u8]) -> io::Result<bool> {
    if slot.connected {
        slot.received += receive(&slot.stream, buffer)?;
        return Ok(slot.received + 1 >= request.len());
    }
    if let Some(error) = slot.stream.take_error()? {
        return Err(error);
    }
    slot.connected = true;
    send(&slot.stream, request)?;
    poll.change(&slot.stream, key, Interest::Read)?;
    Ok(false)
}
