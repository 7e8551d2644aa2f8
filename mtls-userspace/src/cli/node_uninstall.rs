//! `mtls node-uninstall`: takes off a node what agents leave there when they end, so that STRICT holds without them: the
//! CNI plugin, and what they pinned in the kernel.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use anyhow::ensure;

use super::cni::Installed;
use super::stay::stay;
use crate::capture;

#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(flatten)]
    plugin: Installed,
    /// Where agents pinned their links and maps
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/mtls")]
    bpffs: PathBuf,
    /// Where an agent would answer that still runs
    #[arg(long, value_name = "PATH", default_value = "/run/mtls/agent.sock")]
    agent_socket: PathBuf,
    /// Once all is off, accept connections on this port until ended, instead of ending: a pod's readiness probe sees by it
    /// that the node is done
    #[arg(long, value_name = "PORT")]
    stay: Option<u16>,
}

pub fn main(args: &Args) -> anyhow::Result<()> {
    ensure!(
        UnixStream::connect(&args.agent_socket).is_err(),
        "an agent answers on {}, and would put everything back; stop it first: kubectl delete -k deploy/base",
        args.agent_socket.display()
    );
    // The plugin first: while it is there new pods are refused, and what is pinned protects those that run.
    args.plugin.take_off()?;
    let pods = capture::release(&args.bpffs)?;
    println!("nothing is pinned in {} any more; pods released: {pods}", args.bpffs.display());
    match args.stay {
        None => Ok(()),
        Some(port) => stay(port).map(|never| match never {}),
    }
}
