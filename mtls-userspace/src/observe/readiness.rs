//! Readiness: rooms say what they wait for, `/healthz/ready` says whether anything is still missing.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Everything the agent must have before it may call itself ready.
#[derive(Clone, Debug, Default)]
pub struct Readiness {
    conditions: Conditions,
}

/// Conditions by name, each with the reason why it is not met.
pub(super) type Judged = Vec<(&'static str, Option<Arc<str>>)>;

type Conditions = Arc<Mutex<Vec<State>>>;

#[derive(Debug)]
struct State {
    name: &'static str,
    /// Why not; none when ready.
    missing: Option<Arc<str>>,
}

/// One thing to wait for. Starts as not ready; clones speak for the same condition.
#[derive(Clone, Debug)]
pub struct Condition {
    name: &'static str,
    conditions: Conditions,
}

impl Readiness {
    /// Registers a condition, or returns the one of that name.
    pub fn condition(&self, name: &'static str) -> Condition {
        let mut conditions = lock(&self.conditions);
        if !conditions.iter().any(|state| state.name == name) {
            conditions.push(State { name, missing: Some("starting".into()) });
        }
        Condition { name, conditions: self.conditions.clone() }
    }

    /// Every condition. Before one is registered nothing is known to be ready.
    pub(super) fn conditions(&self) -> Judged {
        let conditions = lock(&self.conditions);
        if conditions.is_empty() {
            return vec![("agent", Some("starting".into()))];
        }
        conditions.iter().map(|state| (state.name, state.missing.clone())).collect()
    }

    /// What is missing, as (condition, reason).
    pub fn missing(&self) -> Vec<(&'static str, Arc<str>)> {
        self.conditions().into_iter().filter_map(|(name, missing)| Some((name, missing?))).collect()
    }

    pub fn is_ready(&self) -> bool {
        self.missing().is_empty()
    }
}

impl Condition {
    pub fn set_ready(&self) {
        self.set(None);
    }

    pub fn not_ready(&self, reason: impl Into<Arc<str>>) {
        self.set(Some(reason.into()));
    }

    fn set(&self, missing: Option<Arc<str>>) {
        for state in lock(&self.conditions).iter_mut().filter(|state| state.name == self.name) {
            state.missing.clone_from(&missing);
        }
    }
}

fn lock(conditions: &Conditions) -> MutexGuard<'_, Vec<State>> {
    conditions.lock().unwrap_or_else(PoisonError::into_inner)
}
