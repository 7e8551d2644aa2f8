//! A live [`Mesh`]: a directory of manifests or a Kubernetes API server in, snapshots out, one after the other.
//!
//! Whatever can't be understood or reached is reported and never replaces a good snapshot.

use std::any::Any;
use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::{ArcSwap, ArcSwapOption};
use tokio::sync::watch;

use super::{Error, Mesh, Settings, cluster, directory};
use crate::kubernetes::Cluster;

pub use super::cluster::Scope;

/// A live mesh. Cheap to clone; the watching ends when the last clone is dropped.
#[derive(Clone)]
pub struct Source {
    shared: Arc<Shared>,
    /// Dropped with the last clone, and then ends what feeds `shared`.
    _watching: Arc<dyn Any + Send + Sync>,
}

impl Source {
    /// Loads a directory and keeps following it.
    ///
    /// # Errors
    ///
    /// The first load must succeed; its error names the place to correct.
    pub fn directory(directory: PathBuf, settings: Settings) -> Result<Self, Error> {
        let (shared, watching) = directory::follow(directory, settings)?;
        Ok(Self { shared, _watching: Arc::new(watching) })
    }

    /// Follows the objects of an API server. Completes when all that `scope` asks for has been listed once, and waits
    /// for that as long as it takes, saying why: an empty mesh would let out in plaintext what is enrolled.
    pub async fn kubernetes(cluster: Cluster, settings: Settings, scope: Scope) -> Self {
        let (shared, watching) = cluster::follow(cluster, settings, scope).await;
        Self { shared, _watching: Arc::new(watching) }
    }

    /// The snapshot in force. Lock free.
    pub fn current(&self) -> Arc<Mesh> {
        self.shared.current.load_full()
    }

    /// Wakes at every new snapshot, with its generation. [`Self::current`] is at least that new by then.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.shared.generation.subscribe()
    }

    /// Calls `before` with the mesh in force, and with each one to come before it is in force. It must not wait.
    pub fn before_each(&self, before: impl Fn(&Mesh) + Send + Sync + 'static) {
        let mut all = self.shared.before.lock().unwrap_or_else(PoisonError::into_inner);
        before(&self.current());
        all.push(Box::new(before));
    }

    /// Why what is there now isn't all in force; `None` when it is.
    pub fn last_error(&self) -> Option<String> {
        self.shared.last_error.load().as_deref().cloned()
    }

    /// How many changes were refused since the start.
    pub fn errors(&self) -> u64 {
        self.shared.errors.load(Ordering::Relaxed)
    }
}

/// Where a feeder puts snapshots.
pub(super) struct Shared {
    current: ArcSwap<Mesh>,
    generation: watch::Sender<u64>,
    last_error: ArcSwapOption<String>,
    errors: AtomicU64,
    /// Who must be done with a mesh before it is in force.
    before: Mutex<Vec<Before>>,
}

type Before = Box<dyn Fn(&Mesh) + Send + Sync>;

impl Shared {
    pub(super) fn new(mesh: Mesh) -> Arc<Self> {
        report(&mesh, None);
        Arc::new(Self {
            generation: watch::Sender::new(mesh.generation),
            current: ArcSwap::from_pointee(mesh),
            last_error: ArcSwapOption::empty(),
            errors: AtomicU64::new(0),
            before: Mutex::default(),
        })
    }

    pub(super) fn current(&self) -> Arc<Mesh> {
        self.current.load_full()
    }

    pub(super) fn publish(&self, mesh: Mesh) {
        report(&mesh, Some(&self.current()));
        let generation = mesh.generation;
        let before = self.before.lock().unwrap_or_else(PoisonError::into_inner);
        before.iter().for_each(|before| before(&mesh));
        self.current.store(Arc::new(mesh));
        drop(before);
        self.generation.send_replace(generation);
    }

    /// `None`: everything is in force again.
    pub(super) fn say(&self, error: Option<String>) {
        self.last_error.store(error.map(Arc::new));
    }

    pub(super) fn count_error(&self) {
        self.errors.fetch_add(1, Ordering::Relaxed);
    }
}

/// Logs what is new in a snapshot.
fn report(mesh: &Mesh, before: Option<&Mesh>) {
    let enrolled = mesh.workloads.iter().filter(|workload| workload.enrolled).count();
    let workloads = mesh.workloads.len();
    tracing::info!(generation = mesh.generation, workloads, enrolled, "mesh loaded");
    let known: HashSet<_> = before.into_iter().flat_map(Mesh::warnings).collect();
    for warning in mesh.warnings().iter().filter(|warning| !known.contains(warning)) {
        tracing::warn!("{warning}");
    }
    let known: HashSet<_> = before.into_iter().flat_map(|mesh| mesh.policies.warnings()).collect();
    for warning in mesh.policies.warnings().iter().filter(|warning| !known.contains(warning)) {
        if warning.is_error() {
            tracing::error!("{warning}");
        } else {
            tracing::warn!("{warning}");
        }
    }
}
