//! The demo: sets up, builds for release, and hands over to the program that shows it.

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
    call(cargo().args(["build", "--quiet", "--release", "--workspace", "--bin", "lab-app"]))?;
    let mut command = cargo();
    command.args(["run", "--quiet", "--release", "--workspace", "--bin", program, "--"]).args(args);
    call(command.env("MTLS_BIN", mtls))
}
