//! Enrolment: the mesh says which pods of this node take part; the kernel half and the data threads follow.
//!
//! A pod that can't be enrolled stays fenced by whatever kernel state it already has, is reported by name with the
//! reason, and is tried again; it is never let out in plaintext because of a mistake here.

mod places;
mod verification;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use ipnet::IpNet;

use crate::capture::{self, Capture, Enrolled};
use crate::cni::{Admissions, Admitted};
use crate::locate::{self, Locator, NetnsId, Place};
use crate::mesh::{Addresses, Mesh, Workload};
use crate::observe::{Enrolment as State, PodRow};
use crate::policy::{Mode, PortModes};
use crate::worker::{Command, Handle, LocalPods, Pod};
use places::Places;

/// What a change of label may take to be followed.
const PROMPTLY: Duration = Duration::from_secs(1);
/// A pod that is not found at first may just be starting, fenced by an earlier agent.
const SWEEP_AFTER: Duration = Duration::from_secs(10);

/// Keeps kernel and data threads in step with the mesh.
pub struct Enrolment {
    node: Arc<str>,
    capture: Arc<Capture>,
    workers: Vec<Handle>,
    local: Arc<LocalPods>,
    /// Empty: capture exactly the addresses in the mesh.
    prefixes: Vec<IpNet>,
    /// Whose addresses the kernel captures: a hundred thousand are not compared again as long as they are the same.
    captured: Option<Addresses>,
    places: Places,
    admissions: Arc<Admissions>,
    pods: HashMap<String, Kept>,
    /// Pods that are to be enrolled, with the moment they became so after this agent had seen them without: none for
    /// those that it only knows so.
    asked: HashMap<String, Option<Instant>>,
    /// Pods of this node that take no part.
    plain: HashSet<String>,
    /// What does not hold of all that protects a pod; none for a pod in good order.
    faults: HashMap<String, Vec<String>>,
    verified: Option<Instant>,
    /// Pods of which nothing has been found on this node.
    absent: usize,
    /// Pods to enrol again whatever is known of them.
    stale: HashSet<String>,
    begun: Instant,
    /// Pods that could not be enrolled, with the reason.
    failed: BTreeMap<String, String>,
    /// Pinned state of pods that went away while no agent ran is dropped once, after the first complete round.
    swept: bool,
}

/// An enrolled pod and what it was enrolled with.
struct Kept {
    pod: Arc<Pod>,
    modes: PortModes,
    namespace: NetnsId,
    /// How long the pod ran before it was fenced, if it did.
    unfenced: Option<Duration>,
}

impl Enrolment {
    pub fn new(
        node: Arc<str>,
        capture: Arc<Capture>,
        workers: Vec<Handle>,
        local: Arc<LocalPods>,
        prefixes: Vec<IpNet>,
        locator: Locator,
        admissions: Arc<Admissions>,
    ) -> Self {
        Self {
            node,
            places: Places::new(locator),
            admissions,
            asked: HashMap::new(),
            plain: HashSet::new(),
            faults: HashMap::new(),
            verified: None,
            absent: 0,
            stale: HashSet::new(),
            begun: Instant::now(),
            capture,
            workers,
            local,
            prefixes,
            captured: None,
            pods: HashMap::new(),
            failed: BTreeMap::new(),
            swept: false,
        }
    }

    /// Pods that could not be enrolled, with the reason.
    pub fn failed(&self) -> &BTreeMap<String, String> {
        &self.failed
    }

    /// Whether every pod was found and enrolled.
    pub fn is_settled(&self) -> bool {
        self.failed.is_empty() && self.absent == 0
    }

    /// Takes up the kernel's state as another agent left it, and enrols every pod again in the next round.
    pub fn renew(&mut self) {
        if let Err(error) = self.capture.adopt_again() {
            tracing::error!(%error, "the kernel's state cannot be read");
        }
        self.captured = None;
        self.stale = self.pods.keys().cloned().collect();
    }

    /// This node's pods as the admin API shows them.
    pub fn rows(&self, mesh: &Mesh) -> Vec<PodRow> {
        let row = |workload: &Arc<Workload>| {
            let key = workload.key();
            PodRow {
                namespace: workload.namespace.to_string(),
                name: workload.name.to_string(),
                identity: workload.identity.to_string(),
                addresses: workload.addresses.iter().map(ToString::to_string).collect(),
                mode: self.pods.get(&key).map(|kept| kept.modes.to_string()),
                enrolment: match self.failed.get(&key) {
                    Some(reason) => State::Failed { reason: reason.clone() },
                    None if self.pods.contains_key(&key) => State::Enrolled,
                    None => State::Pending,
                },
                faults: self.faults.get(&key).filter(|_| self.pods.contains_key(&key)).cloned(),
                unfenced_seconds: self
                    .pods
                    .get(&key)
                    .and_then(|kept| kept.unfenced)
                    .map(|gap| gap.as_secs_f64()),
            }
        };
        let here = mesh.workloads_and_starting().filter(|it| it.node.as_deref() == Some(&self.node));
        // One that is starting is nobody's concern before there is something of it.
        let is_there = |workload: &&Arc<Workload>| {
            let key = workload.key();
            !workload.addresses.is_empty() || self.pods.contains_key(&key) || self.failed.contains_key(&key)
        };
        here.filter(|workload| workload.enrolled).filter(is_there).map(row).collect()
    }

    /// Brings kernel and data threads in step with a snapshot. Errors end up in [`Self::failed`].
    pub async fn reconcile(&mut self, mesh: &Mesh) {
        self.failed.clear();
        self.absent = 0;
        let admitted = self.admissions.admitted();
        let wanted = self.wanted(mesh, &admitted);
        let pods = &self.pods;
        let known = |key: &str| pods.get(key).map(|kept| kept.namespace);
        if let Err(error) = self.places.refresh(mesh, &self.node, &admitted, known) {
            tracing::error!(%error, "pods cannot be found");
            self.failed.insert("pods".into(), error.to_string());
        }
        self.fence(mesh);
        let gone: Vec<String> = self.pods.keys().filter(|key| !wanted.contains_key(*key)).cloned().collect();
        for key in gone {
            self.release(&key).await;
        }
        for (key, workload) in &wanted {
            let modes = mesh.policies.modes(workload);
            let followed = self.follow(key, workload, admitted.get(key), modes).await;
            if let Err(Error::Capture(capture::Error::NoAddress { .. })) = &followed
                && workload.addresses.is_empty()
            {
                // Its network is just being made.
                self.absent += 1;
            } else if let Err(error) = followed {
                tracing::error!(pod = key, %error, "pod is not enrolled");
                self.failed.insert(key.clone(), error.to_string());
            }
        }
        self.local.replace(self.pods.values().map(|kept| kept.pod.clone()));
        let has_waited = self.begun.elapsed() >= SWEEP_AFTER;
        if !self.swept && self.failed.is_empty() && (self.absent == 0 || has_waited) {
            self.sweep();
        }
    }

    /// Pods to enrol, by key. One that is starting has the addresses that its network was made with, if they are known.
    fn wanted(
        &mut self,
        mesh: &Mesh,
        admitted: &HashMap<String, Admitted>,
    ) -> HashMap<String, Arc<Workload>> {
        let at_the_door = |workload: &Arc<Workload>| {
            let known = admitted.get(&workload.key()).filter(|known| known.workload.uid == workload.uid);
            match known.map(|known| &known.addresses).filter(|addresses| !addresses.is_empty()) {
                Some(addresses) if *addresses != workload.addresses => {
                    Arc::new(Workload { addresses: addresses.clone(), ..(**workload).clone() })
                }
                _ => workload.clone(),
            }
        };
        let here = mesh.workloads_and_starting().filter(|it| it.node.as_deref() == Some(&self.node));
        let (enrolled, plain): (Vec<_>, Vec<_>) = here.partition(|workload| workload.enrolled);
        let enrolled = enrolled.into_iter().map(at_the_door);
        let wanted: HashMap<_, _> = enrolled.map(|workload| (workload.key(), workload)).collect();
        self.asked.retain(|key, _| wanted.contains_key(key));
        for key in wanted.keys().filter(|key| !self.asked.contains_key(*key)).cloned().collect::<Vec<_>>() {
            let was_plain = self.plain.contains(&key);
            self.asked.insert(key, was_plain.then(Instant::now));
        }
        self.plain = plain.into_iter().map(|workload| workload.key()).collect();
        wanted
    }

    /// What holds for the whole node: captured addresses, and whose processes are never trusted as kubelet is.
    fn fence(&mut self, mesh: &Mesh) {
        let addresses = Some(mesh.addresses());
        let captured = if self.captured == addresses {
            Ok(())
        } else if self.prefixes.is_empty() {
            let all: Vec<IpNet> = mesh.captured_addresses().into_iter().map(IpNet::from).collect();
            self.capture.set_captured(&all)
        } else {
            self.capture.set_captured(&self.prefixes)
        };
        self.captured = addresses.filter(|_| captured.is_ok());
        // Beside a pod's cgroup are other pods' (kubepods.slice), also of pods this snapshot does not know yet.
        let cgroups: BTreeSet<PathBuf> = mesh
            .workloads
            .iter()
            .filter(|workload| workload.node.as_deref() == Some(&self.node))
            .filter_map(|workload| workload.cgroup.as_deref())
            .flat_map(|cgroup| {
                let beside = cgroup.parent().filter(|parent| *parent != self.capture.cgroup_root());
                [Some(cgroup), beside].into_iter().flatten()
            })
            .map(PathBuf::from)
            .chain(self.places.cgroups())
            .filter(|path| path.exists())
            .collect();
        let cgroups: Vec<PathBuf> = cgroups.into_iter().collect();
        for (what, result) in [
            ("captured addresses", captured),
            ("pods' cgroups", self.capture.set_untrusted_cgroups(&cgroups)),
        ] {
            if let Err(error) = result {
                tracing::error!(%error, "cannot update {what} in the kernel");
                self.failed.insert(what.into(), error.to_string());
            }
        }
    }

    async fn follow(
        &mut self,
        key: &str,
        workload: &Arc<Workload>,
        admitted: Option<&Admitted>,
        modes: PortModes,
    ) -> Result<(), Error> {
        // Nothing of it runs here: not yet, or no longer. What was fenced stays so.
        let Some(place) = self.places.of(workload, admitted)? else {
            self.absent += 1;
            return Ok(());
        };
        if let Some(kept) = self.pods.get_mut(key).filter(|_| !self.stale.contains(key)) {
            let before = kept.pod.workload.load();
            if kept.namespace == place.id && before.addresses == workload.addresses {
                if kept.pod.place.load().cgroup != place.cgroup {
                    self.capture.set_cgroup(&kept.pod.socket, place.cgroup.as_deref())?;
                    self.faults.remove(key);
                }
                kept.pod.place.store(Arc::new(place));
                if kept.modes != modes {
                    self.capture.set_modes(&kept.pod.socket, &modes)?;
                    // Plaintext that was accepted unjudged comes back through the agent.
                    let unjudged = modes.judged && !kept.modes.judged;
                    let resets = |port| unjudged || modes.of(port) == Mode::Strict;
                    let reset = kept.pod.socket.reset_plaintext(&resets)?;
                    tracing::info!(pod = key, %modes, reset, "modes changed; open plaintext connections reset");
                    kept.modes = modes;
                    self.faults.remove(key);
                }
                kept.pod.workload.store(workload.clone());
                return Ok(());
            }
        }
        self.enrol(key, workload, place, modes).await
    }

    async fn enrol(
        &mut self,
        key: &str,
        workload: &Arc<Workload>,
        place: Place,
        modes: PortModes,
    ) -> Result<(), Error> {
        let netns = place.exact();
        let enrolment = capture::Enrolment {
            name: key,
            netns: &netns,
            cgroup: place.cgroup.as_deref(),
            addresses: &workload.addresses,
            modes: &modes,
        };
        let enrolled = tokio::task::block_in_place(|| self.capture.enrol(&enrolment))?;
        let Enrolled { pod, listeners, was_fenced } = enrolled;
        let asked = self.asked.get(key).copied().flatten();
        // An earlier agent may have left a laxer mode behind, and connections with it. A pod that took no part so far
        // keeps those that it has.
        if asked.is_none() || was_fenced {
            pod.reset_plaintext(&|port| modes.of(port) == Mode::Strict)?;
        }
        let unfenced = if was_fenced { None } else { asked.map(|asked| asked.elapsed()).or(place.age) };
        let namespace = place.id;
        let pod = Arc::new(Pod {
            socket: pod,
            workload: ArcSwap::new(workload.clone()),
            place: ArcSwap::from_pointee(place),
        });
        for (worker, listeners) in self.workers.iter().zip(listeners) {
            worker.tell(Command::Serve { pod: pod.clone(), listeners }).await;
        }
        tracing::info!(pod = key, %modes, "pod enrolled");
        let before = self.pods.remove(key);
        let unfenced = match &before {
            Some(before) if before.namespace == namespace => before.unfenced,
            _ => unfenced.filter(|gap| !gap.is_zero()),
        };
        // A pod whose label has just come to say so is enrolled as soon as that can be.
        if let Some(gap) = unfenced.filter(|gap| before.is_none() && (asked.is_none() || *gap > PROMPTLY)) {
            tracing::warn!(
                pod = key,
                seconds = gap.as_secs_f64(),
                "the pod ran before it was fenced: until then it could send and get plaintext"
            );
        }
        self.faults.remove(key);
        self.stale.remove(key);
        self.pods.insert(key.into(), Kept { pod, modes, namespace, unfenced });
        // Enrolled anew with other addresses it was fenced all the time; another namespace leaves the old one behind.
        if let Some(old) = before.filter(|old| old.namespace != namespace) {
            self.let_go(key, &old.pod);
        }
        Ok(())
    }

    async fn release(&mut self, key: &str) {
        let Some(kept) = self.pods.remove(key) else { return };
        for worker in &self.workers {
            worker.tell(Command::Release { name: key.into() }).await;
        }
        self.let_go(key, &kept.pod);
    }

    fn let_go(&self, key: &str, pod: &Pod) {
        match self.capture.release(&pod.socket) {
            Ok(()) => tracing::info!(pod = key, "pod released"),
            Err(error) => {
                tracing::warn!(pod = key, %error, "pod released, but kernel state of it is left behind")
            }
        }
    }

    fn sweep(&mut self) {
        let wanted: HashSet<u64> = self.pods.values().map(|kept| kept.pod.socket.netns_cookie()).collect();
        match self.capture.retain(&wanted) {
            Ok(dropped) => {
                self.swept = true;
                if dropped > 0 {
                    tracing::info!(dropped, "dropped pinned state of pods that are gone");
                }
            }
            Err(error) => tracing::warn!(%error, "cannot drop pinned state of pods that are gone"),
        }
    }
}

/// Why a pod is not enrolled.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(
        "the pod has neither a UID, by which it could be found, nor the annotation mtls.dev/netns, which says where it is"
    )]
    NoPlace,
    #[error(transparent)]
    Locate(#[from] locate::Error),
    #[error("cgroup {path} (annotation mtls.dev/cgroup) is not a directory")]
    NoCgroup { path: PathBuf },
    #[error(transparent)]
    Capture(#[from] capture::Error),
}
