//! Idle tunnels of one worker: sessions whose stream ended cleanly in, live ones out.
//!
//! Keyed by who dials (identity and its version), from which pod and where to. A tunnel is looked at when it is taken: what the peer
//! said meanwhile is read, and one that was closed is never handed out, nor one to a peer whose certificate has run out
//! or is no longer trusted. A superseded identity version's tunnels are closed, not reused.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::time::Instant;

use crate::identity::SpiffeId;

use super::codec::Pulled;
use super::socket;
use super::stream::Session;

/// What tells idle tunnels apart.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub source: SpiffeId,
    pub version: u64,
    pub road: Road,
}

/// From which network namespace, by its cookie, to which tunnel port. A tunnel ends with the pod it was dialled from:
/// another pod of the same identity would end with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Road {
    pub netns: u64,
    pub address: SocketAddr,
}

/// Where a client's stream returns its tunnel.
pub(crate) struct Home {
    pub pool: Weak<Pool>,
    pub key: Key,
}

impl Home {
    pub fn put(self, session: Box<Session>) {
        match self.pool.upgrade() {
            Some(pool) => pool.put(self.key, session),
            None => close(session),
        }
    }
}

struct Idle {
    session: Box<Session>,
    since: Instant,
}

/// The idle tunnels of one identity version, by destination; the longest idle first.
#[derive(Default)]
struct Shelf {
    version: u64,
    tunnels: HashMap<Road, Vec<Idle>>,
}

#[derive(Default)]
struct Shelves {
    by_source: HashMap<SpiffeId, Shelf>,
    total: usize,
    sweeping: bool,
}

pub(crate) struct Pool {
    shelves: Mutex<Shelves>,
    idle: Duration,
    per_destination: usize,
    total: usize,
}

impl Pool {
    pub fn new(idle: Duration, per_destination: usize, total: usize) -> Arc<Self> {
        Arc::new(Self { shelves: Mutex::default(), idle, per_destination, total })
    }

    /// A live idle tunnel, the one used last.
    pub fn take(&self, key: &Key) -> Option<Box<Session>> {
        loop {
            let Idle { mut session, since } = {
                let mut shelves = self.shelves.lock().unwrap_or_else(PoisonError::into_inner);
                shelves.supersede(key);
                let shelf = shelves.by_source.get_mut(&key.source)?;
                if shelf.version != key.version {
                    return None;
                }
                let list = shelf.tunnels.get_mut(&key.road)?;
                let idle = list.pop()?;
                if list.is_empty() {
                    shelf.tunnels.remove(&key.road);
                }
                shelves.total -= 1;
                idle
            };
            if since.elapsed() < self.idle && alive(&mut session) {
                return Some(session);
            }
            close(session);
        }
    }

    fn put(self: &Arc<Self>, key: Key, session: Box<Session>) {
        let mut shelves = self.shelves.lock().unwrap_or_else(PoisonError::into_inner);
        shelves.supersede(&key);
        let unfit = session.codec.order.retired() || session.peer.unfit().is_some();
        let full = shelves.total >= self.total;
        let shelf = shelves
            .by_source
            .entry(key.source)
            .or_insert_with(|| Shelf { version: key.version, tunnels: HashMap::new() });
        let count = shelf.tunnels.get(&key.road).map_or(0, Vec::len);
        if unfit || full || shelf.version != key.version || count >= self.per_destination {
            drop(shelves);
            return close(session);
        }
        shelf.tunnels.entry(key.road).or_default().push(Idle { session, since: Instant::now() });
        shelves.total += 1;
        if !shelves.sweeping
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            shelves.sweeping = true;
            runtime.spawn(sweep(Arc::downgrade(self), (self.idle / 4).max(Duration::from_millis(20))));
        }
    }

    /// Closes the tunnels that are too old or that the peer closed; says whether any are left.
    fn expire(&self) -> bool {
        self.retain(true, |idle| idle.since.elapsed() < self.idle && alive(&mut idle.session))
    }

    /// Resets the tunnels to peers that are no longer trusted. For any thread: it only looks at what was judged.
    pub fn drop_distrusted(&self) {
        self.retain(false, |idle| idle.session.peer.distrusted().is_none());
    }

    /// Closes all others; says whether any are left, which decides whether the sweep goes on.
    fn retain(&self, sweep: bool, mut keep: impl FnMut(&mut Idle) -> bool) -> bool {
        let mut closing = Vec::new();
        let mut shelves = self.shelves.lock().unwrap_or_else(PoisonError::into_inner);
        for shelf in shelves.by_source.values_mut() {
            for list in shelf.tunnels.values_mut() {
                closing.extend(list.extract_if(.., |idle| !keep(idle)).map(|idle| idle.session));
            }
            shelf.tunnels.retain(|_, list| !list.is_empty());
        }
        shelves.by_source.retain(|_, shelf| !shelf.tunnels.is_empty());
        shelves.total -= closing.len();
        let left = shelves.total > 0;
        if sweep {
            shelves.sweeping = left;
        }
        drop(shelves);
        closing.into_iter().for_each(close);
        left
    }

    /// Closes every idle tunnel.
    pub fn clear(&self) {
        let shelves = {
            let mut shelves = self.shelves.lock().unwrap_or_else(PoisonError::into_inner);
            shelves.total = 0;
            std::mem::take(&mut shelves.by_source)
        };
        shelves.into_values().for_each(Shelf::close);
    }

    pub fn len(&self) -> usize {
        self.shelves.lock().unwrap_or_else(PoisonError::into_inner).total
    }
}

impl Shelves {
    /// Closes what an older version of this identity left.
    fn supersede(&mut self, key: &Key) {
        if let Some(shelf) = self.by_source.get_mut(&key.source)
            && shelf.version < key.version
        {
            let old = std::mem::replace(shelf, Shelf { version: key.version, tunnels: HashMap::new() });
            self.total -= old.tunnels.values().map(Vec::len).sum::<usize>();
            old.close();
        }
    }
}

impl Shelf {
    fn close(self) {
        self.tunnels.into_values().flatten().for_each(|idle| close(idle.session));
    }
}

async fn sweep(pool: Weak<Pool>, every: Duration) {
    loop {
        tokio::time::sleep(every).await;
        match pool.upgrade() {
            Some(pool) if pool.expire() => {}
            _ => return,
        }
    }
}

/// Whether an idle tunnel can carry another stream. Reads what the peer sent meanwhile: a session ticket or a
/// KeyUpdate is fine, anything else, a RETIRE too, and its end, is not.
fn alive(session: &mut Session) -> bool {
    if session.peer.unfit().is_some() {
        return false;
    }
    loop {
        // Asks the kernel, not tokio: the event that tells of a close may not have been fetched yet.
        match session.codec.incoming.receive_now(&session.tcp) {
            Ok(0) => return false,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                session.codec.incoming.release_if_empty();
                return session.codec.incoming.is_empty() && !session.codec.order.retired();
            }
            Err(_) => return false,
        }
        if !matches!(session.codec.pull(), Ok(Pulled::Data)) {
            return false;
        }
    }
}

/// Ends an idle tunnel politely; one to a peer that is no longer trusted, at once.
pub(crate) fn close(mut session: Box<Session>) {
    if session.peer.distrusted().is_some() {
        return socket::reset_on_close(&session.tcp);
    }
    if let Ok((record, n)) = session.codec.seal_close_notify() {
        let _ = socket::send(&session.tcp, &record[..n]);
    }
}
