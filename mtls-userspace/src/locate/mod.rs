//! Locate: pods' UIDs in, where they live on this node out: network namespace and cgroup.
//!
//! A pod is found by the cgroups of its processes, which kubelet names after its UID. Of several namespaces that a
//! pod's processes are in, its own is that of the oldest process nearest to the pod's directory: the sandbox or the
//! first container, never something that a container made for itself later. One that is known stays the pod's while
//! any of its processes is in it, so that nothing in a pod can lead the agent away from it.
//!
//! Reads `/proc` and the cgroup tree; changes nothing.

mod path;
mod process;

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use process::Process;

/// Device and inode of a network namespace: a path may come to mean another one when a pod is made anew.
pub type NetnsId = (u64, u64);

/// Between looks whether located pods still live where they did.
const RECHECK: Duration = Duration::from_secs(2);
/// A search may take this part of the time: one in so many.
const SHARE: u32 = 10;
/// Directories between the cgroup root and kubelet's: kind's nodes have up to three.
const DEPTH: usize = 5;

/// Where a pod lives.
#[derive(Clone, Debug)]
pub struct Place {
    /// Leads to the pod's network namespace.
    pub netns: PathBuf,
    pub id: NetnsId,
    /// The pod's cgroup2 directory; none where it has none, or none yet.
    pub cgroup: Option<PathBuf>,
    /// How long the pod has been running; not known if its manifest says where it lives.
    pub age: Option<Duration>,
    held: Option<Arc<File>>,
}

impl Place {
    /// As the manifest says.
    ///
    /// # Errors
    ///
    /// When there is no such namespace.
    pub fn told(netns: &Path, cgroup: Option<&Path>) -> Result<Self, Error> {
        let id = process::netns_id(netns).map_err(|source| Error::Netns { path: netns.into(), source })?;
        Ok(Self { netns: netns.into(), id, cgroup: cgroup.map(PathBuf::from), age: None, held: None })
    }

    /// Of a namespace that somebody handed over, open. Its path need not exist for us.
    ///
    /// # Errors
    ///
    /// When the descriptor cannot be looked at.
    pub fn handed_over(file: File, cgroup: Option<PathBuf>) -> Result<Self, Error> {
        let netns = descriptor(&file);
        let id = process::netns_id(&netns).map_err(|source| Error::Netns { path: netns.clone(), source })?;
        Ok(Self { netns, id, cgroup, age: Some(Duration::ZERO), held: Some(Arc::new(file)) })
    }

    pub fn with_cgroup(self, cgroup: Option<PathBuf>) -> Self {
        Self { cgroup, ..self }
    }

    /// A path that opens exactly this namespace, whatever became of the process that showed it.
    pub fn exact(&self) -> PathBuf {
        self.held.as_deref().map_or_else(|| self.netns.clone(), descriptor)
    }
}

fn descriptor(file: &File) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

/// Finds pods, and remembers where they are.
#[derive(Debug)]
pub struct Locator {
    proc: PathBuf,
    cgroup_root: PathBuf,
    /// The node's own namespace: pods that share it are found, but have none of their own.
    host: Option<NetnsId>,
    known: HashMap<Arc<str>, Found>,
    checked: Instant,
    /// No search before this.
    rests_until: Instant,
}

#[derive(Debug)]
struct Found {
    process: Process,
    cgroup: Option<PathBuf>,
}

/// A pod whose UID is looked for, and the namespace it is known to have.
#[derive(Clone, Debug)]
pub struct Wanted {
    pub uid: Arc<str>,
    pub known: Option<NetnsId>,
}

impl Locator {
    /// `proc` is mounted for the node's own process ids; `cgroup_root` is the cgroup2 directory above its pods.
    pub fn new(proc: &Path, cgroup_root: &Path) -> Self {
        let now = Instant::now();
        Self {
            proc: proc.into(),
            cgroup_root: cgroup_root.into(),
            host: process::netns_id(Path::new("/proc/self/ns/net")).ok(),
            known: HashMap::new(),
            checked: now,
            rests_until: now,
        }
    }

    /// Looks for those pods that are not known yet, or no longer where they were; forgets all others. Cheap when there
    /// is nothing to look for.
    ///
    /// # Errors
    ///
    /// When processes cannot be listed.
    pub fn refresh(&mut self, wanted: &[Wanted]) -> Result<(), Error> {
        let uids: HashSet<&str> = wanted.iter().map(|wanted| &*wanted.uid).collect();
        self.known.retain(|uid, _| uids.contains(&**uid));
        if self.checked.elapsed() >= RECHECK {
            self.checked = Instant::now();
            self.known.retain(|_, found| found.process.lives());
        }
        let missing: HashMap<&str, &Wanted> = wanted
            .iter()
            .filter(|wanted| !self.known.contains_key(&wanted.uid))
            .map(|wanted| (&*wanted.uid, wanted))
            .collect();
        let started = Instant::now();
        if missing.is_empty() || started < self.rests_until {
            return Ok(());
        }
        let searched = process::of_pods(&self.proc, |uid| missing.contains_key(uid));
        self.rests_until = Instant::now() + started.elapsed() * SHARE;
        let searched = searched.map_err(|source| Error::Processes { path: self.proc.clone(), source })?;
        for (uid, processes) in searched {
            let Some(wanted) = missing.get(uid.as_str()) else { continue };
            if let Some(process) = own(processes, wanted.known, self.host) {
                let cgroup = process.cgroup.as_deref().and_then(|path| below(&self.cgroup_root, path));
                self.known.insert(wanted.uid.clone(), Found { process, cgroup });
            }
        }
        Ok(())
    }

    /// Where a pod lives that was found.
    ///
    /// # Errors
    ///
    /// When its processes are in a cgroup that cannot be seen from the cgroup root, where no hook would reach them.
    pub fn place(&self, uid: &str) -> Result<Option<Place>, Error> {
        let Some(Found { process, cgroup }) = self.known.get(uid) else { return Ok(None) };
        if let (Some(path), None) = (&process.cgroup, cgroup) {
            return Err(Error::OutOfSight { path: path.clone(), root: self.cgroup_root.clone() });
        }
        let age = process::uptime().ok().and_then(|now| now.checked_sub(process.started));
        Ok(Some(Place {
            netns: process.path.clone(),
            id: process.netns,
            cgroup: cgroup.clone(),
            age,
            held: Some(process.file.clone()),
        }))
    }

    /// The cgroup of a pod that may not have a process yet: kubelet makes it before anything else of the pod.
    pub fn cgroup(&self, uid: &str) -> Option<PathBuf> {
        let mut found = None;
        walk(&self.cgroup_root, DEPTH, &mut |directory, name| {
            let is_it = path::uid(name, true).is_some_and(|of| of == uid);
            if is_it {
                found = Some(directory.to_owned());
            }
            // What is in a pod is its own business.
            found.is_none() && path::uid(name, true).is_none()
        });
        found
    }

    /// Directories above every pod of this node, known to the agent or not, and the cgroups of those that are elsewhere.
    pub fn pods_cgroups(&self) -> Vec<PathBuf> {
        let mut above = Vec::new();
        walk(&self.cgroup_root, DEPTH, &mut |directory, name| {
            let is_it = path::is_kubepods(name);
            if is_it {
                above.push(directory.to_owned());
            }
            !is_it
        });
        let elsewhere = self.known.values().filter_map(|found| found.cgroup.clone());
        let elsewhere: Vec<PathBuf> =
            elsewhere.filter(|path| !above.iter().any(|it| path.starts_with(it))).collect();
        above.extend(elsewhere);
        above
    }
}

/// The process that shows a pod's own namespace.
fn own(processes: Vec<Process>, known: Option<NetnsId>, host: Option<NetnsId>) -> Option<Process> {
    let rank = |process: &Process| {
        (
            Some(process.netns) != known,
            // A pod of the host's network has no other; any other pod's process there is a guest.
            Some(process.netns) == host,
            process.below,
            process.started,
        )
    };
    processes.into_iter().min_by_key(rank)
}

/// The directory below `root` that a path leads to which the kernel wrote relative to a root of its own: the longest end
/// of the path that is there.
fn below(root: &Path, path: &str) -> Option<PathBuf> {
    let segments: Vec<&str> = path.split('/').filter(|segment| !segment.is_empty()).collect();
    let ends = (0..segments.len()).filter_map(|first| segments.get(first..));
    ends.filter(|end| !end.contains(&"..")).map(|end| root.join(end.join("/"))).find(|path| path.is_dir())
}

/// Visits directories, those nearer to `root` first, descending into those for which `visit` is true.
fn walk(root: &Path, depth: usize, visit: &mut impl FnMut(&Path, &str) -> bool) {
    let mut level = vec![root.to_owned()];
    for _ in 0..depth {
        let mut next = Vec::new();
        for entry in level.iter().filter_map(|directory| fs::read_dir(directory).ok()).flatten().flatten() {
            let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
            let path = entry.path();
            if is_directory && entry.file_name().to_str().is_some_and(|name| visit(&path, name)) {
                next.push(path);
            }
        }
        level = next;
    }
}

/// Why a pod cannot be located.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("network namespace {path}: {source}")]
    Netns { path: PathBuf, source: io::Error },
    #[error(
        "cannot list the node's processes in {path}: {source}; mount the node's /proc there, or name it with --proc"
    )]
    Processes { path: PathBuf, source: io::Error },
    #[error(
        "its processes are in cgroup {path}, which is not below {root}, so that no hook reaches them; give a \
         --cgroup-root above it", root = root.display()
    )]
    OutOfSight { path: String, root: PathBuf },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(netns: u64, below: usize, started: u64) -> Process {
        Process {
            netns: (4, netns),
            file: Arc::new(File::open("/proc/self/ns/net").unwrap()),
            path: "/proc/1/ns/net".into(),
            started: Duration::from_secs(started),
            below,
            cgroup: None,
        }
    }

    #[test]
    fn a_pods_own_namespace_is_that_of_its_first_process() {
        // The sandbox; a container that joined it; an engine in the pod; something that unshared.
        let all = || vec![process(9, 1, 30), process(7, 1, 10), process(8, 3, 5), process(7, 1, 20)];
        assert_eq!(own(all(), None, None).unwrap().netns.1, 7);
        assert_eq!(own(all(), None, Some((4, 7))).unwrap().netns.1, 9);
        assert!(own(Vec::new(), None, None).is_none());
    }

    #[test]
    fn a_known_namespace_stays_the_pods_while_a_process_is_in_it() {
        // The first container has ended and come back; what unshared is older now.
        let processes = || vec![process(9, 1, 30), process(7, 1, 40)];
        assert_eq!(own(processes(), None, None).unwrap().netns.1, 9);
        assert_eq!(own(processes(), Some((4, 7)), None).unwrap().netns.1, 7);
        assert_eq!(own(processes(), Some((4, 6)), None).unwrap().netns.1, 9);
    }

    #[test]
    fn a_pod_on_the_hosts_network_is_found_there() {
        assert_eq!(own(vec![process(1, 1, 30)], None, Some((4, 1))).unwrap().netns.1, 1);
    }

    #[test]
    fn a_path_from_another_root_is_found_by_its_end() {
        let root = tempfile::tempdir().unwrap();
        let pod = root.path().join("kubepods/burstable/podx");
        fs::create_dir_all(&pod).unwrap();
        for path in [
            "/kubepods/burstable/podx",
            "/../../kubepods/burstable/podx",
            "/docker/1/kubepods/burstable/podx",
        ] {
            assert_eq!(below(root.path(), path), Some(pod.clone()), "{path}");
        }
        for path in ["/", "/../..", "/kubepods/burstable/pody"] {
            assert_eq!(below(root.path(), path), None, "{path}");
        }
    }

    #[test]
    fn cgroups_are_found_before_there_is_a_process_and_wherever_the_pods_are() {
        let root = tempfile::tempdir().unwrap();
        let uid = "3c1ba4c1-9a35-4b47-b3d4-1f0e54f7a6d0";
        let kubepods = root.path().join("kubelet.slice/kubelet-kubepods.slice");
        let name = format!("kubelet-kubepods-besteffort-pod{}.slice", uid.replace('-', "_"));
        let pod = kubepods.join("kubelet-kubepods-besteffort.slice").join(name);
        fs::create_dir_all(pod.join("cri-containerd-1.scope")).unwrap();
        fs::create_dir_all(root.path().join("system.slice/a.service")).unwrap();
        let locator = Locator::new(Path::new("/proc"), root.path());
        assert_eq!(locator.cgroup(uid), Some(pod));
        assert_eq!(locator.cgroup("00000000-9a35-4b47-b3d4-1f0e54f7a6d0"), None);
        assert_eq!(locator.pods_cgroups(), [kubepods]);
    }

    #[test]
    fn processes_that_cannot_be_listed_are_an_error_that_names_the_remedy() {
        let mut locator = Locator::new(Path::new("/nowhere"), Path::new("/sys/fs/cgroup"));
        let wanted = Wanted { uid: "3c1ba4c1-9a35-4b47-b3d4-1f0e54f7a6d0".into(), known: None };
        let error = locator.refresh(&[wanted]).unwrap_err().to_string();
        assert!(error.contains("--proc"), "{error}");
    }
}
