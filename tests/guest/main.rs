//! The only program in a kernel that `cargo xtask vm` boots: process 1, what loads modules, and the tests themselves.
//!
//! As process 1 it runs the command that was put beside it, on the console, and powers the machine off. As
//! `/sbin/modprobe` it is what the kernel calls for a module. `lab-guest test` runs every case on whatever kernel it is
//! started on, and says the outcomes one a line; that alone needs no virtual machine.

mod cases;
mod init;
mod kernel_tls;
mod modules;

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut args = std::env::args();
    let name = args.next().unwrap_or_default();
    let result = match (std::process::id(), Path::new(&name).file_name().and_then(|name| name.to_str())) {
        (1, _) => init::run(),
        (_, Some("modprobe")) => modules::probe(args.filter(|arg| !arg.starts_with('-'))),
        _ => match (args.next().as_deref(), args.next()) {
            (Some("test"), None) => return cases::run(),
            _ => Err(anyhow::anyhow!("usage: lab-guest test")),
        },
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lab-guest: {error:#}");
            ExitCode::FAILURE
        }
    }
}
