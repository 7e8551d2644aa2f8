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
    /// Runs a handshake when it is its turn; it is made only then, and boxed: whoever waits, and whoever needs none
    /// because a tunnel is there, has no room for its state.
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
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Handshakes through one gate that end when they are let go.
    struct Crowd {
        begun: Arc<AtomicUsize>,
        let_go: Arc<Semaphore>,
        gate: Arc<Gate>,
    }

    impl Crowd {
        async fn gather(count: usize) -> Self {
            let crowd =
                Self { begun: Arc::default(), let_go: Arc::new(Semaphore::new(0)), gate: Arc::default() };
            for _ in 0..count {
                let (begun, let_go, gate) = (crowd.begun.clone(), crowd.let_go.clone(), crowd.gate.clone());
                tokio::spawn(async move {
                    let handshake = || async {
                        begun.fetch_add(1, Ordering::Relaxed);
                        let_go.acquire().await.unwrap().forget();
                    };
                    gate.pass(handshake).await;
                });
            }
            crowd.settle(count.min(TURNS)).await;
            crowd
        }

        /// Waits until as many have begun, and gives more the chance to.
        async fn settle(&self, count: usize) {
            while self.begun() < count {
                tokio::task::yield_now().await;
            }
            for _ in 0..100 {
                tokio::task::yield_now().await;
            }
        }

        fn begun(&self) -> usize {
            self.begun.load(Ordering::Relaxed)
        }
    }

    #[tokio::test]
    async fn handshakes_are_made_in_turn() {
        let crowd = Crowd::gather(3 * TURNS).await;
        assert_eq!(crowd.begun(), TURNS);
        crowd.let_go.add_permits(10);
        crowd.settle(TURNS + 10).await;
        assert_eq!(crowd.begun(), TURNS + 10);
    }

    #[tokio::test]
    async fn peers_that_stall_lose_their_turn_and_not_their_handshake() {
        let crowd = Crowd::gather(TURNS).await;
        timeout(40 * TURN, crowd.gate.pass(|| std::future::ready(()))).await.expect("a turn was given up");
        assert_eq!(crowd.begun(), TURNS);
        crowd.let_go.add_permits(TURNS);
        while crowd.let_go.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
    }
}
