//! What the admin socket answers: rows that rooms provide and rows made from open connections, as JSON has them.
//!
//! `mtls status` reads the same types back. Nothing secret is in them.

use std::collections::BTreeMap;
use std::time::SystemTime;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::connections::Open;
use super::flow::{Flow, Party};
use super::inspection::Judged;
use crate::identity::{Identity, IdentityStatus, RevocationList};
use crate::succession::PredecessorRow;

/// One agent, at one moment.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Status {
    pub agent: AgentRow,
    pub mesh: MeshRow,
    pub pods: Vec<PodRow>,
    pub certificates: Vec<IdentityRow>,
    pub connections: ConnectionRows,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct AgentRow {
    pub version: String,
    pub node: String,
    pub pid: u32,
    pub started: Timestamp,
    pub uptime_seconds: u64,
    pub ready: bool,
    /// Condition → why it is not met.
    pub missing: BTreeMap<String, String>,
    pub resident_bytes: Option<u64>,
    pub cpu_seconds: Option<f64>,
    /// The agent whose place this one took, while it drains.
    #[serde(default)]
    pub predecessor: Option<PredecessorRow>,
    /// Another agent has this one's place.
    #[serde(default)]
    pub retired: bool,
}

/// The mesh snapshot in force.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct MeshRow {
    pub generation: u64,
    pub workloads: u64,
    /// Why the newest configuration is not in force; absent when it is.
    pub last_error: Option<String>,
    /// Configurations refused since the agent started.
    pub errors: u64,
}

/// A pod of this node that is to be enrolled.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct PodRow {
    pub namespace: String,
    pub name: String,
    /// SPIFFE ID.
    pub identity: String,
    pub addresses: Vec<String>,
    pub enrolment: Enrolment,
    /// The effective PeerAuthentication modes, for people: `STRICT`, or `STRICT, 8080 PERMISSIVE`.
    pub mode: Option<String>,
    /// What does not hold of all that protects the pod, as the kernel was last found; absent before it was looked at.
    #[serde(default)]
    pub faults: Option<Vec<String>>,
    /// How long the pod ran before it was fenced; absent if it never did.
    #[serde(default)]
    pub unfenced_seconds: Option<f64>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Enrolment {
    Enrolled,
    /// Listeners or kernel state are being set up.
    Pending,
    Failed {
        reason: String,
    },
}

/// One identity that this node speaks for.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct IdentityRow {
    /// SPIFFE ID.
    pub identity: String,
    pub serial: Option<String>,
    pub not_before: Option<Timestamp>,
    pub not_after: Option<Timestamp>,
    pub next_renewal: Option<Timestamp>,
    pub last_error: Option<String>,
    pub renewals: u64,
    pub failures: u64,
    /// The same by reason.
    #[serde(default)]
    pub failures_by_reason: BTreeMap<String, u64>,
    /// Intermediates of the chain and roots of the bundle.
    pub issuers: Vec<IssuerRow>,
    #[serde(default)]
    pub revocation_lists: Vec<RevocationRow>,
}

/// A revocation list that peers are judged by.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct RevocationRow {
    pub issuer: String,
    /// Certificates revoked.
    pub revoked: usize,
    /// When its issuer owes the next.
    pub next_update: Option<Timestamp>,
}

impl RevocationRow {
    /// The lists of an identity's bundle.
    pub fn of(identity: &Identity) -> Vec<Self> {
        let row = |list: &RevocationList| Self {
            issuer: list.issuer.clone(),
            revoked: list.revoked,
            next_update: list.next_update.and_then(|at| Timestamp::try_from(at).ok()),
        };
        identity.bundle.revocations.lists().map(row).collect()
    }
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct IssuerRow {
    pub role: IssuerRole,
    pub subject: String,
    pub serial: String,
    pub not_after: Timestamp,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IssuerRole {
    Intermediate,
    Root,
}

impl IdentityRow {
    /// The row of an identity from what its room says, and from the certificates in force if there are any.
    pub fn new(status: &IdentityStatus, current: Option<&Identity>) -> Self {
        let at = |time: Option<SystemTime>| time.and_then(|time| Timestamp::try_from(time).ok());
        let issuers = current.map_or_else(Vec::new, |identity| {
            let intermediates = identity.svid.chain.iter().skip(1);
            let intermediates =
                intermediates.filter_map(|der| IssuerRow::parse(IssuerRole::Intermediate, der));
            let roots = identity.bundle.roots.iter();
            intermediates.chain(roots.filter_map(|der| IssuerRow::parse(IssuerRole::Root, der))).collect()
        });
        Self {
            identity: status.id.to_string(),
            serial: status.serial.clone(),
            not_before: at(status.not_before),
            not_after: at(status.not_after),
            next_renewal: at(status.next_renewal),
            last_error: status.last_error.clone(),
            renewals: status.renewals,
            failures: status.failures,
            failures_by_reason: status
                .failures_by_reason
                .iter()
                .map(|(reason, count)| ((*reason).to_owned(), *count))
                .collect(),
            issuers,
            revocation_lists: current.map(RevocationRow::of).unwrap_or_default(),
        }
    }
}

impl IssuerRow {
    fn parse(role: IssuerRole, der: &[u8]) -> Option<Self> {
        let (_, certificate) = x509_parser::parse_x509_certificate(der).ok()?;
        Some(Self {
            role,
            subject: certificate.subject().to_string(),
            serial: certificate.raw_serial().iter().map(|byte| format!("{byte:02X}")).collect(),
            not_after: Timestamp::from_second(certificate.validity().not_after.timestamp()).ok()?,
        })
    }
}

/// Open connections: the newest up to a limit, and how many there are.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct ConnectionRows {
    /// Open now, by direction and path.
    pub open: Vec<OpenCount>,
    pub opened_total: u64,
    pub refused_total: u64,
    /// Open now and asked for, listed or not.
    pub matching: usize,
    /// Newest first; not all of them when `matching` is more.
    pub newest: Vec<ConnectionRow>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct OpenCount {
    pub direction: String,
    pub path: String,
    pub count: u64,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ConnectionRow {
    pub id: u64,
    pub direction: String,
    pub path: String,
    pub source: PartyRow,
    pub destination: PartyRow,
    pub original_destination: Option<String>,
    pub service: Option<String>,
    /// The negotiated version: `TLSv1.3`, the only one that tunnels speak. Absent where there is no TLS.
    pub tls: Option<String>,
    /// The negotiated suite's standard name.
    pub cipher: Option<String>,
    /// Who carries the TLS records at this end: `userspace`, `kernel`, or the kernel one way.
    pub records: Option<String>,
    /// Source to destination.
    pub bytes_sent: u64,
    /// Destination to source.
    pub bytes_received: u64,
    pub age_seconds: f64,
    /// Effective mode of the destination's port, where this agent judges the connection.
    pub mode: Option<String>,
    /// `namespace/name` of the ALLOW policy that lets it in, if one decides.
    pub policy: Option<String>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PartyRow {
    pub address: String,
    /// `namespace/name`.
    pub workload: Option<String>,
    /// SPIFFE ID, as it was proven.
    pub identity: Option<String>,
}

impl PartyRow {
    pub(super) fn new(address: String, party: &Party) -> Self {
        Self {
            address,
            workload: party.workload.as_ref().map(|workload| workload.key()),
            identity: party.identity.as_ref().map(ToString::to_string),
        }
    }
}

impl ConnectionRow {
    pub(super) fn new(open: &Open, judged: Judged) -> Self {
        let Flow {
            direction,
            path,
            source,
            destination,
            original_dst,
            address,
            original_src,
            service,
            cipher,
        } = &open.flow;
        let (bytes_sent, bytes_received) = (open.progress.sent(), open.progress.received());
        Self {
            id: open.id,
            direction: direction.as_str().to_owned(),
            path: path.as_str().to_owned(),
            source: PartyRow::new(original_src.to_string(), source),
            destination: PartyRow::new(address.to_string(), destination),
            original_destination: original_dst.map(|dst| dst.to_string()),
            service: service.as_deref().map(str::to_owned),
            tls: cipher.map(|_| "TLSv1.3".to_owned()),
            cipher: cipher.map(str::to_owned),
            records: open.records().map(str::to_owned),
            bytes_sent,
            bytes_received,
            age_seconds: (open.age().as_secs_f64() * 1000.0).round() / 1000.0,
            mode: judged.mode,
            policy: judged.policy.as_deref().map(str::to_owned),
        }
    }
}
