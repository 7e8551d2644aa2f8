//! The open connections of this agent: flows in, guards out.
//!
//! Sharded, so that workers do not wait for each other; a lock is held for one insertion, removal or copy of pointers.
//! It never touches a connection's bytes: it reads two counters that the relay moves.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::Observer;
use super::flow::{Direction, Ending, Flow, Path};
use super::traffic::Reports;
use crate::relay::{Counts, Progress};

const SHARDS: usize = 16;

/// Bytes that the metrics already have.
#[derive(Debug, Default)]
struct Folded {
    sent: AtomicU64,
    received: AtomicU64,
}

/// An open connection, as the registry and the access log share it.
#[derive(Debug)]
pub(super) struct Open {
    pub id: u64,
    pub flow: Flow,
    pub progress: Progress,
    /// What of `progress` the metrics already have.
    folded: Folded,
    pub reports: Reports,
    since: Instant,
    stop: OnceLock<Arc<str>>,
    stopping: Notify,
}

impl Open {
    pub fn age(&self) -> Duration {
        self.since.elapsed()
    }

    /// Who carries the TLS records at this end, where there are any.
    pub fn records(&self) -> Option<&'static str> {
        (self.flow.path == Path::Tunnel).then(|| self.progress.records().as_str())
    }

    /// Moves what came since the last call into the metrics. Exact under concurrent calls: a maximum only rises.
    pub fn fold(&self) {
        let (sent, received) = (self.progress.sent(), self.progress.received());
        let delta =
            |folded: &AtomicU64, now: u64| now.saturating_sub(folded.fetch_max(now, Ordering::Relaxed));
        let (sent, received) = (delta(&self.folded.sent, sent), delta(&self.folded.received, received));
        self.reports.each().for_each(|counts| counts.add_bytes(sent, received));
    }
}

impl Counts for Open {
    fn progress(&self) -> &Progress {
        &self.progress
    }
}

#[derive(Debug, Default)]
pub(super) struct Connections {
    shards: [Mutex<HashMap<u64, Arc<Open>>>; SHARDS],
    next: AtomicU64,
    /// By direction and path.
    open: [[AtomicU64; Path::ALL.len()]; Direction::ALL.len()],
}

impl Connections {
    pub fn insert(&self, flow: Flow, reports: Reports, since: Instant) -> Arc<Open> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let open = Arc::new(Open {
            id,
            flow,
            progress: Progress::default(),
            folded: Folded::default(),
            reports,
            since,
            stop: OnceLock::new(),
            stopping: Notify::new(),
        });
        self.count(&open.flow).fetch_add(1, Ordering::Relaxed);
        self.shard(id).insert(id, open.clone());
        open
    }

    fn remove(&self, open: &Open) {
        self.shard(open.id).remove(&open.id);
        self.count(&open.flow).fetch_sub(1, Ordering::Relaxed);
    }

    /// All open connections, in no order.
    pub fn all(&self) -> Vec<Arc<Open>> {
        let mut all = Vec::new();
        for shard in &self.shards {
            all.extend(lock(shard).values().cloned());
        }
        all
    }

    pub fn open(&self, direction: Direction, path: Path) -> u64 {
        self.open[direction as usize][path as usize].load(Ordering::Relaxed)
    }

    /// Connections ever opened.
    pub fn opened(&self) -> u64 {
        self.next.load(Ordering::Relaxed)
    }

    fn count(&self, flow: &Flow) -> &AtomicU64 {
        &self.open[flow.direction as usize][flow.path as usize]
    }

    fn shard(&self, id: u64) -> MutexGuard<'_, HashMap<u64, Arc<Open>>> {
        lock(&self.shards[id as usize % SHARDS])
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The guard of an open connection. Dropped without [`Connection::close`], it logs an `aborted` ending.
#[derive(Debug)]
#[must_use = "dropping it ends the connection for the observer"]
pub struct Connection {
    observer: Observer,
    open: Arc<Open>,
    closed: bool,
}

impl Connection {
    pub(super) fn new(observer: Observer, open: Arc<Open>) -> Self {
        Self { observer, open, closed: false }
    }

    /// What the relay moves as bytes pass.
    pub fn progress(&self) -> &Progress {
        &self.open.progress
    }

    /// The same, for who moves bytes outside of the connection's own task.
    pub fn counts(&self) -> Arc<dyn Counts> {
        self.open.clone()
    }

    /// Takes up bytes that were counted by somebody else: they are part of the connection, not of these metrics.
    pub fn adopt(&self, sent: u64, received: u64) {
        self.open.folded.sent.fetch_max(sent, Ordering::Relaxed);
        self.open.folded.received.fetch_max(received, Ordering::Relaxed);
        self.open.progress.reach(sent, received);
    }

    /// Leaves the connection, which goes on, to the next agent to report.
    pub fn hand_over(mut self) {
        self.closed = true;
        self.observer.inner.connections.remove(&self.open);
    }

    pub fn flow(&self) -> &Flow {
        &self.open.flow
    }

    /// Why the connection was asked to stop, if it was.
    pub fn stop_reason(&self) -> Option<Arc<str>> {
        self.open.stop.get().cloned()
    }

    /// Resolves with the reason once policy no longer allows this connection; pending until then. Cancel-safe.
    pub async fn stopped(&self) -> Arc<str> {
        loop {
            let notified = self.open.stopping.notified();
            tokio::pin!(notified);
            // Registered before the check, so that a revocation in between is not missed.
            notified.as_mut().enable();
            if let Some(reason) = self.open.stop.get() {
                return reason.clone();
            }
            notified.await;
        }
    }

    /// Notes why the connection is about to be stopped, where it was not the observer who asked for it.
    pub fn revoke(&self, reason: Arc<str>) {
        if self.open.revoke(reason) {
            self.observer.inner.events.revoked.inc();
        }
    }

    /// Ends the connection: counters and one access-log line.
    pub fn close(mut self, ending: Ending) {
        self.end(ending);
    }

    fn end(&mut self, ending: Ending) {
        self.closed = true;
        self.observer.inner.connections.remove(&self.open);
        self.open.fold();
        self.observer.ended(&self.open, ending);
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if !self.closed {
            self.end(Ending::Aborted);
        }
    }
}

impl Open {
    /// Asks the connection to stop; false if it was asked before.
    pub fn revoke(&self, reason: Arc<str>) -> bool {
        let first = self.stop.set(reason).is_ok();
        self.stopping.notify_waiters();
        first
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_open_connection_costs_a_few_hundred_bytes() {
        assert!(size_of::<Open>() <= 512, "Open is {} bytes", size_of::<Open>());
        assert!(size_of::<Connection>() <= 32, "Connection is {} bytes", size_of::<Connection>());
    }
}
