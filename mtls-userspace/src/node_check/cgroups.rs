//! Where the node has its cgroups, and who names them.

use std::fs;
use std::path::Path;

use super::mounts::Mount;
use super::{Finding, Verdict, inside};

const USUAL: &str = "/sys/fs/cgroup";
/// systemd's place for it among the hierarchies of version 1, where the agent looks by itself.
const HYBRID: &str = "/sys/fs/cgroup/unified";
/// Directories between the hierarchy's root and kubelet's: kind's nodes have up to two.
const DEPTH: usize = 3;

/// Where cgroup2 is mounted; the usual place, if there are several.
pub fn root(mounts: &[Mount]) -> Option<&str> {
    let points: Vec<&str> = mounts
        .iter()
        .filter(|mount| mount.filesystem == "cgroup2")
        .map(|mount| mount.point.as_str())
        .collect();
    points.iter().find(|point| **point == USUAL).or(points.first()).copied()
}

/// cgroup2, to which programs are attached.
pub fn hierarchy(mounts: &[Mount]) -> Finding {
    let has_version_1 = mounts.iter().any(|mount| mount.filesystem == "cgroup");
    let (seen, verdict) = match (root(mounts), has_version_1) {
        (Some(USUAL), _) => (format!("version 2 at {USUAL}"), Verdict::Good),
        (Some(HYBRID), _) => (format!("version 2 at {HYBRID}, beside version 1"), Verdict::Good),
        (Some(point), _) => (
            format!("version 2 at {point}"),
            Verdict::Set { value: "node.paths.cgroup", to: point.to_owned() },
        ),
        (None, true) => (
            "version 1 only".into(),
            Verdict::Missing { remedy: "boot with systemd.unified_cgroup_hierarchy=1".into() },
        ),
        (None, false) => {
            ("none".into(), Verdict::Missing { remedy: format!("mount -t cgroup2 none {USUAL}") })
        }
    };
    Finding { what: "cgroups", seen, verdict }
}

/// kubelet's way of naming pods' cgroups; both are understood.
pub fn driver(node: &Path, mounts: &[Mount]) -> Finding {
    let directory = root(mounts).and_then(|root| kubepods(&inside(node, root), DEPTH));
    let (seen, verdict) = match directory {
        Some(name) if name.ends_with(".slice") => (format!("systemd ({name})"), Verdict::Good),
        Some(name) => (format!("cgroupfs ({name})"), Verdict::Good),
        None => {
            let because =
                "no pod runs here, or kubelet's cgroups are elsewhere (--cgroup-root must be above them)";
            ("no kubepods".into(), Verdict::Known { because: because.into() })
        }
    };
    Finding { what: "kubelet's cgroup driver", seen, verdict }
}

/// The name of kubelet's directory, the nearest one.
fn kubepods(directory: &Path, depth: usize) -> Option<String> {
    let mut below = Vec::new();
    for entry in fs::read_dir(directory).ok()?.flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        if name == "kubepods" || name == "kubepods.slice" || name.ends_with("-kubepods.slice") {
            return Some(name);
        }
        below.push(entry.path());
    }
    below.sort();
    if depth == 0 { None } else { below.iter().find_map(|path| kubepods(path, depth - 1)) }
}
