//! Services: manifests in, a table from (VIP, port) to endpoints out.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Service, ServiceSpec};
use k8s_openapi::api::discovery::v1::{Endpoint as SliceEndpoint, EndpointConditions, EndpointSlice};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::error::Error;
use super::interner::{Interner, Labels};
use super::objects::{Objects, Placed, Stripped, called, namespace};
use super::pod::{parse_address, parse_port};
use super::vip::{Candidate, Endpoint, Health, Locality, Readiness, Vip};
use super::{Warning, Workload, key};

/// Label by which an EndpointSlice names its Service.
const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// Every VIP of every Service.
#[derive(Clone, Debug, Default)]
pub(super) struct Services {
    ports: HashMap<SocketAddr, Arc<Vip>>,
    names: HashMap<IpAddr, Arc<str>>,
    /// Whether pods themselves say who is behind some of them.
    follow_pods: bool,
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

/// What the mesh uses of a Service that has an address.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Front {
    /// `namespace/name`.
    pub name: Arc<str>,
    /// Canonical; never empty.
    pub vips: Vec<IpAddr>,
    ports: Vec<FrontPort>,
    locality: Locality,
    not_ready_too: bool,
    session_affinity: bool,
}

/// A Service of a manifest: where no slice says who is behind it, its selector does.
#[derive(Debug)]
pub(super) struct WrittenService {
    front: Front,
    selector: Labels,
}

#[derive(Clone, PartialEq, Eq, Debug)]
struct FrontPort {
    /// By which slices know it; empty for a Service's only port.
    name: Box<str>,
    number: u16,
    target: Target,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Target {
    Number(u16),
    /// Whatever number each pod declares under that name.
    Named(Box<str>),
}

/// What the mesh uses of an EndpointSlice.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Slice {
    ipv4: bool,
    ports: Vec<(Box<str>, u16)>,
    endpoints: Vec<Place>,
}

/// An endpoint without its port.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Place {
    address: IpAddr,
    node: Option<Arc<str>>,
    zone: Option<Arc<str>>,
    hints: Box<[Arc<str>]>,
    readiness: Readiness,
    is_pod: bool,
}

/// Every address and port of one Service.
#[derive(Debug)]
pub(super) struct Table {
    pub name: Arc<str>,
    pub ports: Vec<(SocketAddr, Arc<Vip>)>,
}

impl Services {
    /// The Services of all files; with what in them is not honoured.
    ///
    /// # Errors
    ///
    /// When two Services have the same address.
    pub(super) fn settle(
        files: &[&mut Objects],
        workloads: &[Arc<Workload>],
        readiness: &[Readiness],
    ) -> Result<(Self, Vec<Warning>), Error> {
        let mut slices_of: HashMap<&str, Vec<&Slice>> = HashMap::new();
        for slice in files.iter().flat_map(|file| &file.endpoint_slices) {
            if let Some((service, slice)) = &slice.object {
                slices_of.entry(service).or_default().push(slice);
            }
        }
        let mut selectable: Option<Selectable<'_>> = None;
        let (mut services, mut warnings) = (Self::default(), Vec::new());
        let mut claimed: HashMap<IpAddr, (&Objects, &Stripped<Option<WrittenService>>)> = HashMap::new();
        for (file, placed) in files.iter().flat_map(|file| file.services.iter().map(move |it| (&**file, it)))
        {
            let Some(WrittenService { front, selector }) = &placed.object else { continue };
            for vip in &front.vips {
                if let Some((first_file, first)) = claimed.insert(*vip, (file, placed)) {
                    return Err(Error::ClaimedVip {
                        address: *vip,
                        first: first.key.to_string().into(),
                        first_place: first_file.place(first.spot),
                        second: placed.key.to_string().into(),
                        second_place: file.place(placed.spot),
                    });
                }
            }
            warnings.extend(front.warning());
            let table = match slices_of.get(&*front.name) {
                Some(slices) => front.table(slices.iter().copied()),
                None => {
                    let pods = selectable.get_or_insert_with(|| Selectable::new(workloads, readiness));
                    front.selected(pods.selected(&placed.key.namespace, selector))
                }
            };
            front.vips.iter().for_each(|vip| services.add(*vip, &table));
        }
        services.follow_pods = selectable.is_some();
        Ok((services, warnings))
    }

    /// Whether other pods may make other endpoints, without a slice having changed.
    pub(super) fn follow_pods(&self) -> bool {
        self.follow_pods
    }

    /// Lets an address of a Service lead to what is behind it.
    pub(super) fn add(&mut self, vip: IpAddr, table: &Table) {
        self.names.insert(vip, table.name.clone());
        let ports = table.ports.iter().filter(|(address, _)| address.ip() == vip);
        self.ports.extend(ports.map(|(address, vip)| (*address, vip.clone())));
    }

    pub(super) fn remove(&mut self, vip: IpAddr) {
        self.names.remove(&vip);
        self.ports.retain(|address, _| address.ip() != vip);
    }

    /// What a Service's address and port stand for.
    pub(super) fn vip(&self, address: SocketAddr) -> Option<&Vip> {
        self.ports.get(&address).map(Arc::as_ref)
    }

    /// The addresses of a Service's port.
    pub(super) fn addresses_of(&self, service: &str, port: u16) -> impl Iterator<Item = SocketAddr> {
        let owned = self.names.iter().filter(move |(_, name)| ***name == *service);
        owned.map(move |(address, _)| SocketAddr::new(*address, port))
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

    pub(super) fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.names.keys().copied()
    }
}

/// A pod that a Service selects.
type Selected<'a> = (&'a Workload, Readiness);

/// Pods by namespace, for Services that have no slices.
struct Selectable<'a>(HashMap<&'a str, Vec<Selected<'a>>>);

impl<'a> Selectable<'a> {
    fn new(workloads: &'a [Arc<Workload>], readiness: &[Readiness]) -> Self {
        let mut by_namespace: HashMap<&str, Vec<Selected<'_>>> = HashMap::new();
        for (workload, readiness) in workloads.iter().zip(readiness) {
            by_namespace.entry(&workload.namespace).or_default().push((workload, *readiness));
        }
        Self(by_namespace)
    }

    /// An empty selector selects nobody.
    fn selected(&self, namespace: &str, selector: &Labels) -> Vec<Selected<'a>> {
        let selects = |(workload, _): &Selected<'_>| {
            !selector.is_empty() && selector.iter().all(|(k, v)| workload.labels.get(k) == Some(v))
        };
        let pods = self.0.get(namespace).map(Vec::as_slice).unwrap_or_default();
        pods.iter().copied().filter(selects).collect()
    }
}

impl WrittenService {
    /// As [`Front::read`].
    pub(super) fn read(placed: &Placed<Service>, interner: &mut Interner) -> Result<Option<Self>, Error> {
        let selector = placed.object.spec.as_ref().and_then(|spec| spec.selector.clone());
        let selector = interner.labels(selector.unwrap_or_default());
        Ok(Front::read(placed)?.map(|front| Self { front, selector }))
    }
}

impl Front {
    /// `None` for a Service without an address of its own: headless, ExternalName, or not there yet.
    pub(super) fn read(placed: &Placed<Service>) -> Result<Option<Self>, Error> {
        let Some(spec) = &placed.object.spec else { return Ok(None) };
        let vips = vips(placed, spec)?;
        if vips.is_empty() {
            return Ok(None);
        }
        let checked = |port: i32, field| checked_port(placed, port.into(), field);
        let mut ports = Vec::new();
        for port in spec.ports.iter().flatten().filter(|port| is_tcp(port.protocol.as_ref())) {
            let number = checked(port.port, "spec.ports.port")?;
            let target = match &port.target_port {
                None => Target::Number(number),
                Some(IntOrString::Int(number)) => Target::Number(checked(*number, "spec.ports.targetPort")?),
                Some(IntOrString::String(name)) => Target::Named(name.as_str().into()),
            };
            ports.push(FrontPort { name: port.name.as_deref().unwrap_or_default().into(), number, target });
        }
        ports.shrink_to_fit();
        Ok(Some(Self {
            name: key(&placed.object.metadata).into(),
            vips,
            ports,
            locality: locality(spec),
            not_ready_too: spec.publish_not_ready_addresses.unwrap_or(false),
            session_affinity: spec.session_affinity.as_deref() == Some("ClientIP"),
        }))
    }

    pub(super) fn warning(&self) -> Option<Warning> {
        self.session_affinity.then(|| Warning::SessionAffinity { service: self.name.clone() })
    }

    /// Slices say everything themselves: target ports are already numbers, and readiness is already judged.
    pub(super) fn table<'a>(&self, slices: impl Iterator<Item = &'a Slice> + Clone) -> Table {
        self.with(|port, vip| {
            let mut candidates: Vec<Candidate> = Vec::new();
            // While endpoints move from one slice to another they may be in both.
            let mut known: HashMap<SocketAddr, usize> = HashMap::new();
            for slice in slices.clone().filter(|slice| slice.ipv4 == vip.is_ipv4()) {
                let target = slice.ports.iter().find(|(name, _)| *name == port.name);
                for place in target.iter().flat_map(|_| &slice.endpoints) {
                    let Some((_, target)) = target else { continue };
                    let address = SocketAddr::new(place.address, *target);
                    let candidate = Candidate {
                        endpoint: Endpoint { address, is_pod: place.is_pod },
                        node: place.node.clone(),
                        zone: place.zone.clone(),
                        hints: place.hints.clone(),
                        readiness: if self.not_ready_too { Readiness::Ready } else { place.readiness },
                    };
                    let at = *known.entry(address).or_insert(candidates.len());
                    match candidates.get_mut(at) {
                        None => candidates.push(candidate),
                        Some(same) if candidate.readiness < same.readiness => *same = candidate,
                        Some(_) => {}
                    }
                }
            }
            candidates
        })
    }

    /// Without slices, what the EndpointSlice controller would have found.
    fn selected(&self, selected: Vec<Selected<'_>>) -> Table {
        self.with(|port, vip| {
            let candidate = |(workload, readiness): &Selected<'_>| {
                let address = workload.addresses.iter().find(|a| a.is_ipv4() == vip.is_ipv4())?;
                let target = match &port.target {
                    Target::Number(number) => *number,
                    Target::Named(wanted) => {
                        let ports = &workload.ports;
                        ports.iter().find(|(name, _)| name.as_deref() == Some(wanted))?.1
                    }
                };
                Some(Candidate {
                    endpoint: Endpoint { address: SocketAddr::new(*address, target), is_pod: false },
                    node: workload.node.clone(),
                    zone: None,
                    hints: Box::default(),
                    readiness: if self.not_ready_too { Readiness::Ready } else { *readiness },
                })
            };
            selected.iter().filter_map(candidate).collect()
        })
    }

    fn with(&self, candidates: impl Fn(&FrontPort, IpAddr) -> Vec<Candidate>) -> Table {
        let vip = |port: &FrontPort, vip: IpAddr| Arc::new(Vip::new(self.locality, candidates(port, vip)));
        let ports = self.vips.iter().flat_map(|address| {
            self.ports.iter().map(move |port| (SocketAddr::new(*address, port.number), vip(port, *address)))
        });
        Table { name: self.name.clone(), ports: ports.collect() }
    }
}

impl Slice {
    /// With its Service's `namespace/name`. `None` for a slice of names instead of addresses, or of no Service.
    pub(super) fn read(
        placed: &Placed<EndpointSlice>,
        interner: &mut Interner,
    ) -> Result<Option<(String, Self)>, Error> {
        let EndpointSlice { metadata, address_type, ports, endpoints } = &placed.object;
        let service = metadata.labels.as_ref().and_then(|labels| labels.get(SERVICE_NAME));
        let (Some(service), "IPv4" | "IPv6") = (service, address_type.as_str()) else { return Ok(None) };
        let wrong = |field, problem| Error::Address {
            place: placed.place.clone(),
            object: called("EndpointSlice", metadata),
            field,
            problem,
        };
        let mut slice =
            Self { ipv4: address_type.as_str() == "IPv4", ports: Vec::new(), endpoints: Vec::new() };
        for port in ports.iter().flatten().filter(|port| is_tcp(port.protocol.as_ref())) {
            let Some(number) = port.port else { continue };
            let number = parse_port(number.into()).map_err(|problem| wrong("ports.port", problem))?;
            slice.ports.push((port.name.as_deref().unwrap_or_default().into(), number));
        }
        for endpoint in endpoints.iter().flatten() {
            // Kubernetes: all addresses of an endpoint are the same one; consumers take the first.
            let Some(address) = endpoint.addresses.first() else { continue };
            let address = parse_address(address).map_err(|problem| wrong("endpoints.addresses", problem))?;
            slice.endpoints.push(Place::read(endpoint, address, interner));
        }
        slice.ports.shrink_to_fit();
        slice.endpoints.shrink_to_fit();
        Ok(Some((format!("{}/{service}", namespace(metadata)), slice)))
    }
}

impl Place {
    fn read(endpoint: &SliceEndpoint, address: IpAddr, interner: &mut Interner) -> Self {
        let hints = endpoint.hints.iter().flat_map(|hints| hints.for_zones.iter().flatten());
        Self {
            address,
            node: endpoint.node_name.as_deref().map(|node| interner.text(node)),
            zone: endpoint.zone.as_deref().map(|zone| interner.text(zone)),
            hints: hints.map(|zone| interner.text(&zone.name)).collect(),
            readiness: endpoint.conditions.as_ref().map_or(Readiness::Ready, readiness),
            is_pod: endpoint.target_ref.as_ref().is_some_and(|it| it.kind.as_deref() == Some("Pod")),
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
    vips.shrink_to_fit();
    Ok(vips)
}

fn locality(spec: &ServiceSpec) -> Locality {
    if spec.internal_traffic_policy.as_deref() == Some("Local") {
        return Locality::SameNodeOnly;
    }
    match spec.traffic_distribution.as_deref() {
        Some("PreferSameNode") => Locality::SameNodeFirst,
        Some("PreferSameZone" | "PreferClose") => Locality::SameZoneFirst,
        _ => Locality::Anywhere,
    }
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
