//! `mtls node-check`: whether a node can take part, before anything is installed on it, and what to set.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use super::stay::stay;
use super::{Align, Output, Table};
use crate::features;
use crate::node_check::{self, Finding, Node, Verdict};

/// Something is missing or in the way.
const NOT_YET: u8 = 1;
/// Nobody could tell.
const UNKNOWN: u8 = 2;

#[derive(clap::Args, Debug)]
pub struct Args {
    /// Where the node's root file system is, when this runs in a pod that mounts it
    #[arg(long, value_name = "DIR", default_value = "/")]
    root: PathBuf,
    /// The node's name, to be said above the table
    #[arg(long, value_name = "NAME")]
    node: Option<String>,
    /// If nothing is in the way, accept connections on this port until ended, instead of ending: a pod's readiness probe
    /// sees by it that the node can take part
    #[arg(long, value_name = "PORT")]
    stay: Option<u16>,
    /// Table for people, or JSON for programs
    #[arg(long, short, value_enum, default_value_t = Output::Table)]
    output: Output,
}

pub fn main(args: &Args) -> ExitCode {
    let findings = match findings(&args.root) {
        Ok(findings) => findings,
        Err(error) => {
            eprintln!("mtls: {error}");
            return ExitCode::from(UNKNOWN);
        }
    };
    let is_ready = !findings.iter().any(|finding| finding.verdict.is_obstacle());
    let title = args.node.as_ref().map(|node| {
        format!("node {node}: {}", if is_ready { "can take part" } else { "can't take part yet" })
    });
    // Whoever stopped reading has seen enough; the exit code is what counts.
    let _ = print(&findings, title.as_deref(), args.output, &mut io::stdout().lock());
    match (is_ready, args.stay) {
        (true, None) => ExitCode::SUCCESS,
        (true, Some(port)) => {
            let Err(error) = stay(port);
            eprintln!("mtls: {error:#}");
            ExitCode::from(UNKNOWN)
        }
        (false, _) => ExitCode::from(NOT_YET),
    }
}

fn findings(root: &Path) -> Result<Vec<Finding>, node_check::Error> {
    let places = node_check::places(root)?;
    let features = features::examine(places.cgroup.as_deref(), &places.bpffs.join("mtls"));
    let can_look = features.machine.capabilities.contains(&"CAP_SYS_ADMIN");
    let hooks = features.machine.hooks.iter().map(|hook| hook.program.clone()).collect();
    let mut findings = vec![kernel(&features)];
    findings.extend(node_check::look(&Node { root: root.into(), hooks: can_look.then_some(hooks) })?);
    Ok(findings)
}

/// All that was tried of the kernel, in one line.
fn kernel(report: &features::Report) -> Finding {
    let lacking = report.features.iter().filter(|tried| tried.feature.required && tried.works == Some(false));
    let lacking: Vec<&str> = lacking.map(|tried| tried.feature.name).collect();
    let verdict = if lacking.is_empty() {
        Verdict::Good
    } else {
        Verdict::Conflict { because: format!("no {}; `mtls lab features` says more", lacking.join(", no ")) }
    };
    Finding {
        what: "kernel",
        seen: format!("{} {}", report.machine.kernel, report.machine.architecture),
        verdict,
    }
}

fn print(findings: &[Finding], title: Option<&str>, output: Output, out: &mut impl Write) -> io::Result<()> {
    if output == Output::Json {
        return writeln!(out, "{}", serde_json::to_string(findings)?);
    }
    if let Some(title) = title {
        writeln!(out, "{title}")?;
    }
    let mut table = Table::new(&[("", Align::Left), ("SEEN", Align::Left), ("VERDICT", Align::Left)]);
    for finding in findings {
        table.row([finding.what.to_owned(), finding.seen.clone(), finding.verdict.to_string()]);
    }
    write!(out, "{table}")?;
    let settings: Vec<String> = findings
        .iter()
        .filter_map(|finding| match &finding.verdict {
            Verdict::Set { value, to } => Some(format!("--set {value}={to}")),
            _ => None,
        })
        .collect();
    if !settings.is_empty() {
        writeln!(out, "\nhelm install mtls deploy/chart {}", settings.join(" "))?;
    }
    Ok(())
}
