//! What surrounds the kernel half on a machine: looked at, not tried.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::capture::probe::Occupant;

#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    pub kernel: String,
    pub architecture: &'static str,
    pub cgroup_root: Option<CgroupRoot>,
    /// Mounted BPF file systems.
    pub bpffs: Vec<PathBuf>,
    /// Where the agent pins, or would.
    pub pins: PathBuf,
    /// The kernel describes its own types; the agent does not need it.
    pub btf: bool,
    /// `net.core.bpf_jit_enable`; absent where programs are interpreted.
    pub jit: Option<u32>,
    /// `none`, `integrity` or `confidentiality`; absent where there is no lockdown.
    pub lockdown: Option<String>,
    /// Capabilities of this process, of those that matter here.
    pub capabilities: Vec<&'static str>,
    pub modules: Vec<Module>,
    /// Programs of others at the hooks that ours are attached to, such as a CNI's socket load balancer.
    pub hooks: Vec<Hook>,
}

#[derive(Clone, Debug, Serialize)]
pub struct CgroupRoot {
    pub path: PathBuf,
    /// Processes that are in no cgroup below it, as far as they can be seen from here: hooks there never see them.
    pub outside: Vec<String>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Module {
    pub name: &'static str,
    pub state: &'static str,
}

#[derive(Clone, Debug, Serialize)]
pub struct Hook {
    pub hook: &'static str,
    pub program: String,
    pub id: u32,
}

/// Modules that paths of the agent depend on, and whose absence looks like the kernel's inability.
const MODULES: [&str; 5] = ["tls", "gcm", "chacha20poly1305", "tcp_diag", "inet_diag"];

const CAPABILITIES: [(u32, &str); 5] = [
    (12, "CAP_NET_ADMIN"),
    (21, "CAP_SYS_ADMIN"),
    (24, "CAP_SYS_RESOURCE"),
    (38, "CAP_PERFMON"),
    (39, "CAP_BPF"),
];

impl Machine {
    pub(super) fn look(cgroup_root: Option<&Path>, pins: &Path, occupants: Vec<Occupant>) -> Self {
        let kernel = first_line("/proc/sys/kernel/osrelease").unwrap_or_default();
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let effective = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let effective = effective.lines().find_map(|line| line.strip_prefix("CapEff:"));
        let effective = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0);
        let held = CAPABILITIES.into_iter().filter(|(bit, _)| effective & (1 << bit) != 0);
        Self {
            cgroup_root: cgroup_root
                .map(|path| CgroupRoot { path: path.into(), outside: outside(path, &mounts) }),
            bpffs: mounted(&mounts, "bpf"),
            pins: pins.into(),
            btf: Path::new("/sys/kernel/btf/vmlinux").exists(),
            jit: first_line("/proc/sys/net/core/bpf_jit_enable").and_then(|line| line.parse().ok()),
            lockdown: fs::read_to_string("/sys/kernel/security/lockdown")
                .ok()
                .and_then(|text| selected(&text)),
            capabilities: held.map(|(_, name)| name).collect(),
            modules: MODULES.into_iter().map(|name| Module { name, state: state(name, &kernel) }).collect(),
            hooks: hooks(occupants),
            architecture: std::env::consts::ARCH,
            kernel,
        }
    }
}

fn hooks(occupants: Vec<Occupant>) -> Vec<Hook> {
    occupants.into_iter().map(|Occupant { hook, id, program }| Hook { hook, program, id }).collect()
}

fn first_line(path: &str) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.lines().next()?.to_owned())
}

fn mounted(mounts: &str, kind: &str) -> Vec<PathBuf> {
    let fields = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(1);
        Some((fields.next()?, fields.next()?))
    });
    let points = fields.filter(|(_, found)| *found == kind).map(|(point, _)| PathBuf::from(point));
    // One that hides another at the same place counts once.
    points.collect::<BTreeSet<_>>().into_iter().collect()
}

/// The word in brackets.
fn selected(text: &str) -> Option<String> {
    Some(text.split_once('[')?.1.split_once(']')?.0.to_owned())
}

/// Names of processes in no cgroup below a directory: those above this process's cgroup namespace show as `/..`.
fn outside(root: &Path, mounts: &str) -> Vec<String> {
    let mount = mounted(mounts, "cgroup2").into_iter().find(|mount| root.starts_with(mount));
    let Some(root) = mount.and_then(|mount| root.strip_prefix(mount).ok()) else { return Vec::new() };
    let mut names = BTreeSet::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let process = entry.path();
        let Ok(cgroups) = fs::read_to_string(process.join("cgroup")) else { continue };
        let Some(own) = cgroups.lines().find_map(|line| line.strip_prefix("0::/")) else { continue };
        if own.starts_with("..") || !Path::new(own).starts_with(root) {
            names.extend(fs::read_to_string(process.join("comm")).map(|name| name.trim_end().to_owned()));
        }
    }
    names.into_iter().collect()
}

/// Whether a module is there, or could be.
fn state(name: &str, release: &str) -> &'static str {
    let modules = Path::new("/lib/modules").join(release);
    let lists = |file| {
        let text = fs::read_to_string(modules.join(file)).unwrap_or_default();
        text.lines().any(|line| names_module(line, name))
    };
    match () {
        () if fs::read_to_string("/proc/modules")
            .is_ok_and(|text| text.lines().any(|line| line.split(' ').next() == Some(name))) =>
        {
            "loaded"
        }
        () if Path::new("/sys/module").join(name).exists() || lists("modules.builtin") => "built in",
        () if lists("modules.dep") => "loadable",
        () => "not a module here",
    }
}

/// `kernel/net/tls/tls.ko.xz: …`
fn names_module(line: &str, name: &str) -> bool {
    let path = line.split(':').next().unwrap_or_default();
    let file = path.rsplit('/').next().unwrap_or_default();
    file.split_once(".ko").is_some_and(|(stem, _)| stem.replace('-', "_") == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_found_in_the_lists_of_a_distribution() {
        assert!(names_module("kernel/net/ipv4/tcp_diag.ko.xz: kernel/net/ipv4/inet_diag.ko.xz", "tcp_diag"));
        assert!(names_module("kernel/crypto/chacha20-poly1305.ko", "chacha20_poly1305"));
        assert!(!names_module("kernel/net/ipv4/tcp_diag.ko: kernel/net/tls/tls.ko", "tls"));
    }

    #[test]
    fn the_lockdown_in_force_is_the_one_in_brackets() {
        assert_eq!(selected("none [integrity] confidentiality\n"), Some("integrity".into()));
        assert_eq!(selected(""), None);
    }
}
