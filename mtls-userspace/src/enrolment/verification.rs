//! Whether what protects a pod is really there: looked up in the kernel, not in a record of what was once set up.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Enrolment, Kept};
use crate::capture::{Examined, Fact, Place};
use crate::cni::{Admitted, Standing};
use crate::identity::{Identities, SpiffeId};
use crate::{locate, mesh};

/// Between looks at every pod. One that changed, or is not in good order, is looked at in each round.
const VERIFY_EVERY: Duration = Duration::from_secs(10);

/// Of a certificate that was asked for just now.
const AWAITED: &str = "the certificate authority has not answered yet";

/// A pod to look at.
struct LookedAt<'a> {
    key: &'a str,
    kept: &'a Kept,
    workload: Arc<mesh::Workload>,
    place: Arc<locate::Place>,
}

impl Enrolment {
    /// Looks whether everything is in force that protects the pods, and says so to those who wait at the door.
    pub fn verify(&mut self, identities: &Identities) {
        self.faults.retain(|key, _| self.pods.contains_key(key));
        let known = self.faults.clone();
        if self.verified.is_none_or(|verified| verified.elapsed() >= VERIFY_EVERY) {
            self.verified = Some(Instant::now());
            self.faults.clear();
        }
        for (key, faults) in self.examine(identities) {
            // A first certificate is always waited for a moment; an authority that does not answer becomes an error.
            let is_news = faults.iter().any(|fault| !fault.ends_with(AWAITED));
            if is_news && known.get(&key) != Some(&faults) {
                tracing::warn!(
                    pod = key,
                    faults = faults.join("; "),
                    "not everything is in force that protects the pod"
                );
            }
            self.faults.insert(key, faults);
        }
        self.admissions.tell(|admitted| self.standing(admitted));
    }

    /// What does not hold of each pod that is to be looked at.
    fn examine(&self, identities: &Identities) -> Vec<(String, Vec<String>)> {
        let looked_at: Vec<LookedAt<'_>> = self
            .pods
            .iter()
            .filter(|(key, _)| self.faults.get(*key).is_none_or(|faults| !faults.is_empty()))
            .map(|(key, kept)| {
                let (workload, place) = (kept.pod.workload.load_full(), kept.pod.place.load_full());
                LookedAt { key, kept, workload, place }
            })
            .collect();
        let examined: Vec<Examined<'_>> = looked_at
            .iter()
            .map(|LookedAt { kept, workload, place, .. }| Examined {
                pod: &kept.pod.socket,
                place: Place { netns: Some(&place.netns), cgroup: place.cgroup.as_deref() },
                addresses: &workload.addresses,
                modes: &kept.modes,
            })
            .collect();
        let facts = tokio::task::block_in_place(|| self.capture.examine_pods(&examined));
        let faults = |(it, facts): (&LookedAt<'_>, Vec<Fact>)| {
            let broken = facts.into_iter().filter(|fact| !fact.holds);
            let broken = broken.map(|fact| format!("{}: {}", fact.name, fact.found));
            (it.key.to_owned(), broken.chain(no_certificate(identities, &it.workload.identity)).collect())
        };
        looked_at.iter().zip(facts).map(faults).collect()
    }

    fn standing(&self, admitted: &Admitted) -> Standing {
        let key = admitted.workload.key();
        if let Some(reason) = self.failed.get(&key).or_else(|| self.failed.get("pods")) {
            return Standing::Waiting(reason.clone());
        }
        let kept = self.pods.get(&key).filter(|kept| kept.namespace == admitted.place.id);
        match (kept, self.faults.get(&key)) {
            (Some(_), Some(faults)) if faults.is_empty() => Standing::Protected,
            (Some(_), Some(faults)) => Standing::Waiting(faults.join("; ")),
            _ => Standing::Waiting("the agent is enrolling it".into()),
        }
    }
}

fn no_certificate(identities: &Identities, id: &SpiffeId) -> Option<String> {
    if identities.current(id).is_some() {
        return None;
    }
    let status = identities.status().into_iter().find(|status| status.id == *id);
    let why = status.and_then(|status| status.last_error);
    let why = why.unwrap_or_else(|| AWAITED.into());
    Some(format!("no certificate for {id}: {why}"))
}
