//! The `mtls_*` metrics: events counted here, and rows that rooms provide at scrape time, in one registry.

use std::collections::BTreeMap;
use std::fmt;
use std::hash::Hash;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use super::Inner;
use super::bounded::{Bounded, Labels};
use super::exposition::{Exposition, LabelPairs};
use super::flow::{Direction, Path};
use super::status::{Enrolment, IdentityRow, IssuerRole, PodRow};
use super::traffic::OVERFLOW;

/// What happened to a plaintext connection to an enrolled destination.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Plaintext {
    Accepted,
    Refused,
}

impl Plaintext {
    fn as_str(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Refused => "refused",
        }
    }
}

/// Counters of events; their values live as long as the agent.
#[derive(Debug)]
pub(super) struct Events {
    pub handshakes: Family<HandshakeLabels, Counter>,
    pub handshake_failures: Family<HandshakeFailureLabels, Counter>,
    pub tunnels_opened: Family<DirectionLabels, Counter>,
    pub tunnels_reused: Family<DirectionLabels, Counter>,
    pub lanes_opened: Family<DirectionLabels, Counter>,
    pub lanes_left: Family<DirectionLabels, Counter>,
    pub became_bulk: Family<DirectionLabels, Counter>,
    pub tunnel_connections: Family<RecordsLabels, Counter>,
    pub revoked: Counter,
    pub refused_total: AtomicU64,
    pub refused: Bounded<RefusedLabels, AtomicU64>,
    pub plaintext: Bounded<PlaintextLabels, AtomicU64>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct HandshakeLabels {
    pub direction: &'static str,
    /// `full` or `resumed`.
    pub kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct HandshakeFailureLabels {
    pub direction: &'static str,
    pub reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct DirectionLabels {
    pub direction: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct RecordsLabels {
    pub direction: &'static str,
    pub records: &'static str,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct RefusedLabels {
    pub direction: &'static str,
    pub reason: &'static str,
    pub policy: Box<str>,
}

#[derive(Hash)]
pub(super) struct Refused<'a> {
    pub direction: &'static str,
    pub reason: &'static str,
    /// Empty where no policy was involved.
    pub policy: &'a str,
}

impl Labels for Refused<'_> {
    type Owned = RefusedLabels;

    fn matches(&self, owned: &RefusedLabels) -> bool {
        self.direction == owned.direction && self.reason == owned.reason && *self.policy == *owned.policy
    }

    fn own(&self) -> RefusedLabels {
        RefusedLabels { direction: self.direction, reason: self.reason, policy: self.policy.into() }
    }

    fn overflow(&self) -> RefusedLabels {
        RefusedLabels { direction: self.direction, reason: self.reason, policy: OVERFLOW.into() }
    }
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct PlaintextLabels {
    namespace: Box<str>,
    workload: Box<str>,
    /// None stands for all ports above the cap.
    port: Option<u16>,
    outcome: Plaintext,
}

#[derive(Hash)]
pub(super) struct PlaintextTo<'a> {
    pub namespace: &'a str,
    pub workload: &'a str,
    pub port: u16,
    pub outcome: Plaintext,
}

impl Labels for PlaintextTo<'_> {
    type Owned = PlaintextLabels;

    fn matches(&self, owned: &PlaintextLabels) -> bool {
        *self.namespace == *owned.namespace
            && *self.workload == *owned.workload
            && Some(self.port) == owned.port
            && self.outcome == owned.outcome
    }

    fn own(&self) -> PlaintextLabels {
        PlaintextLabels {
            namespace: self.namespace.into(),
            workload: self.workload.into(),
            port: Some(self.port),
            outcome: self.outcome,
        }
    }

    fn overflow(&self) -> PlaintextLabels {
        PlaintextLabels {
            namespace: OVERFLOW.into(),
            workload: OVERFLOW.into(),
            port: None,
            outcome: self.outcome,
        }
    }
}

impl Events {
    pub fn new(cap: usize, idle: Duration) -> Self {
        Self {
            handshakes: Family::default(),
            handshake_failures: Family::default(),
            tunnels_opened: Family::default(),
            tunnels_reused: Family::default(),
            lanes_opened: Family::default(),
            lanes_left: Family::default(),
            became_bulk: Family::default(),
            tunnel_connections: Family::default(),
            revoked: Counter::default(),
            refused_total: AtomicU64::new(0),
            refused: Bounded::new(cap, idle),
            plaintext: Bounded::new(cap, idle),
        }
    }

    pub fn register(&self, registry: &mut Registry) {
        registry.register("mtls_handshakes", "TLS handshakes that ended well", self.handshakes.clone());
        registry.register(
            "mtls_handshake_failures",
            "TLS handshakes that produced no authenticated peer",
            self.handshake_failures.clone(),
        );
        registry.register(
            "mtls_tunnels_opened",
            "Tunnels opened to (outbound) or by (inbound) other agents",
            self.tunnels_opened.clone(),
        );
        registry.register(
            "mtls_tunnels_reused",
            "Connections carried by a tunnel that an earlier connection opened",
            self.tunnels_reused.clone(),
        );
        registry.register(
            "mtls_lanes_opened",
            "Connections that began on a tunnel shared with others",
            self.lanes_opened.clone(),
        );
        registry.register(
            "mtls_lanes_left",
            "Connections that were moved from a shared tunnel to one of their own, because they became fast",
            self.lanes_left.clone(),
        );
        registry.register(
            "mtls_bulk_connections",
            "Connections that went on on a thread for those that move much",
            self.became_bulk.clone(),
        );
        registry.register(
            "mtls_tunnel_connections",
            "Connections through tunnels that ended, by who carried their TLS records at this end",
            self.tunnel_connections.clone(),
        );
        registry.register(
            "mtls_connections_revoked",
            "Open connections stopped because policy no longer allows them, or their peer is no longer trusted",
            self.revoked.clone(),
        );
    }
}

/// What is read from elsewhere at the moment of a scrape.
impl Collector for Inner {
    fn encode(&self, encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let mut out = Exposition::new(encoder);
        let version = vec![("version", env!("CARGO_PKG_VERSION").to_owned())];
        out.gauges("mtls_build_info", "The agent's version; always 1", [(version, 1u64)])?;
        let conditions = self.providers.conditions().into_iter();
        let conditions = conditions
            .map(|(name, missing)| (vec![("condition", name.to_owned())], u64::from(missing.is_none())));
        out.gauges("mtls_agent_ready", "1 when the condition for being ready is met", conditions)?;
        let capabilities = self.providers.capabilities().into_iter();
        let capabilities =
            capabilities.map(|(name, used)| (vec![("feature", name.to_owned())], u64::from(used)));
        out.gauges(
            "mtls_capability",
            "1 when the agent makes use of what this kernel can do; 0 when it does without",
            capabilities,
        )?;
        let open = Direction::ALL.into_iter().flat_map(|direction| {
            Path::ALL.into_iter().map(move |path| {
                let labels =
                    vec![("direction", direction.as_str().to_owned()), ("path", path.as_str().to_owned())];
                (labels, self.connections.open(direction, path))
            })
        });
        out.gauges("mtls_connections_open", "Connections open now, by the way their bytes take", open)?;
        out.gauge(
            "mtls_predecessor_connections_open",
            "Connections still open on the agent whose place this one took",
            self.providers.predecessor().map_or(0, |row| row.open),
        )?;
        self.encode_refusals(&mut out)?;
        self.encode_overflow(&mut out)?;
        out.counter(
            "mtls_access_log_lines_lost",
            "Access-log lines lost because the output was too slow or failed",
            self.log.lost(),
        )?;
        self.encode_mesh(&mut out)?;
        self.encode_pods(&mut out)?;
        let identities = self.providers.identities();
        encode_certificates(&identities, &mut out)?;
        encode_lifetimes(&identities, &mut out)?;
        encode_revocation_lists(&identities, &mut out)?;
        self.encode_plaintext(&mut out)?;
        let kernel = self.providers.kernel_counters().into_iter();
        let kernel = kernel.map(|(name, value)| (vec![("counter", name.to_owned())], value));
        out.counters("mtls_kernel_events", "What the kernel half counted", kernel)
    }
}

impl Inner {
    fn encode_refusals(&self, out: &mut Exposition<'_>) -> fmt::Result {
        let refused = self.events.refused.live().into_iter().map(|entry| {
            let labels = vec![
                ("direction", entry.labels.direction.to_owned()),
                ("reason", entry.labels.reason.to_owned()),
                ("policy", entry.labels.policy.to_string()),
            ];
            (labels, entry.value.load(Ordering::Relaxed))
        });
        out.counters("mtls_connections_refused", "Connections that were refused, by reason", refused)?;
        let plaintext = self.events.plaintext.live().into_iter().map(|entry| {
            let labels = vec![
                ("destination_workload", entry.labels.workload.to_string()),
                ("destination_workload_namespace", entry.labels.namespace.to_string()),
                (
                    "destination_port",
                    entry.labels.port.map_or_else(|| OVERFLOW.to_owned(), |port| port.to_string()),
                ),
                ("outcome", entry.labels.outcome.as_str().to_owned()),
            ];
            (labels, entry.value.load(Ordering::Relaxed))
        });
        out.counters(
            "mtls_plaintext_connections",
            "Plaintext connections to enrolled workloads of this node",
            plaintext,
        )
    }

    fn encode_overflow(&self, out: &mut Exposition<'_>) -> fmt::Result {
        let overflowed = [
            ("istio_tcp", self.traffic.overflowed()),
            ("mtls_connections_refused", self.events.refused.overflowed()),
            ("mtls_plaintext_connections", self.events.plaintext.overflowed()),
        ];
        let overflowed = overflowed.map(|(family, count)| (vec![("family", family.to_owned())], count));
        out.counters("mtls_label_sets_overflowed", "Events counted under an overflow label set", overflowed)
    }

    fn encode_plaintext(&self, out: &mut Exposition<'_>) -> fmt::Result {
        let Some(counts) = self.providers.plaintext_counts() else { return Ok(()) };
        out.gauge("mtls_plaintext_peers", "Plaintext peers remembered for `mtls readiness`", counts.peers)?;
        out.counter(
            "mtls_plaintext_peers_not_kept",
            "Plaintext connections whose peer found no room in the memory of `mtls readiness`",
            counts.not_kept,
        )?;
        out.counter(
            "mtls_plaintext_sightings_lost",
            "Plaintext connections that came faster than the agent could take them in",
            counts.lost,
        )
    }

    fn encode_mesh(&self, out: &mut Exposition<'_>) -> fmt::Result {
        let Some(mesh) = self.providers.mesh() else { return Ok(()) };
        out.gauge("mtls_mesh_generation", "Generation of the configuration in force", mesh.generation)?;
        out.gauge("mtls_mesh_workloads", "Workloads the configuration in force knows", mesh.workloads)?;
        let valid = u64::from(mesh.last_error.is_none());
        out.gauge("mtls_config_valid", "1 when the newest configuration is the one in force", valid)?;
        out.counter("mtls_config_errors", "Configurations refused", mesh.errors)
    }

    fn encode_pods(&self, out: &mut Exposition<'_>) -> fmt::Result {
        // By key, because a label set may appear only once.
        let pods = self.providers.pods().into_iter();
        let pods: BTreeMap<_, _> = pods.map(|pod| ((pod.namespace.clone(), pod.name.clone()), pod)).collect();
        let labels = |pod: &PodRow| vec![("namespace", pod.namespace.clone()), ("pod", pod.name.clone())];
        let enrolled =
            pods.values().map(|pod| (labels(pod), u64::from(pod.enrolment == Enrolment::Enrolled)));
        out.gauges("mtls_pod_enrolled", "1 when the pod's connections are captured and protected", enrolled)?;
        let is_verified = |pod: &PodRow| {
            pod.enrolment == Enrolment::Enrolled && pod.faults.as_ref().is_some_and(Vec::is_empty)
        };
        let verified = pods.values().map(|pod| (labels(pod), u64::from(is_verified(pod))));
        out.gauges(
            "mtls_pod_verified",
            "1 when everything that protects the pod was found in force in the kernel",
            verified,
        )?;
        let unfenced = pods.values().map(|pod| (labels(pod), pod.unfenced_seconds.unwrap_or_default()));
        out.gauges(
            "mtls_pod_unfenced_seconds",
            "How long the pod ran before it was fenced; 0 when it never did",
            unfenced,
        )
    }
}

fn encode_certificates(identities: &[IdentityRow], out: &mut Exposition<'_>) -> fmt::Result {
    // Two roots of one name overlap during a rotation: the earlier end is the one to be warned of.
    let mut expiry: BTreeMap<(&str, &str, &str), i64> = BTreeMap::new();
    for row in identities {
        let leaf = row.not_after.map(|end| ("leaf", row.identity.as_str(), end));
        let issuers = row.issuers.iter().map(|issuer| {
            let role = match issuer.role {
                IssuerRole::Intermediate => "intermediate",
                IssuerRole::Root => "root",
            };
            (role, issuer.subject.as_str(), issuer.not_after)
        });
        for (role, subject, end) in leaf.into_iter().chain(issuers) {
            let end = end.as_second();
            let earliest = expiry.entry((&row.identity, role, subject)).or_insert(end);
            *earliest = end.min(*earliest);
        }
    }
    let expiry = expiry.into_iter().map(|((identity, role, subject), end)| {
        let labels: LabelPairs = vec![
            ("identity", identity.to_owned()),
            ("role", role.to_owned()),
            ("subject", subject.to_owned()),
        ];
        (labels, end)
    });
    out.gauges(
        "mtls_certificate_expiry_timestamp_seconds",
        "When a certificate of an identity ends",
        expiry,
    )?;
    let identity = |row: &IdentityRow| vec![("identity", row.identity.clone())];
    let renewals = identities.iter().map(|row| (identity(row), row.renewals));
    out.counters("mtls_certificate_renewals", "Certificates obtained", renewals)?;
    let failures = identities.iter().flat_map(|row| {
        let by_reason = row.failures_by_reason.iter();
        by_reason.map(|(reason, count)| {
            let labels = vec![("identity", row.identity.clone()), ("reason", reason.clone())];
            (labels, *count)
        })
    });
    out.counters(
        "mtls_certificate_renewal_failures",
        "Attempts to obtain a certificate that failed",
        failures,
    )
}

/// What the time left is to be compared with.
fn encode_lifetimes(identities: &[IdentityRow], out: &mut Exposition<'_>) -> fmt::Result {
    let lifetimes = identities.iter().filter_map(|row| {
        let lifetime = row.not_after?.as_second() - row.not_before?.as_second();
        Some((vec![("identity", row.identity.clone())], lifetime))
    });
    out.gauges("mtls_certificate_lifetime_seconds", "How long an identity's certificate lives", lifetimes)
}

/// Two lists of one issuer's name: the one that is due first is the one to be warned of.
fn encode_revocation_lists(identities: &[IdentityRow], out: &mut Exposition<'_>) -> fmt::Result {
    let mut due: BTreeMap<&str, i64> = BTreeMap::new();
    for list in identities.iter().flat_map(|row| &row.revocation_lists) {
        let Some(next) = list.next_update else { continue };
        let first = due.entry(&list.issuer).or_insert(next.as_second());
        *first = next.as_second().min(*first);
    }
    let due = due.into_iter().map(|(issuer, next)| (vec![("issuer", issuer.to_owned())], next));
    out.gauges(
        "mtls_revocation_list_next_update_timestamp_seconds",
        "When a revocation list that peers are judged by is due to be replaced",
        due,
    )
}

/// Registers everything that is scraped.
pub(super) fn registry(inner: &Arc<Inner>) -> Registry {
    let mut registry = Registry::default();
    inner.events.register(&mut registry);
    registry.register_collector(Box::new(inner.clone()));
    registry.register_collector(Box::new(inner.traffic.clone()));
    registry
}
