//! The programs under test, linked statically: nothing in, three files out.
//!
//! Only the last step of the ordinary build is done another way, so that nothing is compiled twice.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::dir;
use crate::{call, cargo, setup, step};

/// Package and program.
const PROGRAMS: [(&str, &str); 3] =
    [("mtls-userspace", "mtls"), ("mtls-tests", "lab-app"), ("mtls-tests", "lab-guest")];

pub fn build() -> Result<Vec<PathBuf>> {
    step("linking the programs under test statically");
    setup::packages(&[("strip", "binutils")])?;
    let target = dir().join("programs");
    fs::create_dir_all(&target).with_context(|| format!("make {}", target.display()))?;
    call(cargo().args(["build", "--quiet", "--workspace", "--bins"]))?;
    let linked = PROGRAMS.into_iter().map(|(package, name)| link(package, name, &target)).collect();
    // Puts the ordinary programs back in their place, which cargo knows only one of.
    call(cargo().args(["build", "--quiet", "--workspace", "--bins"]))?;
    linked
}

fn link(package: &str, name: &str, target: &Path) -> Result<PathBuf> {
    let mut command = cargo();
    command.args(["rustc", "--quiet", "--package", package, "--bin", name]);
    call(command.args(["--", "-C", "target-feature=+crt-static"]))?;
    let built = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join("target/debug").join(name);
    let path = target.join(name);
    // Without what only a debugger reads: the machine holds it in memory.
    call(Command::new("strip").arg("-o").arg(&path).arg(built))?;
    Ok(path)
}
