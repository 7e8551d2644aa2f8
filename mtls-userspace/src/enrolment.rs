//! Enrolment: the mesh says which pods of this node take part; the kernel half and the data threads follow.
//!
//! A pod that can't be enrolled stays fenced by whatever kernel state it already has, is reported by name with the
//! reason, and is tried again; it is never let out in plaintext because of a mistake here.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use ipnet::IpNet;

use crate::capture::{self, Capture, Enrolled};
use crate::mesh::{Mesh, Workload};
use crate::observe::{Enrolment as State, PodRow};
use crate::policy::{Mode, PortModes};
use crate::worker::{Command, Handle, LocalPods, Pod};

/// Keeps kernel and data threads in step with the mesh.
pub struct Enrolment {
    node: Arc<str>,
    capture: Arc<Capture>,
    workers: Vec<Handle>,
    local: Arc<LocalPods>,
    /// Empty: capture exactly the addresses in the mesh.
    prefixes: Vec<IpNet>,
    pods: HashMap<String, Kept>,
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
}

/// Device and inode of a network namespace: a path may come to mean another one when a pod is made anew.
type NetnsId = (u64, u64);

impl Enrolment {
    pub fn new(
        node: Arc<str>,
        capture: Arc<Capture>,
        workers: Vec<Handle>,
        local: Arc<LocalPods>,
        prefixes: Vec<IpNet>,
    ) -> Self {
        Self {
            node,
            capture,
            workers,
            local,
            prefixes,
            pods: HashMap::new(),
            failed: BTreeMap::new(),
            swept: false,
        }
    }

    /// Pods that could not be enrolled, with the reason.
    pub fn failed(&self) -> &BTreeMap<String, String> {
        &self.failed
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
            }
        };
        mesh.enrolled_on(&self.node).map(row).collect()
    }

    /// Brings kernel and data threads in step with a snapshot. Errors end up in [`Self::failed`].
    pub async fn reconcile(&mut self, mesh: &Mesh) {
        self.failed.clear();
        let wanted: HashMap<String, Arc<Workload>> =
            mesh.enrolled_on(&self.node).map(|workload| (workload.key(), workload.clone())).collect();
        self.fence(mesh);
        let gone: Vec<String> = self.pods.keys().filter(|key| !wanted.contains_key(*key)).cloned().collect();
        for key in gone {
            self.release(&key).await;
        }
        for (key, workload) in &wanted {
            let modes = mesh.policies.modes(workload);
            if let Err(error) = self.follow(key, workload, modes).await {
                tracing::error!(pod = key, %error, "pod is not enrolled");
                self.failed.insert(key.clone(), error.to_string());
            }
        }
        self.local.replace(self.pods.values().map(|kept| kept.pod.clone()));
        if !self.swept && self.failed.is_empty() {
            self.sweep();
        }
    }

    /// What holds for the whole node: captured addresses, and whose processes are never trusted as kubelet is.
    fn fence(&mut self, mesh: &Mesh) {
        let prefixes = if self.prefixes.is_empty() {
            mesh.captured_addresses().into_iter().map(IpNet::from).collect()
        } else {
            self.prefixes.clone()
        };
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
            .filter(|path| path.exists())
            .map(PathBuf::from)
            .collect();
        let cgroups: Vec<PathBuf> = cgroups.into_iter().collect();
        for (what, result) in [
            ("captured addresses", self.capture.set_captured(&prefixes)),
            ("pods' cgroups", self.capture.set_untrusted_cgroups(&cgroups)),
        ] {
            if let Err(error) = result {
                tracing::error!(%error, "cannot update {what} in the kernel");
                self.failed.insert(what.into(), error.to_string());
            }
        }
    }

    async fn follow(&mut self, key: &str, workload: &Arc<Workload>, modes: PortModes) -> Result<(), Error> {
        let netns = workload.netns.as_deref().ok_or(Error::NoNetns)?;
        let namespace = netns_id(netns)?;
        if let Some(kept) = self.pods.get_mut(key) {
            let before = kept.pod.workload.load();
            if kept.namespace == namespace
                && before.addresses == workload.addresses
                && before.cgroup == workload.cgroup
            {
                if kept.modes != modes {
                    self.capture.set_modes(&kept.pod.socket, &modes)?;
                    // Plaintext that was accepted unjudged comes back through the agent.
                    let unjudged = modes.judged && !kept.modes.judged;
                    let resets = |port| unjudged || modes.of(port) == Mode::Strict;
                    let reset = kept.pod.socket.reset_plaintext(&resets)?;
                    tracing::info!(pod = key, %modes, reset, "modes changed; open plaintext connections reset");
                    kept.modes = modes;
                }
                kept.pod.workload.store(workload.clone());
                return Ok(());
            }
        }
        self.enrol(key, workload, netns, namespace, modes).await
    }

    async fn enrol(
        &mut self,
        key: &str,
        workload: &Arc<Workload>,
        netns: &Path,
        namespace: NetnsId,
        modes: PortModes,
    ) -> Result<(), Error> {
        if let Some(cgroup) = workload.cgroup.as_deref().filter(|path| !path.is_dir()) {
            return Err(Error::NoCgroup { path: cgroup.into() });
        }
        let enrolment = capture::Enrolment {
            name: key,
            netns,
            cgroup: workload.cgroup.as_deref(),
            addresses: &workload.addresses,
            modes: &modes,
        };
        let Enrolled { pod, listeners } = tokio::task::block_in_place(|| self.capture.enrol(&enrolment))?;
        // An earlier agent may have left a laxer mode behind, and connections with it.
        pod.reset_plaintext(&|port| modes.of(port) == Mode::Strict)?;
        let pod = Arc::new(Pod { socket: pod, workload: ArcSwap::new(workload.clone()) });
        for (worker, listeners) in self.workers.iter().zip(listeners) {
            worker.tell(Command::Serve { pod: pod.clone(), listeners }).await;
        }
        tracing::info!(pod = key, %modes, "pod enrolled");
        let before = self.pods.insert(key.into(), Kept { pod, modes, namespace });
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

fn netns_id(path: &Path) -> Result<NetnsId, Error> {
    let metadata = std::fs::metadata(path).map_err(|source| Error::Netns { path: path.into(), source })?;
    Ok((metadata.dev(), metadata.ino()))
}

/// Why a pod is not enrolled.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("the manifest names no network namespace: add the annotation mtls.dev/netns")]
    NoNetns,
    #[error("network namespace {path} (annotation mtls.dev/netns): {source}")]
    Netns { path: PathBuf, source: std::io::Error },
    #[error("cgroup {path} (annotation mtls.dev/cgroup) is not a directory")]
    NoCgroup { path: PathBuf },
    #[error(transparent)]
    Capture(#[from] capture::Error),
}
