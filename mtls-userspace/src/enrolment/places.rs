//! Where this node's pods live: by their manifests' annotations, by a CNI plugin that handed the namespace over, or by
//! their processes.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Error;
use crate::cni::Admitted;
use crate::locate::{self, Locator, NetnsId, Place, Wanted};
use crate::mesh::{Mesh, Workload};

/// Between looks for kubelet's directories in the cgroup tree.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

pub(super) struct Places {
    locator: Locator,
    /// Directories above the node's pods, and when they were looked for.
    above: Option<(Instant, Vec<PathBuf>)>,
    /// Cgroups of pods that had no process when they were looked for.
    early: HashMap<Arc<str>, PathBuf>,
    has_warned: bool,
}

impl Places {
    pub fn new(locator: Locator) -> Self {
        Self { locator, above: None, early: HashMap::new(), has_warned: false }
    }

    /// Looks for pods of the node whose manifests don't say where they live.
    pub fn refresh(
        &mut self,
        mesh: &Mesh,
        node: &str,
        admitted: &HashMap<String, Admitted>,
        known: impl Fn(&str) -> Option<NetnsId>,
    ) -> Result<(), locate::Error> {
        let here = mesh.workloads_and_starting().filter(|workload| workload.node.as_deref() == Some(node));
        let wanted: Vec<Wanted> = here
            .filter(|workload| workload.netns.is_none())
            .filter_map(|workload| {
                let key = workload.key();
                let told = admitted.get(&key).map(|admitted| admitted.place.id);
                Some(Wanted { uid: workload.uid.clone()?, known: told.or_else(|| known(&key)) })
            })
            .collect();
        self.early.retain(|uid, _| wanted.iter().any(|wanted| wanted.uid == *uid));
        tokio::task::block_in_place(|| self.locator.refresh(&wanted))
    }

    /// Where a pod lives; none if nothing of it has been found on this node.
    pub fn of(&mut self, workload: &Workload, admitted: Option<&Admitted>) -> Result<Option<Place>, Error> {
        if let Some(netns) = &workload.netns {
            if let Some(path) = workload.cgroup.as_ref().filter(|path| !path.is_dir()) {
                return Err(Error::NoCgroup { path: path.to_path_buf() });
            }
            return Ok(Some(Place::told(netns, workload.cgroup.as_deref())?));
        }
        let uid = workload.uid.as_ref().ok_or(Error::NoPlace)?;
        let found = self.locator.place(uid)?;
        if let (Some(place), false) = (&found, self.has_warned) {
            self.has_warned = place.cgroup.is_none();
            if self.has_warned {
                tracing::warn!(
                    pod = workload.key(),
                    "pods have no cgroup2 directory of their own: a process of a host-network pod passes for the kubelet"
                );
            }
        }
        let Some(admitted) = admitted else { return Ok(found) };
        // What the runtime handed over counts, until a process shows the same.
        if let Some(found) = found.filter(|found| found.id == admitted.place.id) {
            return Ok(Some(found));
        }
        if !self.early.contains_key(uid)
            && let Some(cgroup) = self.locator.cgroup(uid)
        {
            self.early.insert(uid.clone(), cgroup);
        }
        Ok(Some(admitted.place.clone().with_cgroup(self.early.get(uid).cloned())))
    }

    /// Cgroups that hold this node's pods, known to the mesh or not.
    pub fn cgroups(&mut self) -> Vec<PathBuf> {
        let is_fresh = self.above.as_ref().is_some_and(|(looked, _)| looked.elapsed() < LOOK_AGAIN);
        if !is_fresh {
            self.above = Some((Instant::now(), self.locator.pods_cgroups()));
        }
        self.above.as_ref().map(|(_, above)| above.clone()).unwrap_or_default()
    }
}
