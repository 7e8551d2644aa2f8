//! Direct: connections between two pods of this node without this agent in the middle. Policy and pods in; grants for
//! the kernel half, and reports to the observer, out.
//!
//! The first connection of a pod to an address of a neighbour, or of a Service that has neighbours only, is relayed and judged like any other; then the pair gets a
//! grant, and the kernel half lets the next ones pass by themselves. Before a new mesh is in force, every grant that it
//! would refuse is taken back; once it is, open connections that it refuses are reset. It never moves a byte, and
//! whatever cannot go directly is relayed.

mod grants;
mod open;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::addr::OriginalDst;
use crate::capture::{self, Capture};
use crate::mesh;
use crate::observe::Observer;
use crate::worker::{LocalPods, Pod};

use grants::Grants;
use open::Open;

/// For how long grants outlive a word from this agent. One that is dead voids them at once, by the listeners that it no
/// longer has; this is for one that hangs.
const LEASE: Duration = Duration::from_secs(4);
const RENEWAL: Duration = Duration::from_secs(1);

pub struct Direct {
    node: Arc<str>,
    /// False: nothing is granted, and what an earlier agent let through is reset.
    wanted: bool,
    capture: Arc<Capture>,
    local: Arc<LocalPods>,
    mesh: mesh::Source,
    observer: Observer,
    grants: Mutex<Grants>,
    open: Mutex<Open>,
}

impl Direct {
    /// # Errors
    ///
    /// When what an earlier agent granted cannot be taken back.
    pub fn new(
        node: Arc<str>,
        wanted: bool,
        capture: Arc<Capture>,
        local: Arc<LocalPods>,
        mesh: mesh::Source,
        observer: Observer,
    ) -> Result<Arc<Self>, capture::Error> {
        capture.withdraw_all()?;
        let direct = Arc::new(Self {
            node,
            wanted,
            capture,
            local,
            mesh: mesh.clone(),
            observer,
            grants: Mutex::default(),
            open: Mutex::default(),
        });
        if wanted {
            let judge = Arc::downgrade(&direct);
            mesh.before_each(move |mesh| {
                if let Some(direct) = judge.upgrade() {
                    direct.keep_granted(mesh);
                }
            });
        }
        Ok(direct)
    }

    /// Holds the lease until `stopped`: from then on every new connection goes through an agent.
    pub async fn run(self: Arc<Self>, stopped: impl Future<Output = ()>) {
        if !self.wanted {
            return;
        }
        let mut stopped = std::pin::pin!(stopped);
        loop {
            match self.renew() {
                Ok(true) => {}
                Ok(false) => return tracing::info!("another agent has taken over direct connections"),
                Err(error) => tracing::error!(%error, "direct connections are relayed for now"),
            }
            tokio::select! {
                () = tokio::time::sleep(RENEWAL) => {}
                () = &mut stopped => break,
            }
        }
        if let Err(error) = self.capture.hold_lease(Duration::ZERO) {
            tracing::warn!(%error, "direct connections may be made for {LEASE:?} more");
        }
    }

    /// A relayed connection from one pod of this node to another was let in: the next ones need no relay.
    pub fn offer(&self, client: &Arc<Pod>, dialled: OriginalDst, address: SocketAddr) {
        if !self.wanted {
        } else if dialled.addr() == address {
            self.grant(client, address);
        } else {
            self.grant_service(client, dialled);
        }
    }

    fn grants(&self) -> MutexGuard<'_, Grants> {
        // A grant enters this memory before the kernel, and leaves it after: a panic in between loses none.
        self.grants.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
