//! The demo: sets up, builds for release, and hands over to the program that shows it.

use std::process::Command;

use anyhow::Result;

use crate::build::Build;
use crate::{call, cargo, setup, step};

pub fn run() -> Result<()> {
    setup::run()?;
    show("demo", &[])
}

/// Builds for release and runs one of the lab's programs.
pub fn show(program: &str, args: &[String]) -> Result<()> {
    step("building (the first time takes minutes)");
    let mtls = Build { release: true }.run()?;
    let mut programs = cargo();
    programs.args(["build", "--quiet", "--release", "--workspace", "--bin", "lab-app", "--bin", program]);
    call(&mut programs)?;
    // Cargo puts them beside each other; `cargo run` would choose other features, and build everything again.
    call(Command::new(mtls.with_file_name(program)).args(args).env("MTLS_BIN", &mtls))
}
