//! Requests at a fixed rate, whatever the answers do (an open loop).
//!
//! Each connection has a timetable. A request that is due while the last answer is still awaited goes out late, and its
//! latency counts from when it was due: a path that stalls pays for every request that it kept waiting (coordinated
//! omission corrected).

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use super::client::{open_echoes, receive, send};
use super::poll::{Interest, Poll, Ready};
use super::tally::Tally;
use super::{Load, MAX_SIZE, Report};

/// How long answers are waited for after the last request was due.
const GRACE: Duration = Duration::from_secs(2);

/// When one connection's requests are due, in time since the start; slots are spread evenly over one interval.
#[derive(Debug)]
struct Timetable {
    next: Duration,
    interval: Duration,
    end: Duration,
    /// When the request that is out was due.
    out: Option<Duration>,
}

impl Timetable {
    fn new(slot: usize, slots: usize, rate: f64, end: Duration) -> Self {
        let spacing = Duration::from_secs_f64(1.0 / rate);
        Self { next: spacing * slot as u32, interval: spacing * slots as u32, end, out: None }
    }

    /// When the next request may be sent, if one is still to come and none is out.
    fn due(&self) -> Option<Duration> {
        (self.out.is_none() && self.next < self.end).then_some(self.next)
    }

    /// Takes the request that is due at `now`, if there is one.
    fn send(&mut self, now: Duration) -> bool {
        let may = self.due().is_some_and(|due| due <= now);
        if may {
            self.out = Some(self.next);
            self.next += self.interval;
        }
        may
    }

    /// The latency of the answer that came at `now`.
    fn answered(&mut self, now: Duration) -> Option<Duration> {
        self.out.take().map(|due| now.saturating_sub(due))
    }

    /// What requests have waited that never got an answer, or never got out, when everything stops at `now`.
    fn unanswered(&mut self, now: Duration) -> Vec<Duration> {
        let mut waited: Vec<Duration> = self.answered(now).into_iter().collect();
        while self.next < self.end {
            waited.push(now.saturating_sub(self.next));
            self.next += self.interval;
        }
        waited
    }
}

struct Slot {
    stream: TcpStream,
    timetable: Timetable,
    received: usize,
}

pub(super) fn run(to: SocketAddr, load: &Load) -> io::Result<Report> {
    let poll = Poll::new()?;
    let mut slots = Vec::with_capacity(load.connections);
    for stream in open_echoes(to, load)? {
        stream.set_nonblocking(true)?;
        poll.add(&stream, slots.len(), Interest::Read)?;
        let timetable = Timetable::new(slots.len(), load.connections, load.rate, load.duration);
        slots.push(Slot { stream, timetable, received: 0 });
    }
    let request = vec![0x5a; load.size];
    let mut buffer = vec![0; MAX_SIZE];
    let mut tally = Tally::new()?;
    tally.untimed = slots.len() as u64;
    let mut ready = Ready::new();
    let start = Instant::now();
    loop {
        let mut now = start.elapsed();
        for slot in &mut slots {
            if slot.timetable.send(now) {
                send(&slot.stream, &request)?;
            }
        }
        let out = slots.iter().any(|slot| slot.timetable.out.is_some());
        let next = slots.iter().filter_map(|slot| slot.timetable.due()).min();
        let Some(until) =
            next.or(out.then_some(load.duration + GRACE)).filter(|_| now < load.duration + GRACE)
        else {
            break;
        };
        poll.wait(&mut ready, Some(until.saturating_sub(start.elapsed())))?;
        for key in ready.keys() {
            let Some(slot) = slots.get_mut(key) else { continue };
            slot.received += receive(&slot.stream, &mut buffer)?;
            now = start.elapsed();
            if slot.received >= load.size
                && let Some(took) = slot.timetable.answered(now)
            {
                slot.received = 0;
                tally.record(took);
            }
        }
    }
    let elapsed = start.elapsed();
    for slot in &mut slots {
        slot.timetable.unanswered(elapsed).into_iter().for_each(|waited| tally.record(waited));
    }
    Ok(tally.report(elapsed, load.size))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn connections_share_the_rate_evenly() {
        // 100 a second over 4 connections: one is due every 10 ms, each connection's every 40 ms.
        let mut second = Timetable::new(1, 4, 100.0, ms(100));
        assert_eq!(second.due(), Some(ms(10)));
        assert!(!second.send(ms(9)));
        assert!(second.send(ms(10)));
        assert_eq!(second.due(), None, "one is out");
        assert_eq!(second.answered(ms(11)), Some(ms(1)));
        assert_eq!(second.due(), Some(ms(50)));
    }

    #[test]
    fn a_stall_is_paid_for_by_every_request_it_kept_waiting() {
        let mut timetable = Timetable::new(0, 1, 100.0, ms(50));
        assert!(timetable.send(ms(0)));
        // The answer takes 35 ms; those due at 10, 20 and 30 ms go out late, one after the other, 1 ms each.
        assert_eq!(timetable.answered(ms(35)), Some(ms(35)));
        for (at, expected) in [(35, 26), (36, 17), (37, 8)] {
            assert!(timetable.send(ms(at)));
            assert_eq!(timetable.answered(ms(at + 1)), Some(ms(expected)));
        }
        assert!(!timetable.send(ms(38)), "the one at 40 ms isn't due");
    }

    #[test]
    fn what_never_went_out_counts_with_what_it_waited() {
        let mut timetable = Timetable::new(0, 1, 100.0, ms(30));
        assert!(timetable.send(ms(0)));
        assert_eq!(timetable.unanswered(ms(100)), [ms(100), ms(90), ms(80)]);
        assert_eq!(timetable.due(), None);
    }
}
