//! Which shared tunnels lead where.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::{Lane, Shared};
use crate::identity::SpiffeId;
use crate::tunnel::frame::Open;
use crate::tunnel::pool::Key;
use crate::tunnel::sweep::Sweep;

/// Of one worker. An identity's new version is a new key: what leads on from the old one begins nothing more, and is
/// closed when it has been idle for its time.
#[derive(Default)]
pub(crate) struct Shares(Mutex<Known>);

#[derive(Default)]
struct Known {
    ways: HashMap<Key, Arc<Way>>,
    /// Drops those that lead nowhere now.
    sweep: Sweep,
}

/// The tunnels shared from one pod to another.
#[derive(Default)]
pub(crate) struct Way {
    shared: Mutex<Vec<Arc<Shared>>>,
    /// Held while a tunnel to share is made, so that a crowd makes one.
    pub making: tokio::sync::Mutex<()>,
    failures: AtomicU32,
}

impl Way {
    /// How often no tunnel to share could be made.
    pub fn failures(&self) -> u32 {
        self.failures.load(Ordering::Relaxed)
    }

    pub fn failed(&self) {
        self.failures.fetch_add(1, Ordering::Relaxed);
    }

    /// A lane for a stream to the workload `expected`, if there is one.
    pub fn lane(&self, expected: &SpiffeId, open: &Open) -> Option<Lane> {
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        shared.retain(|tunnel| !tunnel.has_ended());
        shared.iter().find_map(|tunnel| match tunnel.peer.expect(expected) {
            Ok(_proof) => tunnel.open(open, true),
            // The address has passed to another workload.
            Err(_) => {
                tunnel.retire();
                None
            }
        })
    }

    pub fn add(&self, tunnel: Arc<Shared>) {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner).push(tunnel);
    }

    fn retire(&self) {
        let shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        shared.iter().for_each(|tunnel| tunnel.retire());
    }

    fn leads_nowhere(&self) -> bool {
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        shared.retain(|tunnel| !tunnel.has_ended());
        shared.is_empty()
    }
}

impl Shares {
    pub fn way(&self, key: &Key) -> Arc<Way> {
        let Known { ways, sweep } = &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(way) = ways.get(key) {
            return way.clone();
        }
        sweep.before_insert(ways, |way| Arc::strong_count(way) > 1 || !way.leads_nowhere());
        ways.entry(key.clone()).or_default().clone()
    }

    /// Begins nothing more on any shared tunnel; each is closed when its last stream is over.
    pub fn retire(&self) {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.ways.values().for_each(|way| way.retire());
    }
}
