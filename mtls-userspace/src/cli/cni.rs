//! `mtls cni`: the CNI plugin, called as such by a container runtime, and its removal from a node.

use std::collections::HashMap;
use std::io::Read;
use std::path::PathBuf;
use std::process::ExitCode;

use crate::cni;

/// Flags of `mtls cni`.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Take the plugin off this node: out of the network configuration, then its binary
    Uninstall(Installed),
}

/// Where the plugin is to be taken off.
#[derive(clap::Args, Debug)]
pub(super) struct Installed {
    /// Where CNI plugins are
    #[arg(long, value_name = "DIR", default_value = "/opt/cni/bin")]
    cni_bin_dir: PathBuf,
    /// Where the network configuration is
    #[arg(long, value_name = "DIR", default_value = "/etc/cni/net.d")]
    cni_conf_dir: PathBuf,
}

impl Installed {
    /// Takes it off, and says so.
    pub(super) fn take_off(&self) -> anyhow::Result<()> {
        let changed = cni::uninstall(&self.cni_bin_dir, &self.cni_conf_dir)?;
        for path in &changed {
            println!("{} is out of {}", cni::NAME, path.display());
        }
        if changed.is_empty() {
            println!("{} was not installed", cni::NAME);
        }
        Ok(())
    }
}

pub fn main(args: Args) -> anyhow::Result<ExitCode> {
    match args.command {
        None => Ok(plugin()),
        Some(Command::Uninstall(installed)) => installed.take_off().map(|()| ExitCode::SUCCESS),
    }
}

/// Whether this process was started by the plugin's name, as container runtimes do.
pub fn is_called() -> bool {
    let name = std::env::args_os().next().map(PathBuf::from);
    name.is_some_and(|name| name.file_name().is_some_and(|name| name == cni::NAME))
}

/// Answers a container runtime.
pub fn plugin() -> ExitCode {
    let environment: HashMap<String, String> = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect();
    let mut input = String::new();
    // What cannot be read cannot be parsed either, and is reported so.
    let _ = std::io::stdin().read_to_string(&mut input);
    let (answer, is_success) = cni::plugin::run(&environment, &input);
    if !answer.is_null() {
        println!("{answer}");
    }
    if is_success { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
