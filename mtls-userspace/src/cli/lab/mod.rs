//! `mtls lab`: what a kernel can do.

mod carry;
mod compare;
mod diff;
mod features;

use std::process::ExitCode;

#[derive(clap::Subcommand)]
pub enum Lab {
    /// Try everything the agent needs or could use: exit 0 the agent can run here, 1 it cannot, 2 wrong usage
    Features(features::Args),
    /// Measure every way to carry a connection that this kernel has, beside plain TCP
    Compare(compare::Args),
    /// Lay two files of results side by side
    Diff(diff::Args),
    /// Run two relays, for `compare`
    #[command(hide = true)]
    Carry(carry::Args),
}

pub fn main(lab: &Lab) -> ExitCode {
    let result = match lab {
        Lab::Features(args) => return features::main(args),
        Lab::Compare(args) => compare::run(args),
        Lab::Diff(args) => diff::run(args, &mut std::io::stdout()),
        Lab::Carry(args) => carry::run(args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mtls: {error:#}");
            ExitCode::FAILURE
        }
    }
}
