//! The mesh: manifests or the objects of an API server in, an immutable [`Mesh`] snapshot out.
//!
//! What is broken never replaces what is good: of a directory the last good snapshot stays in force, and the error names
//! file, document and field; of an API server each object's last good version does, because in a cluster somebody is
//! always at work. This room never looks at a certificate.

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use crate::addr::OriginalDst;
use crate::identity::{SpiffeId, TrustDomain};
use crate::policy::{Mode, Policies};

mod check;
mod cluster;
mod directory;
mod error;
mod files;
mod hosts;
mod interner;
mod manifests;
mod objects;
mod parts;
mod pod;
mod server_calls;
mod service;
mod source;
mod vip;

pub use check::{Finding, Severity, check};
pub use error::{Error, InvalidAddress, NoObject, Place};
pub use objects::{Key, Objects};
pub use source::{Scope, Source};

pub use hosts::NodeName;
pub use interner::Labels;
pub use server_calls::ServerCall;
pub use service::ServedPort;
pub use vip::Health;

use files::Files;
use hosts::Hosts;
use objects::Concerned;
use parts::Parts;
use server_calls::ServerCalls;
use service::Services;
use vip::{Endpoint, Vantage, Vip};

/// What a mesh is built with besides its objects.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Of every workload's identity.
    pub trust_domain: TrustDomain,
    /// Policies without a selector in this namespace are the mesh's; Istio calls it `istio-system`.
    pub root_namespace: Arc<str>,
}

/// One pod in the mesh's view, enrolled or not. Pods in phase Succeeded or Failed are absent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
    /// What kubelet names the pod's cgroup after: `metadata.uid`, or of a static pod the digest of its manifest.
    pub uid: Option<Arc<str>>,
    pub service_account: Arc<str>,
    /// `app` (or `app.kubernetes.io/name`) label, else the pod's name: Istio's `*_canonical_service`/`*_app`.
    pub app: Arc<str>,
    /// Node the pod runs on (`spec.nodeName`).
    pub node: Option<Arc<str>>,
    /// All pod IPs, canonical, in manifest order; empty only while the pod is [starting](Mesh::starting). Of a pod on the
    /// host network: the node's.
    pub addresses: Vec<IpAddr>,
    pub labels: Labels,
    /// `istio.io/dataplane-mode` says so and the pod is not on the host network.
    pub enrolled: bool,
    pub identity: SpiffeId,
    /// (name, port) of each TCP container port.
    pub ports: Vec<(Option<Arc<str>>, u16)>,
    /// From the annotation `mtls.dev/netns`: path of the pod's network namespace.
    pub netns: Option<Box<Path>>,
    /// From the annotation `mtls.dev/cgroup`: path of the pod's cgroup2 directory.
    pub cgroup: Option<Box<Path>>,
}

impl Workload {
    /// `namespace/name`: how logs, metrics and the admin API call a pod.
    pub fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}

/// Where a captured connection goes. `service` is `namespace/name`, if the application dialled a VIP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Destination {
    /// An enrolled workload; `address` is the pod's own address and port (a VIP already resolved).
    Workload { workload: Arc<Workload>, address: SocketAddr, service: Option<Arc<str>> },
    /// Plain TCP: a pod that is not enrolled, an address nobody knows, or a port whose mode is DISABLE.
    Plain { workload: Option<Arc<Workload>>, address: SocketAddr, service: Option<Arc<str>> },
    /// A Service of ours that has no ready endpoint, or doesn't serve that port: refuse, as kube-proxy does.
    Nowhere { service: Arc<str> },
}

/// An immutable view of everything known; the data path reads one snapshot per connection.
#[derive(Debug, Default)]
pub struct Mesh {
    /// Rises with every accepted change.
    pub generation: u64,
    pub workloads: Arc<Vec<Arc<Workload>>>,
    /// Pods that have a node but no address yet.
    starting: Arc<Vec<Arc<Workload>>>,
    pub policies: Arc<Policies>,
    by_address: Arc<HashMap<IpAddr, Arc<Workload>>>,
    services: Arc<Services>,
    hosts: Arc<Hosts>,
    server_calls: Arc<ServerCalls>,
    warnings: Vec<Warning>,
}

impl Mesh {
    /// Builds a snapshot. Pure: the same objects make the same mesh.
    ///
    /// # Errors
    ///
    /// The first object that contradicts itself or another, with the place it was read.
    pub fn build(objects: &mut Objects, settings: &Settings, generation: u64) -> Result<Self, Error> {
        Ok(Parts::default().anew(&mut [objects], Concerned::ALL, settings)?.mesh(generation))
    }

    /// Reads every manifest of a directory, once.
    ///
    /// # Errors
    ///
    /// The first thing in it that can't be read or understood.
    pub fn from_directory(directory: &Path, settings: &Settings) -> Result<Self, Error> {
        let mut files = Files::default();
        files.refresh(directory, settings)?;
        Ok(files.parts(&Parts::default(), settings)?.mesh(0))
    }

    /// The workload that owns an address, enrolled or not. Pods on the host network own none: the node's address
    /// does not tell who is using it.
    pub fn workload(&self, address: IpAddr) -> Option<&Arc<Workload>> {
        self.by_address.get(&address)
    }

    /// Decides where a connection to `dst`, dialled by a workload on `node`, goes. Flat cost in the number of
    /// endpoints. Chooses among ready endpoints at random.
    pub fn resolve(&self, dst: OriginalDst, node: &str) -> Destination {
        let Some(service) = self.services.name(dst.ip()) else {
            return self.destination(self.workload(dst.ip()).cloned(), dst.addr(), None);
        };
        let from = Vantage { node, zone: self.hosts.zone(node) };
        let vip = self.services.vip(dst.addr());
        match vip.and_then(|vip| vip.choose(from, |endpoint| self.is_known(endpoint))) {
            Some(endpoint) => {
                let workload = self.workload(endpoint.address.ip()).cloned();
                self.destination(workload, endpoint.address, Some(service.clone()))
            }
            None => Destination::Nowhere { service: service.clone() },
        }
    }

    /// A pod of which only its slice has told so far could be enrolled: to dial it would be to risk plaintext.
    /// Every endpoint to which [`Self::resolve`] may send connections to a Service's address, dialled on `node`; of more
    /// than `most`, so many and one. None for any other address.
    pub fn eligible(&self, dst: OriginalDst, node: &str, most: usize) -> Option<Vec<SocketAddr>> {
        let vip = self.services.vip(dst.addr())?;
        let from = Vantage { node, zone: self.hosts.zone(node) };
        let endpoints = vip.eligible(from, most, |endpoint| self.is_known(endpoint));
        Some(endpoints.iter().map(|endpoint| endpoint.address).collect())
    }

    fn is_known(&self, endpoint: &Endpoint) -> bool {
        let address = endpoint.address.ip();
        !endpoint.is_pod || self.by_address.contains_key(&address) || self.hosts.owns(address)
    }

    /// The node that dials from this address, if nodes are known: whatever runs on its network, for example the API
    /// server of a control plane node.
    pub fn node_at(&self, address: IpAddr) -> Option<&NodeName> {
        self.hosts.at(address)
    }

    /// What the API server itself dials, by the address and port of the pod that it then reaches.
    pub fn server_calls(&self) -> HashMap<SocketAddr, Vec<&ServerCall>> {
        let mut reached = HashMap::<_, Vec<_>>::new();
        for call in &self.server_calls.calls {
            let vips = self.services.addresses_of(&call.service, call.port);
            for endpoint in vips.filter_map(|address| self.services.vip(address)).flat_map(Vip::endpoints) {
                reached.entry(endpoint.address).or_default().push(call);
            }
        }
        reached
    }

    /// Kinds of objects, in the plural, that would say more about that and can't be read.
    pub fn unread_callers(&self) -> &[&'static str] {
        &self.server_calls.unread
    }

    fn destination(
        &self,
        workload: Option<Arc<Workload>>,
        address: SocketAddr,
        service: Option<Arc<str>>,
    ) -> Destination {
        match workload {
            Some(workload)
                if workload.enrolled && self.policies.mode(&workload, address.port()) != Mode::Disable =>
            {
                Destination::Workload { workload, address, service }
            }
            workload => Destination::Plain { workload, address, service },
        }
    }

    /// Every port of every Service with a cluster IP, sorted by name and address.
    pub fn services(&self) -> Vec<ServedPort> {
        self.service_ports().into_iter().filter_map(|(_, address)| self.served(address)).collect()
    }

    /// Name and address of what [`Self::services`] lists, without the endpoints.
    pub fn service_ports(&self) -> Vec<(&Arc<str>, SocketAddr)> {
        self.services.list()
    }

    /// What is behind a Service's address and port.
    pub fn served(&self, address: SocketAddr) -> Option<ServedPort> {
        let vip = self.services.vip(address)?;
        let endpoint =
            |endpoint: &Endpoint| (endpoint.address, self.workload(endpoint.address.ip()).cloned());
        let service = self.services.name(address.ip())?.clone();
        let endpoints = vip.endpoints().iter().filter(|it| self.is_known(it)).map(endpoint).collect();
        Some(ServedPort { service, address, endpoints, health: vip.health() })
    }

    /// Whether the address is a Service's, and which.
    pub fn service(&self, address: IpAddr) -> Option<&Arc<str>> {
        self.services.name(address)
    }

    /// Every address that the kernel half must capture when no mesh prefixes are configured: the addresses of
    /// enrolled workloads and the VIPs of services. Sorted.
    pub fn captured_addresses(&self) -> Vec<IpAddr> {
        let enrolled = self.by_address.iter().filter(|(_, workload)| workload.enrolled);
        let mut addresses: Vec<IpAddr> =
            enrolled.map(|(address, _)| *address).chain(self.services.addresses()).collect();
        addresses.sort_unstable();
        addresses.dedup();
        addresses
    }

    /// What [`Self::captured_addresses`] depends on.
    pub fn addresses(&self) -> Addresses {
        Addresses { workloads: self.by_address.clone(), services: self.services.clone() }
    }

    /// Enrolled workloads on a node.
    pub fn enrolled_on<'a>(&'a self, node: &'a str) -> impl Iterator<Item = &'a Arc<Workload>> {
        self.workloads.iter().filter(move |w| w.enrolled && w.node.as_deref() == Some(node))
    }

    /// Pods on a node that have no address yet, enrolled or not. Nobody can dial them.
    pub fn starting<'a>(&'a self, node: &'a str) -> impl Iterator<Item = &'a Arc<Workload>> {
        self.starting.iter().filter(move |w| w.node.as_deref() == Some(node))
    }

    /// Every pod that has an address or a node.
    pub fn workloads_and_starting(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.iter().chain(self.starting.iter())
    }

    /// Identities of enrolled pods on a node, of those too that are still starting.
    pub fn identities_on<'a>(&'a self, node: &'a str) -> impl Iterator<Item = &'a SpiffeId> {
        let starting = self.starting(node).filter(|workload| workload.enrolled);
        self.enrolled_on(node).chain(starting).map(|workload| &workload.identity)
    }

    /// What in the objects is not honoured as written. Policies have their own: [`Policies::warnings`].
    pub fn warnings(&self) -> &[Warning] {
        &self.warnings
    }
}

/// Who has which address: equal only to that of snapshots that share it.
#[derive(Clone, Debug)]
pub struct Addresses {
    workloads: Arc<HashMap<IpAddr, Arc<Workload>>>,
    services: Arc<Services>,
}

impl PartialEq for Addresses {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.workloads, &other.workloads) && Arc::ptr_eq(&self.services, &other.services)
    }
}

/// A remark on objects that are in force nonetheless.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Warning {
    ClaimedAddress { address: IpAddr, newer: String, older: String },
    SessionAffinity { service: Arc<str> },
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ClaimedAddress { address, newer, older } => write!(
                f,
                "{address} is claimed by Pod {newer} and by the older Pod {older}; it counts as {newer}'s"
            ),
            Self::SessionAffinity { service } => {
                write!(
                    f,
                    "Service {service}: sessionAffinity ClientIP isn't honoured; endpoints are chosen at random"
                )
            }
        }
    }
}

/// `namespace/name`.
fn key(metadata: &ObjectMeta) -> String {
    format!("{}/{}", objects::namespace(metadata), metadata.name.as_deref().unwrap_or_default())
}
