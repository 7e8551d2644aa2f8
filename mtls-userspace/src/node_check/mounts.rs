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

const USUAL: &str = "/sys/fs/bpf";

/// The BPF file system to pin in: the usual one, or whichever there is.
pub fn pins(mounts: &[Mount]) -> &str {
    let points: Vec<&str> =
        mounts.iter().filter(|mount| mount.filesystem == "bpf").map(|mount| mount.point.as_str()).collect();
    if points.contains(&USUAL) { USUAL } else { points.first().copied().unwrap_or(USUAL) }
}

/// Where pinned programs outlive the agent.
pub fn bpffs(mounts: &[Mount]) -> Finding {
    let points: Vec<&str> =
        mounts.iter().filter(|mount| mount.filesystem == "bpf").map(|mount| mount.point.as_str()).collect();
    let verdict = match points.first() {
        _ if points.contains(&USUAL) => Verdict::Good,
        Some(point) => Verdict::Set { value: "node.paths.bpffs", to: (*point).to_owned() },
        None => Verdict::Missing {
            remedy: format!("mount -t bpf bpf {USUAL}, and the same in /etc/fstab: bpf {USUAL} bpf defaults 0 0"),
        },
    };
    let seen = if points.is_empty() { "not mounted".into() } else { points.join(", ") };
    Finding { what: "BPF file system", seen, verdict }
}
