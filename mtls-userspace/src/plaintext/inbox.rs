//! Where data threads and the reader of kernel events leave what they saw: bounded, and quick to leave.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use tokio::sync::Notify;

/// A look at the listening ports is due after at most this many, so that a scan of ports costs little each.
const BATCH: usize = 1024;
const CAPACITY: usize = 16 * BATCH;

/// A plaintext connection from outside a pod, or the attempt.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    /// The pod's side.
    pub destination: SocketAddr,
    pub source: IpAddr,
    pub at: SystemTime,
    /// By a STRICT port.
    pub refused: bool,
}

#[derive(Debug, Default)]
pub struct Inbox {
    queue: Mutex<Queue>,
    filling: Notify,
}

#[derive(Debug, Default)]
struct Queue {
    seen: Vec<Seen>,
    lost: u64,
}

impl Inbox {
    /// Never waits for more than another such call. What finds the inbox full is counted as lost.
    pub fn put(&self, seen: Seen) {
        let mut queue = self.queue();
        if queue.seen.len() >= CAPACITY {
            queue.lost += 1;
            return;
        }
        queue.seen.push(seen);
        if queue.seen.len() == BATCH {
            self.filling.notify_one();
        }
    }

    /// Everything since the last call, and how much was lost.
    pub(super) fn take(&self) -> (Vec<Seen>, u64) {
        let mut queue = self.queue();
        (std::mem::take(&mut queue.seen), std::mem::take(&mut queue.lost))
    }

    /// Resolves when it holds a batch.
    pub(super) async fn filling(&self) {
        self.filling.notified().await;
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_finds_the_inbox_full_is_counted_and_not_kept() {
        let inbox = Inbox::default();
        let seen = Seen {
            destination: "10.0.0.1:80".parse().unwrap(),
            source: "10.0.0.2".parse().unwrap(),
            at: SystemTime::UNIX_EPOCH,
            refused: false,
        };
        (0..CAPACITY + 7).for_each(|_| inbox.put(seen));
        let (taken, lost) = inbox.take();
        assert_eq!((taken.len(), lost), (CAPACITY, 7));
        assert!(
            taken.capacity() * size_of::<Seen>() <= 2 << 20,
            "{} bytes",
            taken.capacity() * size_of::<Seen>()
        );
        inbox.put(seen);
        let (taken, lost) = inbox.take();
        assert_eq!((taken.len(), lost), (1, 0));
    }
}
