//! The server's end: the streams that come out of shared tunnels, and where those are found that are to be adopted.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use rustls::SupportedCipherSuite;

use super::core::Event;
use super::{Failure, Lane, LaneRequest, Shared};
use crate::identity::SpiffeId;
use crate::tunnel::Error;
use crate::tunnel::frame::{Place, RejectReason, Rejection, SharedId};
use crate::tunnel::sweep::Sweep;

/// How long a retired tunnel without streams waits for its client to close it, whose OPEN may be under way.
const LINGER: Duration = Duration::from_secs(2);

/// The server's end of a shared tunnel. Dropped, it resets what is still on it.
pub struct SharedTunnel {
    shared: Arc<Shared>,
    idle: Duration,
}

impl SharedTunnel {
    pub(in crate::tunnel) fn new(shared: Arc<Shared>, idle: Duration) -> Self {
        Self { shared, idle }
    }

    pub fn peer(&self) -> &SpiffeId {
        self.shared.peer.id()
    }

    pub fn cipher(&self) -> SupportedCipherSuite {
        self.shared.cipher
    }

    /// The next stream, or `None` when the tunnel has ended. Everything else on it goes on while this is polled.
    /// Nothing is lost if the future is dropped.
    pub async fn next(&mut self) -> Result<Option<LaneRequest>, Error> {
        let Self { shared, idle } = self;
        loop {
            let retired = shared.lock().retired;
            let event = tokio::select! {
                event = shared.event() => event,
                () = shared.wait(if retired { LINGER } else { *idle }) => continue,
                _ = shared.peer.until_distrusted(), if shared.peer.distrusted().is_none() => continue,
            };
            match event {
                Ok(Event::Ended) => return Ok(None),
                Ok(Event::Opened(number, open)) => {
                    let lane = Lane::new(shared.clone(), number, true);
                    let request = LaneRequest { open, lane };
                    if shared.peer.unfit().is_none() {
                        return Ok(Some(request));
                    }
                    let detail = "the certificate that this tunnel began with counts no more";
                    request.reject(&Rejection::new(RejectReason::Unavailable, detail));
                    shared.ask_to_retire();
                }
                Err(error) => {
                    shared.lock().fail(Failure::from(&error));
                    return Err(error);
                }
            }
        }
    }

    /// Asks the client to begin no more streams here; those that are open go on, and so does [`Self::next`].
    pub fn retire(&mut self) {
        self.shared.ask_to_retire();
    }
}

impl Drop for SharedTunnel {
    fn drop(&mut self) {
        self.shared.lock().fail(Failure::Reset);
    }
}

/// The shared tunnels that this process serves, to be found by who adopts a stream of theirs.
#[derive(Default)]
pub struct Served(Mutex<Known>);

#[derive(Default)]
struct Known {
    /// By whom each leads to, who shares it, and what that calls it.
    tunnels: HashMap<(SpiffeId, SpiffeId, SharedId), Weak<Shared>>,
    /// Drops those of tunnels that have ended.
    sweep: Sweep,
}

impl std::fmt::Debug for Served {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Served").finish_non_exhaustive()
    }
}

impl Served {
    /// A client that uses an id twice gets what it asks for from the later one.
    pub(in crate::tunnel) fn insert(&self, ours: &SpiffeId, shared: &Arc<Shared>) {
        let Known { tunnels, sweep } = &mut *self.lock();
        sweep.before_insert(tunnels, |shared| shared.strong_count() > 0);
        let key = (ours.clone(), shared.peer.id().clone(), shared.id);
        tunnels.insert(key, Arc::downgrade(shared));
    }

    pub(in crate::tunnel) fn find(
        &self,
        ours: &SpiffeId,
        peer: &SpiffeId,
        place: &Place,
    ) -> Option<Arc<Shared>> {
        self.lock().tunnels.get(&(ours.clone(), peer.clone(), place.tunnel)).and_then(Weak::upgrade)
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
