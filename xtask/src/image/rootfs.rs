//! What is in the image: a binary and the few files that a program expects of any system.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result};

use super::{Arch, link};

/// Where the bill of materials is, for those who have only the image.
pub const SBOM: &str = "/usr/share/doc/mtls/sbom.cdx.json";

const FILES: [(&str, &str); 3] = [
    ("etc/passwd", "root:x:0:0::/:/usr/bin/mtls\nnonroot:x:65532:65532::/:/usr/bin/mtls\n"),
    ("etc/group", "root:x:0:\nnonroot:x:65532:\n"),
    // Names of the cluster are asked for where kubelet's resolv.conf says, and nowhere else.
    ("etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n"),
];
/// For what kubelet and the runtime mount, which a read-only root file system could not take otherwise.
const DIRECTORIES: [&str; 6] = ["dev", "host", "proc", "run", "sys", "var/run/secrets"];

/// Lays out the root file system.
pub fn lay(root: &Path, binary: &Path, arch: Arch, sbom: &str) -> Result<()> {
    for directory in DIRECTORIES {
        fs::create_dir_all(root.join(directory)).with_context(|| format!("make {directory}"))?;
    }
    for (path, text) in FILES {
        write(&root.join(path), text.as_bytes(), 0o644)?;
    }
    write(&root.join(SBOM.trim_start_matches('/')), sbom.as_bytes(), 0o644)?;
    let place = root.join("usr/bin/mtls");
    write(&place, &fs::read(binary).with_context(|| format!("read {}", binary.display()))?, 0o755)?;
    link::strip(&place, arch)?;
    permit_all_to_look(root)
}

fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::write(path, bytes).with_context(|| format!("write {}", path.display()))?;
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(mode))?)
}

/// Whatever this process's mask would have made of the directories.
fn permit_all_to_look(directory: &Path) -> Result<()> {
    fs::set_permissions(directory, fs::Permissions::from_mode(0o755))?;
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            permit_all_to_look(&entry.path())?;
        }
    }
    Ok(())
}
