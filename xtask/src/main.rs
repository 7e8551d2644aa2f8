//! Development commands: setup, build, demo, test. Nothing the product needs at run time.

mod build;
mod toolchain;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Build, demonstrate and test mtls")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build the kernel half and the `mtls` binary that carries it.
    Build(build::Build),
}

fn main() -> anyhow::Result<()> {
    match Args::parse().command {
        Command::Build(build) => build.run().map(|path| println!("{}", path.display())),
    }
}
