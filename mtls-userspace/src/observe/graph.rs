//! The workload graph: the traffic metrics' label sets in, one edge per pair of workloads and protection out.
//!
//! Made when somebody asks, from what is counted anyway: as bounded as the metrics, and free for connections. A flow
//! that this agent reports from both its ends is one flow here.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

use super::Inner;
use super::flow::Direction;
use super::traffic::{Principal, Series, TrafficLabels, UNKNOWN};

/// Edges that one answer has at most; what is unprotected and what carries most comes first.
const SHOWN: usize = 500;

/// How the bytes between two workloads are kept from others. What needs attention comes first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Protection {
    /// Plain TCP into an enrolled workload.
    Plaintext,
    /// Plain TCP to what is not enrolled.
    Outside,
    /// Authorized with both identities and relayed inside this node.
    SameNode,
    /// Mutual TLS.
    Encrypted,
}

impl Protection {
    /// None above the cap, where the label set no longer says it.
    fn of(labels: &TrafficLabels) -> Option<Self> {
        match (labels.fixed.connection_security_policy, &labels.source_principal) {
            (_, Principal::Overflow) => None,
            ("mutual_tls", _) => Some(Self::Encrypted),
            ("none", Principal::Known(_)) => Some(Self::SameNode),
            ("none", Principal::Unknown) => Some(Self::Plaintext),
            _ => Some(Self::Outside),
        }
    }
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
pub(super) struct End {
    pub namespace: String,
    pub workload: String,
}

impl End {
    /// None for what nobody knows.
    fn new((namespace, workload): (&str, &str)) -> Option<Self> {
        (namespace != UNKNOWN || workload != UNKNOWN)
            .then(|| Self { namespace: namespace.into(), workload: workload.into() })
    }
}

/// What one workload has with another, under one protection.
#[derive(Debug, Serialize)]
pub(super) struct Edge {
    pub source: Option<End>,
    pub destination: Option<End>,
    pub protection: Protection,
    /// Which ends are on this node: the ones that this agent reports for.
    pub source_here: bool,
    pub destination_here: bool,
    #[serde(flatten)]
    pub totals: Totals,
}

#[derive(Clone, Copy, Default, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Totals {
    /// Connections open now.
    pub open: u64,
    /// Connections that both ends agreed on, ever.
    pub opened: u64,
    /// Connections that never came to be.
    pub refused: u64,
    pub bytes_from_source: u64,
    pub bytes_to_source: u64,
    /// Connections among `opened` that the far agent then refused.
    #[serde(skip)]
    refused_late: u64,
}

impl Totals {
    fn add(&mut self, other: &Self) {
        self.open += other.open;
        self.opened += other.opened;
        self.refused += other.refused;
        self.bytes_from_source += other.bytes_from_source;
        self.bytes_to_source += other.bytes_to_source;
        self.refused_late += other.refused_late;
    }

    /// Of two reports on the same flows, what either has seen.
    fn either(&self, other: &Self) -> Self {
        Self {
            open: self.open.max(other.open),
            opened: self.agreed().max(other.agreed()),
            refused: self.refused.max(other.refused),
            bytes_from_source: self.bytes_from_source.max(other.bytes_from_source),
            bytes_to_source: self.bytes_to_source.max(other.bytes_to_source),
            refused_late: 0,
        }
    }

    fn agreed(&self) -> u64 {
        self.opened.saturating_sub(self.refused_late)
    }
}

type Key = (Option<End>, Option<End>, Protection);

fn key(labels: &TrafficLabels) -> Option<Key> {
    let [source, destination] = labels.ends().map(End::new);
    Some((source, destination, Protection::of(labels)?))
}

/// By reporter: the source's end, the destination's end.
type Reported = BTreeMap<Key, [Option<Totals>; 2]>;

fn reporter(labels: &TrafficLabels) -> usize {
    usize::from(labels.fixed.reporter == Direction::Inbound.reporter())
}

impl Inner {
    /// The edges, most noteworthy first, and how many there are in all.
    pub fn edges(&self) -> (Vec<Edge>, usize) {
        let mut reported = Reported::new();
        self.providers.refresh();
        let open = self.connections.all();
        open.iter().for_each(|open| open.fold());
        for series in self.traffic.live() {
            let Some(key) = key(&series.labels) else { continue };
            let totals = reported.entry(key).or_default()[reporter(&series.labels)].get_or_insert_default();
            totals.add(&count(&series));
        }
        for open in &open {
            let labels = &open.reports.own.labels;
            let Some(reports) = key(labels).and_then(|key| reported.get_mut(&key)) else { continue };
            reports[reporter(labels)].get_or_insert_default().open += 1;
        }
        self.add_kernels_plaintext(&mut reported);
        let mut edges: Vec<Edge> = reported.into_iter().map(edge).collect();
        let all = edges.len();
        edges.sort_by_key(|edge| {
            let bytes = edge.totals.bytes_from_source + edge.totals.bytes_to_source;
            (edge.protection, std::cmp::Reverse((edge.totals.opened > 0, bytes)))
        });
        edges.truncate(SHOWN);
        (edges, all)
    }

    fn add_kernels_plaintext(&self, reported: &mut Reported) {
        self.kernels_plaintext.for_each(|ends, opened, refused| {
            let [source, destination] = ends.map(End::new);
            let key = (source, destination, Protection::Plaintext);
            let totals = Totals { opened, refused, ..Totals::default() };
            reported.entry(key).or_default()[1].get_or_insert_default().add(&totals);
        });
    }
}

fn count(series: &Series) -> Totals {
    let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let counts = &series.value;
    // The source's agent learns of a refusal only after it has accepted its application's connection.
    let refused_late = match (series.labels.fixed.reporter, series.labels.fixed.response_flags) {
        ("source", "DENY" | "TLS_FAILURE" | "CONNECT") => load(&counts.closed),
        _ => 0,
    };
    Totals {
        open: 0,
        opened: load(&counts.opened),
        refused: load(&counts.failed) + refused_late,
        bytes_from_source: load(&counts.received),
        bytes_to_source: load(&counts.sent),
        refused_late,
    }
}

fn edge(((source, destination, protection), [outbound, inbound]): (Key, [Option<Totals>; 2])) -> Edge {
    let totals = outbound.unwrap_or_default().either(&inbound.unwrap_or_default());
    Edge {
        source,
        destination,
        protection,
        source_here: outbound.is_some(),
        destination_here: inbound.is_some(),
        totals,
    }
}
