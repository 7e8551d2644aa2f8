//! What is mounted on the node: its first process's view of it.

use std::path::Path;

use super::{Error, Finding, Verdict, inside, read};

/// A mount, as far as it matters here.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mount {
    pub point: String,
    pub filesystem: String,
}

/// By the node's own first process, whatever namespace we are in.
pub fn of_the_node(root: &Path) -> Result<Vec<Mount>, Error> {
    read(&inside(root, "proc/1/mountinfo")).map(|text| text.lines().filter_map(mount).collect())
}

/// `36 35 98:0 /root /mount/point options optional* - type source options`.
fn mount(line: &str) -> Option<Mount> {
    let (before, after) = line.split_once(" - ")?;
    Some(Mount {
        point: before.split(' ').nth(4)?.replace("\\040", " "),
        filesystem: after.split(' ').next()?.to_owned(),
    })
}

/// Where everybody expects it, and where systemd mounts it.
pub const BPFFS: &str = "/sys/fs/bpf";

/// Where pinned programs outlive the agent. One that is mounted elsewhere is somebody's own.
pub fn bpffs(mounts: &[Mount]) -> Finding {
    let is_there = mounts.iter().any(|mount| mount.filesystem == "bpf" && mount.point == BPFFS);
    let (seen, verdict) = match is_there {
        true => (format!("mounted at {BPFFS}"), Verdict::Good),
        false => {
            let remedy = format!("mount -t bpf bpf {BPFFS}, and in /etc/fstab: bpf {BPFFS} bpf defaults 0 0");
            (format!("not mounted at {BPFFS}"), Verdict::Missing { remedy })
        }
    };
    Finding { what: "BPF file system", seen, verdict }
}
