//! Formatting and clippy. The kernel half has a panic handler of its own, so it is linted apart from the host crates; the
//! fuzz targets, which need a nightly compiler to run, are compiled here so that they do not rot.

use std::path::Path;

use anyhow::Result;

use crate::{call, cargo, step};

const KERNEL_HALF: &str = "mtls-ebpf/Cargo.toml";
const FUZZ: &str = "tests/fuzz/Cargo.toml";

pub fn run() -> Result<()> {
    step("formatting");
    call(cargo().args(["fmt", "--all", "--check"]))?;
    step("clippy");
    call(cargo().args(["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    if Path::new(KERNEL_HALF).exists() {
        step("formatting and clippy of the kernel half");
        call(cargo().args(["fmt", "--manifest-path", KERNEL_HALF, "--check"]))?;
        call(cargo().args(["clippy", "--quiet", "--manifest-path", KERNEL_HALF, "--", "-D", "warnings"]))?;
    }
    step("formatting and compiling of the fuzz targets");
    call(cargo().args(["fmt", "--manifest-path", FUZZ, "--check"]))?;
    let mut check = cargo();
    check.args(["check", "--quiet", "--locked", "--bins", "--manifest-path", FUZZ, "--target-dir", "target"]);
    // Nothing is linked, so the fuzzer itself need not be compiled.
    call(check.env("CUSTOM_LIBFUZZER_PATH", "/nowhere/libfuzzer.a"))
}
