//! What a lab needs from the machine: names of programs in, the reason why a test cannot run out.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result};

/// The helper that runs inside pods, built beside the running program.
pub fn lab_app() -> Result<PathBuf> {
    beside_us("lab-app").context("lab-app is not built: cargo build -p mtls-tests")
}

/// The product: `$MTLS_BIN`, or the binary built beside the running program.
pub fn mtls() -> Result<PathBuf> {
    match std::env::var_os("MTLS_BIN") {
        Some(path) => Ok(path.into()),
        None => beside_us("mtls").context("mtls is not built: cargo xtask build"),
    }
}

/// Why a test that needs these programs cannot run here, if so.
pub fn missing(programs: &[&str]) -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("network namespaces, cgroups and BPF need root".into());
    }
    if let Err(error) = crate::cgroup::root() {
        return Some(format!("{error:#}"));
    }
    let absent: Vec<&str> = programs.iter().copied().filter(|name| find(name).is_none()).collect();
    (!absent.is_empty()).then(|| format!("not installed: {} (cargo xtask setup)", absent.join(", ")))
}

/// Whether to skip a test that lacks something. Under `CI=true` lacking is failing.
pub fn skip(programs: &[&str]) -> bool {
    let Some(reason) = missing(programs) else { return false };
    assert!(std::env::var("CI").as_deref() != Ok("true"), "a requirement is missing: {reason}");
    // Not by `println!`, which the test harness keeps to itself when a test passes.
    let _ = writeln!(std::io::stdout(), "skipped: {reason}");
    true
}

/// Finds a program where Debian and `cargo xtask setup` put programs.
pub fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut dirs: Vec<PathBuf> = std::env::split_paths(&path).collect();
    dirs.extend(["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from));
    // PostgreSQL's server programs stand in a directory per version.
    let mut versions: Vec<PathBuf> = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .map(|version| version.path().join("bin"))
        .collect();
    versions.sort();
    dirs.extend(versions.into_iter().rev());
    // target/tools, seen as below.
    let exe = std::env::current_exe().unwrap_or_default();
    dirs.extend(exe.ancestors().skip(2).take(2).map(|dir| dir.join("tools")));
    dirs.into_iter().map(|dir| dir.join(name)).find(|path| path.is_file())
}

/// `target/<profile>/name`, seen from `target/<profile>/` or `target/<profile>/deps/`.
fn beside_us(name: &str) -> Option<PathBuf> {
    let exe = std::env::current_exe().ok()?;
    exe.ancestors().skip(1).take(2).map(|dir| dir.join(name)).find(|path| path.is_file())
}
