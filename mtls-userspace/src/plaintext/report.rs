//! The report: what is known and what was asked in; who would be cut off if STRICT came now out. Pure.
//!
//! [`Report`] is the JSON that the admin socket answers on
//! `GET /readiness[?namespace=shop][&window_seconds=86400][&dry_run=true]`:
//!
//! ```json
//! {"node": "node-b", "at": "2026-01-02T03:04:05Z", "window_seconds": 86400, "namespace": null, "dry_run": false,
//!  "ready": false, "reasons": ["shop/server port 7000: 1 peer would be cut off"],
//!  "lost": {"count": 0, "last": null},
//!  "workloads": [{"namespace": "shop", "name": "server", "identity": "spiffe://…", "mode": "PERMISSIVE",
//!    "observed_since": "2026-01-01T00:00:00Z", "observed_seconds": 97445, "covered": true, "ready": false,
//!    "not_kept": {"count": 0, "last": null}, "unserved": {"count": 65532, "last": "2026-01-02T01:00:00Z"},
//!    "ports": [{"port": 7000, "mode": "PERMISSIVE", "set_by": null, "listening": true, "ready": false,
//!      "dry_run": {"mode": "STRICT", "policy": "shop/trial"},
//!      "cut_off": [{"workload": "outside/cron", "enrolled": false, "node": null, "control_plane": false,
//!        "address": "10.1.2.3", "connections": 12,
//!        "refused": 0, "open": 1, "first_seen": "2026-01-01T05:00:00Z", "last_seen": "2026-01-02T03:04:05Z"}],
//!      "becomes_mtls": [], "kept_open": [], "not_kept": {"count": 0, "last": null},
//!      "called_by": [{"by": "ValidatingWebhookConfiguration rules", "service": "shop/hook", "port": 443,
//!        "cut_off": true}]}]}]}
//! ```

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use super::sighting::{Peer, Row, Source, Tally};
use crate::mesh::{NodeName, ServerCall};
use crate::policy::Mode;

/// What is asked.
#[derive(Clone, Debug)]
pub struct Asked {
    /// Only this namespace.
    pub namespace: Option<String>,
    /// How far back nobody may have come in plaintext.
    pub window: Duration,
    /// Only what the dry-run policies would make STRICT.
    pub dry_run: bool,
}

/// Everything known at one moment.
#[derive(Clone, Debug)]
pub struct Facts {
    pub node: Arc<str>,
    pub at: Timestamp,
    /// Events that the kernel half could not hand over, and sightings that came faster than they were filed.
    pub lost: Tally,
    /// Why nothing is observed any more.
    pub blind: Option<String>,
    /// Kinds of objects, in the plural, that say what the API server calls and can't be read.
    pub unread_callers: Vec<&'static str>,
    pub workloads: Vec<Observed>,
}

/// An enrolled workload of this node.
#[derive(Clone, Debug)]
pub struct Observed {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
    /// SPIFFE ID.
    pub identity: String,
    /// The modes for people.
    pub modes: String,
    /// Some port is not STRICT.
    pub is_open: bool,
    /// The dry-run policies would make a port STRICT that is not.
    pub dry_run_tightens: bool,
    /// None: it is not enrolled yet.
    pub since: Option<Timestamp>,
    /// Ports that are not STRICT and declared, listened on, named by a policy or dialled in plaintext.
    pub ports: BTreeMap<u16, PortFacts>,
    pub missed: Tally,
    pub unserved: Tally,
}

#[derive(Clone, Debug)]
pub struct PortFacts {
    pub mode: Mode,
    pub set_by: Option<String>,
    /// The mode if the dry-run policies were enforced, and who would set it; only where that differs.
    pub dry_run: Option<(Mode, Option<String>)>,
    pub is_served: bool,
    /// Each with whether it is enrolled now.
    pub peers: Vec<(Peer, Row, bool)>,
    /// The nodes that dial from the addresses of peers that are no workloads.
    pub nodes: HashMap<IpAddr, NodeName>,
    pub missed: Tally,
    /// What the API server calls here, whether it has done so yet or not.
    pub called_by: Vec<ServerCall>,
    /// A PeerAuthentication speaks of this very port: STRICT on a wider level does not concern it.
    pub has_own_mode: bool,
}

/// What one agent knows about its pods' readiness for STRICT.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Report {
    pub node: String,
    pub at: Timestamp,
    pub window_seconds: u64,
    pub namespace: Option<String>,
    pub dry_run: bool,
    /// Nobody would be cut off, and the observation covers the window.
    pub ready: bool,
    /// Why not, a sentence each.
    pub reasons: Vec<String>,
    /// Plaintext connections of any pod that were noticed but not filed.
    pub lost: TallyRow,
    pub workloads: Vec<WorkloadRow>,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct WorkloadRow {
    pub namespace: String,
    pub name: String,
    /// SPIFFE ID.
    pub identity: String,
    /// The effective modes for people: `PERMISSIVE`, or `STRICT, 8080 PERMISSIVE`.
    pub mode: String,
    /// In the agent's memory only: an agent that starts anew observes anew. Null: the pod is not enrolled yet.
    pub observed_since: Option<Timestamp>,
    pub observed_seconds: u64,
    /// The observation goes back as far as the window does. True too where every port is STRICT already.
    pub covered: bool,
    pub ready: bool,
    /// Connections of peers for which there was no room, to ports that are not listed.
    pub not_kept: TallyRow,
    /// Attempts at ports that nothing listens on: a scan, say. They stand in nobody's way.
    pub unserved: TallyRow,
    /// Those that are not STRICT.
    pub ports: Vec<PortRow>,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct PortRow {
    pub port: u16,
    /// The mode in force.
    pub mode: String,
    /// The PeerAuthentication (`namespace/name`) that sets it; null: none does.
    pub set_by: Option<String>,
    /// Null: enforcing the dry-run policies would change nothing here.
    pub dry_run: Option<DryRunRow>,
    pub listening: bool,
    pub ready: bool,
    /// Who would be cut off: came in plaintext within the window, or is connected still.
    pub cut_off: Vec<PeerRow>,
    /// Enrolled clients that come in plaintext because the port is DISABLE, and would use mTLS if it were STRICT.
    pub becomes_mtls: Vec<PeerRow>,
    /// Clients without a name at a port that a policy keeps open for the API server's calls.
    #[serde(default)]
    pub kept_open: Vec<PeerRow>,
    /// Connections of peers for which there was no room.
    pub not_kept: TallyRow,
    /// What the API server calls here in plaintext, whether it has done so yet or not.
    #[serde(default)]
    pub called_by: Vec<CallRow>,
}

/// A webhook or an aggregated API.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CallRow {
    /// `ValidatingWebhookConfiguration gatekeeper`.
    pub by: String,
    /// `namespace/name` of the Service that is called, and its port.
    pub service: String,
    pub port: u16,
    /// STRICT would refuse it. False where a policy keeps this very port open.
    pub cut_off: bool,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DryRunRow {
    pub mode: String,
    /// `namespace/name`.
    pub policy: Option<String>,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct PeerRow {
    /// `namespace/name` of the pod that had the address then; null: the mesh knows none.
    pub workload: Option<String>,
    /// The workload takes part in the mesh now. Its plaintext is then an older connection's, or an agent is missing.
    pub enrolled: bool,
    /// Of a client that is no workload: the node that dials from its address. That is the API server's call to a webhook,
    /// a pod on the host's network, or a process of the node.
    #[serde(default)]
    pub node: Option<String>,
    /// That node is where the API server runs.
    #[serde(default)]
    pub control_plane: bool,
    /// The last address it came from.
    pub address: String,
    /// Accepted within the whole observation. A resent first packet may count twice.
    pub connections: u64,
    /// Attempts that the port refused while it was STRICT.
    pub refused: u64,
    pub open: u64,
    pub first_seen: Timestamp,
    pub last_seen: Timestamp,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct TallyRow {
    pub count: u64,
    pub last: Option<Timestamp>,
}

impl From<Tally> for TallyRow {
    fn from(Tally { count, last }: Tally) -> Self {
        Self { count, last }
    }
}

impl Report {
    pub fn new(facts: Facts, asked: &Asked) -> Self {
        let window = SignedDuration::try_from(asked.window).unwrap_or(SignedDuration::MAX);
        let begin = facts.at.checked_sub(window).unwrap_or(Timestamp::MIN);
        let judge = Judge { asked, at: facts.at, begin };
        let mut reasons = Vec::new();
        if let Some(why) = facts.blind {
            reasons.push(format!("plaintext is no longer observed: {why}; restart the agent"));
        }
        if judge.is_recent(facts.lost) {
            reasons.push(format!(
                "{} of plaintext came faster than could be taken in: peers may be missing",
                plural(facts.lost.count, "event")
            ));
        }
        if !facts.unread_callers.is_empty() {
            reasons.push(format!(
                "what the API server calls is not known: {} can't be read; the agent's log and `mtls status` say why",
                facts.unread_callers.join(", ")
            ));
        }
        let wanted = facts.workloads.into_iter().filter(|workload| judge.concerns(workload));
        let workloads: Vec<WorkloadRow> =
            wanted.map(|workload| judge.workload(workload, &mut reasons)).collect();
        Self {
            node: facts.node.to_string(),
            at: facts.at,
            window_seconds: asked.window.as_secs(),
            namespace: asked.namespace.clone(),
            dry_run: asked.dry_run,
            ready: reasons.is_empty(),
            reasons,
            lost: facts.lost.into(),
            workloads,
        }
    }
}

struct Judge<'a> {
    asked: &'a Asked,
    at: Timestamp,
    /// Of the window.
    begin: Timestamp,
}

impl Judge<'_> {
    fn concerns(&self, workload: &Observed) -> bool {
        self.asked.namespace.as_deref().is_none_or(|wanted| *wanted == *workload.namespace)
            && (!self.asked.dry_run || workload.dry_run_tightens)
    }

    fn is_recent(&self, tally: Tally) -> bool {
        tally.last.is_some_and(|last| last >= self.begin)
    }

    fn workload(&self, observed: Observed, reasons: &mut Vec<String>) -> WorkloadRow {
        let key = format!("{}/{}", observed.namespace, observed.name);
        let already = reasons.len();
        let covered = !observed.is_open || observed.since.is_some_and(|since| since <= self.begin);
        let seconds = observed.since.map_or(0, |since| self.at.as_second() - since.as_second());
        if !covered {
            reasons.push(match observed.since {
                Some(_) => format!("{key}: observed for {seconds} s of {} s", self.asked.window.as_secs()),
                None => format!(
                    "{key}: not observed: not enrolled yet, or its sockets cannot be listed; the agent's log says why"
                ),
            });
        }
        if observed.is_open && self.is_recent(observed.missed) {
            let count = plural(observed.missed.count, "more plaintext connection");
            reasons.push(format!("{key}: {count}, of peers that are not kept"));
        }
        let wanted =
            observed.ports.into_iter().filter(|(_, port)| !self.asked.dry_run || port.would_be_strict());
        let ports = wanted.map(|(number, port)| self.port(&key, number, port, reasons)).collect();
        WorkloadRow {
            namespace: observed.namespace.to_string(),
            name: observed.name.to_string(),
            identity: observed.identity,
            mode: observed.modes,
            observed_since: observed.since,
            observed_seconds: u64::try_from(seconds).unwrap_or(0),
            covered,
            ready: reasons.len() == already,
            not_kept: observed.missed.into(),
            unserved: observed.unserved.into(),
            ports,
        }
    }

    fn port(&self, key: &str, number: u16, port: PortFacts, reasons: &mut Vec<String>) -> PortRow {
        let already = reasons.len();
        let recent = port.peers.into_iter().filter(|(_, row, _)| row.open > 0 || row.last >= self.begin);
        let (becomes_mtls, plain): (Vec<_>, Vec<_>) = recent.partition(|(peer, _, _)| peer.by_disable);
        // The exception that the API server's calls need is no reason to wait with STRICT for everything else.
        let is_excepted = !self.asked.dry_run && port.has_own_mode && !port.called_by.is_empty();
        let (kept_open, cut_off): (Vec<_>, Vec<_>) =
            plain.into_iter().partition(|(peer, _, _)| is_excepted && peer.is_address());
        if !is_excepted && let Some(first) = port.called_by.first() {
            let more = match port.called_by.len() - 1 {
                0 => String::new(),
                more => format!(" and {more} more"),
            };
            reasons.push(format!(
                "{key} port {number}: the API server's calls would be cut off ({first}{more}); keep the port open for \
                 them: portLevelMtls {{\"{number}\": {{mode: PERMISSIVE}}}} in a PeerAuthentication that selects the pod"
            ));
        }
        if !cut_off.is_empty() {
            let count = plural(cut_off.len() as u64, "peer");
            reasons.push(format!("{key} port {number}: {count} would be cut off"));
        }
        if self.is_recent(port.missed) {
            let count = plural(port.missed.count, "more plaintext connection");
            reasons.push(format!("{key} port {number}: {count}, of peers that are not kept"));
        }
        PortRow {
            port: number,
            mode: port.mode.to_string(),
            set_by: port.set_by,
            dry_run: port.dry_run.map(|(mode, policy)| DryRunRow { mode: mode.to_string(), policy }),
            listening: port.is_served,
            ready: reasons.len() == already,
            cut_off: rows(cut_off, &port.nodes),
            becomes_mtls: rows(becomes_mtls, &port.nodes),
            kept_open: rows(kept_open, &port.nodes),
            not_kept: port.missed.into(),
            called_by: port.called_by.iter().map(|call| CallRow::new(call, !is_excepted)).collect(),
        }
    }
}

impl CallRow {
    fn new(ServerCall { by, service, port }: &ServerCall, cut_off: bool) -> Self {
        Self { by: by.to_string(), service: service.to_string(), port: *port, cut_off }
    }
}

impl PortFacts {
    fn would_be_strict(&self) -> bool {
        self.dry_run.as_ref().is_some_and(|(mode, _)| *mode == Mode::Strict)
    }
}

/// The last seen first.
fn rows(mut peers: Vec<(Peer, Row, bool)>, nodes: &HashMap<IpAddr, NodeName>) -> Vec<PeerRow> {
    peers.sort_by_key(|(_, row, _)| (std::cmp::Reverse(row.last), row.address));
    peers.into_iter().map(|(peer, row, enrolled)| PeerRow::new(&peer, &row, enrolled, nodes)).collect()
}

impl PeerRow {
    fn new(peer: &Peer, row: &Row, enrolled: bool, nodes: &HashMap<IpAddr, NodeName>) -> Self {
        let node = nodes.get(&row.address).filter(|_| peer.is_address());
        Self {
            workload: match &peer.source {
                Source::Workload(key) => Some(key.to_string()),
                Source::Address(_) => None,
            },
            enrolled,
            node: node.map(|node| node.name.to_string()),
            control_plane: node.is_some_and(|node| node.control_plane),
            address: row.address.to_string(),
            connections: row.connections,
            refused: row.refused,
            open: row.open,
            first_seen: row.first,
            last_seen: row.last,
        }
    }
}

fn plural(count: u64, what: &str) -> String {
    if count == 1 { format!("1 {what}") } else { format!("{count} {what}s") }
}
