//! Control groups: a path in, a cgroup2 directory out that can be emptied and removed.
//!
//! Never enables a controller: the lab needs membership, not limits.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Where cgroup2 is mounted on this machine.
pub fn root() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("read /proc/self/mountinfo")?;
    mounts
        .lines()
        .find_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            (right.split(' ').next()? == "cgroup2").then(|| left.split(' ').nth(4).map(PathBuf::from))?
        })
        .context("no cgroup2 file system is mounted: mount -t cgroup2 cgroup2 /sys/fs/cgroup")
}

/// Makes a directory, and those above it.
pub fn create(path: &Path) -> Result<()> {
    fs::create_dir_all(path).with_context(|| format!("make cgroup {}", path.display()))
}

/// Kills every process in a cgroup and below, then removes the directories.
pub fn remove(path: &Path) -> Result<()> {
    if !path.exists() {
        return Ok(());
    }
    fs::write(path.join("cgroup.kill"), "1")
        .with_context(|| format!("kill what runs in {}", path.display()))?;
    let deadline = Instant::now() + Duration::from_secs(10);
    while populated(path) {
        if Instant::now() > deadline {
            bail!("processes in {} outlive a SIGKILL", path.display());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    remove_dirs(path)
}

/// Removes what a container runtime left in the hierarchies of cgroup v1, which the lab itself has no use for.
pub fn remove_v1(id: &str) -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("read /proc/self/mountinfo")?;
    let roots = mounts.lines().filter_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        (right.split(' ').next()? == "cgroup").then(|| left.split(' ').nth(4).map(PathBuf::from))?
    });
    for path in roots.map(|root| root.join(id)).filter(|path| path.exists()) {
        remove_dirs(&path)?;
    }
    Ok(())
}

fn populated(path: &Path) -> bool {
    fs::read_to_string(path.join("cgroup.events")).is_ok_and(|events| events.contains("populated 1"))
}

fn remove_dirs(path: &Path) -> Result<()> {
    for entry in fs::read_dir(path)?.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_dirs(&entry.path())?;
        }
    }
    // A process that has just died may keep its directory busy for a moment.
    let deadline = Instant::now() + Duration::from_secs(2);
    loop {
        match fs::remove_dir(path) {
            Ok(()) => return Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(error) => return Err(error).with_context(|| format!("remove cgroup {}", path.display())),
        }
    }
}
