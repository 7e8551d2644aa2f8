//! A bounded table of label sets: a query in, the counters of its label set out.
//!
//! Finding a label set that exists allocates nothing. Above the cap, new label sets share one overflow entry per kind;
//! an entry that nobody holds expires after a time without use. It never holds a lock while a caller counts.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockWriteGuard};
use std::time::{Duration, Instant};

/// A borrowed view of a label set.
pub(super) trait Labels: Hash {
    type Owned: PartialEq;

    fn matches(&self, owned: &Self::Owned) -> bool;
    fn own(&self) -> Self::Owned;
    /// What stands in for this label set above the cap; may keep enums only, so that few of them exist.
    fn overflow(&self) -> Self::Owned;
}

/// One label set and what is counted under it.
#[derive(Debug)]
pub(super) struct Entry<K, V> {
    pub labels: K,
    pub value: V,
    /// Milliseconds since the table was made.
    touched: AtomicU64,
}

#[derive(Debug)]
pub(super) struct Bounded<K, V> {
    table: RwLock<Table<K, V>>,
    hasher: RandomState,
    cap: usize,
    idle: Duration,
    epoch: Instant,
    overflowed: AtomicU64,
}

#[derive(Debug)]
struct Table<K, V> {
    by_hash: HashMap<u64, Vec<Arc<Entry<K, V>>>>,
    overflow: Vec<Arc<Entry<K, V>>>,
    len: usize,
    swept: u64,
}

impl<K: PartialEq, V: Default> Bounded<K, V> {
    pub fn new(cap: usize, idle: Duration) -> Self {
        let table = Table { by_hash: HashMap::new(), overflow: Vec::new(), len: 0, swept: 0 };
        Self {
            table: RwLock::new(table),
            hasher: RandomState::new(),
            cap,
            idle,
            epoch: Instant::now(),
            overflowed: AtomicU64::new(0),
        }
    }

    pub fn entry<L: Labels<Owned = K>>(&self, labels: &L) -> Arc<Entry<K, V>> {
        let hash = self.hasher.hash_one(labels);
        let now = self.now();
        let found = self.table.read().unwrap_or_else(PoisonError::into_inner).find(hash, labels);
        if let Some(entry) = found {
            entry.touched.store(now, Ordering::Relaxed);
            return entry;
        }
        let mut table = self.write();
        if let Some(entry) = table.find(hash, labels) {
            return entry;
        }
        // A full table is swept at most once a second: a scan of label sets must not turn into a scan of the table.
        if table.len >= self.cap && now >= table.swept + 1000 {
            table.sweep(now, self.idle);
        }
        if table.len >= self.cap {
            self.overflowed.fetch_add(1, Ordering::Relaxed);
            return table.overflow(labels.overflow(), now);
        }
        let entry = Arc::new(Entry { labels: labels.own(), value: V::default(), touched: now.into() });
        table.by_hash.entry(hash).or_default().push(entry.clone());
        table.len += 1;
        entry
    }

    /// Drops what expired and returns the rest.
    pub fn live(&self) -> Vec<Arc<Entry<K, V>>> {
        let mut table = self.write();
        table.sweep(self.now(), self.idle);
        table.by_hash.values().flatten().chain(&table.overflow).cloned().collect()
    }

    /// How often a label set was counted under the overflow entry.
    pub fn overflowed(&self) -> u64 {
        self.overflowed.load(Ordering::Relaxed)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Table<K, V>> {
        self.table.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

impl<K: PartialEq, V: Default> Table<K, V> {
    fn find<L: Labels<Owned = K>>(&self, hash: u64, labels: &L) -> Option<Arc<Entry<K, V>>> {
        self.by_hash.get(&hash)?.iter().find(|entry| labels.matches(&entry.labels)).cloned()
    }

    fn overflow(&mut self, labels: K, now: u64) -> Arc<Entry<K, V>> {
        if let Some(entry) = self.overflow.iter().find(|entry| entry.labels == labels) {
            return entry.clone();
        }
        let entry = Arc::new(Entry { labels, value: V::default(), touched: now.into() });
        self.overflow.push(entry.clone());
        entry
    }

    fn sweep(&mut self, now: u64, idle: Duration) {
        self.swept = now;
        let idle = u64::try_from(idle.as_millis()).unwrap_or(u64::MAX);
        let mut left = 0;
        self.by_hash.retain(|_, entries| {
            entries.retain(|entry| {
                if Arc::strong_count(entry) > 1 {
                    entry.touched.store(now, Ordering::Relaxed);
                }
                now.saturating_sub(entry.touched.load(Ordering::Relaxed)) <= idle
            });
            left += entries.len();
            !entries.is_empty()
        });
        self.len = left;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Hash)]
    struct Name<'a>(&'a str);

    impl Labels for Name<'_> {
        type Owned = String;

        fn matches(&self, owned: &String) -> bool {
            self.0 == owned
        }

        fn own(&self) -> String {
            self.0.to_owned()
        }

        fn overflow(&self) -> String {
            "overflow".to_owned()
        }
    }

    fn names(table: &Bounded<String, AtomicU64>) -> Vec<String> {
        let mut names: Vec<_> = table.live().iter().map(|entry| entry.labels.clone()).collect();
        names.sort();
        names
    }

    #[test]
    fn above_the_cap_label_sets_share_the_overflow_entry() {
        let table = Bounded::<String, AtomicU64>::new(2, Duration::from_secs(60));
        for name in ["a", "b", "c", "d", "c", "a"] {
            table.entry(&Name(name)).value.fetch_add(1, Ordering::Relaxed);
        }
        assert_eq!(names(&table), ["a", "b", "overflow"]);
        assert_eq!(table.entry(&Name("a")).value.load(Ordering::Relaxed), 2);
        assert_eq!(table.entry(&Name("zzz")).value.load(Ordering::Relaxed), 3);
        assert_eq!(table.overflowed(), 4);
    }

    #[test]
    fn an_idle_label_set_expires_and_one_in_use_does_not() {
        let table = Bounded::<String, AtomicU64>::new(2, Duration::from_millis(5));
        let held = table.entry(&Name("held"));
        table.entry(&Name("idle"));
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!(names(&table), ["held"]);
        drop(held);
        std::thread::sleep(Duration::from_millis(30));
        assert!(names(&table).is_empty());
    }
}
