//! How many handshakes a worker has under way at once: as many as keep its core busy, and the rest in turn.
//!
//! A handshake in the middle holds several KiB (hybrid key shares, flights, a chain), an established tunnel holds
//! little: thousands at once would cost memory that the process never gives back, and each would wait for all.

use std::future::Future;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::timeout;

/// Under way at once. With a peer 10 ms away it still allows more handshakes a second than a core can compute.
const TURNS: usize = 64;
/// A handshake that takes longer waits for its peer, not for this core, and gives up its turn: peers that stall hold
/// up nobody else for longer.
const TURN: Duration = Duration::from_millis(250);

pub(crate) struct Gate(Semaphore);

impl Default for Gate {
    fn default() -> Self {
        Self(Semaphore::new(TURNS))
    }
}

impl Gate {
    /// Runs a handshake when it is its turn; it is made only then.
    pub async fn pass<F: Future>(&self, handshake: impl FnOnce() -> F) -> F::Output {
        // Closed by nobody.
        let turn = self.0.acquire().await.ok();
        let mut handshake = Box::pin(handshake());
        match timeout(TURN, &mut handshake).await {
            Ok(done) => done,
            Err(_) => {
                drop(turn);
                handshake.await
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn handshakes_are_made_in_turn() {
        let gate = std::sync::Arc::new(Gate::default());
        let started = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
        for _ in 0..3 * TURNS {
            let (gate, started) = (gate.clone(), started.clone());
            tokio::spawn(async move {
                let shake = async {
                    started.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    tokio::time::sleep(TURN / 2).await;
                };
                gate.pass(|| shake).await;
            });
        }
        let started = || started.load(std::sync::atomic::Ordering::Relaxed);
        tokio::time::sleep(TURN / 4).await;
        assert_eq!(started(), TURNS);
        tokio::time::sleep(TURN / 2).await;
        assert_eq!(started(), 2 * TURNS);
    }

    #[tokio::test(start_paused = true)]
    async fn peers_that_stall_lose_their_turn_and_not_their_handshake() {
        let gate = std::sync::Arc::new(Gate::default());
        let stalled: Vec<_> = (0..TURNS)
            .map(|_| {
                let gate = gate.clone();
                tokio::spawn(async move { gate.pass(|| tokio::time::sleep(8 * TURN)).await })
            })
            .collect();
        tokio::task::yield_now().await;
        let before = tokio::time::Instant::now();
        gate.pass(|| std::future::ready(())).await;
        assert!(before.elapsed() <= TURN + Duration::from_millis(1));
        for handshake in stalled {
            handshake.await.unwrap();
        }
        assert!(before.elapsed() >= 8 * TURN);
    }
}
