//! promtool, without the rest of Prometheus: Debian's package in, one program in `target/tools` out.
//!
//! Installed, the package would add a user and a server that starts with the machine from then on.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::{call, setup, step};

const PACKAGE: &str = "prometheus";
const PROGRAM: &str = "./usr/bin/promtool";

/// Where tests look for tools that are no packages.
fn tools() -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join("target/tools")
}

/// Brings promtool unless it is there.
pub fn install() -> Result<()> {
    let target = tools().join("promtool");
    if target.is_file() || setup::find("promtool").is_some() {
        return Ok(());
    }
    setup::require_debian("promtool (in target/tools or on the path)")?;
    step("taking promtool out of Debian's prometheus");
    let aside = tools().join("unpacking");
    fs::create_dir_all(&aside).with_context(|| format!("make {}", aside.display()))?;
    setup::apt(&["update"])?;
    call(Command::new("apt-get").args(["-qq", "download", PACKAGE]).current_dir(&aside))?;
    unpack(&aside)?;
    fs::rename(aside.join(PROGRAM), &target).with_context(|| format!("make {}", target.display()))?;
    fs::remove_dir_all(&aside).with_context(|| format!("remove {}", aside.display()))
}

fn unpack(aside: &Path) -> Result<()> {
    let is_package = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "deb");
    let mut files = fs::read_dir(aside)?.filter_map(|entry| Some(entry.ok()?.path()));
    let package = files.find(is_package).with_context(|| format!("apt-get downloaded no {PACKAGE}"))?;
    let mut reader = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(package)
        .stdout(Stdio::piped())
        .spawn()
        .context("run dpkg-deb")?;
    let archive = reader.stdout.take().context("dpkg-deb has no output")?;
    call(Command::new("tar").args(["-x", PROGRAM]).current_dir(aside).stdin(archive))?;
    ensure!(reader.wait()?.success(), "dpkg-deb could not read the package {PACKAGE}");
    Ok(())
}
