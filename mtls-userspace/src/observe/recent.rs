//! The last connections that ended and the last that were refused: flows in, rows out. Bounded; it forgets the oldest.
//!
//! It holds no counters: a label set that only this remembers expires like any other.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;

use super::connections::Open;
use super::flow::{Ending, Flow, Refusal};
use super::inspection::EndedRow;
use super::status::PartyRow;

const ENDED: usize = 1024;
/// Apart from the others, so that a scan does not push out what was served.
const REFUSED: usize = 256;

#[derive(Debug)]
pub(super) struct Recent {
    ended: Ring,
    refused: Ring,
}

impl Default for Recent {
    fn default() -> Self {
        Self { ended: Ring::new(ENDED), refused: Ring::new(REFUSED) }
    }
}

#[derive(Debug)]
struct Past {
    at: Timestamp,
    flow: Flow,
    sent: u64,
    received: u64,
    records: Option<&'static str>,
    duration: Duration,
    how: How,
}

#[derive(Debug)]
enum How {
    Ended(Ending),
    Refused(Refusal),
}

impl Recent {
    pub fn ended(&self, open: &Open, ending: &Ending) {
        self.ended.push(Past {
            at: Timestamp::now(),
            flow: open.flow.clone(),
            sent: open.progress.sent(),
            received: open.progress.received(),
            records: open.records(),
            duration: open.age(),
            how: How::Ended(ending.clone()),
        });
    }

    pub fn refused(&self, flow: &Flow, refusal: &Refusal) {
        self.refused.push(Past {
            at: Timestamp::now(),
            flow: flow.clone(),
            sent: 0,
            received: 0,
            records: None,
            duration: Duration::ZERO,
            how: How::Refused(refusal.clone()),
        });
    }

    /// Rows of the flows wanted, newest first.
    pub fn rows(&self, wanted: &dyn Fn(&Flow) -> bool) -> Vec<EndedRow> {
        let mut rows = self.ended.rows(wanted);
        rows.extend(self.refused.rows(wanted));
        rows.sort_by_key(|row| std::cmp::Reverse(row.at));
        rows
    }
}

#[derive(Debug)]
struct Ring {
    size: usize,
    past: Mutex<VecDeque<Past>>,
}

impl Ring {
    fn new(size: usize) -> Self {
        Self { size, past: Mutex::default() }
    }

    fn push(&self, newest: Past) {
        let mut past = self.past();
        let forgotten = if past.len() >= self.size { past.pop_front() } else { None };
        past.push_back(newest);
        // Freed without the lock.
        drop(past);
        drop(forgotten);
    }

    fn rows(&self, wanted: &dyn Fn(&Flow) -> bool) -> Vec<EndedRow> {
        self.past().iter().filter(|past| wanted(&past.flow)).map(Past::row).collect()
    }

    fn past(&self) -> MutexGuard<'_, VecDeque<Past>> {
        self.past.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Past {
    fn row(&self) -> EndedRow {
        let Flow { direction, path, source, destination, address, original_src, service, cipher, .. } =
            &self.flow;
        let (ending, reason) = match &self.how {
            How::Ended(ending) => (ending.as_str(), ending.reason()),
            How::Refused(refusal) => ("refused", Some(refusal.to_string())),
        };
        EndedRow {
            at: self.at,
            direction: direction.as_str().to_owned(),
            path: path.as_str().to_owned(),
            source: PartyRow::new(original_src.to_string(), source),
            destination: PartyRow::new(address.to_string(), destination),
            service: service.as_deref().map(str::to_owned),
            cipher: cipher.map(str::to_owned),
            records: self.records.map(str::to_owned),
            bytes_sent: self.sent,
            bytes_received: self.received,
            duration_seconds: (self.duration.as_secs_f64() * 1000.0).round() / 1000.0,
            ending: ending.to_owned(),
            reason,
        }
    }
}
