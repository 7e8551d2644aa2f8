//! Readiness for STRICT as the status page shows it: the report in; names and counts, but no addresses, out.

use serde::Serialize;

use crate::plaintext::{Asked, Facts, PeerRow, PortRow, Report, WorkloadRow};

/// What `mtls readiness` looks back at, too.
const WINDOW: std::time::Duration = std::time::Duration::from_secs(24 * 3600);
/// Rows that one answer has at most.
const SHOWN: usize = 50;

#[derive(Debug, Serialize)]
pub(super) struct Strict {
    ready: bool,
    window_seconds: u64,
    /// The shortest observation of a workload that is not STRICT already; absent if there is none.
    observed_seconds: Option<u64>,
    /// Ports that somebody would be cut off from, the most peers first.
    cut_off: Vec<Port>,
    /// More than `cut_off` when the answer would be too long.
    cut_off_total: usize,
    /// Other reasons not to be ready: workloads whose observation misses something, or is too short.
    unsure: usize,
}

#[derive(Debug, Serialize)]
struct Port {
    /// `namespace/name`.
    workload: String,
    port: u16,
    /// `namespace/name`, where the mesh knows it.
    peers: Vec<String>,
    /// Peers that are no workloads.
    unnamed: usize,
    connections: u64,
}

impl Strict {
    pub fn new(facts: Facts) -> Self {
        let asked = Asked { namespace: None, window: WINDOW, dry_run: false };
        let report = Report::new(facts, &asked);
        let ports = |workload: &WorkloadRow| {
            let name = format!("{}/{}", workload.namespace, workload.name);
            let refusing = workload.ports.iter().filter(|port| would_refuse(port));
            refusing.map(|port| Port::new(name.clone(), port)).collect::<Vec<_>>()
        };
        let mut cut_off: Vec<Port> = report.workloads.iter().flat_map(ports).collect();
        cut_off.sort_by_key(|port| std::cmp::Reverse(port.peers.len() + port.unnamed));
        let cut_off_total = cut_off.len();
        cut_off.truncate(SHOWN);
        let open = report.workloads.iter().filter(|workload| !workload.ports.is_empty());
        let sure = |workload: &WorkloadRow| {
            workload.ready || workload.covered && workload.ports.iter().any(would_refuse)
        };
        Self {
            ready: report.ready,
            window_seconds: report.window_seconds,
            observed_seconds: open.map(|workload| workload.observed_seconds).min(),
            cut_off,
            cut_off_total,
            unsure: report.workloads.iter().filter(|workload| !sure(workload)).count(),
        }
    }
}

/// Somebody who has come, or whom the API server will send.
fn would_refuse(port: &PortRow) -> bool {
    !port.cut_off.is_empty() || port.called_by.iter().any(|call| call.cut_off)
}

impl Port {
    fn new(workload: String, row: &PortRow) -> Self {
        let named = |peer: &PeerRow| peer.workload.clone();
        let mut peers: Vec<String> = row.cut_off.iter().filter_map(named).collect();
        // The API server's calls have no name either, and may be among those that have come.
        let called = usize::from(row.called_by.iter().any(|call| call.cut_off));
        let unnamed = (row.cut_off.len() - peers.len()).max(called);
        peers.truncate(SHOWN);
        let connections = row.cut_off.iter().map(|peer| peer.connections).sum();
        Self { workload, port: row.port, peers, unnamed, connections }
    }
}
