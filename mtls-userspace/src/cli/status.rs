//! `mtls status`: asks the agent of this node over its admin socket, prints tables for people or JSON for programs.

use std::fmt;
use std::io::{self, Write};

use jiff::Timestamp;

pub use super::agent::Error;
use super::agent::{Ask, block_on};
use super::words::{Names, bytes, duration, seconds_between};
use super::{Align, Table, printable};
use crate::observe::{AgentRow, ConnectionRows, Enrolment, IdentityRow, MeshRow, PodRow, Status};

#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(flatten)]
    pub ask: Ask,
}

/// Runs `mtls status` to its end.
pub fn main(args: &Args) -> anyhow::Result<()> {
    Ok(block_on(run(args, &mut io::stdout()))?)
}

/// Asks and prints.
///
/// # Errors
///
/// When no agent answers, or not as an agent does, or the output is closed.
pub async fn run(args: &Args, out: &mut (dyn Write + Send)) -> Result<(), Error> {
    let status: Status = args.ask.get("/status", out).await?;
    if args.ask.is_for_people() {
        write!(out, "{}", Tables { status: &status, now: Timestamp::now() })?;
    }
    Ok(())
}

/// A status as people read it.
pub struct Tables<'a> {
    pub status: &'a Status,
    pub now: Timestamp,
}

impl fmt::Display for Tables<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Status { agent, mesh, pods, certificates, connections } = self.status;
        let names = names(self.status);
        write_agent(f, agent, mesh, &names)?;
        write_pods(f, pods, &names)?;
        write_certificates(f, certificates, self.now, &names)?;
        write_connections(f, connections, &names)
    }
}

/// Every identity of the status, to be written alike.
fn names(status: &Status) -> Names {
    let parties = status.connections.newest.iter().flat_map(|row| [&row.source, &row.destination]);
    let identities = parties.filter_map(|party| party.identity.as_deref());
    let identities = identities.chain(status.pods.iter().map(|pod| pod.identity.as_str()));
    Names::new(identities.chain(status.certificates.iter().map(|row| row.identity.as_str())))
}

fn write_agent(f: &mut fmt::Formatter<'_>, agent: &AgentRow, mesh: &MeshRow, names: &Names) -> fmt::Result {
    let state = if agent.ready { "ready" } else { "NOT READY" };
    writeln!(
        f,
        "AGENT  node {}, mtls {}, pid {}, up {}, {state}",
        printable(&agent.node),
        printable(&agent.version),
        agent.pid,
        duration(agent.uptime_seconds),
    )?;
    for (condition, why) in &agent.missing {
        writeln!(f, "       waiting for {}: {}", printable(condition), printable(why))?;
    }
    let memory = agent.resident_bytes.map_or_else(|| "unknown".to_owned(), bytes);
    let cpu = agent.cpu_seconds.map_or_else(|| "unknown".to_owned(), |seconds| format!("{seconds:.1} s"));
    writeln!(f, "       memory {memory}, CPU time {cpu}")?;
    if let Some(row) = &agent.predecessor {
        let (pid, version) = (row.pid, printable(&row.version));
        writeln!(
            f,
            "       took the place of pid {pid}, mtls {version}, which drains: {} open connections",
            row.open
        )?;
    }
    if agent.retired {
        writeln!(
            f,
            "       ANOTHER AGENT HAS TAKEN ITS PLACE; it keeps its open connections until it is told to end"
        )?;
    }
    writeln!(f, "MESH   generation {}, {} workloads", mesh.generation, mesh.workloads)?;
    if let Some(trust_domain) = &names.trust_domain {
        writeln!(f, "       trust domain {}", printable(trust_domain))?;
    }
    if let Some(error) = &mesh.last_error {
        writeln!(f, "       NEWEST CONFIGURATION REFUSED: {}", printable(error))?;
    }
    Ok(())
}

fn write_pods(f: &mut fmt::Formatter<'_>, pods: &[PodRow], names: &Names) -> fmt::Result {
    writeln!(f, "\nPODS OF THIS NODE ({})", pods.len())?;
    if pods.is_empty() {
        return writeln!(f, "  none is enrolled");
    }
    let mut table =
        Table::new(&["POD", "ADDRESSES", "IDENTITY", "MODE", "STATE"].map(|name| (name, Align::Left)));
    for pod in pods {
        let state = match &pod.enrolment {
            Enrolment::Enrolled => match pod.faults.as_deref() {
                Some([]) | None => "enrolled".to_owned(),
                Some(faults) => format!("enrolled, NOT PROTECTED: {}", faults.join("; ")),
            },
            Enrolment::Pending => "pending".to_owned(),
            Enrolment::Failed { reason } => format!("FAILED: {reason}"),
        };
        table.row([
            format!("{}/{}", pod.namespace, pod.name),
            pod.addresses.join(","),
            names.short(&pod.identity),
            pod.mode.clone().unwrap_or_default(),
            state,
        ]);
    }
    write!(f, "{table}")
}

fn write_certificates(
    f: &mut fmt::Formatter<'_>,
    certificates: &[IdentityRow],
    now: Timestamp,
    names: &Names,
) -> fmt::Result {
    writeln!(f, "\nCERTIFICATES ({})", certificates.len())?;
    if certificates.is_empty() {
        return writeln!(f, "  none");
    }
    let mut table = Table::new(&[
        ("IDENTITY", Align::Left),
        ("SERIAL", Align::Left),
        ("TIME LEFT", Align::Right),
        ("RENEWS IN", Align::Right),
        ("RENEWALS", Align::Right),
        ("FAILURES", Align::Right),
        ("LAST ERROR", Align::Left),
    ]);
    for row in certificates {
        let left = match row.not_after {
            None => "NO CERTIFICATE".to_owned(),
            Some(end) if end <= now => "EXPIRED".to_owned(),
            Some(end) => duration(seconds_between(now, end)),
        };
        let renews = row.next_renewal.map(|at| duration(seconds_between(now, at)));
        table.row([
            names.short(&row.identity),
            row.serial.clone().unwrap_or_default(),
            left,
            renews.unwrap_or_default(),
            row.renewals.to_string(),
            row.failures.to_string(),
            row.last_error.clone().unwrap_or_default(),
        ]);
    }
    write!(f, "{table}")
}

fn write_connections(f: &mut fmt::Formatter<'_>, connections: &ConnectionRows, names: &Names) -> fmt::Result {
    let open: u64 = connections.open.iter().map(|open| open.count).sum();
    write!(
        f,
        "\nOPEN CONNECTIONS ({open}; {} opened and {} refused since the start)",
        connections.opened_total, connections.refused_total
    )?;
    if (connections.newest.len() as u64) < open {
        write!(f, ", the newest {}", connections.newest.len())?;
    }
    writeln!(f)?;
    for count in &connections.open {
        writeln!(f, "  {} {} {}", count.count, printable(&count.direction), printable(&count.path))?;
    }
    if connections.newest.is_empty() {
        return Ok(());
    }
    let left =
        ["WAY", "SOURCE", "IDENTITY", "DESTINATION", "IDENTITY", "CIPHER"].map(|name| (name, Align::Left));
    let right = ["SENT", "RECEIVED", "AGE"].map(|name| (name, Align::Right));
    let mut table = Table::new(&[left.as_slice(), &right].concat());
    for row in &connections.newest {
        let end = |workload: &Option<String>, address: &str| match workload {
            Some(workload) => format!("{workload} {address}"),
            None => address.to_owned(),
        };
        table.row([
            format!("{} {}", row.direction, row.path),
            end(&row.source.workload, &row.source.address),
            names.proven(row.source.identity.as_deref()),
            end(&row.destination.workload, &row.destination.address),
            names.proven(row.destination.identity.as_deref()),
            row.cipher.clone().unwrap_or_default(),
            bytes(row.bytes_sent),
            bytes(row.bytes_received),
            duration(row.age_seconds as u64),
        ]);
    }
    write!(f, "{table}")
}
