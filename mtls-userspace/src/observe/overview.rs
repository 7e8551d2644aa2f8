//! What the status page shows: sums and dates that metrics have as well, as JSON.
//!
//! Anybody who can reach the admin address reads it: no addresses, no single connections, no words of errors but those
//! of `/healthz/ready`.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use jiff::Timestamp;
use serde::Serialize;

use super::graph::Edge;
use super::status::{Enrolment, IdentityRow, IssuerRow};
use super::strict::Strict;
use super::{Observer, Readiness, process};

#[derive(Debug, Serialize)]
pub(super) struct Overview {
    /// The agent's clock, so that times left don't depend on the reader's.
    now: Timestamp,
    node: String,
    version: &'static str,
    uptime_seconds: u64,
    resident_bytes: Option<u64>,
    conditions: Vec<Condition>,
    /// Who would be cut off if STRICT came now; absent until plaintext is observed.
    strict: Option<Strict>,
    /// Absent until the configuration has been read.
    mesh: Option<Mesh>,
    pods: Vec<Pod>,
    certificates: Vec<Certificate>,
    issuers: Vec<IssuerRow>,
    open_connections: u64,
    refusals: Vec<Refusals>,
    edges: Vec<Edge>,
    /// More than `edges` when the answer would be too long.
    edges_total: usize,
    /// Connections that are in no edge because there were too many label sets.
    overflowed: u64,
}

#[derive(Debug, Serialize)]
struct Condition {
    name: &'static str,
    /// Why it is not met; absent when it is.
    missing: Option<String>,
}

#[derive(Debug, Serialize)]
struct Mesh {
    generation: u64,
    workloads: u64,
    /// Whether the newest configuration is the one in force.
    valid: bool,
}

#[derive(Debug, Serialize)]
struct Pod {
    namespace: String,
    name: String,
    mode: Option<String>,
    state: &'static str,
}

#[derive(Debug, Serialize)]
struct Certificate {
    identity: String,
    not_before: Option<Timestamp>,
    not_after: Option<Timestamp>,
    next_renewal: Option<Timestamp>,
    renewals: u64,
    failures: u64,
    /// Whether the last attempt to renew it failed.
    failing: bool,
}

#[derive(Debug, Serialize)]
struct Refusals {
    direction: &'static str,
    reason: &'static str,
    /// Empty where no policy was involved.
    policy: String,
    count: u64,
}

impl Observer {
    pub(super) fn overview(&self, readiness: &Readiness) -> Overview {
        let identities = self.inner.providers.identities();
        let (edges, edges_total) = self.inner.edges();
        let conditions = readiness.conditions().into_iter();
        Overview {
            now: Timestamp::now(),
            node: self.inner.node.to_string(),
            version: env!("CARGO_PKG_VERSION"),
            uptime_seconds: self.inner.since.elapsed().as_secs(),
            resident_bytes: process::resident_bytes(),
            conditions: conditions
                .map(|(name, missing)| Condition { name, missing: missing.map(|why| why.to_string()) })
                .collect(),
            strict: self.inner.providers.plaintext().map(Strict::new),
            mesh: self.inner.providers.mesh().map(|mesh| Mesh {
                generation: mesh.generation,
                workloads: mesh.workloads,
                valid: mesh.last_error.is_none(),
            }),
            pods: self.pods(),
            issuers: issuers(&identities),
            certificates: identities.into_iter().map(Certificate::new).collect(),
            open_connections: self.open_connections(),
            refusals: self.refusals(),
            edges,
            edges_total,
            overflowed: self.inner.traffic.overflowed() + self.inner.kernels_plaintext.overflowed(),
        }
    }

    fn pods(&self) -> Vec<Pod> {
        let pods = self.inner.providers.pods().into_iter();
        pods.map(|pod| Pod {
            namespace: pod.namespace,
            name: pod.name,
            mode: pod.mode,
            state: match pod.enrolment {
                Enrolment::Enrolled => "enrolled",
                Enrolment::Pending => "pending",
                Enrolment::Failed { .. } => "failed",
            },
        })
        .collect()
    }

    fn refusals(&self) -> Vec<Refusals> {
        let refused = self.inner.events.refused.live();
        let mut refusals: Vec<Refusals> = refused
            .iter()
            .map(|entry| Refusals {
                direction: entry.labels.direction,
                reason: entry.labels.reason,
                policy: entry.labels.policy.to_string(),
                count: entry.value.load(Ordering::Relaxed),
            })
            .collect();
        refusals.sort_by(|a, b| (b.count, a.reason, &a.policy).cmp(&(a.count, b.reason, &b.policy)));
        refusals
    }
}

impl Certificate {
    fn new(row: IdentityRow) -> Self {
        Self {
            identity: row.identity,
            not_before: row.not_before,
            not_after: row.not_after,
            next_renewal: row.next_renewal,
            renewals: row.renewals,
            failures: row.failures,
            failing: row.last_error.is_some(),
        }
    }
}

/// Each issuer once, however many identities it stands behind; the first to end first.
fn issuers(identities: &[IdentityRow]) -> Vec<IssuerRow> {
    let all = identities.iter().flat_map(|row| &row.issuers);
    let by_end: BTreeMap<_, _> =
        all.map(|issuer| ((issuer.not_after, issuer.role, &issuer.serial), issuer)).collect();
    by_end.into_values().cloned().collect()
}
