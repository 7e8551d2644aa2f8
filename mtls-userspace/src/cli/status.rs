//! `mtls status`: asks the agent of this node over its admin socket, prints tables for people or JSON for programs.
//!
//! It only reads; an agent that does not answer is an error that names the socket and the remedy.

use std::fmt;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::{Align, Output, Table, printable};
use crate::identity::SpiffeId;
use crate::observe::{AgentRow, ConnectionRows, Enrolment, IdentityRow, MeshRow, PodRow, Status};

pub(super) const PATIENCE: Duration = Duration::from_secs(5);
const MAX_ANSWER: usize = 64 << 20;

#[derive(clap::Args, Debug)]
pub struct Args {
    /// The agent's admin socket.
    #[arg(long, value_name = "PATH", default_value = "/run/mtls/admin.sock")]
    pub admin_socket: PathBuf,

    /// Tables for people, or JSON for programs.
    #[arg(long, short, value_enum, default_value_t = Output::Table)]
    pub output: Output,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "no agent answers on {path}: {source}; start `mtls node` on this node, or give the socket it was started \
         with as --admin-socket", path = path.display())]
    NoAgent { path: PathBuf, source: io::Error },

    #[error("not allowed to ask the agent on {path}; run this as the user the agent runs as, usually root",
        path = path.display())]
    NotAllowed { path: PathBuf },

    #[error("the agent on {path} did not answer within {} s; its log may say why", PATIENCE.as_secs(),
        path = path.display())]
    Silent { path: PathBuf },

    #[error("what listens on {path} does not speak HTTP as an agent does: {source}", path = path.display())]
    Http { path: PathBuf, source: Box<dyn std::error::Error + Send + Sync> },

    #[error("the agent on {path} answered {status} instead of what it was asked for", path = path.display())]
    Refused { path: PathBuf, status: hyper::StatusCode },

    #[error("the agent on {path} answered something this version of mtls cannot read: {source}; use the same version",
        path = path.display())]
    Answer { path: PathBuf, source: serde_json::Error },

    #[error("cannot print the answer: {0}")]
    Print(#[from] io::Error),
}

/// Runs `mtls status` to its end.
pub fn main(args: &Args) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(run(args, &mut io::stdout()))?)
}

/// Asks and prints.
///
/// # Errors
///
/// When no agent answers, or not as an agent does, or the output is closed.
pub async fn run(args: &Args, out: &mut (dyn Write + Send)) -> Result<(), Error> {
    let path = &args.admin_socket;
    let answer = timeout(PATIENCE, get(path, "/status"));
    let answer = answer.await.map_err(|_| Error::Silent { path: path.clone() })??;
    let unreadable = |source| Error::Answer { path: path.clone(), source };
    match args.output {
        Output::Table => {
            let status: Status = serde_json::from_slice(&answer).map_err(unreadable)?;
            write!(out, "{}", Tables { status: &status, now: Timestamp::now() })?;
        }
        Output::Json => {
            // Passed on as it came: a newer agent may say more than this version knows.
            let status: serde_json::Value = serde_json::from_slice(&answer).map_err(unreadable)?;
            writeln!(out, "{status:#}")?;
        }
    }
    Ok(())
}

pub(super) async fn get(path: &Path, resource: &str) -> Result<Bytes, Error> {
    let stream = UnixStream::connect(path).await.map_err(|source| match source.kind() {
        io::ErrorKind::PermissionDenied => Error::NotAllowed { path: path.to_owned() },
        _ => Error::NoAgent { path: path.to_owned(), source },
    })?;
    fn http<E: Into<Box<dyn std::error::Error + Send + Sync>>>(path: &Path) -> impl Fn(E) -> Error {
        move |source| Error::Http { path: path.to_owned(), source: source.into() }
    }
    let (mut requests, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(http(path))?;
    let request =
        hyper::Request::get(resource).header(hyper::header::HOST, "agent").body(Empty::<Bytes>::new());
    let request = request.map_err(http(path))?;
    let exchange = async {
        let response = requests.send_request(request).await.map_err(http(path))?;
        if !response.status().is_success() {
            return Err(Error::Refused { path: path.to_owned(), status: response.status() });
        }
        Ok(Limited::new(response.into_body(), MAX_ANSWER).collect().await.map_err(http(path))?.to_bytes())
    };
    let mut exchange = std::pin::pin!(exchange);
    tokio::select! {
        answer = &mut exchange => answer,
        // The answer may be complete when the agent closes. If not, what broke the connection says why.
        ended = connection => match (exchange.await, ended) {
            (Err(Error::Http { .. }), Err(broken)) => Err(http(path)(broken)),
            (answer, _) => answer,
        },
    }
}

/// A status as people read it.
pub struct Tables<'a> {
    pub status: &'a Status,
    pub now: Timestamp,
}

impl fmt::Display for Tables<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Status { agent, mesh, pods, certificates, connections } = self.status;
        let names = Names::new(self.status);
        write_agent(f, agent, mesh, &names)?;
        write_pods(f, pods, &names)?;
        write_certificates(f, certificates, self.now, &names)?;
        write_connections(f, connections, &names)
    }
}

/// How identities are written: without the trust domain when there is only one.
struct Names {
    trust_domain: Option<String>,
}

impl Names {
    fn new(status: &Status) -> Self {
        let parties = status.connections.newest.iter().flat_map(|row| [&row.source, &row.destination]);
        let identities = parties.filter_map(|party| party.identity.as_deref());
        let identities = identities.chain(status.pods.iter().map(|pod| pod.identity.as_str()));
        let identities = identities.chain(status.certificates.iter().map(|row| row.identity.as_str()));
        let mut domains: Vec<String> = identities
            .filter_map(|identity| Some(identity.parse::<SpiffeId>().ok()?.trust_domain().to_string()))
            .collect();
        domains.sort();
        domains.dedup();
        Self { trust_domain: if domains.len() == 1 { domains.pop() } else { None } }
    }

    fn short(&self, identity: &str) -> String {
        match identity.parse::<SpiffeId>() {
            Ok(id) if self.trust_domain.is_some() => {
                format!("ns/{}/sa/{}", id.namespace(), id.service_account())
            }
            Ok(id) => id.principal().to_owned(),
            Err(_) => identity.to_owned(),
        }
    }

    fn proven(&self, identity: Option<&str>) -> String {
        identity.map_or_else(|| "none".to_owned(), |identity| self.short(identity))
    }
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
            Enrolment::Enrolled => "enrolled".to_owned(),
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

fn seconds_between(from: Timestamp, to: Timestamp) -> u64 {
    u64::try_from(to.as_second().saturating_sub(from.as_second())).unwrap_or(0)
}

/// The two largest units.
pub(super) fn duration(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m {}s", seconds % 60),
        (0, _, _) => format!("{hours}h {minutes}m"),
        _ => format!("{days}d {hours}h"),
    }
}

fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1024.0;
    let mut unit = UNITS[0];
    for larger in &UNITS[1..] {
        // What would be written as 1024.0 belongs to the next unit.
        if value < 1023.95 {
            break;
        }
        value /= 1024.0;
        unit = larger;
    }
    format!("{value:.1} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_show_the_two_largest_units() {
        let shown = [0, 59, 60, 3599, 3600, 86399, 86400, 90061].map(duration);
        assert_eq!(shown, ["0s", "59s", "1m 0s", "59m 59s", "1h 0m", "23h 59m", "1d 0h", "1d 1h"]);
    }

    #[test]
    fn bytes_have_the_unit_that_keeps_them_short() {
        let shown = [0, 1023, 1024, 1536, (1 << 20) - 1, 1 << 20, u64::MAX].map(bytes);
        assert_eq!(shown, ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "1.0 MiB", "1.0 MiB", "16.0 EiB"]);
    }
}
