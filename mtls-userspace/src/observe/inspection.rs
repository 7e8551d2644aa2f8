//! What the admin socket lists beside the status: workloads, certificates, services, policies, and connections that
//! ended. Rows as JSON has them; an [`Inspector`] fills them from the rooms that know.

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::flow::Flow;
use super::status::{Enrolment, PartyRow, RevocationRow};
use super::verification::{Pair, Unverifiable, Verification};

/// Rows that a listing has unless told otherwise, and at most.
pub const LISTED: usize = 1000;
pub const MOST_LISTED: usize = 10_000;

/// Answers questions about what the agent knows. Called on threads that may block.
pub trait Inspector: Send + Sync {
    fn workloads(&self, filter: &Filter) -> Listing<WorkloadRow>;
    /// Of the identities this node speaks for.
    fn certificates(&self, filter: &Filter) -> Listing<CertificateRow>;
    fn services(&self, filter: &Filter) -> Listing<ServiceRow>;
    fn policies(&self, filter: &Filter) -> Listing<PolicyRow>;
    /// By what an open connection is let in as things stand now.
    fn judged(&self, flow: &Flow) -> Judged;
    /// Everything about a pair but its connections.
    ///
    /// # Errors
    ///
    /// When a pod is not in the mesh, or neither is on this node.
    fn verify(&self, pair: &Pair) -> Result<Verification, Unverifiable>;
}

/// Which rows are asked for. Sorted by namespace and name, so that pages fit together while nothing changes.
#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Filter {
    pub namespace: Option<String>,
    pub name: Option<String>,
    /// At most [`MOST_LISTED`]; [`LISTED`] if absent.
    pub limit: Option<usize>,
    #[serde(default)]
    pub offset: usize,
}

impl Filter {
    pub fn wants(&self, namespace: &str, name: &str) -> bool {
        self.namespace.as_deref().is_none_or(|wanted| wanted == namespace)
            && self.name.as_deref().is_none_or(|wanted| wanted == name)
    }

    /// The page of what was found that was asked for; only that much is turned into rows.
    pub fn page<T, R>(&self, found: Vec<T>, row: impl FnMut(T) -> R) -> Listing<R> {
        let total = found.len();
        let limit = self.limit.unwrap_or(LISTED).min(MOST_LISTED);
        Listing { total, items: found.into_iter().skip(self.offset).take(limit).map(row).collect() }
    }
}

/// Rows, not all of them when `total` is larger than what `items` and the offset add up to.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Listing<T> {
    /// How many match the filter, listed or not.
    pub total: usize,
    pub items: Vec<T>,
}

/// A pod of the mesh's view, on this node or another.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct WorkloadRow {
    pub namespace: String,
    pub name: String,
    /// What made the pod (a Deployment, say), by its labels; its own name if nothing did.
    pub controller: String,
    pub service_account: String,
    pub node: Option<String>,
    /// On the node of the agent that answers.
    pub local: bool,
    pub addresses: Vec<String>,
    pub enrolled: bool,
    /// SPIFFE ID; absent when not enrolled.
    pub identity: Option<String>,
    /// What clients of the mesh speak to it: `mtls`, or `none` (not enrolled, or its mode is DISABLE).
    pub protocol: String,
    /// Absent when not enrolled.
    pub modes: Option<ModesRow>,
    /// How far enrolment is; of this node's enrolled pods only.
    pub enrolment: Option<Enrolment>,
}

/// Effective PeerAuthentication modes.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ModesRow {
    /// `STRICT`, `PERMISSIVE` or `DISABLE`.
    pub default: String,
    /// Of ports that have one of their own.
    pub ports: BTreeMap<u16, String>,
    /// An AuthorizationPolicy applies.
    pub authorization: bool,
    /// As they would be if dry-run policies were enforced, where that differs.
    pub dry_run: Option<String>,
}

/// One identity that this node speaks for, with its chain and whether that proves it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct CertificateRow {
    /// SPIFFE ID.
    pub identity: String,
    /// `namespace/name` of this node's pods that use it.
    pub workloads: Vec<String>,
    pub serial: Option<String>,
    pub not_before: Option<Timestamp>,
    pub not_after: Option<Timestamp>,
    pub seconds_left: Option<u64>,
    /// The next attempt, whether a renewal or a retry.
    pub next_renewal: Option<Timestamp>,
    pub renewals: u64,
    pub failures: u64,
    pub last_error: Option<String>,
    /// Leaf first, then intermediates. Empty without a certificate.
    pub chain: Vec<ChainRow>,
    /// Those of the bundle in force.
    pub roots: Vec<ChainRow>,
    /// By which the bundle's peers are judged.
    #[serde(default)]
    pub revocation_lists: Vec<RevocationRow>,
    /// A peer with the bundle in force would accept it as this identity, now.
    pub verifies: bool,
    /// Why it verifies, or why not.
    pub verdict: String,
}

/// One certificate of a chain or bundle.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ChainRow {
    pub subject: String,
    pub issuer: String,
    pub serial: String,
    /// URI subject alternative names.
    pub uris: Vec<String>,
    pub not_before: Timestamp,
    pub not_after: Timestamp,
}

/// One port of a Service.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ServiceRow {
    pub namespace: String,
    pub name: String,
    /// The VIP.
    pub address: String,
    pub port: u16,
    /// `all`, `some` or `none` of the endpoints in use are enrolled workloads; `no_endpoints` if there are none.
    pub mesh: String,
    /// Endpoints that connections may go to.
    pub in_use: usize,
    pub in_use_local: usize,
    pub in_use_mesh: usize,
    pub ready: usize,
    /// Shutting down; used only where nothing is ready.
    pub draining: usize,
    pub not_ready: usize,
    /// Those in use, the first hundred.
    pub endpoints: Vec<EndpointRow>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct EndpointRow {
    pub address: String,
    /// `namespace/name`, if it belongs to a pod of the mesh's view.
    pub workload: Option<String>,
    pub node: Option<String>,
    pub local: bool,
    pub enrolled: bool,
}

/// A policy as the agent read it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct PolicyRow {
    /// `PeerAuthentication` or `AuthorizationPolicy`.
    pub kind: String,
    pub namespace: String,
    pub name: String,
    /// `mesh`, `namespace` or `workload`.
    pub scope: String,
    /// `spec.selector.matchLabels`.
    pub selector: BTreeMap<String, String>,
    /// Of a PeerAuthentication; absent where it inherits.
    pub mode: Option<String>,
    pub port_modes: BTreeMap<u16, String>,
    /// Of an AuthorizationPolicy: `ALLOW` or `DENY`.
    pub action: Option<String>,
    pub rules: usize,
    /// `enforced`, `dry_run`, or `ignored` for a reason that is among the warnings.
    pub state: String,
    /// Enrolled workloads it applies to, in the mesh and on this node.
    pub selects: usize,
    pub selects_local: usize,
    pub warnings: Vec<String>,
}

/// Why an open connection is let in. Both absent where the destination's agent decides.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Judged {
    /// Effective mode of the destination's port.
    pub mode: Option<String>,
    /// The ALLOW policy, if one decided.
    pub policy: Option<Arc<str>>,
}

/// A connection that ended, or was refused.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct EndedRow {
    pub at: Timestamp,
    pub direction: String,
    pub path: String,
    pub source: PartyRow,
    pub destination: PartyRow,
    pub service: Option<String>,
    pub cipher: Option<String>,
    /// Who carried the TLS records at this end when it ended.
    pub records: Option<String>,
    /// Source to destination.
    pub bytes_sent: u64,
    /// Destination to source.
    pub bytes_received: u64,
    pub duration_seconds: f64,
    /// As in the access log: `clean`, `reset_by_source`, `refused` …
    pub ending: String,
    pub reason: Option<String>,
}
