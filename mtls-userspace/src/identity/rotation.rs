//! Rotation: the set of wanted identities in, their current certificates out, renewed at half life.
//!
//! Readers never wait and never see a half-replaced identity. While the authority is away a certificate stays
//! current to its end and not a moment longer. What revokes peers' certificates is joined to every identity as it
//! comes. Established connections are none of this room's business.

use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use rand::Rng;
use rustls_pki_types::CertificateDer;
use tokio::sync::{Notify, Semaphore, mpsc, watch};
use tokio::task::{AbortHandle, JoinSet};

use super::issuing::issue;
use super::revocation_file::RevocationFile;
use super::slot::{IdentityStatus, Slot, lock};
use super::{
    Authority, Error, Identity, News, Revocations, SpiffeId, Svid, TrustBundle, WorkloadApi, timestamp,
};

/// How certificates are asked for.
#[derive(Debug, Clone)]
pub struct Config {
    /// Asked of the authority, which may give less.
    pub lifetime: Duration,
    /// Before the first retry; doubles with each failure up to `retry_max`.
    pub retry_min: Duration,
    pub retry_max: Duration,
    /// For one attempt, from connecting to the answer.
    pub attempt_timeout: Duration,
    /// Attempts at one time, so that a node with many identities doesn't overrun the authority at start.
    pub concurrent: usize,
    /// Revocation lists besides those that the authority gives; followed.
    pub revocation_file: Option<PathBuf>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            lifetime: Duration::from_secs(24 * 3600),
            retry_min: Duration::from_millis(250),
            retry_max: Duration::from_secs(15),
            attempt_timeout: Duration::from_secs(10),
            concurrent: 8,
            revocation_file: None,
        }
    }
}

/// Between two attempts that went well, however short the certificate's life.
const SOONEST: Duration = Duration::from_millis(100);

/// The current identity of every workload identity on this node.
pub struct Identities {
    origin: Origin,
    config: Config,
    /// Replaced whole by `want`; each slot's content by its own renewal task.
    slots: ArcSwap<HashMap<SpiffeId, Arc<Slot>>>,
    /// Held while `slots` is replaced.
    wanting: Mutex<()>,
    wanted: Notify,
    changes: watch::Sender<u64>,
    attempts: Semaphore,
    /// Held while an identity is replaced, so that none misses what came meanwhile.
    revoked: Mutex<Revoked>,
}

/// Where identities come from.
enum Origin {
    /// Signs what we ask for; keys are made here.
    Authority(Arc<dyn Authority>),
    /// Hands out keys and certificates, and renews them by itself.
    WorkloadApi(Arc<WorkloadApi>),
}

/// Revocation lists by who gave them, and all together.
#[derive(Default)]
struct Revoked {
    origin: Arc<Revocations>,
    file: Arc<Revocations>,
    together: Arc<Revocations>,
}

impl Identities {
    /// Identities that an authority signs.
    pub fn new(authority: Arc<dyn Authority>, config: Config) -> Arc<Self> {
        Self::of(Origin::Authority(authority), config)
    }

    /// Identities that a SPIFFE Workload API hands out.
    pub fn from_workload_api(api: WorkloadApi, config: Config) -> Arc<Self> {
        Self::of(Origin::WorkloadApi(Arc::new(api)), config)
    }

    fn of(origin: Origin, config: Config) -> Arc<Self> {
        Arc::new(Self {
            origin,
            attempts: Semaphore::new(config.concurrent.max(1)),
            config,
            slots: ArcSwap::default(),
            wanting: Mutex::new(()),
            wanted: Notify::new(),
            changes: watch::Sender::new(0),
            revoked: Mutex::default(),
        })
    }

    /// Fetches and renews what is wanted until `shutdown` completes. Run it once.
    pub async fn run(self: Arc<Self>, shutdown: impl Future<Output = ()>) {
        let mut shutdown = pin!(shutdown);
        let mut renewals = Renewals::default();
        let (news, mut heard) = mpsc::channel(4);
        let (file, mut read) = mpsc::channel(4);
        let mut following = pin!(self.follow(&news, &file));
        loop {
            renewals.follow(&self);
            tokio::select! {
                () = &mut shutdown => return,
                () = self.wanted.notified() => {}
                Some(ended) = renewals.tasks.join_next() => renewals.ended(ended),
                () = &mut following => {}
                Some(news) = heard.recv() => match news {
                    News::Renew { why } => {
                        tracing::info!("{why}; renewing every certificate");
                        self.renew();
                    }
                    News::Revocations(lists) => self.revoke(|revoked| revoked.origin = lists),
                },
                Some(lists) = read.recv() => self.revoke(|revoked| revoked.file = lists),
            }
        }
    }

    /// Never ends.
    async fn follow(&self, news: &mpsc::Sender<News>, lists: &mpsc::Sender<Arc<Revocations>>) {
        let origin = async {
            match &self.origin {
                Origin::Authority(authority) => authority.follow(news).await,
                Origin::WorkloadApi(api) => api.follow(news).await,
            }
        };
        let file = async {
            match &self.config.revocation_file {
                Some(path) => RevocationFile::new(path.clone()).follow(lists, || self.authorities()).await,
                None => std::future::pending().await,
            }
        };
        tokio::join!(origin, file);
    }

    fn renew(&self) {
        self.slots.load().values().for_each(|slot| slot.renew.notify_one());
    }

    /// Certificates of every authority known by now.
    fn authorities(&self) -> Vec<CertificateDer<'static>> {
        let slots = self.slots.load();
        let current = slots.values().filter_map(|slot| slot.current.load_full());
        let mut known: Vec<_> = current
            .flat_map(|identity| {
                let intermediates = identity.svid.chain.iter().skip(1).cloned();
                intermediates.chain(identity.bundle.roots.iter().cloned()).collect::<Vec<_>>()
            })
            .collect();
        known.sort_by(|a, b| a.as_ref().cmp(b.as_ref()));
        known.dedup();
        known
    }

    /// Puts changed revocation lists in force for every identity.
    fn revoke(&self, change: impl FnOnce(&mut Revoked)) {
        let mut revoked = lock(&self.revoked);
        change(&mut revoked);
        let together = revoked.origin.join(&revoked.file);
        if together == *revoked.together {
            return;
        }
        tracing::info!(lists = ?together, "revocation lists in force");
        revoked.together = Arc::new(together);
        for slot in self.slots.load().values() {
            let Some(before) = slot.current.load_full() else { continue };
            let bundle = before.bundle.with(revoked.together.clone());
            let next =
                Identity { version: next_version(), svid: before.svid.clone(), bundle: Arc::new(bundle) };
            let own = next.verify();
            slot.current.store(Some(Arc::new(next)));
            if let Err(fault) = own {
                tracing::warn!(id = %slot.id, %fault, "our own certificate is refused by peers; asking for another");
                slot.renew.notify_one();
            }
        }
        drop(revoked);
        self.changed();
    }

    /// The revocation lists in force.
    pub fn revocations(&self) -> Arc<Revocations> {
        lock(&self.revoked).together.clone()
    }

    /// Sets the identities to hold: those of the node's enrolled workloads. Others are forgotten at once.
    pub fn want(&self, ids: HashSet<SpiffeId>) {
        let _wanting = lock(&self.wanting);
        let held = self.slots.load_full();
        if held.len() == ids.len() && held.keys().all(|id| ids.contains(id)) {
            return;
        }
        let forgotten = held.keys().any(|id| !ids.contains(id));
        let slot = |id: SpiffeId| {
            let slot = held.get(&id).cloned().unwrap_or_else(|| Slot::new(id.clone()));
            (id, slot)
        };
        self.slots.store(Arc::new(ids.into_iter().map(slot).collect()));
        self.wanted.notify_one();
        if forgotten {
            self.changed();
        }
    }

    /// The identity to use now; `None` when it was never issued, has expired or isn't wanted. Lock-free.
    pub fn current(&self, id: &SpiffeId) -> Option<Arc<Identity>> {
        let identity = self.slots.load().get(id)?.current.load_full()?;
        (SystemTime::now() < identity.svid.not_after).then_some(identity)
    }

    /// Waits until the identity is there.
    ///
    /// # Errors
    ///
    /// [`Error::NotReady`] with the last attempt's error, after `timeout`.
    pub async fn ready(&self, id: &SpiffeId, timeout: Duration) -> Result<Arc<Identity>, Error> {
        let mut changes = self.subscribe();
        let arrival = async {
            loop {
                if let Some(identity) = self.current(id) {
                    return identity;
                }
                if changes.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        };
        tokio::time::timeout(timeout, arrival).await.map_err(|_| {
            let last = self.slots.load().get(id).map(|slot| {
                let pending = "the authority has not answered yet";
                lock(&slot.progress).last_error.clone().unwrap_or_else(|| pending.into())
            });
            Error::NotReady { id: id.clone(), waited: timeout, last }
        })
    }

    /// Rises whenever `current` answers differently: issued, renewed, forgotten, expired.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// One entry for each wanted identity, ordered by ID.
    pub fn status(&self) -> Vec<IdentityStatus> {
        let mut status: Vec<_> = self.slots.load().values().map(|slot| slot.status()).collect();
        status.sort_by(|a, b| a.id.cmp(&b.id));
        status
    }

    fn changed(&self) {
        self.changes.send_modify(|changes| *changes += 1);
    }

    /// Keeps one identity current, for as long as it is wanted.
    async fn keep(self: Arc<Self>, slot: Arc<Slot>) {
        let mut failures_in_a_row = 0;
        loop {
            let next = match self.attempt(&slot.id).await {
                Ok((svid, bundle)) => {
                    failures_in_a_row = 0;
                    self.replace(&slot, svid, bundle)
                }
                Err(error) => {
                    failures_in_a_row += 1;
                    if matches!(error, Error::Withdrawn { .. }) && slot.current.swap(None).is_some() {
                        self.changed();
                    }
                    self.failed(&slot, &error, failures_in_a_row)
                }
            };
            self.pause(&slot, next).await;
        }
    }

    async fn attempt(&self, id: &SpiffeId) -> Result<(Svid, TrustBundle), Error> {
        let authority = match &self.origin {
            Origin::Authority(authority) => authority,
            Origin::WorkloadApi(api) => return api.svid(id),
        };
        let timeout = self.config.attempt_timeout;
        // Only closing it could fail, and nobody does. Waiting for a turn doesn't count as waiting for the authority.
        let _turn = self.attempts.acquire().await.ok();
        let issued = tokio::time::timeout(timeout, issue(&**authority, id, self.config.lifetime));
        issued.await.map_err(|_| Error::TimedOut { id: id.clone(), waited: timeout })?
    }

    /// Returns when to renew.
    fn replace(&self, slot: &Slot, svid: Svid, bundle: TrustBundle) -> SystemTime {
        let now = SystemTime::now();
        // From now on, not from the start that the certificate states: authorities date it back.
        let left = svid.not_after.duration_since(now).unwrap_or_default();
        let next = now + left.mul_f64(rand::rng().random_range(0.45..0.55)).max(SOONEST);
        let revoked = lock(&self.revoked);
        let bundle = bundle.with(revoked.together.clone());
        let unchanged = |before: &Identity| before.svid.chain == svid.chain && *before.bundle == bundle;
        let same = slot.current.load().as_ref().is_some_and(|before| unchanged(before));
        let mut progress = lock(&slot.progress);
        progress.last_error = None;
        progress.next_renewal = Some(next);
        if same {
            // A Workload API renews when it sees fit, and has not yet.
            return next;
        }
        progress.renewals += 1;
        drop(progress);
        tracing::info!(
            id = %slot.id,
            serial = svid.serial,
            not_after = timestamp(svid.not_after),
            next_renewal = timestamp(next),
            "certificate issued"
        );
        let identity = Identity { version: next_version(), svid: Arc::new(svid), bundle: Arc::new(bundle) };
        slot.current.store(Some(Arc::new(identity)));
        drop(revoked);
        self.changed();
        next
    }

    /// Returns when to try again.
    fn failed(&self, slot: &Slot, error: &Error, failures_in_a_row: u32) -> SystemTime {
        let now = SystemTime::now();
        let left = slot.not_after().and_then(|end| end.duration_since(now).ok());
        let pause = self.back_off(failures_in_a_row, left);
        let next = now + pause;
        match left {
            Some(left) => tracing::warn!(
                id = %slot.id, %error, retry_in = ?pause, left = ?left,
                "certificate not renewed; the current one stays in use"
            ),
            None => tracing::error!(
                id = %slot.id, %error, retry_in = ?pause,
                "no certificate; connections of this identity are refused"
            ),
        }
        let mut progress = lock(&slot.progress);
        progress.failures += 1;
        *progress.failures_by_reason.entry(error.reason()).or_default() += 1;
        progress.last_error = Some(error.to_string());
        progress.next_renewal = Some(next);
        next
    }

    fn back_off(&self, failures_in_a_row: u32, left: Option<Duration>) -> Duration {
        let Config { retry_min, retry_max, .. } = self.config;
        let doubled = retry_min.saturating_mul(1 << failures_in_a_row.saturating_sub(1).min(20));
        // A certificate near its end is worth asking for more often than the limit says.
        let worth = left.map_or(retry_max, |left| retry_max.min(left / 3).max(retry_min));
        doubled.min(worth).mul_f64(rand::rng().random_range(0.5..=1.0))
    }

    /// Sleeps by the wall clock, which certificates go by, or until told to renew; announces an expiry on the way.
    async fn pause(&self, slot: &Slot, until: SystemTime) {
        // A suspended machine's monotonic clock stands still: look at the wall clock now and then.
        const GLANCE: Duration = Duration::from_secs(20);
        loop {
            let now = SystemTime::now();
            let end = slot.not_after();
            if end.is_some_and(|end| end <= now) {
                slot.current.store(None);
                self.changed();
                tracing::error!(id = %slot.id, "certificate expired; connections of this identity are refused");
                continue;
            }
            let Ok(left) = until.duration_since(now) else { return };
            let to_end = end.and_then(|end| end.duration_since(now).ok()).unwrap_or(GLANCE);
            // Not less than a timer tick, or the last moments are a busy loop.
            let nap = left.min(to_end).min(GLANCE).max(Duration::from_millis(1));
            tokio::select! {
                () = tokio::time::sleep(nap) => {}
                () = slot.renew.notified() => return,
            }
        }
    }
}

/// A task for each slot. Dropping this ends them.
#[derive(Default)]
struct Renewals {
    tasks: JoinSet<()>,
    /// With its slot: an identity forgotten and wanted again has a new one.
    running: HashMap<SpiffeId, (Arc<Slot>, AbortHandle)>,
}

impl Renewals {
    fn follow(&mut self, identities: &Arc<Identities>) {
        let slots = identities.slots.load_full();
        self.running.retain(|id, (slot, task)| {
            let kept = slots.get(id).is_some_and(|wanted| Arc::ptr_eq(wanted, slot));
            if !kept {
                task.abort();
            }
            kept
        });
        for (id, slot) in slots.iter() {
            if !self.running.contains_key(id) {
                let task = self.tasks.spawn(identities.clone().keep(slot.clone()));
                self.running.insert(id.clone(), (slot.clone(), task));
            }
        }
    }

    /// A task ends only when aborted, or by a defect: then `follow` starts it anew.
    fn ended(&mut self, ended: Result<(), tokio::task::JoinError>) {
        if let Err(error) = ended
            && error.is_panic()
        {
            tracing::error!(%error, "a renewal task failed; starting it again");
            self.running.retain(|_, (_, task)| !task.is_finished());
        }
    }
}

/// One count for the process, so that caches may key on it alone.
fn next_version() -> u64 {
    static VERSIONS: AtomicU64 = AtomicU64::new(1);
    VERSIONS.fetch_add(1, Ordering::Relaxed)
}
