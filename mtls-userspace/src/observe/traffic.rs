//! Istio's standard TCP metrics: a flow in, the counters of its label set out, and their exposition.
//!
//! Names, labels and the meaning of *sent* (destination to source, "during response") and *received* (source to
//! destination, "during request") are those of <https://istio.io/latest/docs/reference/config/metrics>; values
//! follow the ambient data plane. A principal is what was proven for the connection, never what an address suggests.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;

use super::bounded::{Bounded, Entry, Labels};
use super::exposition::Exposition;
use super::flow::{Direction, Flow, Party};
use super::workload_labels::{canonical_name, canonical_revision, controller};
use crate::identity::SpiffeId;
use crate::mesh::Workload;

/// What stands in a label when nobody knows the value, as everywhere in Istio.
pub(super) const UNKNOWN: &str = "unknown";
/// What stands in the labels of everything above the cap.
pub(super) const OVERFLOW: &str = "overflow";

pub(super) type Series = Entry<TrafficLabels, Counts>;

#[derive(Debug, Default)]
pub(super) struct Counts {
    pub opened: AtomicU64,
    pub closed: AtomicU64,
    pub failed: AtomicU64,
    /// Destination to source.
    pub sent: AtomicU64,
    /// Source to destination.
    pub received: AtomicU64,
}

/// Where a flow is counted.
#[derive(Debug)]
pub(super) struct Reports {
    pub own: Arc<Series>,
    other: Option<Arc<Series>>,
}

impl Reports {
    pub fn each(&self) -> impl Iterator<Item = &Counts> {
        std::iter::once(&self.own).chain(&self.other).map(|series| &series.value)
    }
}

impl Counts {
    /// Takes bytes as the source sees them and files them as Istio does: what the source sent was received from it.
    pub fn add_bytes(&self, from_source: u64, to_source: u64) {
        self.received.fetch_add(from_source, Ordering::Relaxed);
        self.sent.fetch_add(to_source, Ordering::Relaxed);
    }
}

#[derive(Debug)]
pub(super) struct Traffic {
    table: Bounded<TrafficLabels, Counts>,
    cluster: Arc<str>,
    service_suffix: String,
}

impl Traffic {
    pub fn new(table: Bounded<TrafficLabels, Counts>, cluster: Arc<str>, cluster_domain: &str) -> Self {
        Self { table, cluster, service_suffix: format!(".svc.{cluster_domain}") }
    }

    /// The counters of a flow: one set for each end that this agent stands at. `response_flags` is `-` for what
    /// opened and for what ended well.
    pub fn reports(&self, flow: &Flow, response_flags: &'static str) -> Reports {
        let series =
            |reporter| self.table.entry(&FlowLabels::new(flow, reporter, response_flags, &self.cluster));
        Reports {
            own: series(flow.direction),
            other: flow.path.is_within_node().then(|| series(flow.direction.other())),
        }
    }

    pub fn overflowed(&self) -> u64 {
        self.table.overflowed()
    }

    pub fn live(&self) -> Vec<Arc<Series>> {
        self.table.live()
    }
}

const END_LABELS: usize = 7;
type EndLabels<T> = [T; END_LABELS];

const SOURCE_NAMES: EndLabels<&str> = [
    "source_workload",
    "source_workload_namespace",
    "source_app",
    "source_canonical_service",
    "source_canonical_revision",
    "source_version",
    "source_cluster",
];

const DESTINATION_NAMES: EndLabels<&str> = [
    "destination_workload",
    "destination_workload_namespace",
    "destination_app",
    "destination_canonical_service",
    "destination_canonical_revision",
    "destination_version",
    "destination_cluster",
];

/// A label set of Istio's TCP metrics.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct TrafficLabels {
    pub fixed: Fixed,
    source: EndLabels<Box<str>>,
    pub source_principal: Principal,
    destination: EndLabels<Box<str>>,
    destination_principal: Principal,
    /// Namespace and name.
    service: Option<(Box<str>, Box<str>)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Fixed {
    pub reporter: &'static str,
    pub response_flags: &'static str,
    pub connection_security_policy: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Principal {
    Known(SpiffeId),
    Unknown,
    Overflow,
}

impl fmt::Display for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Known(id) => id.fmt(f),
            Self::Unknown => f.write_str(UNKNOWN),
            Self::Overflow => f.write_str(OVERFLOW),
        }
    }
}

impl From<Option<&SpiffeId>> for Principal {
    fn from(id: Option<&SpiffeId>) -> Self {
        id.map_or(Self::Unknown, |id| Self::Known(id.clone()))
    }
}

/// The label set of a flow, borrowed from it.
#[derive(Hash)]
struct FlowLabels<'a> {
    fixed: Fixed,
    source: EndLabels<&'a str>,
    source_principal: Option<&'a SpiffeId>,
    destination: EndLabels<&'a str>,
    destination_principal: Option<&'a SpiffeId>,
    service: Option<(&'a str, &'a str)>,
}

impl<'a> FlowLabels<'a> {
    fn new(flow: &'a Flow, reporter: Direction, response_flags: &'static str, cluster: &'a str) -> Self {
        Self {
            fixed: Fixed {
                reporter: reporter.reporter(),
                response_flags,
                connection_security_policy: flow.path.security_policy(),
            },
            source: end(&flow.source, cluster),
            source_principal: flow.source.identity.as_ref(),
            destination: end(&flow.destination, cluster),
            destination_principal: flow.destination.identity.as_ref(),
            service: flow.service.as_deref().map(namespace_and_name),
        }
    }
}

fn end<'a>(party: &'a Party, cluster: &'a str) -> EndLabels<&'a str> {
    let Some(workload): Option<&Workload> = party.workload.as_deref() else {
        return [UNKNOWN; END_LABELS];
    };
    let (name, revision) = (canonical_name(workload), canonical_revision(workload));
    [controller(workload), &workload.namespace, name, name, revision, revision, cluster]
}

fn namespace_and_name(service: &str) -> (&str, &str) {
    service.split_once('/').unwrap_or((UNKNOWN, service))
}

impl Labels for FlowLabels<'_> {
    type Owned = TrafficLabels;

    fn matches(&self, owned: &TrafficLabels) -> bool {
        let same = |mine: &EndLabels<&str>, theirs: &EndLabels<Box<str>>| {
            mine.iter().zip(theirs).all(|(mine, theirs)| *mine == &**theirs)
        };
        let proven = |mine: Option<&SpiffeId>, theirs: &Principal| match theirs {
            Principal::Known(id) => mine == Some(id),
            Principal::Unknown => mine.is_none(),
            Principal::Overflow => false,
        };
        self.fixed == owned.fixed
            && same(&self.source, &owned.source)
            && same(&self.destination, &owned.destination)
            && proven(self.source_principal, &owned.source_principal)
            && proven(self.destination_principal, &owned.destination_principal)
            && self.service == owned.service.as_ref().map(|(namespace, name)| (&**namespace, &**name))
    }

    fn own(&self) -> TrafficLabels {
        TrafficLabels {
            fixed: self.fixed,
            source: self.source.map(Box::from),
            source_principal: self.source_principal.into(),
            destination: self.destination.map(Box::from),
            destination_principal: self.destination_principal.into(),
            service: self.service.map(|(namespace, name)| (namespace.into(), name.into())),
        }
    }

    fn overflow(&self) -> TrafficLabels {
        TrafficLabels {
            fixed: self.fixed,
            source: [OVERFLOW; END_LABELS].map(Box::from),
            source_principal: Principal::Overflow,
            destination: [OVERFLOW; END_LABELS].map(Box::from),
            destination_principal: Principal::Overflow,
            service: None,
        }
    }
}

impl TrafficLabels {
    /// Namespace and workload of the source and of the destination.
    pub fn ends(&self) -> [(&str, &str); 2] {
        [&self.source, &self.destination].map(|end| (&*end[1], &*end[0]))
    }

    fn pairs(&self, service_suffix: &str) -> Vec<(&'static str, String)> {
        let mut pairs = vec![("reporter", self.fixed.reporter.to_owned())];
        let ends = [(SOURCE_NAMES, &self.source), (DESTINATION_NAMES, &self.destination)];
        for (names, values) in ends {
            pairs.extend(names.into_iter().zip(values.iter().map(|value| value.to_string())));
        }
        pairs.push(("source_principal", self.source_principal.to_string()));
        pairs.push(("destination_principal", self.destination_principal.to_string()));
        let (host, namespace, name) = match &self.service {
            Some((namespace, name)) => {
                (format!("{name}.{namespace}{service_suffix}"), namespace.to_string(), name.to_string())
            }
            None => (UNKNOWN.to_owned(), UNKNOWN.to_owned(), UNKNOWN.to_owned()),
        };
        pairs.push(("destination_service", host));
        pairs.push(("destination_service_namespace", namespace));
        pairs.push(("destination_service_name", name));
        pairs.push(("request_protocol", "tcp".to_owned()));
        pairs.push(("response_flags", self.fixed.response_flags.to_owned()));
        pairs.push(("connection_security_policy", self.fixed.connection_security_policy.to_owned()));
        pairs
    }
}

impl Collector for Traffic {
    fn encode(&self, encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let series: Vec<_> = self
            .live()
            .into_iter()
            .map(|series| (series.labels.pairs(&self.service_suffix), series))
            .collect();
        let mut exposition = Exposition::new(encoder);
        for family in FAMILIES {
            let shown = series.iter().filter(|(_, series)| (family.shown)(&series.value));
            let samples = shown.map(|(labels, series)| (labels, (family.count)(&series.value)));
            exposition.counters(family.name, family.help, samples)?;
        }
        Ok(())
    }
}

struct Family {
    name: &'static str,
    help: &'static str,
    count: fn(&Counts) -> u64,
    /// A label set that only ever failed, say, has no place among the opened ones.
    shown: fn(&Counts) -> bool,
}

fn load(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

fn was_opened(counts: &Counts) -> bool {
    load(&counts.opened) > 0
}

const FAMILIES: [Family; 5] = [
    Family {
        name: "istio_tcp_connections_opened",
        help: "TCP connections opened",
        count: |counts| load(&counts.opened),
        shown: was_opened,
    },
    Family {
        name: "istio_tcp_connections_closed",
        help: "TCP connections closed, under the response flags of their end",
        count: |counts| load(&counts.closed),
        shown: |counts| was_opened(counts) || load(&counts.closed) > 0,
    },
    Family {
        name: "istio_tcp_connections_failed",
        help: "TCP connections that were refused or failed before they were open",
        count: |counts| load(&counts.failed),
        shown: |counts| load(&counts.failed) > 0,
    },
    Family {
        name: "istio_tcp_sent_bytes",
        help: "Application bytes sent during response: from the destination to the source",
        count: |counts| load(&counts.sent),
        shown: was_opened,
    },
    Family {
        name: "istio_tcp_received_bytes",
        help: "Application bytes received during request: from the source to the destination",
        count: |counts| load(&counts.received),
        shown: was_opened,
    },
];
