//! Preflight: what the machine must offer, checked before anything is loaded, so that what is missing has a name.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use aya::programs::ProgramType;
use aya::sys::{BpfHelper, is_helper_supported, is_program_supported};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, FsType, statfs};

use super::error::Error;
use crate::tunnel::accepts_congestion;

const BPF_FS_MAGIC: FsType = FsType(0xcafe_4a11);
/// Where systemd mounts cgroup2 among the hierarchies of version 1.
const BESIDE_VERSION_1: &str = "unified";

/// A cgroup2 directory, its path without symbolic links.
#[derive(Debug)]
pub(super) struct Cgroup {
    pub path: PathBuf,
    pub file: File,
    pub id: u64,
}

impl Cgroup {
    /// The directory given, or what it holds where cgroups of version 1 are mounted beside those of version 2; or the
    /// root of the mounted hierarchy.
    pub fn open(path: Option<&Path>) -> Result<Self, Error> {
        let given = match path {
            Some(path) => path.to_path_buf(),
            None => mounted()?,
        };
        let not_root = |source| Error::NotCgroup { path: given.clone(), source };
        let path = if is_cgroup2(&given).map_err(|error| not_root(Some(error)))? {
            given.clone()
        } else {
            let beside = Some(given.join(BESIDE_VERSION_1)).filter(|path| is_cgroup2(path).unwrap_or(false));
            beside.ok_or_else(|| not_root(None))?
        };
        let file = File::open(&path).map_err(|error| not_root(Some(error)))?;
        let metadata = file.metadata().map_err(|error| not_root(Some(error)))?;
        // A path through another process's root (/proc/1/root) would lead elsewhere once it is resolved by name.
        let is_same = |resolved: &PathBuf| {
            fs::metadata(resolved).is_ok_and(|it| (it.dev(), it.ino()) == (metadata.dev(), metadata.ino()))
        };
        let resolved = path.canonicalize().ok().filter(is_same);
        Ok(Self { path: resolved.unwrap_or(path), file, id: metadata.ino() })
    }
}

/// A cgroup's id, as the kernel half sees it: the directory's inode number.
pub(super) fn cgroup_id(path: &Path) -> Result<u64, Error> {
    let error = |source| Error::Cgroup { path: path.to_path_buf(), source };
    if !is_cgroup2(path).map_err(error)? {
        return Err(Error::NotPodCgroup { path: path.to_path_buf() });
    }
    Ok(fs::metadata(path).map_err(error)?.ino())
}

fn is_cgroup2(path: &Path) -> io::Result<bool> {
    Ok(statfs(path)?.filesystem_type() == CGROUP2_SUPER_MAGIC)
}

pub(crate) fn mounted() -> Result<PathBuf, Error> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").map_err(|_| Error::NoCgroup2)?;
    cgroup2_mount(&mounts).ok_or(Error::NoCgroup2)
}

/// `36 35 98:0 /root /mount/point options optional* - type source options`; the mount with the hierarchy's root wins.
fn cgroup2_mount(mountinfo: &str) -> Option<PathBuf> {
    let mut found = None;
    for line in mountinfo.lines() {
        let Some((mount, filesystem)) = line.split_once(" - ") else { continue };
        if filesystem.split(' ').next() != Some("cgroup2") {
            continue;
        }
        let mut fields = mount.split(' ').skip(3);
        let (Some(root), Some(point)) = (fields.next(), fields.next()) else { continue };
        let point = PathBuf::from(point.replace("\\040", " "));
        if root == "/" {
            return Some(point);
        }
        found.get_or_insert(point);
    }
    found
}

pub(super) fn bpffs(path: &Path) -> Result<(), Error> {
    let not_bpffs = |source| Error::NotBpffs { path: path.to_path_buf(), source };
    // The directory itself may not exist yet.
    let existing = path.ancestors().find(|path| path.exists()).ok_or_else(|| not_bpffs(None))?;
    let filesystem = statfs(existing).map_err(|errno| not_bpffs(Some(errno.into())))?;
    if filesystem.filesystem_type() == BPF_FS_MAGIC { Ok(()) } else { Err(not_bpffs(None)) }
}

/// Capabilities, by bit: to attach programs to networking, to find pods by processes that have other privileges, to load
/// programs and enter namespaces.
const CAPABILITIES: [(u32, &str); 3] = [(12, "CAP_NET_ADMIN"), (19, "CAP_SYS_PTRACE"), (21, "CAP_SYS_ADMIN")];

pub(super) fn capabilities() -> Result<(), Error> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = effective_capabilities(&status);
    match CAPABILITIES.iter().find(|(bit, _)| effective & (1 << bit) == 0) {
        Some((_, name)) => Err(Error::MissingCapability(name)),
        None => Ok(()),
    }
}

fn effective_capabilities(status: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    line.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0)
}

pub(super) fn features() -> Result<(), Error> {
    let missing =
        |feature: &str, since, remedy| Error::MissingFeature { feature: feature.into(), since, remedy };
    // The map of sockets' notes needs its types described; what the kernel knows of its own types is not looked at.
    if aya::features().btf().is_none() {
        return Err(missing("BTF of maps", "5.2", ""));
    }
    let sock_addr = ProgramType::CgroupSockAddr;
    for (program, feature, since) in [
        (ProgramType::SkLookup, "sk_lookup programs", "5.9"),
        (sock_addr, "cgroup socket address hooks", "5.8 with CONFIG_CGROUP_BPF"),
        (ProgramType::SockOps, "sock_ops programs", "4.13 with CONFIG_CGROUP_BPF"),
    ] {
        if !is_program_supported(program).unwrap_or(true) {
            return Err(missing(feature, since, ""));
        }
    }
    for (program, helper, feature, since) in [
        (sock_addr, BpfHelper::BPF_FUNC_get_current_pid_tgid, "process ids in connect hooks", "5.10"),
        (
            sock_addr,
            BpfHelper::BPF_FUNC_get_current_ancestor_cgroup_id,
            "ancestor cgroups in connect hooks",
            "5.7",
        ),
        (sock_addr, BpfHelper::BPF_FUNC_sk_storage_get, "socket storage in connect hooks", "5.8"),
        (ProgramType::SockOps, BpfHelper::BPF_FUNC_get_netns_cookie, "namespace cookies in sock_ops", "5.15"),
    ] {
        if !is_helper_supported(program, helper).unwrap_or(true) {
            return Err(missing(feature, since, ""));
        }
    }
    Ok(())
}

pub(super) fn has_mptcp() -> bool {
    Path::new("/proc/sys/net/mptcp").exists()
}

/// Whether a connect hook can tell that a socket is a subflow of MPTCP. Without MPTCP there are none.
pub(super) fn tells_mptcp() -> bool {
    const HELPER: BpfHelper = BpfHelper::BPF_FUNC_skc_to_mptcp_sock;
    has_mptcp() && is_helper_supported(ProgramType::CgroupSockAddr, HELPER).unwrap_or(false)
}

/// The congestion control of loopback legs; the kernel loads its module if need be.
pub(super) fn congestion(wanted: Option<&str>) -> Result<String, Error> {
    match wanted {
        None if accepts_congestion("cubic").is_ok() => Ok("cubic".into()),
        None => Ok("reno".into()),
        Some("") => Ok(String::new()),
        Some(name) => {
            let unknown = |source| Error::UnknownCongestion { name: name.into(), source };
            if name.len() >= TCP_CA_NAME_MAX {
                return Err(unknown(io::ErrorKind::InvalidInput.into()));
            }
            accepts_congestion(name).map_err(unknown)?;
            Ok(name.into())
        }
    }
}

const TCP_CA_NAME_MAX: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
25 30 0:22 / /sys/fs/cgroup rw - tmpfs tmpfs rw
26 25 0:23 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
27 25 0:24 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw";

    #[test]
    fn the_cgroup2_mount_is_found_beside_version_one() {
        assert_eq!(cgroup2_mount(HYBRID), Some("/sys/fs/cgroup/unified".into()));
    }

    #[test]
    fn a_mount_of_the_hierarchys_root_wins_over_one_of_a_part() {
        let part = "20 1 0:24 /docker/x /sys/fs/cgroup rw - cgroup2 cgroup rw\n";
        assert_eq!(cgroup2_mount(part), Some("/sys/fs/cgroup".into()));
        assert_eq!(cgroup2_mount(&format!("{part}{HYBRID}")), Some("/sys/fs/cgroup/unified".into()));
    }

    #[test]
    fn without_a_cgroup2_mount_there_is_none() {
        assert_eq!(cgroup2_mount("26 25 0:23 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"), None);
    }

    #[test]
    fn capabilities_are_the_effective_ones() {
        assert_eq!(effective_capabilities("CapPrm:\t0000000000000fff\nCapEff:\t0000000000001000\n"), 1 << 12);
        assert_eq!(effective_capabilities(""), 0);
    }
}
