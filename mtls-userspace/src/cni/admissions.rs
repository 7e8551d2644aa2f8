//! Pods at the door: what CNI plugins ask in, an answer out once enrolment has dealt with the pod.
//!
//! A container runtime that starts a pod hands over its network namespace before any process runs in it. Enrolment takes
//! it from here, as where the pod lives, and says how far it is; this waits for that, within limits.

use std::collections::HashMap;
use std::fs::File;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use crate::agent_socket::{Answer, Attachment};
use crate::locate::Place;
use crate::mesh::{Mesh, Source, Workload};

/// No caller waits longer, whatever it says.
const LONGEST_WAIT: Duration = Duration::from_secs(120);

/// A pod whose network was made, and not yet unmade.
#[derive(Clone, Debug)]
pub struct Admitted {
    pub workload: Arc<Workload>,
    /// As the plugins before ours gave them; the API tells them later.
    pub addresses: Vec<IpAddr>,
    pub place: Place,
}

/// How far enrolment is with an admitted pod.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Standing {
    /// Identity, listeners and kernel state are in place.
    Protected,
    /// Why not yet.
    Waiting(String),
}

/// The pods at the door, by the container that stands for the pod.
#[derive(Default)]
pub struct Admissions {
    pods: Mutex<HashMap<String, (Admitted, Standing)>>,
    /// Rises when there is something for enrolment to do.
    asked: watch::Sender<u64>,
    /// Rises when enrolment has said how far it is.
    told: watch::Sender<u64>,
}

impl Admissions {
    /// Wakes enrolment.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.asked.subscribe()
    }

    /// Pods whose network is known from a plugin, by `namespace/name`.
    pub fn admitted(&self) -> HashMap<String, Admitted> {
        self.lock().values().map(|(admitted, _)| (admitted.workload.key(), admitted.clone())).collect()
    }

    /// Says how far enrolment is with each.
    pub fn tell(&self, standing: impl Fn(&Admitted) -> Standing) {
        for (admitted, told) in self.lock().values_mut() {
            *told = standing(admitted);
        }
        self.told.send_modify(|told| *told += 1);
    }

    /// Lets a pod in: answers when it is protected or takes no part, or says why not when the time is over.
    pub async fn add(&self, mesh: &Source, attachment: Attachment, netns: Option<OwnedFd>) -> Answer {
        let until = Instant::now() + Duration::from_millis(attachment.patience_ms).min(LONGEST_WAIT);
        let workload = match known(mesh, &attachment, until).await {
            Ok(workload) => workload,
            Err(answer) => return answer,
        };
        let Some(netns) = netns else {
            return Answer::Failed {
                reason: "the plugin did not hand over the pod's network namespace".into(),
            };
        };
        // The agent holds the namespace by the descriptor, and finds its cgroup when there is a process in it.
        let place = match Place::handed_over(File::from(netns), None) {
            Ok(place) => place,
            Err(error) => return Answer::Failed { reason: error.to_string() },
        };
        let container = attachment.container;
        {
            let mut pods = self.lock();
            // A sandbox that was made anew: its forerunner's network is as good as gone.
            pods.retain(|_, (other, _)| other.workload.key() != workload.key());
            let admitted = Admitted { workload, addresses: attachment.addresses, place };
            pods.insert(container.clone(), (admitted, Standing::Waiting("the agent is enrolling it".into())));
        }
        self.asked.send_modify(|asked| *asked += 1);
        self.standing(mesh, &container, until).await
    }

    /// Whether a pod is still protected, or takes no part.
    pub async fn check(&self, mesh: &Source, attachment: &Attachment) -> Answer {
        let now = Instant::now();
        match known(mesh, attachment, now).await {
            Err(answer) => answer,
            Ok(_) if self.lock().contains_key(&attachment.container) => {
                self.standing(mesh, &attachment.container, now).await
            }
            // From before this agent's time: what it finds by itself it protects, and reports.
            Ok(_) => Answer::Done,
        }
    }

    /// A pod's network is gone.
    pub fn del(&self, container: &str) {
        if self.lock().remove(container).is_some() {
            self.asked.send_modify(|asked| *asked += 1);
        }
    }

    /// Only these are still there.
    pub fn gc(&self, containers: &[String]) {
        let mut pods = self.lock();
        let before = pods.len();
        pods.retain(|container, _| containers.contains(container));
        if pods.len() < before {
            self.asked.send_modify(|asked| *asked += 1);
        }
    }

    async fn standing(&self, mesh: &Source, container: &str, until: Instant) -> Answer {
        let mut told = self.told.subscribe();
        let mut changes = mesh.subscribe();
        loop {
            told.mark_unchanged();
            changes.mark_unchanged();
            let (admitted, standing) = match self.lock().get(container) {
                Some(known) => known.clone(),
                None => return Answer::Failed { reason: "its network was unmade meanwhile".into() },
            };
            if standing == Standing::Protected {
                return Answer::Protected;
            }
            if find(&mesh.current(), &admitted.workload).is_some_and(|now| !now.enrolled) {
                return Answer::NotEnrolled;
            }
            tokio::select! {
                _ = told.changed() => {}
                _ = changes.changed() => {}
                () = tokio::time::sleep_until(until) => {
                    let Standing::Waiting(reason) = standing else { return Answer::Protected };
                    return Answer::Failed { reason };
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, (Admitted, Standing)>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits until the mesh's source has told of the pod. A pod that takes no part is an answer already.
async fn known(mesh: &Source, attachment: &Attachment, until: Instant) -> Result<Arc<Workload>, Answer> {
    let mut changes = mesh.subscribe();
    loop {
        changes.mark_unchanged();
        let now = mesh.current();
        let same = |workload: &&Arc<Workload>| {
            *workload.namespace == attachment.namespace
                && *workload.name == attachment.name
                // A pod that was made anew under the same name is another.
                && attachment.uid.as_deref().zip(workload.uid.as_deref()).is_none_or(|(told, is)| told == is)
        };
        match now.workloads_and_starting().find(same) {
            Some(workload) if workload.enrolled => return Ok(workload.clone()),
            Some(_) => return Err(Answer::NotEnrolled),
            None => {}
        }
        tokio::select! {
            _ = changes.changed() => {}
            () = tokio::time::sleep_until(until) => {
                let reason = "the agent of this node has not heard of the pod; its own log says whether it can reach \
                              the Kubernetes API";
                return Err(Answer::Failed { reason: reason.into() });
            }
        }
    }
}

/// The pod as the mesh has it now.
fn find<'a>(mesh: &'a Mesh, pod: &Workload) -> Option<&'a Arc<Workload>> {
    mesh.workloads_and_starting().find(|workload| workload.key() == pod.key() && workload.uid == pod.uid)
}
