//! `mtls`: parse, run, exit code.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use mtls::cli;

/// Handshakes come and go between connections that stay for hours: this allocator leaves fewer holes between them than
/// the C library's, and gives memory back.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Transparent mTLS for Kubernetes: no sidecar, no iptables.
#[derive(Parser)]
#[command(name = "mtls", version)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the node agent
    Node(Box<cli::node::Node>),
    /// Run the certificate authority
    Ca(cli::ca::Ca),
    /// Show what the agent on this node is doing
    Status(cli::status::Args),
    /// Say who would be cut off if STRICT came now: exit 0 nobody, 1 somebody or not known, 2 nobody could tell
    Readiness(cli::readiness::Args),
    /// List the pods of the mesh and how each is protected
    Workloads(cli::workloads::Args),
    /// Show this node's certificates; exit 0 all verify, 1 one does not, 2 nobody could tell
    Certs(cli::certs::Args),
    /// List open connections, or those that ended last
    Connections(cli::connections::Args),
    /// List Services and who is behind them
    Services(cli::services::Args),
    /// Prove how one pod's connections to another are protected: exit 0 proven, 1 not, 2 nobody could tell
    Verify(cli::verify::Args),
    /// List policies, look over manifests, or explain what they would do to a connection
    Policy(cli::policy::Args),
    /// Say whether this node can take part, before installing, and what to set: exit 0 it can, 1 not yet, 2 nobody could tell
    NodeCheck(cli::node_check::Args),
    /// Take off this node what agents leave when they end: the CNI plugin, and what protects its pods
    NodeUninstall(cli::node_uninstall::Args),
    /// Be the CNI plugin of this node, or take it off
    Cni(cli::cni::Args),
    /// Measure: a load client and its server
    Bench(cli::bench::Bench),
    /// Find out what this kernel can do
    #[command(subcommand)]
    Lab(cli::lab::Lab),
}

fn main() -> ExitCode {
    if cli::cni::is_called() {
        return cli::cni::plugin();
    }
    let result = match Args::parse().command {
        Command::Node(node) => node.run(),
        Command::Ca(ca) => cli::ca::main(ca),
        Command::Status(args) => cli::status::main(&args),
        Command::Readiness(args) => return cli::readiness::main(&args),
        Command::Workloads(args) => cli::workloads::main(&args),
        Command::Certs(args) => return cli::certs::main(&args),
        Command::Connections(args) => cli::connections::main(&args),
        Command::Services(args) => cli::services::main(&args),
        Command::Verify(args) => return cli::verify::main(&args),
        Command::NodeCheck(args) => return cli::node_check::main(&args),
        Command::NodeUninstall(args) => cli::node_uninstall::main(&args),
        Command::Policy(args) => cli::policy::main(args),
        Command::Cni(args) => match cli::cni::main(args) {
            Ok(code) => return code,
            Err(error) => Err(error),
        },
        Command::Bench(bench) => bench.run(),
        Command::Lab(lab) => return cli::lab::main(&lab),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mtls: {error:#}");
            ExitCode::FAILURE
        }
    }
}
