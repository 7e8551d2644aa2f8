//! Requests on persistent connections, one outstanding on each: as many as the path takes.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use super::client::{open_echoes, receive, send};
use super::poll::{Interest, Poll, Ready};
use super::tally::Tally;
use super::{Load, MAX_SIZE, Report};

struct Slot {
    stream: TcpStream,
    sent: Instant,
    received: usize,
}

pub(super) fn run(to: SocketAddr, load: &Load) -> io::Result<Report> {
    let (poll, mut slots) = open_slots(to, load)?;
    let request = vec![0x5a; load.size];
    let mut buffer = vec![0; MAX_SIZE];
    let mut tally = Tally::new()?;
    tally.untimed = slots.len() as u64;
    let begin = Instant::now() + warm_up(load.duration);
    let end = begin + load.duration;
    for slot in &mut slots {
        slot.sent = Instant::now();
        send(&slot.stream, &request)?;
    }
    let mut ready = Ready::new();
    let mut now = Instant::now();
    while now < end {
        poll.wait(&mut ready, Some(end - now))?;
        now = Instant::now();
        for key in ready.keys() {
            let Some(slot) = slots.get_mut(key) else { continue };
            slot.received += receive(&slot.stream, &mut buffer)?;
            if slot.received < load.size {
                continue;
            }
            now = Instant::now();
            if now >= begin && now < end {
                tally.record(now - slot.sent);
            } else {
                tally.untimed += 1;
            }
            slot.received = 0;
            slot.sent = now;
            send(&slot.stream, &request)?;
        }
    }
    Ok(tally.report(load.duration, load.size))
}

fn open_slots(to: SocketAddr, load: &Load) -> io::Result<(Poll, Vec<Slot>)> {
    let poll = Poll::new()?;
    let mut slots = Vec::with_capacity(load.connections);
    for stream in open_echoes(to, load)? {
        stream.set_nonblocking(true)?;
        poll.add(&stream, slots.len(), Interest::Read)?;
        slots.push(Slot { stream, sent: Instant::now(), received: 0 });
    }
    Ok((poll, slots))
}

/// Not counted: a tenth, at most half a second.
fn warm_up(duration: Duration) -> Duration {
    (duration / 10).min(Duration::from_millis(500))
}
