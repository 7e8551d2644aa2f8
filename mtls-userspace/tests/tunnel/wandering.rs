//! Streams that don't stay where they are: as those do that move much.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use mtls::relay::Progress;

/// Streams that leave their event loop again and again in the midst of what they carry, if wanted.
#[derive(Default)]
pub struct Wandering {
    pub wanted: AtomicBool,
    pub departures: [AtomicUsize; 2],
}

/// As long as this lives a connection is taken for bulk, time and again.
pub struct Driven(tokio::task::AbortHandle);

impl Drop for Driven {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Wandering {
    pub fn drive(&self, progress: &Arc<Progress>) -> Option<Driven> {
        self.wanted.load(Ordering::Relaxed).then(|| {
            progress.take_for_bulk();
            let progress = progress.clone();
            let driver = tokio::spawn(async move {
                loop {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                    progress.take_for_bulk();
                }
            });
            Driven(driver.abort_handle())
        })
    }

    pub fn departs(&self, end: usize) {
        self.departures[end].fetch_add(1, Ordering::Relaxed);
    }
}
