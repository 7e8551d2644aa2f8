//! Plaintext that the kernel half decided alone, by pair of workloads: for the graph, where metrics have destinations.
//!
//! The source is whoever has the address: in plaintext nobody proves anything.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::bounded::{Bounded, Labels};
use super::metrics::Plaintext;
use super::traffic::UNKNOWN;
use super::workload_labels::controller;
use crate::mesh::Workload;

#[derive(Debug)]
pub(super) struct Pairs(Bounded<OwnedPair, Counts>);

/// Namespace and workload, of the source and of the destination.
#[derive(Hash)]
struct Pair<'a>([(&'a str, &'a str); 2]);

/// None stands for all pairs above the cap.
type OwnedPair = Option<[(Box<str>, Box<str>); 2]>;

#[derive(Default, Debug)]
struct Counts {
    accepted: AtomicU64,
    refused: AtomicU64,
}

impl Labels for Pair<'_> {
    type Owned = OwnedPair;

    fn matches(&self, owned: &OwnedPair) -> bool {
        owned
            .as_ref()
            .is_some_and(|owned| self.0 == owned.each_ref().map(|(space, name)| (&**space, &**name)))
    }

    fn own(&self) -> OwnedPair {
        Some(self.0.map(|(space, name)| (space.into(), name.into())))
    }

    fn overflow(&self) -> OwnedPair {
        None
    }
}

impl Pairs {
    pub fn new(cap: usize, idle: Duration) -> Self {
        Self(Bounded::new(cap, idle))
    }

    pub fn count(&self, source: Option<&Workload>, destination: &Workload, outcome: Plaintext) {
        let source = source.map_or((UNKNOWN, UNKNOWN), named);
        let entry = self.0.entry(&Pair([source, named(destination)]));
        let count = match outcome {
            Plaintext::Accepted => &entry.value.accepted,
            Plaintext::Refused => &entry.value.refused,
        };
        count.fetch_add(1, Ordering::Relaxed);
    }

    /// Calls `each` with every pair's ends, and the connections accepted and refused between them.
    pub fn for_each(&self, mut each: impl FnMut([(&str, &str); 2], u64, u64)) {
        for entry in self.0.live() {
            let Some(ends) = &entry.labels else { continue };
            let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
            let ends = ends.each_ref().map(|(space, name)| (&**space, &**name));
            each(ends, load(&entry.value.accepted), load(&entry.value.refused));
        }
    }

    pub fn overflowed(&self) -> u64 {
        self.0.overflowed()
    }
}

fn named(workload: &Workload) -> (&str, &str) {
    (&workload.namespace, controller(workload))
}
