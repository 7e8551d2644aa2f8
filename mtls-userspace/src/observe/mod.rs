//! Observe: what the connection walk and other rooms report in; metrics, access log and the admin API out.
//!
//! An [`Observer`] is told of every connection that opens, ends or is refused. It never touches a connection's bytes,
//! never blocks the data path, and never turns a string from the wire into a metric label.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use crate::mesh::Workload;
use crate::plaintext;
use crate::succession::PredecessorRow;
use crate::tunnel::HandshakeFailure;

mod access_log;
mod admin;
mod bounded;
mod connections;
mod exposition;
mod flow;
mod graph;
mod inspection;
mod inspector_api;
mod metrics;
mod overview;
mod page;
mod pairs;
mod process;
mod providers;
mod readiness;
mod recent;
mod socket;
mod status;
mod strict;
mod traffic;
mod verification;
mod workload_labels;

use access_log::{Log, Record};
use bounded::Bounded;
use connections::{Connections, Open};
use metrics::{
    DirectionLabels, Events, HandshakeFailureLabels, HandshakeLabels, PlaintextTo, RecordsLabels, Refused,
};
use process::Process;
use providers::Providers;
use recent::Recent;
use traffic::Traffic;

pub use access_log::AccessLog;
pub use admin::Admin;
pub use connections::Connection;
pub use flow::{Direction, Ending, Flow, Party, Path, Refusal};
pub use inspection::{
    CertificateRow, ChainRow, EndedRow, EndpointRow, Filter, Inspector, Judged, Listing, ModesRow, PolicyRow,
    ServiceRow, WorkloadRow,
};
pub use metrics::Plaintext;
pub use readiness::{Condition, Readiness};
pub use socket::{SocketFile, bind as bind_socket};
pub use status::{
    AgentRow, ConnectionRow, ConnectionRows, Enrolment, IdentityRow, IssuerRole, IssuerRow, MeshRow,
    OpenCount, PartyRow, PodRow, RevocationRow, Status,
};
pub use verification::{CheckRow, End, Pair, Proof, Unverifiable, Verification};
pub use workload_labels::controller;

/// What an operator decides about observation.
#[derive(Clone, Debug)]
pub struct Settings {
    pub node: Arc<str>,
    pub access_log: AccessLog,
    /// Istio's `*_cluster` labels.
    pub cluster: Arc<str>,
    /// The domain of Service names.
    pub cluster_domain: Arc<str>,
    /// Label sets that one family of metrics may have before new ones are counted as `overflow`.
    pub label_sets: usize,
    /// How long a label set without connections stays in the metrics.
    pub label_idle: Duration,
}

impl Settings {
    pub fn new(node: impl Into<Arc<str>>) -> Self {
        Self {
            node: node.into(),
            access_log: AccessLog::Off,
            cluster: "Kubernetes".into(),
            cluster_domain: "cluster.local".into(),
            label_sets: 2000,
            label_idle: Duration::from_secs(30 * 60),
        }
    }
}

/// Where connections are reported. Clones share everything.
#[derive(Clone, Debug)]
pub struct Observer {
    inner: Arc<Inner>,
    registry: Arc<Registry>,
}

#[derive(Debug)]
struct Inner {
    node: Arc<str>,
    started: Timestamp,
    since: Instant,
    connections: Connections,
    recent: Recent,
    traffic: Arc<Traffic>,
    events: Events,
    kernels_plaintext: pairs::Pairs,
    providers: Providers,
    log: Log,
}

/// Why the admin API cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "cannot listen on {address} for the admin API: {source}; if another agent has the port, stop it or choose \
         another with --admin"
    )]
    Listen { address: SocketAddr, source: io::Error },

    #[error("an agent already answers on the admin socket {path}; stop it or choose another path with --admin-socket",
        path = path.display())]
    SocketTaken { path: PathBuf },

    #[error("{path} exists and is no socket, so it is not replaced; remove it or choose another path with --admin-socket",
        path = path.display())]
    NotASocket { path: PathBuf },

    #[error("cannot make the admin socket {path}: {source}", path = path.display())]
    Socket { path: PathBuf, source: io::Error },

    #[error("the admin API stopped serving: {source}")]
    Serve { source: io::Error },
}

impl Observer {
    /// An observer whose access log, if on, goes to standard output.
    pub fn new(settings: Settings) -> Self {
        Self::with_log(settings, Box::new(io::stdout()))
    }

    /// An observer whose access log, if on, goes to `out`, written by a thread of its own.
    pub fn with_log(settings: Settings, out: Box<dyn Write + Send>) -> Self {
        let Settings { node, access_log, cluster, cluster_domain, label_sets, label_idle } = settings;
        let inner = Arc::new(Inner {
            node,
            started: Timestamp::now(),
            since: Instant::now(),
            connections: Connections::default(),
            recent: Recent::default(),
            traffic: Arc::new(Traffic::new(Bounded::new(label_sets, label_idle), cluster, &cluster_domain)),
            events: Events::new(label_sets, label_idle),
            kernels_plaintext: pairs::Pairs::new(label_sets, label_idle),
            providers: Providers::default(),
            log: Log::start(access_log, out),
        });
        let mut registry = metrics::registry(&inner);
        registry
            .register_collector(Box::new(Process { started: inner.started.as_millisecond() as f64 / 1e3 }));
        Self { inner, registry: Arc::new(registry) }
    }

    /// Registers a connection that is about to carry bytes.
    pub fn open(&self, flow: Flow) -> Connection {
        self.open_since(flow, Instant::now())
    }

    /// Registers a connection that may have carried bytes already.
    pub fn open_since(&self, flow: Flow, since: Instant) -> Connection {
        let reports = self.inner.traffic.reports(&flow, "-");
        reports.each().for_each(|counts| count(&counts.opened));
        self.count_plaintext(&flow, Plaintext::Accepted);
        Connection::new(self.clone(), self.inner.connections.insert(flow, reports, since))
    }

    /// Records a connection that was never opened.
    pub fn refused(&self, flow: Flow, refusal: Refusal) {
        self.count_refusal(flow.direction, &refusal);
        self.count_plaintext(&flow, Plaintext::Refused);
        let reports = self.inner.traffic.reports(&flow, refusal.response_flags());
        reports.each().for_each(|counts| count(&counts.failed));
        self.inner.recent.refused(&flow, &refusal);
        if self.inner.log.is_on() {
            self.inner.log.write(Record::Refused { at: Timestamp::now(), flow: Box::new(flow), refusal });
        }
    }

    /// Asks every open connection that `judge` gives a reason against to stop; returns how many were newly asked.
    pub fn revoke(&self, judge: &dyn Fn(&Flow) -> Option<Arc<str>>) -> usize {
        let open = self.inner.connections.all();
        let revoked = open.iter().filter(|open| judge(&open.flow).is_some_and(|reason| open.revoke(reason)));
        let revoked = revoked.count();
        self.inner.events.revoked.inc_by(revoked as u64);
        revoked
    }

    pub fn handshake_done(&self, direction: Direction, resumed: bool) {
        let kind = if resumed { "resumed" } else { "full" };
        let labels = HandshakeLabels { direction: direction.as_str(), kind };
        self.inner.events.handshakes.get_or_create(&labels).inc();
    }

    pub fn handshake_failed(&self, direction: Direction, failure: HandshakeFailure) {
        let labels = HandshakeFailureLabels { direction: direction.as_str(), reason: failure.as_str() };
        self.inner.events.handshake_failures.get_or_create(&labels).inc();
    }

    pub fn tunnel_opened(&self, direction: Direction) {
        count_by(&self.inner.events.tunnels_opened, direction);
    }

    pub fn tunnel_reused(&self, direction: Direction) {
        count_by(&self.inner.events.tunnels_reused, direction);
    }

    pub fn lane_opened(&self, direction: Direction) {
        count_by(&self.inner.events.lanes_opened, direction);
    }

    pub fn lane_left(&self, direction: Direction) {
        count_by(&self.inner.events.lanes_left, direction);
    }

    pub fn became_bulk(&self, direction: Direction) {
        count_by(&self.inner.events.became_bulk, direction);
    }

    /// Counts a plaintext connection that the kernel half decided alone; `source` is whoever has the address. Those
    /// that come through [`Observer::open`] and [`Observer::refused`] are counted there.
    pub fn plaintext(&self, source: Option<&Workload>, to: &Workload, port: u16, outcome: Plaintext) {
        self.inner.kernels_plaintext.count(source, to, outcome);
        self.count_plaintext_to(to, port, outcome);
    }

    /// Where certificates are asked for at scrape time.
    pub fn set_identities(&self, ask: Arc<dyn Fn() -> Vec<IdentityRow> + Send + Sync>) {
        self.inner.providers.set_identities(ask);
    }

    /// Where the pods to be enrolled are asked for at scrape time.
    pub fn set_pods(&self, ask: Arc<dyn Fn() -> Vec<PodRow> + Send + Sync>) {
        self.inner.providers.set_pods(ask);
    }

    /// Where to ask for the agent whose place this one took, and whether another has this one's.
    pub fn set_succession(
        &self,
        predecessor: Arc<dyn Fn() -> Option<PredecessorRow> + Send + Sync>,
        retired: Arc<dyn Fn() -> bool + Send + Sync>,
    ) {
        self.inner.providers.set_succession(predecessor, retired);
    }

    /// Where the configuration in force is asked for at scrape time.
    pub fn set_mesh(&self, ask: Arc<dyn Fn() -> MeshRow + Send + Sync>) {
        self.inner.providers.set_mesh(ask);
    }

    /// Where the kernel half's counters are asked for at scrape time; a name may appear once.
    pub fn set_kernel_counters(&self, ask: Arc<dyn Fn() -> Vec<(&'static str, u64)> + Send + Sync>) {
        self.inner.providers.set_kernel_counters(ask);
    }

    /// What the agent makes use of, of what it has a choice about.
    pub fn set_capabilities(&self, rows: Vec<(&'static str, bool)>) {
        self.inner.providers.set_capabilities(Arc::new(move || rows.clone()));
    }

    /// Where it is asked who speaks plaintext to this node's pods, and, at scrape time, how many are remembered.
    pub fn set_plaintext(
        &self,
        facts: Arc<dyn Fn() -> plaintext::Facts + Send + Sync>,
        counts: Arc<dyn Fn() -> plaintext::Counts + Send + Sync>,
    ) {
        self.inner.providers.set_plaintext(facts, counts);
    }

    /// Who answers questions about the mesh, certificates and policies.
    pub fn set_inspector(&self, inspector: Arc<dyn Inspector>) {
        self.inner.providers.set_inspector(inspector);
    }

    /// What brings connections up to date that nobody reports as their bytes pass. Called before open ones are shown.
    pub fn set_refresh(&self, refresh: Arc<dyn Fn() + Send + Sync>) {
        self.inner.providers.set_refresh(refresh);
    }

    /// Waits until the access log has written what was logged so far; false if it could not within `patience`.
    /// Blocks: for the end of the process, not for the data path.
    pub fn flush_access_log(&self, patience: Duration) -> bool {
        self.inner.log.flush(patience)
    }

    /// Connections open now.
    pub fn open_connections(&self) -> u64 {
        let pairs = Direction::ALL.into_iter().flat_map(|d| Path::ALL.into_iter().map(move |p| (d, p)));
        pairs.map(|(direction, path)| self.inner.connections.open(direction, path)).sum()
    }

    /// The metrics in OpenMetrics text, the bytes of open connections included.
    fn scrape(&self) -> String {
        self.inner.providers.refresh();
        for open in self.inner.connections.all() {
            open.fold();
        }
        let mut text = String::new();
        if let Err(error) = prometheus_client::encoding::text::encode(&mut text, &self.registry) {
            // Writing to a String fails only if a metric refuses to be written.
            tracing::error!(%error, "metrics could not be encoded");
        }
        text
    }

    fn status(&self, readiness: &Readiness, limit: usize) -> Status {
        let missing = readiness.missing();
        let agent = AgentRow {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node: self.inner.node.to_string(),
            pid: std::process::id(),
            started: self.inner.started,
            uptime_seconds: self.inner.since.elapsed().as_secs(),
            ready: missing.is_empty(),
            missing: missing.into_iter().map(|(name, why)| (name.to_owned(), why.to_string())).collect(),
            resident_bytes: process::resident_bytes(),
            cpu_seconds: process::cpu_seconds(),
            predecessor: self.inner.providers.predecessor(),
            retired: self.inner.providers.is_retired(),
        };
        Status {
            agent,
            mesh: self.inner.providers.mesh().unwrap_or_default(),
            pods: self.inner.providers.pods(),
            certificates: self.inner.providers.identities(),
            connections: self.connection_rows(0..limit, &|_| true),
        }
    }

    /// Open connections: how many there are, and the newest of those wanted.
    fn connection_rows(&self, shown: Range<usize>, wanted: &dyn Fn(&Flow) -> bool) -> ConnectionRows {
        self.inner.providers.refresh();
        let mut newest = self.inner.connections.all();
        newest.retain(|open| wanted(&open.flow));
        newest.sort_unstable_by_key(|open| std::cmp::Reverse(open.id));
        let inspector = self.inner.providers.inspector();
        let row = |open: &Arc<Open>| {
            let judged = inspector.as_ref().map(|inspector| inspector.judged(&open.flow));
            ConnectionRow::new(open, judged.unwrap_or_default())
        };
        let pairs = Direction::ALL.into_iter().flat_map(|d| Path::ALL.into_iter().map(move |p| (d, p)));
        let open = pairs.map(|(direction, path)| OpenCount {
            direction: direction.as_str().to_owned(),
            path: path.as_str().to_owned(),
            count: self.inner.connections.open(direction, path),
        });
        ConnectionRows {
            open: open.filter(|open| open.count > 0).collect(),
            opened_total: self.inner.connections.opened(),
            refused_total: self.inner.events.refused_total.load(Ordering::Relaxed),
            matching: newest.len(),
            newest: newest.iter().take(shown.end).skip(shown.start).map(row).collect(),
        }
    }

    /// The last connections that ended or were refused, newest first, of those wanted.
    fn ended_rows(&self, wanted: &dyn Fn(&Flow) -> bool) -> Vec<EndedRow> {
        self.inner.recent.rows(wanted)
    }

    fn ended(&self, open: &Arc<Open>, ending: Ending) {
        match ending.response_flags(open.flow.direction) {
            "-" => open.reports.each().for_each(|counts| count(&counts.closed)),
            flags => {
                let reports = self.inner.traffic.reports(&open.flow, flags);
                reports.each().for_each(|counts| count(&counts.closed));
            }
        }
        if let Ending::Rejected(refusal) = &ending {
            self.count_refusal(open.flow.direction, refusal);
        }
        if let Some(records) = open.records() {
            let labels = RecordsLabels { direction: open.flow.direction.as_str(), records };
            self.inner.events.tunnel_connections.get_or_create(&labels).inc();
        }
        self.inner.recent.ended(open, &ending);
        if self.inner.log.is_on() {
            let (at, duration) = (Timestamp::now(), open.age());
            self.inner.log.write(Record::Ended { at, open: open.clone(), duration, ending });
        }
    }

    fn count_refusal(&self, direction: Direction, refusal: &Refusal) {
        let policy = match refusal {
            Refusal::Denied(denied) => denied.policy.as_deref().unwrap_or_default(),
            _ => "",
        };
        let labels = Refused { direction: direction.as_str(), reason: refusal.as_str(), policy };
        self.inner.events.refused.entry(&labels).value.fetch_add(1, Ordering::Relaxed);
        self.inner.events.refused_total.fetch_add(1, Ordering::Relaxed);
    }

    fn count_plaintext(&self, flow: &Flow, outcome: Plaintext) {
        if let (Direction::Inbound, Path::Plaintext, Some(destination)) =
            (flow.direction, flow.path, &flow.destination.workload)
        {
            self.count_plaintext_to(destination, flow.address.port(), outcome);
        }
    }

    fn count_plaintext_to(&self, destination: &Workload, port: u16, outcome: Plaintext) {
        let labels = PlaintextTo {
            namespace: &destination.namespace,
            workload: workload_labels::controller(destination),
            port,
            outcome,
        };
        self.inner.events.plaintext.entry(&labels).value.fetch_add(1, Ordering::Relaxed);
    }
}

fn count_by(counters: &Family<DirectionLabels, Counter>, direction: Direction) {
    counters.get_or_create(&DirectionLabels { direction: direction.as_str() }).inc();
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}
