//! The end of a lab: its name in, nothing left of it out.
//!
//! The one way things are undone, whether a lab ends well, fails, or was left behind by a process that was killed.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, umount2};

use crate::{PREFIX, cgroup, network};

/// The directory of a lab.
pub fn dir(id: &str) -> PathBuf {
    std::env::temp_dir().join(id)
}

/// Undoes a lab and checks that nothing of it is left.
pub fn lab(id: &str) -> Result<()> {
    let mut problems = Vec::new();
    let mut attempt = |result: Result<()>| {
        if let Err(error) = result {
            problems.push(format!("{error:#}"));
        }
    };
    // Processes first: they hold everything else.
    attempt(cgroup::root().and_then(|root| cgroup::remove(&root.join(id))));
    attempt(cgroup::remove_v1(id));
    for mount in mounts_of(id) {
        attempt(umount2(&mount, MntFlags::empty()).with_context(|| format!("unmount {}", mount.display())));
    }
    for name in namespaces_of(id) {
        attempt(network::delete(&name));
    }
    let dir = dir(id);
    if dir.exists() {
        attempt(fs::remove_dir_all(&dir).with_context(|| format!("remove {}", dir.display())));
    }
    problems.extend(leaks(id));
    if !problems.is_empty() {
        bail!("{}", problems.join("; "));
    }
    Ok(())
}

/// What exists with the name of this lab, or of any lab if the name is only [`PREFIX`].
fn leaks(id: &str) -> Vec<String> {
    let mut found: Vec<String> =
        namespaces_of(id).into_iter().map(|name| format!("network namespace {name}")).collect();
    found.extend(mounts_of(id).into_iter().map(|path| format!("mount {}", path.display())));
    if let Ok(root) = cgroup::root() {
        found.extend(names_in(&root, id).into_iter().map(|name| format!("cgroup {name}")));
    }
    found.extend(names_in(&std::env::temp_dir(), id).into_iter().map(|name| format!("directory {name}")));
    found
}

/// Undoes labs whose process is gone.
pub fn dead_labs() {
    let mut ids: Vec<String> = namespaces_of(PREFIX);
    ids.extend(names_in(&std::env::temp_dir(), PREFIX));
    if let Ok(root) = cgroup::root() {
        ids.extend(names_in(&root, PREFIX));
    }
    // `mtls-lab-<pid>-<number>` and whatever follows.
    let mut ids: Vec<(u32, String)> = ids
        .iter()
        .filter_map(|name| {
            let mut parts = name.strip_prefix(PREFIX)?.split('-');
            let (pid, number) = (parts.next()?.parse().ok()?, parts.next()?.parse::<u32>().ok()?);
            Some((pid, format!("{PREFIX}{pid}-{number}")))
        })
        .collect();
    ids.sort();
    ids.dedup();
    for (pid, id) in ids {
        if pid != std::process::id() && !Path::new(&format!("/proc/{pid}")).exists() {
            eprintln!("lab: undoing {id}, left by a process that is gone");
            if let Err(error) = lab(&id) {
                eprintln!("lab: {error:#}");
            }
        }
    }
}

/// Prints the end of every log in a lab's directory: called when a test fails.
pub fn show_logs(dir: &Path) {
    if let Some(keep) = std::env::var_os("MTLS_LAB_LOGS") {
        let _ = fs::create_dir_all(&keep);
        for path in logs(dir) {
            let _ = fs::copy(&path, Path::new(&keep).join(path.file_name().unwrap_or_default()));
        }
    }
    for path in logs(dir) {
        let text = fs::read_to_string(&path).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        eprintln!("--- {} ({} lines)", path.display(), lines.len());
        for line in lines.iter().skip(lines.len().saturating_sub(25)) {
            eprintln!("{line}");
        }
    }
}

fn logs(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|ext| ext == "log"))
        .collect();
    paths.sort();
    paths
}

fn namespaces_of(id: &str) -> Vec<String> {
    names_in(Path::new(network::NAMES), id)
}

/// Names in a directory that are `id` itself or start with `id-` (or with the prefix of all labs).
fn names_in(dir: &Path, id: &str) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names
        .filter(|name| {
            name.strip_prefix(id).is_some_and(|rest| id == PREFIX || rest.is_empty() || rest.starts_with('-'))
        })
        .collect()
}

fn mounts_of(id: &str) -> Vec<PathBuf> {
    let dir = dir(id);
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    let mut points: Vec<PathBuf> = points.filter(|point| point.starts_with(&dir)).collect();
    points.reverse();
    points
}
