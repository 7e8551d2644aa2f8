//! `mtls policy`: the policies in force listed; manifests looked over and connections explained before anything is
//! applied, which needs no agent.

use std::fmt;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, bail};
use clap::Subcommand;
use ipnet::IpNet;

use super::{Output, policies, printable};
use crate::config::SameNode;
use crate::explain::{self, EndRow, Explanation, ModeRow};
use crate::identity::TrustDomain;
use crate::mesh::{self, Finding, Mesh, Severity};

#[derive(clap::Args, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    #[command(subcommand)]
    command: Option<Command>,

    #[command(flatten)]
    list: policies::ListArgs,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// List the policies that this node's agent has read, as without a subcommand
    List(policies::ListArgs),
    /// Look over manifests: what is refused, and what policies do not do although they seem to
    Check(Check),
    /// Say what would happen to a connection, and which policy decides
    Explain(Explain),
}

#[derive(clap::Args, Debug)]
struct View {
    /// Trust domain of the mesh.
    #[arg(long, value_name = "NAME", default_value = "cluster.local")]
    trust_domain: TrustDomain,

    /// Namespace whose policies without a selector are the mesh's.
    #[arg(long, value_name = "NAME", default_value = "istio-system")]
    root_namespace: Arc<str>,

    /// Text for people, or JSON for programs.
    #[arg(long, short, value_enum, default_value_t = Output::Table)]
    output: Output,
}

#[derive(clap::Args, Debug)]
struct Check {
    /// Directory of manifests.
    #[arg(value_name = "DIR")]
    directory: PathBuf,

    /// Fail on warnings too.
    #[arg(long)]
    deny_warnings: bool,

    #[command(flatten)]
    view: View,
}

#[derive(clap::Args, Debug)]
struct Explain {
    /// Directory of manifests.
    #[arg(long, value_name = "DIR")]
    manifests: PathBuf,

    /// Who dials: a pod or an address.
    #[arg(long, value_name = "NAMESPACE/POD|ADDRESS")]
    from: explain::End,

    /// Who is dialled: a pod, its address, or a Service's.
    #[arg(long, value_name = "NAMESPACE/POD|ADDRESS")]
    to: explain::End,

    /// The port that is dialled.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    port: u16,

    /// Addresses that agents capture; without it, exactly those of the mesh.
    #[arg(long, value_name = "CIDR")]
    mesh_prefix: Vec<IpNet>,

    /// How agents carry connections between two pods of one node.
    #[arg(long, value_enum, default_value_t = SameNode::Relay)]
    same_node: SameNode,

    #[command(flatten)]
    view: View,
}

/// Runs `mtls policy` to its end. An error is also what `check` found.
pub fn main(args: Args) -> anyhow::Result<()> {
    match args.command {
        None => policies::main(&args.list),
        Some(Command::List(list)) => policies::main(&list),
        Some(Command::Check(check)) => check.run(&mut io::stdout().lock()),
        Some(Command::Explain(explain)) => explain.run(&mut io::stdout().lock()),
    }
}

impl View {
    fn settings(&self) -> mesh::Settings {
        mesh::Settings {
            trust_domain: self.trust_domain.clone(),
            root_namespace: self.root_namespace.clone(),
        }
    }
}

impl Check {
    fn run(self, out: &mut impl Write) -> anyhow::Result<()> {
        let findings = mesh::check(&self.directory, &self.view.settings())?;
        let count = |severity| findings.iter().filter(|finding| finding.severity == severity).count();
        let (errors, warnings) = (count(Severity::Error), count(Severity::Warning));
        match self.view.output {
            Output::Json => {
                serde_json::to_writer_pretty(&mut *out, &findings)?;
                writeln!(out)?;
            }
            Output::Table => {
                for Finding { severity, message, .. } in &findings {
                    let severity = match severity {
                        Severity::Error => "error",
                        Severity::Warning => "warning",
                    };
                    writeln!(out, "{severity}: {}", printable(message))?;
                }
                if findings.is_empty() {
                    writeln!(out, "{}: nothing to remark", self.directory.display())?;
                }
            }
        }
        if errors > 0 || self.deny_warnings && warnings > 0 {
            bail!("{}: {errors} errors, {warnings} warnings", self.directory.display());
        }
        Ok(())
    }
}

impl Explain {
    fn run(self, out: &mut impl Write) -> anyhow::Result<()> {
        let mesh = Mesh::from_directory(&self.manifests, &self.view.settings())?;
        let setting = explain::Setting { prefixes: self.mesh_prefix, same_node: self.same_node };
        let explained = explain::explain(&mesh, &setting, &self.from, &self.to, self.port)
            .with_context(|| format!("cannot explain {} to {} port {}", self.from, self.to, self.port))?;
        match self.view.output {
            Output::Json => {
                serde_json::to_writer_pretty(&mut *out, &explained)?;
                writeln!(out)?;
            }
            Output::Table => {
                for (number, explanation) in explained.iter().enumerate() {
                    let gap = if number == 0 { "" } else { "\n" };
                    write!(out, "{gap}{}", ForPeople(explanation))?;
                }
            }
        }
        Ok(())
    }
}

/// An explanation as people read it.
pub(super) struct ForPeople<'a>(pub &'a Explanation);

impl fmt::Display for ForPeople<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Explanation { from, to, service, mode, dry_run_mode, dry_run, .. } = self.0;
        let mut line = |name: &str, text: &str| writeln!(f, "{name:<9} {}", printable(text));
        line("FROM", &end(from))?;
        line("TO", &end(to))?;
        if let Some(service) = service {
            line("SERVICE", service)?;
        }
        line("CAPTURED", &self.0.why_captured)?;
        line("PATH", &self.0.path)?;
        line("ON WIRE", &self.0.wire)?;
        match mode {
            Some(mode) => line("MODE", &set_by(mode))?,
            None => line("MODE", "none: the destination is not enrolled")?,
        }
        line("VERDICT", &self.0.verdict)?;
        if let Some(mode) = dry_run_mode {
            line("DRY RUN", &format!("mode would be {}", set_by(mode)))?;
        }
        if let Some(verdict) = dry_run {
            line("DRY RUN", &format!("would be {verdict}"))?;
        }
        self.0.notes.iter().try_for_each(|note| line("NOTE", note))
    }
}

fn end(end: &EndRow) -> String {
    let name = end.workload.as_deref().unwrap_or("unknown to the mesh");
    let identity = end.identity.as_deref().unwrap_or("not enrolled");
    let node = end.node.as_ref().map(|node| format!(", node {node}")).unwrap_or_default();
    format!("{} ({name}), {identity}{node}", end.address)
}

fn set_by(row: &ModeRow) -> String {
    match &row.policy {
        Some(policy) => format!("{}, set by PeerAuthentication {policy}", row.mode),
        None => format!("{}, the default: no PeerAuthentication sets it", row.mode),
    }
}
