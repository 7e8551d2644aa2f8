//! What other rooms tell when they are asked: closures in, rows out. Until a room is connected, it tells nothing.

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

use super::inspection::Inspector;
use super::readiness::Judged;
use super::status::{IdentityRow, MeshRow, PodRow};
use crate::plaintext;

type Ask<T> = Arc<dyn Fn() -> T + Send + Sync>;

struct Source<T>(RwLock<Option<Ask<T>>>);

impl<T> Default for Source<T> {
    fn default() -> Self {
        Self(RwLock::new(None))
    }
}

impl<T> Source<T> {
    fn set(&self, ask: Ask<T>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Some(ask);
    }

    fn ask(&self) -> Option<T> {
        // Cloned, so that no lock is held while a room answers.
        let ask = self.0.read().unwrap_or_else(PoisonError::into_inner).clone()?;
        Some(ask())
    }
}

#[derive(Default)]
pub(super) struct Providers {
    identities: Source<Vec<IdentityRow>>,
    pods: Source<Vec<PodRow>>,
    mesh: Source<MeshRow>,
    kernel_counters: Source<Vec<(&'static str, u64)>>,
    capabilities: Source<Vec<(&'static str, bool)>>,
    conditions: Source<Judged>,
    plaintext: Source<plaintext::Facts>,
    plaintext_counts: Source<plaintext::Counts>,
    refresh: Source<()>,
    inspector: RwLock<Option<Arc<dyn Inspector>>>,
}

impl Providers {
    pub fn set_identities(&self, ask: Ask<Vec<IdentityRow>>) {
        self.identities.set(ask);
    }

    pub fn set_pods(&self, ask: Ask<Vec<PodRow>>) {
        self.pods.set(ask);
    }

    pub fn set_mesh(&self, ask: Ask<MeshRow>) {
        self.mesh.set(ask);
    }

    pub fn set_kernel_counters(&self, ask: Ask<Vec<(&'static str, u64)>>) {
        self.kernel_counters.set(ask);
    }

    pub fn set_capabilities(&self, ask: Ask<Vec<(&'static str, bool)>>) {
        self.capabilities.set(ask);
    }

    pub fn capabilities(&self) -> Vec<(&'static str, bool)> {
        self.capabilities.ask().unwrap_or_default()
    }

    pub fn set_conditions(&self, ask: Ask<Judged>) {
        self.conditions.set(ask);
    }

    pub fn set_refresh(&self, refresh: Ask<()>) {
        self.refresh.set(refresh);
    }

    /// Brings up to date what is not reported as it happens.
    pub fn refresh(&self) {
        self.refresh.ask();
    }

    pub fn set_plaintext(&self, facts: Ask<plaintext::Facts>, counts: Ask<plaintext::Counts>) {
        self.plaintext.set(facts);
        self.plaintext_counts.set(counts);
    }

    pub fn plaintext(&self) -> Option<plaintext::Facts> {
        self.plaintext.ask()
    }

    pub fn plaintext_counts(&self) -> Option<plaintext::Counts> {
        self.plaintext_counts.ask()
    }

    pub fn set_inspector(&self, inspector: Arc<dyn Inspector>) {
        *self.inspector.write().unwrap_or_else(PoisonError::into_inner) = Some(inspector);
    }

    pub fn inspector(&self) -> Option<Arc<dyn Inspector>> {
        self.inspector.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn identities(&self) -> Vec<IdentityRow> {
        self.identities.ask().unwrap_or_default()
    }

    pub fn pods(&self) -> Vec<PodRow> {
        self.pods.ask().unwrap_or_default()
    }

    pub fn mesh(&self) -> Option<MeshRow> {
        self.mesh.ask()
    }

    pub fn kernel_counters(&self) -> Vec<(&'static str, u64)> {
        self.kernel_counters.ask().unwrap_or_default()
    }

    pub fn conditions(&self) -> Judged {
        self.conditions.ask().unwrap_or_default()
    }
}

impl fmt::Debug for Providers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Providers").finish_non_exhaustive()
    }
}
