//! The programs under test, linked statically: nothing in, four files out.
//!
//! Only the last step of the ordinary build is done another way, so that nothing is compiled twice.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::dir;
use crate::{call, cargo, setup, step};

/// Package and program.
const PROGRAMS: [(&str, &str); 3] =
    [("mtls-userspace", "mtls"), ("mtls-tests", "lab-app"), ("mtls-tests", "lab-guest")];

/// A package's tests that kernels are put to, beside the lab's.
const TESTS: (&str, &str) = ("mtls-userspace", "tunnel");

pub fn build() -> Result<Vec<PathBuf>> {
    step("linking the programs under test statically");
    setup::packages(&[("strip", "binutils")])?;
    let target = dir().join("programs");
    fs::create_dir_all(&target).with_context(|| format!("make {}", target.display()))?;
    call(cargo().args(["build", "--quiet", "--workspace", "--bins"]))?;
    // First, because cargo builds a package's programs for its tests.
    let tests = link_tests(TESTS.0, TESTS.1, &target);
    let linked = PROGRAMS.into_iter().map(|(package, name)| link(package, name, &target));
    let linked = std::iter::once(tests).chain(linked).collect();
    // Puts the ordinary programs back in their place, which cargo knows only one of.
    call(cargo().args(["build", "--quiet", "--workspace", "--bins"]))?;
    linked
}

fn link(package: &str, name: &str, target: &Path) -> Result<PathBuf> {
    let mut command = cargo();
    command.args(["rustc", "--quiet", "--package", package, "--bin", name]);
    call(command.args(["--", "-C", "target-feature=+crt-static"]))?;
    let built = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join("target/debug").join(name);
    strip(&built, &target.join(name))
}

/// As [`link`]; only cargo knows the name of the program that it makes of tests.
fn link_tests(package: &str, name: &str, target: &Path) -> Result<PathBuf> {
    let mut command = cargo();
    command.args(["rustc", "--quiet", "--package", package, "--test", name, "--message-format", "json"]);
    let output = command.args(["--", "-C", "target-feature=+crt-static"]).stderr(Stdio::inherit()).output();
    let output = output.context("run cargo")?;
    ensure!(output.status.success(), "linking the tests {name} failed");
    let messages = String::from_utf8_lossy(&output.stdout);
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let mut built = messages.filter(|message| message["target"]["name"] == name);
    let built = built.find_map(|message| message["executable"].as_str().map(PathBuf::from));
    strip(&built.with_context(|| format!("cargo named no program of the tests {name}"))?, &target.join(name))
}

fn strip(built: &Path, path: &Path) -> Result<PathBuf> {
    // Without what only a debugger reads: the machine holds it in memory.
    call(Command::new("strip").arg("-o").arg(path).arg(built))?;
    Ok(path.to_owned())
}
