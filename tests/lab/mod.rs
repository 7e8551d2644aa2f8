//! The lab: names of nodes and pods in, a small cluster made of network namespaces and cgroups out.
//!
//! ```text
//!   pod ─ veth ─ [node-a] eth0 ─ port1 [wire] port2 ─ eth0 [node-b] ─ veth ─ pod
//! ```
//!
//! A node is a namespace that routes for its pods; a pod is a namespace and a cgroup. The lab describes itself in
//! Kubernetes manifests, as a cluster would, and knows nothing about the product but its command line. Everything
//! it makes carries the lab's name and is undone on drop; what stays behind is an error.
//!
//! Labs run side by side: namespaces keep them apart, so all of them use the same addresses.

pub mod apps;
mod cgroup;
mod forgery;
mod http;
mod image;
mod kubelet;
pub mod kubernetes;
mod manifests;
mod mesh;
mod network;
mod packet;
mod place;
mod process;
mod requirements;
mod spire;
mod teardown;
mod wire;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, Once, OnceLock};

use anyhow::{Context, Result, ensure};

pub use forgery::{Credentials, Forger};
pub use http::{Request, Response, get as http_get};
pub use kubelet::{Cni, Kubelet, RealPod, RealPodSpec};
pub use manifests::{Level, Mode, Port};
pub use mesh::{Agent, Mesh, Metrics, Options, eventually};
pub use network::plan::MESH_PREFIXES;
pub use network::{cut, sysctl};
pub use place::{Node, Pod, PodSpec};
pub use process::{Finished, PATIENCE, Running};
pub use requirements::{find, lab_app, missing, mtls, skip};
pub use spire::{Said, Spire, SpireAuthority, Svid};
pub use wire::{Encrypted, Flow, Seen, Wire};

/// Sent by applications so that a capture can look for it.
pub const MARKER: &str = "MARKER-WRITTEN-BY-THE-APPLICATION";

/// Starts the name of everything a lab makes.
const PREFIX: &str = "mtls-lab-";

/// Nodes, their pods and the wire between them.
#[derive(Debug)]
pub struct Lab {
    id: String,
    dir: PathBuf,
    cgroup: PathBuf,
    wire: network::Netns,
    nodes: Vec<Arc<Node>>,
    services: AtomicU8,
    pods: Mutex<Vec<Arc<Pod>>>,
    api: OnceLock<kubernetes::ApiServer>,
}

impl Lab {
    /// `node-a` and `node-b`, without pods.
    pub fn two_nodes() -> Result<Self> {
        Self::with_nodes(&["node-a", "node-b"])
    }

    pub fn with_nodes(names: &[&str]) -> Result<Self> {
        static CLEAN: Once = Once::new();
        static COUNTER: AtomicU32 = AtomicU32::new(1);
        CLEAN.call_once(teardown::dead_labs);
        ensure!(names.len() < 200, "a lab has room for fewer than 200 nodes");
        let id = format!("{PREFIX}{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
        Self::build(&id, names).inspect_err(|_| {
            if let Err(error) = teardown::lab(&id) {
                eprintln!("{id}: {error:#}");
            }
        })
    }

    fn build(id: &str, names: &[&str]) -> Result<Self> {
        let dir = teardown::dir(id);
        std::fs::create_dir_all(dir.join("manifests")).with_context(|| format!("make {}", dir.display()))?;
        let cgroup = cgroup::root()?.join(id);
        cgroup::create(&cgroup)?;
        let bpffs = dir.join("bpf");
        std::fs::create_dir(&bpffs)?;
        nix::mount::mount(Some("bpf"), &bpffs, Some("bpf"), nix::mount::MsFlags::empty(), None::<&str>)
            .with_context(|| format!("mount a bpf file system on {}", bpffs.display()))?;
        let wire = network::Netns::create(&format!("{id}-wire"))?;
        network::lay_wire(&wire)?;
        let mut nodes = Vec::new();
        for (index, name) in (1..).zip(names) {
            nodes.push(Arc::new(Node::join(id, &cgroup, &wire, name, index, names.len() as u8)?));
        }
        let lab = Self {
            id: id.into(),
            dir,
            cgroup,
            wire,
            nodes,
            services: AtomicU8::new(10),
            pods: Mutex::new(Vec::new()),
            api: OnceLock::new(),
        };
        lab.namespace("shop", true)?;
        lab.namespace("outside", false)?;
        Ok(lab)
    }

    pub fn id(&self) -> &str {
        &self.id
    }

    /// Where the lab keeps manifests, logs, tokens and applications' data.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The cgroup directory above all of the lab's.
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    pub fn node(&self, name: &str) -> Result<Arc<Node>> {
        self.nodes.iter().find(|node| node.name() == name).cloned().with_context(|| format!("no node {name}"))
    }

    pub fn nodes(&self) -> &[Arc<Node>] {
        &self.nodes
    }

    /// An enrolled pod of namespace `shop`, with a service account of its own name.
    pub fn pod(&self, node: &str, name: &str) -> Result<Arc<Pod>> {
        self.add(PodSpec::new(node, name))
    }

    /// A pod of namespace `outside`, which is not enrolled.
    pub fn outsider(&self, node: &str, name: &str) -> Result<Arc<Pod>> {
        self.add(PodSpec::new(node, name).namespace("outside"))
    }

    /// Makes a pod and writes its manifest.
    pub fn add(&self, spec: PodSpec) -> Result<Arc<Pod>> {
        let pod = Arc::new(Pod::create(&self.id, self.node(spec.node())?, spec)?);
        self.write(&manifests::pod(&pod))?;
        self.pods.lock().unwrap_or_else(|e| e.into_inner()).push(Arc::clone(&pod));
        Ok(pod)
    }

    /// Every pod made so far.
    pub fn pods(&self) -> Vec<Arc<Pod>> {
        self.pods.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// Watches everything that crosses between the nodes from now on, looking for [`MARKER`].
    pub fn watch_wire(&self) -> Result<Wire> {
        Wire::watch(&self.wire, "port1")
    }

    /// Watches everything that enters or leaves a pod by its network.
    pub fn watch_pod(&self, pod: &Pod) -> Result<Wire> {
        Wire::watch(pod.node().netns(), &pod.port_on_node())
    }

    /// Requirements every lab has.
    pub const NEEDS: [&str; 1] = ["ip"];
}

impl Drop for Lab {
    fn drop(&mut self) {
        let failed = std::thread::panicking();
        if failed {
            teardown::show_logs(&self.dir);
        }
        let undone = teardown::lab(&self.id);
        if let Err(error) = undone {
            if failed {
                eprintln!("{}: {error:#}", self.id);
            } else {
                panic!("{} left something behind: {error:#}", self.id);
            }
        }
    }
}
