//! Places where things run: nodes and pods. A specification in, a network namespace and cgroups out.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::manifests::Port;
use crate::network::{self, Netns, plan};
use crate::process::{self, Finished, Running};
use crate::{cgroup, requirements};

/// A node: its own namespace, where the agent and the kubelet's stand-in run.
#[derive(Debug)]
pub struct Node {
    name: String,
    index: u8,
    netns: Netns,
    cgroup: PathBuf,
    next_pod: AtomicU8,
}

impl Node {
    pub(crate) fn join(
        lab: &str,
        cgroup: &Path,
        wire: &Netns,
        name: &str,
        index: u8,
        nodes: u8,
    ) -> Result<Self> {
        let netns = Netns::create(&format!("{lab}-{name}"))?;
        network::join_wire(wire, &netns, index, nodes)?;
        let cgroup = cgroup.join(name);
        for part in ["agent", "kubelet", "pods"] {
            cgroup::create(&cgroup.join(part))?;
        }
        Ok(Self { name: name.into(), index, netns, cgroup, next_pod: AtomicU8::new(10) })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// The directory that stands for this node's cgroup root.
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// The node's own address on the wire.
    pub fn ip(&self) -> IpAddr {
        plan::node(self.index).into()
    }

    /// A command in the node's namespace, outside every pod's cgroup, as the kubelet runs.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        self.command_in("kubelet", program)
    }

    /// The same in a named cgroup of the node.
    pub fn command_in(&self, part: &str, program: impl AsRef<std::ffi::OsStr>) -> Command {
        process::command(program, self.netns.fd(), &self.cgroup.join(part))
    }

    /// A cgroup of the node beside its agent's, made if it isn't there: what runs in it is counted apart.
    pub fn part(&self, name: &str) -> Result<PathBuf> {
        let part = self.cgroup.join(name);
        cgroup::create(&part)?;
        Ok(part)
    }

    /// Runs `lab-app` as the kubelet would run a probe, and returns its last line.
    pub fn app(&self, args: &[&str]) -> Result<Value> {
        run_app(self.command(requirements::lab_app()?), args)
    }

    /// Waits for a command's end.
    pub fn run(&self, program: &str, args: &[&str]) -> Result<Finished> {
        let mut command = self.command(program);
        command.args(args);
        Running::start(command)?.finish()
    }
}

/// What a pod shall be.
#[derive(Clone, Debug)]
pub struct PodSpec {
    node: String,
    name: String,
    namespace: String,
    service_account: String,
    ports: Vec<Port>,
    dataplane_mode: Option<&'static str>,
}

impl PodSpec {
    pub fn new(node: &str, name: &str) -> Self {
        Self {
            node: node.into(),
            name: name.into(),
            namespace: "shop".into(),
            service_account: name.into(),
            ports: Vec::new(),
            dataplane_mode: None,
        }
    }

    pub fn namespace(mut self, namespace: &str) -> Self {
        self.namespace = namespace.into();
        self
    }

    pub fn service_account(mut self, name: &str) -> Self {
        self.service_account = name.into();
        self
    }

    /// Declares a container port.
    pub fn port(mut self, name: &str, port: u16) -> Self {
        self.ports.push(Port { name: name.into(), port });
        self
    }

    /// The pod's own label `istio.io/dataplane-mode`.
    pub fn dataplane_mode(mut self, mode: &'static str) -> Self {
        self.dataplane_mode = Some(mode);
        self
    }

    pub(crate) fn node(&self) -> &str {
        &self.node
    }
}

/// A pod: a namespace and a cgroup behind a node.
#[derive(Debug)]
pub struct Pod {
    spec: PodSpec,
    node: Arc<Node>,
    index: u8,
    netns: Netns,
    cgroup: PathBuf,
}

impl Pod {
    pub(crate) fn create(lab: &str, node: Arc<Node>, spec: PodSpec) -> Result<Self> {
        let index = node.next_pod.fetch_add(1, Ordering::Relaxed);
        let netns = Netns::create(&format!("{lab}-{}", spec.name))?;
        network::join_node(&node.netns, &netns, node.index, index)?;
        let cgroup = node.cgroup.join("pods").join(&spec.name);
        cgroup::create(&cgroup)?;
        Ok(Self { spec, node, index, netns, cgroup })
    }

    pub fn name(&self) -> &str {
        &self.spec.name
    }

    pub fn namespace(&self) -> &str {
        &self.spec.namespace
    }

    pub fn service_account(&self) -> &str {
        &self.spec.service_account
    }

    pub fn ports(&self) -> &[Port] {
        &self.spec.ports
    }

    pub fn dataplane_mode(&self) -> Option<&'static str> {
        self.spec.dataplane_mode
    }

    pub fn node(&self) -> &Node {
        &self.node
    }

    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// What the product calls this workload in certificates and policy, without `spiffe://`.
    pub fn principal(&self) -> String {
        format!("cluster.local/ns/{}/sa/{}", self.spec.namespace, self.spec.service_account)
    }

    pub fn ip(&self) -> IpAddr {
        plan::pod(self.node.index, self.index).into()
    }

    pub fn ip6(&self) -> IpAddr {
        plan::pod6(self.node.index, self.index).into()
    }

    pub fn addr(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.ip(), port)
    }

    pub fn addr6(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.ip6(), port)
    }

    /// The node's end of the pod's network.
    pub(crate) fn port_on_node(&self) -> String {
        format!("pod{}", self.index)
    }

    /// A command inside the pod.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        process::command(program, self.netns.fd(), &self.cgroup)
    }

    /// A command in the pod's network, but in a [part](Node::part) of its node: a proxy beside the pod, say.
    pub fn command_in(&self, part: &str, program: impl AsRef<std::ffi::OsStr>) -> Command {
        process::command(program, self.netns.fd(), &self.node.cgroup.join(part))
    }

    /// Waits for a command's end; its exit status is the caller's to judge.
    pub fn run(&self, program: &str, args: &[&str]) -> Result<Finished> {
        let mut command = self.command(program);
        command.args(args);
        Running::start(command)?.finish()
    }

    /// As [`run`](Self::run), for what may take longer than anything should.
    pub fn run_within(&self, program: &str, args: &[&str], limit: Duration) -> Result<Finished> {
        let mut command = self.command(program);
        command.args(args);
        Running::start(command)?.finish_within(limit)
    }

    /// Starts a command and lets it run.
    pub fn spawn(&self, program: &str, args: &[&str]) -> Result<Running> {
        let mut command = self.command(program);
        command.args(args).stdin(Stdio::piped());
        Running::start(command)
    }

    /// Runs a `lab-app` client and returns its last line.
    pub fn app(&self, args: &[&str]) -> Result<Value> {
        run_app(self.command(requirements::lab_app()?), args)
    }

    /// Starts a `lab-app` that is spoken to, or watched, while it runs.
    pub fn start_app(&self, args: &[&str]) -> Result<Running> {
        let mut command = self.command(requirements::lab_app()?);
        command.args(args).stdin(Stdio::piped());
        Running::start(command)
    }

    /// Starts a `lab-app` server and waits until it listens.
    pub fn serve(&self, args: &[&str]) -> Result<Running> {
        let running = self.start_app(&[&["serve"], args].concat())?;
        running.json_with("listening")?;
        Ok(running)
    }

    /// Takes the pod off the network without a word to its peers.
    pub fn cut(&self) -> Result<()> {
        network::cut(&self.node.netns, self.index)
    }
}

fn run_app(mut command: Command, args: &[&str]) -> Result<Value> {
    command.args(args);
    let finished =
        Running::start(command)?.finish().with_context(|| format!("lab-app {}", args.join(" ")))?;
    finished.success().with_context(|| format!("lab-app {}", args.join(" ")))?.json()
}
