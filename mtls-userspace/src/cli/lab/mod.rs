//! `mtls lab`: what a kernel can do.

mod features;

use std::process::ExitCode;

#[derive(clap::Subcommand)]
pub enum Lab {
    /// Try everything the agent needs or could use: exit 0 the agent can run here, 1 it cannot, 2 wrong usage
    Features(features::Args),
}

pub fn main(lab: &Lab) -> ExitCode {
    match lab {
        Lab::Features(args) => features::main(args),
    }
}
