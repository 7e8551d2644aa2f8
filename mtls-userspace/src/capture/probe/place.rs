//! A place to try things in: cgroups of an agent and a pod, a network namespace, a BPF file system. Undone on drop; and
//! what a process that was killed leaves, an empty cgroup and pins, the next one removes.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use aya::maps::MapData;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use super::Obstacle;
use crate::capture::error::Error;
use crate::capture::netns::Netns;
use crate::capture::{preflight, sys};
use crate::rtnetlink;

const PREFIX: &str = "mtls-probe-";

pub(super) struct Scratch {
    /// What hooks are attached to.
    pub root: File,
    pub root_path: PathBuf,
    pub netns: Netns,
    pub netns_path: PathBuf,
    pub bpffs: PathBuf,
    /// Why nothing can be tried in a cgroup of its own, if so.
    pub cgroups: Result<Cgroups, Obstacle>,
    mounted: bool,
    _open: File,
}

pub(super) struct Cgroups {
    dir: PathBuf,
    /// Where this process was before.
    home: PathBuf,
}

impl Scratch {
    pub fn make(root_path: &Path, bpffs: &Path) -> Result<Self, Obstacle> {
        let root = File::open(root_path)?;
        let netns = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            File::open("/proc/thread-self/ns/net")
        });
        let panicked = || io::Error::other("the thread that makes a namespace panicked");
        let open = netns.join().map_err(|_| panicked())?;
        let open = open.map_err(|error| Obstacle::of(error).during("making a network namespace"))?;
        let netns_path = PathBuf::from(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&open)));
        let netns = Netns::open(&netns_path)?;
        netns.within(rtnetlink::loopback_up)??;
        remove_leftovers(bpffs, |path| drop(fs::remove_dir_all(path)));
        let (bpffs, mounted) = match private_bpffs() {
            Ok(path) => (path, true),
            // A container may be forbidden to mount; then beside what an agent pins.
            Err(_) => (bpffs.join(format!("{PREFIX}{}", std::process::id())), false),
        };
        fs::create_dir_all(&bpffs)?;
        let cgroups = Cgroups::make(root_path);
        let root_path = root_path.to_path_buf();
        Ok(Self { root, root_path, netns, netns_path, bpffs, cgroups, mounted, _open: open })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = match self.mounted {
            true => umount2(&self.bpffs, MntFlags::MNT_DETACH).map_err(io::Error::from),
            false => fs::remove_dir_all(&self.bpffs),
        };
    }
}

/// A BPF file system that nobody else sees, and that ends with this process.
fn private_bpffs() -> io::Result<PathBuf> {
    let at = std::env::temp_dir();
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
    mount(Some("bpf"), &at, Some("bpf"), MsFlags::empty(), None::<&str>)?;
    Ok(at)
}

impl Cgroups {
    fn make(root: &Path) -> Result<Self, Obstacle> {
        remove_leftovers(root, remove);
        let dir = root.join(format!("{PREFIX}{}", std::process::id()));
        let failed = |error| Obstacle::of(error).during(&format!("making a cgroup below {}", root.display()));
        let home = home()?;
        // Whoever could not come back must not go: a container sees its own cgroup read-only.
        File::options().write(true).open(home.join("cgroup.procs")).map_err(failed)?;
        let cgroups = Self { home, dir };
        for role in ["agent", "pod"] {
            fs::create_dir_all(cgroups.dir.join(role)).map_err(failed)?;
        }
        cgroups.visit("agent").map_err(failed)?;
        Ok(cgroups)
    }

    /// Where a pod's processes would be.
    pub fn pod(&self) -> PathBuf {
        self.dir.join("pod")
    }

    /// Moves this process. A process in another cgroup than the agent's is not taken for it.
    pub fn visit(&self, role: &str) -> io::Result<()> {
        fs::write(self.dir.join(role).join("cgroup.procs"), "0")
    }
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        let _ = fs::write(self.home.join("cgroup.procs"), "0");
        remove(&self.dir);
    }
}

/// The directory of this process's own cgroup.
fn home() -> Result<PathBuf, Error> {
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let own = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    Ok(preflight::mounted()?.join(own))
}

/// Of processes that are no more.
fn remove_leftovers(directory: &Path, remove: impl Fn(&Path)) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let process = name.to_str().and_then(|name| name.strip_prefix(PREFIX));
        if process.is_some_and(|process| !Path::new("/proc").join(process).exists()) {
            remove(&entry.path());
        }
    }
}

fn remove(dir: &Path) {
    for path in [dir.join("agent"), dir.join("pod"), dir.to_path_buf()] {
        let _ = fs::remove_dir(path);
    }
}

/// Whether objects can be pinned there, and found again.
pub(super) fn pins(bpffs: &Path) -> Result<String, Obstacle> {
    preflight::bpffs(bpffs)?;
    let existed = bpffs.exists();
    fs::create_dir_all(bpffs)?;
    let path = bpffs.join(format!("{PREFIX}{}", std::process::id()));
    let outcome = sys::create_hash().map_err(Obstacle::of).and_then(|map| {
        sys::pin(sys::borrow(&map), &path).map_err(|error| Obstacle::of(error).during("pinning a map"))?;
        let found = MapData::from_pin(&path).map(drop);
        fs::remove_file(&path)?;
        found.map_err(|error| Obstacle::of(error).during("finding a pinned map again"))
    });
    if !existed {
        let _ = fs::remove_dir(bpffs);
    }
    outcome.map(|()| bpffs.display().to_string())
}
