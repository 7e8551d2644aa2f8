//! Development commands: setup, build, demo, test, lint. Nothing the product needs at run time.

mod bench;
mod build;
mod demo;
mod image;
mod kubernetes;
mod lint;
mod promtool;
mod setup;
mod test;
mod toolchain;
mod vm;

use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Build, demonstrate and test mtls")]
struct Args {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what the other commands need, as far as it is missing.
    Setup,
    /// Build the kernel half and the `mtls` binary that carries it.
    Build(build::Build),
    /// The container image, without Docker: an OCI layout and an archive to load.
    Image(image::Image),
    /// Show it at work: two nodes, real applications, an intruder.
    Demo,
    /// Measure beside plain TCP, and beside others, in the same lab: `cargo xtask bench --help`.
    #[command(disable_help_flag = true)]
    Bench(bench::Bench),
    /// Lint everything, then run every test.
    Test(test::Test),
    /// Boot real kernels and run the kernel-facing tests inside.
    Vm(vm::Vm),
    /// Formatting and clippy, for the host and for the kernel half.
    Lint,
}

fn main() -> Result<()> {
    if let Some(error) = toolchain::wrap() {
        return Err(error).context("call the compiler");
    }
    match Args::parse().command {
        Task::Setup => setup::run(),
        Task::Build(build) => build.run().map(|path| println!("{}", path.display())),
        Task::Image(image) => image.run(),
        Task::Demo => demo::run(),
        Task::Bench(bench) => bench.run(),
        Task::Test(test) => test.run(),
        Task::Vm(vm) => vm.run(),
        Task::Lint => lint::run(),
    }
}

/// Cargo, as it was called.
fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// Runs a command to its end; its failure is ours.
fn call(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("run {:?}", command.get_program()))?;
    ensure!(status.success(), "{command:?} failed: {status}");
    Ok(())
}

/// Says what comes next, to a person who watches.
fn step(what: &str) {
    println!("── {what}");
}
