//! Kernel modules: names in, loaded modules out, each after those it depends on.
//!
//! Stands in for modprobe in a machine that has nothing else, so that the kernel loads on demand what it loads on
//! demand elsewhere.

use std::fs::{self, File};
use std::os::fd::AsRawFd;

use anyhow::{Context, Result};

/// What `cargo xtask vm` found in the modules it packed: `name dependency,… alias,…` a line.
const INDEX: &str = "/guest/modules";

/// Loads what the kernel asks for, by a module's name or by one of its aliases. What is not here is not an error:
/// a kernel asks for much, and goes on without.
pub fn probe(wanted: impl Iterator<Item = String>) -> Result<()> {
    let index = fs::read_to_string(INDEX).with_context(|| format!("read {INDEX}"))?;
    for wanted in wanted {
        load(&index, &plain(&wanted))?;
    }
    Ok(())
}

fn load(index: &str, wanted: &str) -> Result<()> {
    for line in index.lines() {
        let mut fields = line.split(' ');
        let (Some(name), Some(needs), Some(aliases)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        if plain(name) != wanted && !aliases.split(',').any(|alias| plain(alias) == wanted) {
            continue;
        }
        for needed in needs.split(',').filter(|needed| !needed.is_empty()) {
            load(index, &plain(needed))?;
        }
        insert(&format!("/guest/modules.d/{name}.ko"))?;
    }
    Ok(())
}

/// The kernel takes `-` and `_` for the same.
fn plain(name: &str) -> String {
    name.replace('-', "_")
}

fn insert(path: &str) -> Result<()> {
    let file = File::open(path).with_context(|| format!("open {path}"))?;
    // SAFETY: the kernel reads a descriptor and a string that ends with NUL.
    let outcome = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
    let error = std::io::Error::last_os_error();
    match error.raw_os_error() {
        // Loaded already; or the processor lacks what a faster implementation needs.
        Some(libc::EEXIST | libc::ENODEV) => Ok(()),
        _ if outcome == 0 => Ok(()),
        _ => Err(error).with_context(|| format!("load {path}")),
    }
}
