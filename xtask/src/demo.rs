//! The demo and the first figures: sets up, builds for release, and hands over to the program that shows them.

use anyhow::Result;

use crate::build::Build;
use crate::{call, cargo, setup, step};

pub fn run() -> Result<()> {
    show("demo")
}

/// Speed and memory beside plain TCP.
pub fn figures() -> Result<()> {
    show("figures")
}

fn show(program: &str) -> Result<()> {
    setup::run()?;
    step("building (the first time takes minutes)");
    let mtls = Build { release: true }.run()?;
    call(cargo().args(["build", "--quiet", "--release", "--package", "mtls-tests", "--bin", "lab-app"]))?;
    call(
        cargo()
            .args(["run", "--quiet", "--release", "--package", "mtls-tests", "--bin", program])
            .env("MTLS_BIN", mtls),
    )
}
