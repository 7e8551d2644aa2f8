//! Processes as `/proc` shows them: a proc file system and the pods that are looked for in, their processes out.
//!
//! Reads only. A process that ends, or whose id is given to another while it is looked at, is left out.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::NetnsId;
use super::path::pod_in;

/// A process of a pod.
#[derive(Clone, Debug)]
pub(super) struct Process {
    pub netns: NetnsId,
    /// The namespace, held: it cannot become another's while this is looked at.
    pub file: Arc<File>,
    pub path: PathBuf,
    /// Since the machine started.
    pub started: Duration,
    /// Directories below the pod's own: engines in pods make more of them.
    pub below: usize,
    /// Path of the pod's directory in the cgroup2 hierarchy, as the kernel shows it to us; none if it has none there.
    pub cgroup: Option<String>,
}

impl Process {
    /// Whether the same process is still there, in the same namespace.
    pub fn lives(&self) -> bool {
        let Some(process) = self.path.parent().and_then(Path::parent) else { return false };
        netns_id(&self.path).is_ok_and(|id| id == self.netns)
            && started(process).is_some_and(|started| started == self.started)
    }
}

/// Processes of those pods whose UID `is_wanted` accepts.
pub(super) fn of_pods(
    proc: &Path,
    is_wanted: impl Fn(&str) -> bool,
) -> io::Result<HashMap<String, Vec<Process>>> {
    let mut found: HashMap<String, Vec<Process>> = HashMap::new();
    for entry in fs::read_dir(proc)? {
        let entry = entry?;
        if !entry.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit) {
            continue;
        }
        let directory = entry.path();
        let Some(member) = member(&directory, &is_wanted) else { continue };
        let Some(process) = look(&directory, &member) else { continue };
        // The same pod before and after: it was one process all the time.
        if self::member(&directory, &is_wanted).as_ref() == Some(&member) {
            found.entry(member.uid).or_default().push(process);
        }
    }
    Ok(found)
}

#[derive(PartialEq, Eq, Debug)]
struct Member {
    uid: String,
    below: usize,
    cgroup: Option<String>,
}

/// The pod that a process belongs to, by any of its cgroup hierarchies.
fn member(directory: &Path, is_wanted: &impl Fn(&str) -> bool) -> Option<Member> {
    let text = fs::read_to_string(directory.join("cgroup")).ok()?;
    let mut member: Option<Member> = None;
    for line in text.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(hierarchy), Some(_), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
            continue;
        };
        let Some(pod) = pod_in(path).filter(|pod| is_wanted(&pod.uid)) else { continue };
        if pod.is_monitor {
            return None;
        }
        let cgroup = (hierarchy == "0").then(|| pod.directory.to_owned());
        match &mut member {
            None => member = Some(Member { uid: pod.uid, below: pod.below, cgroup }),
            Some(known) => known.cgroup = known.cgroup.take().or(cgroup),
        }
    }
    member
}

fn look(directory: &Path, member: &Member) -> Option<Process> {
    let path = directory.join("ns/net");
    let file = File::open(&path).ok()?;
    let metadata = file.metadata().ok()?;
    Some(Process {
        netns: (metadata.dev(), metadata.ino()),
        file: Arc::new(file),
        path,
        started: started(directory)?,
        below: member.below,
        cgroup: member.cgroup.clone(),
    })
}

pub(super) fn netns_id(path: &Path) -> io::Result<NetnsId> {
    let metadata = fs::metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// When a process started, since the machine did (proc(5): field 22 of `stat`, in clock ticks).
fn started(directory: &Path) -> Option<Duration> {
    let stat = fs::read_to_string(directory.join("stat")).ok()?;
    let ticks: u64 = stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()?;
    Some(Duration::from_millis(ticks * 1000 / ticks_per_second()))
}

fn ticks_per_second() -> u64 {
    let ticks = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK);
    ticks.ok().flatten().and_then(|ticks| u64::try_from(ticks).ok()).filter(|ticks| *ticks > 0).unwrap_or(100)
}

/// How long the machine has been up, by the clock that processes' starts are told in.
pub(super) fn uptime() -> io::Result<Duration> {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).map(Duration::from).map_err(io::Error::from)
}
