//! `mtls readiness`: asks the agent of this node who would be cut off if STRICT came now, and says so by its exit code.
//!
//! 0: nobody would be, and the observation covers the window. 1: somebody would be, or it does not. 2: nobody could
//! tell: wrong usage, or no agent answers.

use std::fmt;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use jiff::Timestamp;
use tokio::time::timeout;

use super::agent::{self, Error, PATIENCE};
use super::words::duration;
use super::{Align, Output, Table, printable};
use crate::plaintext::{LONGEST_WINDOW, PeerRow, PortRow, Report, WorkloadRow};

/// The two judgements that are not "ready".
const NOT_READY: u8 = 1;
const UNKNOWN: u8 = 2;

#[derive(clap::Args, Debug)]
pub struct Args {
    /// Only workloads of this namespace; all of the node's without it.
    #[arg(value_parser = namespace)]
    pub namespace: Option<String>,

    /// For how long nobody may have come in plaintext, for example 24h or 7d.
    #[arg(long, value_name = "DURATION", default_value = "24h", value_parser = window)]
    pub window: Duration,

    /// Judge only what PeerAuthentications with the annotation istio.io/dry-run would make STRICT.
    #[arg(long)]
    pub dry_run: bool,

    /// The agent's admin socket.
    #[arg(long, value_name = "PATH", default_value = "/run/mtls/admin.sock")]
    pub admin_socket: PathBuf,

    /// Tables for people, or JSON for programs.
    #[arg(long, short, value_enum, default_value_t = Output::Table)]
    pub output: Output,
}

/// Runs `mtls readiness` to its end.
pub fn main(args: &Args) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let ready = runtime.map_err(Error::from).and_then(|it| it.block_on(run(args, &mut io::stdout())));
    match ready {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(NOT_READY),
        Err(error) => {
            eprintln!("mtls: {error}");
            ExitCode::from(UNKNOWN)
        }
    }
}

/// Asks and prints. Returns whether everything asked about is ready.
///
/// # Errors
///
/// When no agent answers, or not as an agent does, or the output is closed.
pub async fn run(args: &Args, out: &mut (dyn Write + Send)) -> Result<bool, Error> {
    let path = &args.admin_socket;
    let mut resource =
        format!("/readiness?window_seconds={}&dry_run={}", args.window.as_secs(), args.dry_run);
    if let Some(namespace) = &args.namespace {
        resource += &format!("&namespace={namespace}");
    }
    let answer = timeout(PATIENCE, agent::get(path, &resource));
    let answer = answer.await.map_err(|_| Error::Silent { path: path.clone() })??;
    let unreadable = |source| Error::Answer { path: path.clone(), source };
    let report: Report = serde_json::from_slice(&answer).map_err(unreadable)?;
    match args.output {
        Output::Table => write!(out, "{}", Tables(&report))?,
        Output::Json => {
            // Passed on as it came: a newer agent may say more than this version knows.
            let report: serde_json::Value = serde_json::from_slice(&answer).map_err(unreadable)?;
            writeln!(out, "{report:#}")?;
        }
    }
    Ok(report.ready)
}

/// What Kubernetes allows as a name; nothing of it needs escaping in a URL.
fn namespace(text: &str) -> Result<String, String> {
    let is_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    match !text.is_empty() && text.len() <= 63 && text.chars().all(is_name) {
        true => Ok(text.to_owned()),
        false => Err("a namespace has lower-case letters, digits and `-`, at most 63 of them".into()),
    }
}

fn window(text: &str) -> Result<Duration, String> {
    let days = text.strip_suffix('d').and_then(|days| days.parse::<u32>().ok());
    let window = match days {
        Some(days) => Duration::from_secs(u64::from(days) * 24 * 3600),
        None => {
            let parsed: jiff::SignedDuration = text.parse().map_err(|e: jiff::Error| e.to_string())?;
            Duration::try_from(parsed).map_err(|_| "a window cannot be negative".to_owned())?
        }
    };
    if window < Duration::from_secs(1) || window > LONGEST_WINDOW {
        return Err("a window is between 1s and 30d".into());
    }
    Ok(window)
}

/// A report as people read it.
pub struct Tables<'a>(pub &'a Report);

impl fmt::Display for Tables<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let report = self.0;
        let verdict = if report.ready { "READY" } else { "NOT READY" };
        let scope = report.namespace.as_deref().map(|name| format!(", namespace {name}")).unwrap_or_default();
        let what = if report.dry_run { "THE DRY-RUN POLICIES" } else { "STRICT" };
        writeln!(
            f,
            "{verdict} FOR {what}  node {}{}, window {}",
            printable(&report.node),
            printable(&scope),
            duration(report.window_seconds)
        )?;
        for reason in &report.reasons {
            writeln!(f, "  {}", printable(reason))?;
        }
        write_observation(f, report)?;
        let ports = || report.workloads.iter().flat_map(|row| row.ports.iter().map(move |port| (row, port)));
        write_peers(f, "WOULD BE CUT OFF", ports().map(|(row, port)| (row, port, &port.cut_off)))?;
        write_peers(
            f,
            "PLAINTEXT BECAUSE OF DISABLE; WOULD USE MTLS",
            ports().map(|(row, port)| (row, port, &port.becomes_mtls)),
        )?;
        write_peers(
            f,
            "KEPT OPEN FOR THE API SERVER",
            ports().map(|(row, port)| (row, port, &port.kept_open)),
        )?;
        write_calls(f, ports())?;
        write_dry_run(f, report)
    }
}

fn write_observation(f: &mut fmt::Formatter<'_>, report: &Report) -> fmt::Result {
    writeln!(f, "\nOBSERVED WORKLOADS ({})", report.workloads.len())?;
    match (report.workloads.is_empty(), report.dry_run) {
        (true, true) => return writeln!(f, "  no dry-run PeerAuthentication makes anything here STRICT"),
        (true, false) => return writeln!(f, "  none is enrolled here"),
        _ => {}
    }
    let mut table = Table::new(&[
        ("POD", Align::Left),
        ("MODE", Align::Left),
        ("OBSERVED SINCE", Align::Left),
        ("FOR", Align::Right),
        ("PORTS NOT STRICT", Align::Left),
        ("READY", Align::Left),
    ]);
    for row in &report.workloads {
        let ports: Vec<String> = row.ports.iter().map(|port| port.port.to_string()).collect();
        table.row([
            format!("{}/{}", row.namespace, row.name),
            row.mode.clone(),
            row.observed_since.map(seconds).unwrap_or_default(),
            row.observed_since.map(|_| duration(row.observed_seconds)).unwrap_or_default(),
            ports.join(","),
            (if row.ready { "yes" } else { "NO" }).to_owned(),
        ]);
    }
    write!(f, "{table}")?;
    for row in report.workloads.iter().filter(|row| row.unserved.count > 0) {
        let WorkloadRow { namespace, name, unserved, .. } = row;
        let name = printable(&format!("{namespace}/{name}"));
        writeln!(f, "  {name}: {} attempts at ports that nothing listens on", unserved.count)?;
    }
    Ok(())
}

fn write_peers<'a>(
    f: &mut fmt::Formatter<'_>,
    heading: &str,
    ports: impl Iterator<Item = (&'a WorkloadRow, &'a PortRow, &'a Vec<PeerRow>)>,
) -> fmt::Result {
    let left = ["DESTINATION", "MODE", "CLIENT", "ADDRESS"].map(|name| (name, Align::Left));
    let right = ["CONNECTIONS", "OPEN", "REFUSED"].map(|name| (name, Align::Right));
    let times = ["FIRST SEEN", "LAST SEEN"].map(|name| (name, Align::Left));
    let mut table = Table::new(&[left.as_slice(), &right, &times].concat());
    let mut count = 0;
    for (row, port, peers) in ports {
        count += peers.len();
        for peer in peers {
            let client = match (&peer.workload, peer.enrolled) {
                (Some(workload), true) => format!("{workload} (enrolled)"),
                (Some(workload), false) => workload.clone(),
                (None, _) => match &peer.node {
                    Some(node) if peer.control_plane => format!("node {node}: API server or host"),
                    Some(node) => format!("node {node}: host"),
                    None => "unknown to the mesh".to_owned(),
                },
            };
            table.row([
                format!("{}/{}:{}", row.namespace, row.name, port.port),
                port.mode.clone(),
                client,
                peer.address.clone(),
                peer.connections.to_string(),
                peer.open.to_string(),
                peer.refused.to_string(),
                seconds(peer.first_seen),
                seconds(peer.last_seen),
            ]);
        }
    }
    if count > 0 { write!(f, "\n{heading} ({count})\n{table}") } else { Ok(()) }
}

fn write_calls<'a>(
    f: &mut fmt::Formatter<'_>,
    ports: impl Iterator<Item = (&'a WorkloadRow, &'a PortRow)>,
) -> fmt::Result {
    let headings = ["DESTINATION", "MODE", "CALLED FOR", "THROUGH SERVICE", "WITH STRICT"];
    let mut table = Table::new(&headings.map(|name| (name, Align::Left)));
    let mut count = 0;
    for (row, port) in ports {
        count += port.called_by.len();
        for call in &port.called_by {
            table.row([
                format!("{}/{}:{}", row.namespace, row.name, port.port),
                port.mode.clone(),
                call.by.clone(),
                format!("{}:{}", call.service, call.port),
                (if call.cut_off { "CUT OFF" } else { "kept open by the port's own mode" }).to_owned(),
            ]);
        }
    }
    if count > 0 { write!(f, "\nCALLED BY THE API SERVER, IN PLAINTEXT ({count})\n{table}") } else { Ok(()) }
}

fn write_dry_run(f: &mut fmt::Formatter<'_>, report: &Report) -> fmt::Result {
    let mut table = Table::new(
        &["DESTINATION", "MODE", "WOULD BE", "BY", "WOULD CUT OFF"].map(|name| (name, Align::Left)),
    );
    let mut count = 0;
    for row in &report.workloads {
        for port in &row.ports {
            let Some(dry_run) = &port.dry_run else { continue };
            count += 1;
            let cut_off = match (dry_run.mode.as_str(), port.cut_off.len()) {
                ("STRICT", 0) => "nobody seen".to_owned(),
                ("STRICT", 1) => "1 peer".to_owned(),
                ("STRICT", peers) => format!("{peers} peers"),
                _ => "nobody".to_owned(),
            };
            table.row([
                format!("{}/{}:{}", row.namespace, row.name, port.port),
                port.mode.clone(),
                dry_run.mode.clone(),
                dry_run.policy.clone().unwrap_or_default(),
                cut_off,
            ]);
        }
    }
    if count > 0 { write!(f, "\nWITH THE DRY-RUN POLICIES ENFORCED ({count})\n{table}") } else { Ok(()) }
}

/// To the second: people do not read further.
fn seconds(at: Timestamp) -> String {
    Timestamp::from_second(at.as_second()).unwrap_or(at).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_have_units_and_bounds() {
        for (text, seconds) in
            [("24h", 86400), ("7d", 604_800), ("1s", 1), ("1h 30m", 5400), ("30d", 2_592_000)]
        {
            assert_eq!(window(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for text in ["", "5", "0s", "31d", "-1h", "d", "4294967296d", "yesterday"] {
            assert!(window(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_namespace_needs_no_escaping() {
        assert_eq!(namespace("shop-2"), Ok("shop-2".to_owned()));
        for text in ["", "Shop", "a&b=c", "a/b", &"x".repeat(64)] {
            assert!(namespace(text).is_err(), "{text}");
        }
    }
}
