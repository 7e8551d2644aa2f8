//! The demo: sets up, builds for release, and hands over to the program that shows it.

use anyhow::Result;

use crate::build::Build;
use crate::{call, cargo, setup, step};

pub fn run() -> Result<()> {
    setup::run()?;
    step("building (the first time takes minutes)");
    let mtls = Build { release: true }.run()?;
    call(cargo().args(["build", "--quiet", "--release", "--package", "mtls-tests", "--bin", "lab-app"]))?;
    call(
        cargo()
            .args(["run", "--quiet", "--release", "--package", "mtls-tests", "--bin", "demo"])
            .env("MTLS_BIN", mtls),
    )
}
