//! The mesh: manifests in, an immutable [`Mesh`] snapshot out.
//!
//! A broken manifest never replaces a good snapshot: the error names file, document and field, and the last good
//! snapshot stays in force. This room never opens a connection and never looks at a certificate.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use crate::addr::OriginalDst;
use crate::identity::SpiffeId;
use crate::policy::Policies;

/// One pod in the mesh's view, enrolled or not. Pods in phase Succeeded or Failed are absent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
    pub service_account: Arc<str>,
    /// `app` (or `app.kubernetes.io/name`) label, else the pod's name: Istio's `*_canonical_service`/`*_app`.
    pub app: Arc<str>,
    /// Node the pod runs on (`spec.nodeName`).
    pub node: Option<Arc<str>>,
    /// All pod IPs, canonical, in manifest order; never empty.
    pub addresses: Vec<IpAddr>,
    pub labels: BTreeMap<String, String>,
    /// `istio.io/dataplane-mode` says so and the pod is not on the host network.
    pub enrolled: bool,
    pub identity: SpiffeId,
    /// (name, port) of each container port.
    pub ports: Vec<(Option<Arc<str>>, u16)>,
    /// From the annotation `mtls.dev/netns`: path of the pod's network namespace.
    pub netns: Option<PathBuf>,
    /// From the annotation `mtls.dev/cgroup`: path of the pod's cgroup2 directory.
    pub cgroup: Option<PathBuf>,
}

impl Workload {
    /// `namespace/name`: how logs, metrics and the admin API call a pod.
    pub fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}

/// Where a captured connection goes.
#[derive(Debug, Clone)]
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
    pub workloads: Vec<Arc<Workload>>,
    pub policies: Policies,
    by_address: HashMap<IpAddr, Arc<Workload>>,
}

impl Mesh {
    /// The workload that owns an address, enrolled or not.
    pub fn workload(&self, address: IpAddr) -> Option<&Arc<Workload>> {
        self.by_address.get(&address)
    }

    /// Decides where a connection to `dst`, dialled by a workload on `node`, goes. Flat cost in the number of
    /// endpoints. Chooses among ready endpoints at random.
    pub fn resolve(&self, _dst: OriginalDst, _node: &str) -> Destination {
        unimplemented!()
    }

    /// Every address that the kernel half must capture when no mesh prefixes are configured: the addresses of
    /// enrolled workloads and the VIPs of services.
    pub fn captured_addresses(&self) -> Vec<IpAddr> {
        unimplemented!()
    }

    /// Enrolled workloads on a node.
    pub fn enrolled_on<'a>(&'a self, node: &'a str) -> impl Iterator<Item = &'a Arc<Workload>> {
        self.workloads.iter().filter(move |w| w.enrolled && w.node.as_deref() == Some(node))
    }
}
