//! Nodes: objects in, whose an address is and which zone a node stands in out. Without them a node has no zone, and
//! its address no name.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Node;

use super::interner::Interner;
use super::pod::parse_address;

const ZONE: &str = "topology.kubernetes.io/zone";
const CONTROL_PLANE: &str = "node-role.kubernetes.io/control-plane";

/// What the mesh uses of a Node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Host {
    pub name: Arc<str>,
    zone: Option<Arc<str>>,
    addresses: Vec<IpAddr>,
    /// Where what it dials into pods comes from besides: bridges and tunnel devices have the first addresses of its range
    /// of pods. With some networks a pod may have such an address all the same.
    bridges: Vec<IpAddr>,
    control_plane: bool,
}

/// A node that has an address.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NodeName {
    pub name: Arc<str>,
    /// Where the API server runs, as far as labels say.
    pub control_plane: bool,
}

#[derive(Debug, Default)]
pub(super) struct Hosts {
    zones: HashMap<Arc<str>, Arc<str>>,
    addresses: HashMap<IpAddr, NodeName>,
    bridges: HashMap<IpAddr, NodeName>,
}

impl Host {
    /// Addresses that are no IP address are host names, and passed over.
    pub(super) fn read(node: &Node, interner: &mut Interner) -> Self {
        let label = |key| node.metadata.labels.as_ref().and_then(|labels| labels.get(key));
        let listed = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
        let ranges = node.spec.iter().flat_map(|spec| spec.pod_cidrs.iter().flatten().chain(&spec.pod_cidr));
        let ranges = ranges.filter_map(|range| range.parse::<ipnet::IpNet>().ok());
        let mut bridges: Vec<IpAddr> = ranges.flat_map(|it| [it.network(), next(it.network())]).collect();
        bridges.dedup();
        Self {
            name: interner.text(node.metadata.name.as_deref().unwrap_or_default()),
            zone: label(ZONE).map(|zone| interner.text(zone)),
            addresses: listed.filter_map(|address| parse_address(&address.address).ok()).collect(),
            bridges,
            control_plane: label(CONTROL_PLANE).is_some(),
        }
    }
}

fn next(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(v4) => std::net::Ipv4Addr::from_bits(v4.to_bits().saturating_add(1)).into(),
        IpAddr::V6(v6) => std::net::Ipv6Addr::from_bits(v6.to_bits().saturating_add(1)).into(),
    }
}

impl Hosts {
    pub(super) fn new<'a>(hosts: impl Iterator<Item = &'a Host>) -> Self {
        let mut all = Self::default();
        for host in hosts {
            if let Some(zone) = &host.zone {
                all.zones.insert(host.name.clone(), zone.clone());
            }
            let named = NodeName { name: host.name.clone(), control_plane: host.control_plane };
            all.addresses.extend(host.addresses.iter().map(|address| (*address, named.clone())));
            all.bridges.extend(host.bridges.iter().map(|address| (*address, named.clone())));
        }
        all
    }

    pub(super) fn zone(&self, node: &str) -> Option<&str> {
        self.zones.get(node).map(AsRef::as_ref)
    }

    /// Whether this is a node's own address, and no pod's.
    pub(super) fn owns(&self, address: IpAddr) -> bool {
        self.addresses.contains_key(&address)
    }

    /// The node that dials from this address.
    pub(super) fn at(&self, address: IpAddr) -> Option<&NodeName> {
        self.addresses.get(&address).or_else(|| self.bridges.get(&address))
    }
}
