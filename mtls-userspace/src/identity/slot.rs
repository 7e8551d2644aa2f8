//! One wanted identity: what is in use, and how obtaining it goes.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use arc_swap::ArcSwapOption;
use serde::Serialize;
use tokio::sync::Notify;

use super::{Identity, REASONS, SpiffeId};

/// One identity's certificate, for people and metrics.
#[derive(Debug, Clone, Serialize)]
pub struct IdentityStatus {
    pub id: SpiffeId,
    /// The certificate in use; absent before the first and after an expiry.
    pub serial: Option<String>,
    pub not_before: Option<SystemTime>,
    pub not_after: Option<SystemTime>,
    /// The next attempt, whether a renewal or a retry.
    pub next_renewal: Option<SystemTime>,
    /// Of the last attempt, if it failed.
    pub last_error: Option<String>,
    /// Certificates obtained, the first included.
    pub renewals: u64,
    /// Attempts that failed.
    pub failures: u64,
    /// The same by [`super::Error::reason`].
    pub failures_by_reason: BTreeMap<&'static str, u64>,
}

pub(super) struct Slot {
    pub id: SpiffeId,
    pub current: ArcSwapOption<Identity>,
    /// Now, whatever is planned.
    pub renew: Notify,
    pub progress: Mutex<Progress>,
}

#[derive(Default)]
pub(super) struct Progress {
    pub next_renewal: Option<SystemTime>,
    pub last_error: Option<String>,
    pub renewals: u64,
    pub failures: u64,
    pub failures_by_reason: BTreeMap<&'static str, u64>,
}

impl Slot {
    pub fn new(id: SpiffeId) -> Arc<Self> {
        Arc::new(Self {
            id,
            current: ArcSwapOption::empty(),
            renew: Notify::new(),
            // Zeroes, so that the first failure of each kind is a rise and not a beginning.
            progress: Mutex::new(Progress {
                failures_by_reason: REASONS.map(|reason| (reason, 0)).into(),
                ..Progress::default()
            }),
        })
    }

    pub fn not_after(&self) -> Option<SystemTime> {
        self.current.load().as_ref().map(|identity| identity.svid.not_after)
    }

    pub fn status(&self) -> IdentityStatus {
        let current = self.current.load_full().filter(|identity| SystemTime::now() < identity.svid.not_after);
        let svid = current.as_ref().map(|identity| &identity.svid);
        let progress = lock(&self.progress);
        IdentityStatus {
            id: self.id.clone(),
            serial: svid.map(|svid| svid.serial.clone()),
            not_before: svid.map(|svid| svid.not_before),
            not_after: svid.map(|svid| svid.not_after),
            next_renewal: progress.next_renewal,
            last_error: progress.last_error.clone(),
            renewals: progress.renewals,
            failures: progress.failures,
            failures_by_reason: progress.failures_by_reason.clone(),
        }
    }
}

/// What these locks guard is valid at every step, so a panicked holder leaves nothing half done.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
