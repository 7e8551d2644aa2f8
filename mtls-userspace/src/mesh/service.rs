//! Services: manifests in, a table from (VIP, port) to endpoints out. Chooses an endpoint at flat cost.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Pod, Service, ServicePort, ServiceSpec};
use k8s_openapi::api::discovery::v1::{EndpointConditions, EndpointSlice};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use rand::Rng;

use super::error::Error;
use super::objects::{Objects, Placed, called, namespace};
use super::pod::{LivePod, parse_address, parse_port};
use super::{Warning, Workload, key};

/// Label by which an EndpointSlice names its Service.
const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// Every VIP of every Service.
#[derive(Debug, Default)]
pub(super) struct Services {
    ports: HashMap<SocketAddr, Vip>,
    names: HashMap<IpAddr, Arc<str>>,
}

/// One port of a Service and who answers behind it.
#[derive(Clone, Debug)]
pub struct ServedPort {
    /// `namespace/name`.
    pub service: Arc<str>,
    pub address: SocketAddr,
    /// Where connections go: the pod's own address and port, and the pod if it is one of the mesh's view.
    pub endpoints: Vec<(SocketAddr, Option<Arc<Workload>>)>,
    pub health: Health,
}

/// Endpoints by readiness, whether connections go to them or not.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Health {
    pub ready: usize,
    /// Shutting down but still answering: used where nobody is ready.
    pub draining: usize,
    pub not_ready: usize,
}

/// One (VIP, port).
#[derive(Debug)]
pub(super) struct Vip {
    endpoints: Vec<Endpoint>,
    locality: Locality,
    /// Endpoints by node, where locality asks for it.
    by_node: HashMap<Arc<str>, Vec<Endpoint>>,
    health: Health,
}

#[derive(Clone, Debug)]
pub(super) struct Endpoint {
    pub address: SocketAddr,
    /// `None`: an address that belongs to no pod of the mesh's view.
    pub workload: Option<Arc<Workload>>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Locality {
    Anywhere,
    /// `trafficDistribution: PreferSameNode`.
    SameNodeFirst,
    /// `internalTrafficPolicy: Local`.
    SameNodeOnly,
}

/// An endpoint while its readiness is judged.
struct Candidate {
    endpoint: Endpoint,
    node: Option<Arc<str>>,
    readiness: Readiness,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Readiness {
    Ready,
    /// Shutting down but still answering: used when nobody is ready, as kube-proxy does.
    Draining,
    NotReady,
}

impl Services {
    pub(super) fn new(
        objects: &Objects,
        pods: &[LivePod<'_>],
        owner: &HashMap<IpAddr, Arc<Workload>>,
        warnings: &mut Vec<Warning>,
    ) -> Result<Self, Error> {
        let mut pods_of: HashMap<&str, Vec<&LivePod<'_>>> = HashMap::new();
        for pod in pods {
            pods_of.entry(&pod.workload.namespace).or_default().push(pod);
        }
        let mut slices_of: HashMap<(&str, &str), Vec<&Placed<EndpointSlice>>> = HashMap::new();
        for slice in &objects.endpoint_slices {
            let metadata = &slice.object.metadata;
            if let Some(service) = metadata.labels.as_ref().and_then(|labels| labels.get(SERVICE_NAME)) {
                slices_of.entry((namespace(metadata), service)).or_default().push(slice);
            }
        }

        let mut services = Self::default();
        let mut claimed: HashMap<IpAddr, &Placed<Service>> = HashMap::new();
        for placed in &objects.services {
            let Some(spec) = &placed.object.spec else { continue };
            let vips = vips(placed, spec)?;
            for vip in &vips {
                if let Some(first) = claimed.insert(*vip, placed) {
                    return Err(Error::ClaimedVip {
                        address: *vip,
                        first: key(&first.object.metadata).into(),
                        first_place: first.place.clone(),
                        second: key(&placed.object.metadata).into(),
                        second_place: placed.place.clone(),
                    });
                }
            }
            if vips.is_empty() {
                continue;
            }
            let metadata = &placed.object.metadata;
            let name: Arc<str> = key(metadata).into();
            if spec.session_affinity.as_deref() == Some("ClientIP") {
                warnings.push(Warning::SessionAffinity { service: name.clone() });
            }
            let in_namespace = pods_of.get(namespace(metadata)).map(Vec::as_slice).unwrap_or_default();
            let slices = slices_of.get(&(namespace(metadata), metadata.name.as_deref().unwrap_or_default()));
            for vip in vips {
                services.names.insert(vip, name.clone());
                for port in spec.ports.iter().flatten().filter(|port| is_tcp(port.protocol.as_ref())) {
                    let number = checked_port(placed, port.port.into(), "spec.ports.port")?;
                    let candidates = match slices {
                        Some(slices) => from_slices(slices, spec, port, vip, owner)?,
                        None => from_selector(placed, spec, port, vip, in_namespace)?,
                    };
                    let vip_port = Vip::new(locality(spec), candidates);
                    services.ports.insert(SocketAddr::new(vip, number), vip_port);
                }
            }
        }
        Ok(services)
    }

    /// What a Service's address and port stand for.
    pub(super) fn vip(&self, address: SocketAddr) -> Option<&Vip> {
        self.ports.get(&address)
    }

    /// The Service that has this address.
    pub(super) fn name(&self, address: IpAddr) -> Option<&Arc<str>> {
        self.names.get(&address)
    }

    /// Every port with its Service's name, sorted.
    pub(super) fn list(&self) -> Vec<(&Arc<str>, SocketAddr)> {
        let named = self.ports.keys().filter_map(|address| Some((self.name(address.ip())?, *address)));
        let mut ports: Vec<_> = named.collect();
        ports.sort();
        ports
    }

    pub(super) fn served(&self, address: SocketAddr) -> Option<ServedPort> {
        let vip = self.vip(address)?;
        let endpoints = vip.endpoints.iter().map(|e| (e.address, e.workload.clone())).collect();
        let service = self.name(address.ip())?.clone();
        Some(ServedPort { service, address, endpoints, health: vip.health })
    }

    pub(super) fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.names.keys().copied()
    }
}

impl Vip {
    fn new(locality: Locality, candidates: Vec<Candidate>) -> Self {
        let count =
            |readiness| candidates.iter().filter(|candidate| candidate.readiness == readiness).count();
        let health = Health {
            ready: count(Readiness::Ready),
            draining: count(Readiness::Draining),
            not_ready: count(Readiness::NotReady),
        };
        let used = if health.ready > 0 { Readiness::Ready } else { Readiness::Draining };
        let mut vip = Self { endpoints: Vec::new(), locality, by_node: HashMap::new(), health };
        for candidate in candidates.into_iter().filter(|candidate| candidate.readiness == used) {
            if let (Some(node), true) = (candidate.node, locality != Locality::Anywhere) {
                vip.by_node.entry(node).or_default().push(candidate.endpoint.clone());
            }
            vip.endpoints.push(candidate.endpoint);
        }
        vip
    }

    /// One of the endpoints that a client on `node` may use, each as likely as the others.
    pub(super) fn choose(&self, node: &str) -> Option<&Endpoint> {
        let local = self.by_node.get(node).map(Vec::as_slice).unwrap_or_default();
        let from = match self.locality {
            Locality::SameNodeOnly => local,
            Locality::SameNodeFirst if !local.is_empty() => local,
            Locality::SameNodeFirst | Locality::Anywhere => &self.endpoints,
        };
        match from {
            [] => None,
            [only] => Some(only),
            several => several.get(rand::rng().random_range(0..several.len())),
        }
    }
}

/// Canonical; empty for headless and ExternalName Services.
fn vips(placed: &Placed<Service>, spec: &ServiceSpec) -> Result<Vec<IpAddr>, Error> {
    if spec.type_.as_deref() == Some("ExternalName") {
        return Ok(Vec::new());
    }
    let listed = spec.cluster_ips.iter().flatten().map(|ip| ("spec.clusterIPs", ip));
    let mut vips = Vec::new();
    for (field, text) in spec.cluster_ip.iter().map(|ip| ("spec.clusterIP", ip)).chain(listed) {
        if text.is_empty() || text == "None" {
            continue;
        }
        let vip = parse_address(text).map_err(|problem| Error::Address {
            place: placed.place.clone(),
            object: called("Service", &placed.object.metadata),
            field,
            problem,
        })?;
        if !vips.contains(&vip) {
            vips.push(vip);
        }
    }
    Ok(vips)
}

fn locality(spec: &ServiceSpec) -> Locality {
    if spec.internal_traffic_policy.as_deref() == Some("Local") {
        Locality::SameNodeOnly
    } else if spec.traffic_distribution.as_deref() == Some("PreferSameNode") {
        Locality::SameNodeFirst
    } else {
        Locality::Anywhere
    }
}

/// Slices say everything themselves: target ports are already numbers, and readiness is already judged.
fn from_slices(
    slices: &[&Placed<EndpointSlice>],
    spec: &ServiceSpec,
    port: &ServicePort,
    vip: IpAddr,
    owner: &HashMap<IpAddr, Arc<Workload>>,
) -> Result<Vec<Candidate>, Error> {
    let not_ready_too = spec.publish_not_ready_addresses.unwrap_or(false);
    let family = if vip.is_ipv4() { "IPv4" } else { "IPv6" };
    let name = port.name.as_deref().unwrap_or_default();
    let mut candidates = Vec::new();
    for placed in slices.iter().filter(|placed| placed.object.address_type == family) {
        let wrong = |field, problem| Error::Address {
            place: placed.place.clone(),
            object: called("EndpointSlice", &placed.object.metadata),
            field,
            problem,
        };
        let same = placed
            .object
            .ports
            .iter()
            .flatten()
            .find(|p| is_tcp(p.protocol.as_ref()) && p.name.as_deref().unwrap_or_default() == name);
        let Some(target) = same.and_then(|port| port.port) else { continue };
        let target = parse_port(target.into()).map_err(|problem| wrong("ports.port", problem))?;
        for endpoint in placed.object.endpoints.iter().flatten() {
            // Kubernetes: all addresses of an endpoint are the same one; consumers take the first.
            let Some(address) = endpoint.addresses.first() else { continue };
            let address = parse_address(address).map_err(|problem| wrong("endpoints.addresses", problem))?;
            let readiness = match endpoint.conditions.as_ref() {
                _ if not_ready_too => Readiness::Ready,
                None => Readiness::Ready,
                Some(conditions) => readiness(conditions),
            };
            candidates.push(Candidate {
                endpoint: Endpoint {
                    address: SocketAddr::new(address, target),
                    workload: owner.get(&address).cloned(),
                },
                node: endpoint.node_name.as_deref().map(Arc::from),
                readiness,
            });
        }
    }
    Ok(candidates)
}

/// Absent conditions mean ready; an absent `serving` means whatever `ready` says.
fn readiness(conditions: &EndpointConditions) -> Readiness {
    let ready = conditions.ready.unwrap_or(true);
    match (ready, conditions.serving.unwrap_or(ready), conditions.terminating.unwrap_or(false)) {
        (true, _, _) => Readiness::Ready,
        (false, true, true) => Readiness::Draining,
        _ => Readiness::NotReady,
    }
}

/// Without slices, what the EndpointSlice controller would have found.
fn from_selector(
    placed: &Placed<Service>,
    spec: &ServiceSpec,
    port: &ServicePort,
    vip: IpAddr,
    pods: &[&LivePod<'_>],
) -> Result<Vec<Candidate>, Error> {
    let Some(selector) = spec.selector.as_ref().filter(|selector| !selector.is_empty()) else {
        return Ok(Vec::new());
    };
    let not_ready_too = spec.publish_not_ready_addresses.unwrap_or(false);
    let number = match &port.target_port {
        None => Some(checked_port(placed, port.port.into(), "spec.ports.port")?),
        Some(IntOrString::Int(number)) => {
            Some(checked_port(placed, (*number).into(), "spec.ports.targetPort")?)
        }
        Some(IntOrString::String(_)) => None,
    };
    let named = |workload: &Workload| match &port.target_port {
        Some(IntOrString::String(name)) => {
            workload.ports.iter().find(|(n, _)| n.as_deref() == Some(name)).map(|(_, number)| *number)
        }
        _ => None,
    };
    let mut candidates = Vec::new();
    for live in pods.iter().filter(|p| selector.iter().all(|(k, v)| p.workload.labels.get(k) == Some(v))) {
        let address = live.workload.addresses.iter().find(|a| a.is_ipv4() == vip.is_ipv4());
        let (Some(address), Some(target)) = (address, number.or_else(|| named(&live.workload))) else {
            continue;
        };
        let workload = (!live.host_network).then(|| live.workload.clone());
        candidates.push(Candidate {
            endpoint: Endpoint { address: SocketAddr::new(*address, target), workload },
            node: live.workload.node.clone(),
            readiness: if not_ready_too { Readiness::Ready } else { pod_readiness(live.pod) },
        });
    }
    Ok(candidates)
}

/// A pod manifest without conditions counts as ready: outside Kubernetes nobody probes it.
fn pod_readiness(pod: &Pod) -> Readiness {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
    let ready = match conditions.filter(|conditions| !conditions.is_empty()) {
        None => true,
        Some(conditions) => conditions.iter().any(|c| c.type_ == "Ready" && c.status == "True"),
    };
    match (ready, pod.metadata.deletion_timestamp.is_some()) {
        (true, false) => Readiness::Ready,
        (true, true) => Readiness::Draining,
        (false, _) => Readiness::NotReady,
    }
}

fn checked_port(placed: &Placed<Service>, port: i64, field: &'static str) -> Result<u16, Error> {
    parse_port(port).map_err(|problem| Error::Address {
        place: placed.place.clone(),
        object: called("Service", &placed.object.metadata),
        field,
        problem,
    })
}

fn is_tcp(protocol: Option<&String>) -> bool {
    protocol.is_none_or(|protocol| protocol == "TCP")
}
