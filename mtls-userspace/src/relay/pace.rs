//! How fast a connection moves bytes: whether it is one that others should not have to wait behind.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

/// Looked at whenever so many bytes have moved, in both directions together.
const STRETCH: u64 = 4 * 1024 * 1024;
/// Milliseconds. A connection that moves a stretch in less, 16 MiB in a second, is a few hundredths of a core's work.
const FAST: u32 = 250;

/// Nobody asks.
const ANY: u32 = 0;
/// Not one stretch is over yet.
const FRESH: u32 = 1;
const BULK: u32 = 2;
/// It went to where such connections are.
const AMONG_BULK: u32 = 3;

/// One of those above, or when a stretch ended, in milliseconds of [`now`]. One task writes.
#[derive(Debug, Default)]
pub(super) struct Pace(AtomicU32);

impl Pace {
    pub fn watch(&self) {
        self.0.store(FRESH, Ordering::Relaxed);
    }

    /// The connection goes on among those that move much, and nobody asks any more.
    pub fn leave(&self) {
        self.0.store(AMONG_BULK, Ordering::Relaxed);
    }

    pub fn is_among_bulk(&self) -> bool {
        self.0.load(Ordering::Relaxed) == AMONG_BULK
    }

    pub fn take_for_bulk(&self) {
        self.0.store(BULK, Ordering::Relaxed);
    }

    /// Takes how many bytes had moved at two times, and says whether this is, or was once, a connection that moves much.
    pub fn moved(&self, before: u64, after: u64) -> bool {
        let state = self.0.load(Ordering::Relaxed);
        match state {
            ANY | AMONG_BULK => false,
            BULK => true,
            _ if before / STRETCH == after / STRETCH => false,
            _ => self.stretch_ends(state, now()),
        }
    }

    fn stretch_ends(&self, state: u32, now: u32) -> bool {
        let bulk = state != FRESH && now.wrapping_sub(state) < FAST;
        self.0.store(if bulk { BULK } else { now }, Ordering::Relaxed);
        bulk
    }
}

/// Milliseconds, none of those above.
fn now() -> u32 {
    static BEGINNING: LazyLock<Instant> = LazyLock::new(Instant::now);
    (BEGINNING.elapsed().as_millis() as u32).saturating_add(AMONG_BULK + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn much_at_once_is_bulk_from_then_on() {
        let pace = Pace::default();
        assert!(!pace.moved(0, 9 * STRETCH));
        pace.watch();
        assert!(!pace.moved(0, STRETCH - 1));
        assert!(!pace.moved(STRETCH - 1, STRETCH));
        assert!(!pace.moved(STRETCH, 2 * STRETCH - 1));
        assert!(pace.moved(2 * STRETCH - 1, 2 * STRETCH));
        assert!(pace.moved(2 * STRETCH, 2 * STRETCH));
        assert!(!pace.is_among_bulk());
        pace.leave();
        assert!(pace.is_among_bulk());
        assert!(!pace.moved(2 * STRETCH, 4 * STRETCH));
    }

    #[test]
    fn much_in_a_long_time_is_not() {
        let pace = Pace::default();
        let mut state = FRESH;
        for second in 0..10 {
            assert!(!pace.stretch_ends(state, AMONG_BULK + 1 + second * FAST));
            state = pace.0.load(Ordering::Relaxed);
        }
    }
}
