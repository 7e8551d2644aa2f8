//! Graceful, then forced: who still works, and until when they may.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

/// Held by everything that still works; the drain is over when the last one is dropped.
#[derive(Clone)]
pub struct Working {
    stop: watch::Receiver<bool>,
    _alive: Arc<watch::Sender<()>>,
}

/// Starts the drain and waits for it.
pub struct Drain {
    stop: watch::Sender<bool>,
    alive: watch::Receiver<()>,
    /// Given to the first [`Working`]; dropped when the drain begins, so that only those handed out count.
    held: Option<Arc<watch::Sender<()>>>,
}

impl Drain {
    pub fn new() -> Self {
        let (stop, _) = watch::channel(false);
        let (held, alive) = watch::channel(());
        Self { stop, alive, held: Some(Arc::new(held)) }
    }

    /// A share in the work; `None` once the drain has begun.
    pub fn working(&self) -> Option<Working> {
        let held = self.held.as_ref()?;
        Some(Working { stop: self.stop.subscribe(), _alive: held.clone() })
    }

    /// Tells everyone to stop taking new work.
    pub fn begin(&mut self) {
        self.held = None;
        self.stop.send_replace(true);
    }

    /// Tells everyone to stop taking new work and waits until all have finished or the time is over.
    /// True when all finished.
    pub async fn run(mut self, limit: Duration) -> bool {
        self.begin();
        let finished = async { while self.alive.changed().await.is_ok() {} };
        tokio::time::timeout(limit, finished).await.is_ok()
    }
}

impl Default for Drain {
    fn default() -> Self {
        Self::new()
    }
}

impl Working {
    /// Resolves when the drain begins.
    pub async fn stopping(&mut self) {
        // An error means the drain itself is gone, which is a stop as well.
        let _ = self.stop.wait_for(|stop| *stop).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_drain_ends_when_the_last_worker_is_done() {
        let drain = Drain::new();
        let mut working = drain.working().unwrap();
        let second = working.clone();
        tokio::spawn(async move {
            working.stopping().await;
            drop(working);
            drop(second);
        });
        assert!(drain.run(Duration::from_secs(5)).await);
    }

    #[tokio::test]
    async fn a_worker_that_never_ends_is_given_up_on() {
        let drain = Drain::new();
        let _stuck = drain.working().unwrap();
        assert!(!drain.run(Duration::from_millis(20)).await);
    }
}
