//! The scene: flags in, labs with servers, agents and peers, and the ways through them, out.
//!
//! Two labs of equal shape. In one our agents run; the other knows nothing of them, so that plain TCP and the peers
//! don't pay for our programs in the kernel.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mtls::results::{Compared, Environment, distinct};
use mtls_tests::{Forger, Lab, Mesh, Options, Pod, Running, eventually, mtls, sysctl};

use crate::args::Args;
use crate::cost::{Agent, connections};
use crate::peers::{self, Peer};

/// Where the load server listens, in every server pod.
pub const PORT: u16 = 7000;

/// One way from a client to a server.
pub struct Way {
    pub name: Compared,
    pub client: Arc<Pod>,
    pub server: Arc<Pod>,
    /// What the client dials.
    pub address: SocketAddr,
    /// Whose cost is counted. None on plain TCP.
    pub agents: Vec<Agent>,
    pub carrier: Carrier,
    /// Sockets that an agent has open for one connection.
    pub sockets: u64,
}

impl Way {
    pub fn is_ours(&self) -> bool {
        matches!(self.carrier, Carrier::Mtls | Carrier::Direct)
    }
}

/// Who carries a way's connections.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Carrier {
    Kernel,
    Mtls,
    /// Our kernel half, once our agent has let the first connection of a pair in.
    Direct,
    /// By position in [`World`].
    Peer(usize),
}

pub struct World {
    // Dropped in this order: processes before the labs they run in.
    servers: Vec<Running>,
    peers: Vec<Box<dyn Peer>>,
    mesh: Mesh,
    pub ways: Vec<Way>,
    /// Other pods beside those of `plain` and of `mtls`, for what a neighbour does.
    pub neighbours: Vec<Way>,
    pub meshed: Lab,
    pub bare: Lab,
    /// That a process may open.
    files: u64,
}

pub const PLAIN: &str = "plain";
pub const MTLS: &str = "mtls";
const NODES: [&str; 3] = ["node-a", "node-b", "node-c"];
pub const PLAIN_NEAR: &str = "plain, same node";
/// Everything that anything here listens on: not to be taken by a client's end of a connection.
const LISTENED_ON: &str = "5201,5432,6379,7000-7001,8080,15000-15100,15443";
/// How clients of peers reach the proxy beside them.
const BESIDE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 7001);

impl World {
    pub fn build(args: &Args, files: u64) -> Result<Self> {
        let (meshed, bare) = (Lab::with_nodes(&NODES)?, Lab::two_nodes()?);
        let mut ways = plain(&bare)?;
        ways.extend(ours(&meshed)?);
        let wanted = peers::wanted(args)?;
        for (index, peer) in wanted.iter().enumerate() {
            ways.push(through_peer(&bare, peer.name(), peer.redirects(), index)?);
        }
        let neighbours = neighbours(&meshed, &bare)?;
        for lab in [&meshed, &bare] {
            tune(lab, args.congestion_control.as_deref())?;
        }
        let mesh = start_mesh(&meshed, args)?;
        let mut servers = Vec::new();
        let mtls = mtls()?.to_string_lossy().into_owned();
        for way in ways.iter().chain(&neighbours) {
            servers.push(way.server.spawn(&mtls, &["bench", "server"])?);
            let up = || {
                way.server.netns().within(|| std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, PORT))).ok()
            };
            eventually(Duration::from_secs(10), up).context("a load server does not listen")?;
        }
        let signer = Forger::with_authority(mesh.ca_dir())?;
        let root = mesh.ca_dir().join("ca-cert.pem");
        let of_peers = ways.iter().filter(|way| matches!(way.carrier, Carrier::Peer(_)));
        let peers = wanted
            .into_iter()
            .zip(of_peers)
            .map(|(peer, way)| {
                peer.start(&bare, way, &signer, &root).with_context(|| format!("start {}", way.name.path))
            })
            .collect::<Result<_>>()?;
        ways.retain(|way| args.wants_path(&way.name.path));
        ensure!(!ways.is_empty(), "no path's name contains {:?}", args.path);
        Ok(Self { servers, peers, mesh, ways, neighbours, meshed, bare, files })
    }

    /// Starts a way's agents anew: nothing they learnt, kept open or allocated remains.
    pub fn restart(&mut self, carrier: Carrier) -> Result<()> {
        match carrier {
            Carrier::Kernel => {}
            Carrier::Mtls | Carrier::Direct => {
                for node in NODES {
                    self.mesh.agent(node).kill();
                }
                for node in NODES {
                    self.mesh.agent(node).launch()?;
                }
                for node in NODES {
                    self.mesh.agent(node).await_ready()?;
                }
            }
            Carrier::Peer(index) => self.peers.get_mut(index).context("no such peer")?.restart()?,
        }
        Ok(())
    }

    /// Numbers of idle connections that were asked for, as far as an agent may open so many files.
    pub fn idle_counts(&self, way: &Way, args: &Args) -> Vec<usize> {
        let most = connections(self.files, way.sockets);
        distinct(args.idle.iter().map(|count| most.min(*count)))
    }

    /// Our agents' processes.
    pub fn agents(&self) -> Result<Vec<u32>> {
        self.mesh.pids().context("an agent does not run")
    }

    /// Whether every load server still runs.
    pub fn check_servers(&mut self) -> Result<()> {
        ensure!(self.servers.iter_mut().all(Running::alive), "a load server ended");
        Ok(())
    }
}

/// Where it is measured; `pod` is any that takes part: its namespace's congestion control is everybody's.
pub fn environment(pod: &Pod) -> Result<Environment> {
    const CONTROL: &str = "/proc/sys/net/ipv4/tcp_congestion_control";
    let control = pod.netns().within(|| std::fs::read_to_string(CONTROL).context(CONTROL))?;
    let version = std::process::Command::new(mtls()?).arg("--version").output()?;
    let version = String::from_utf8_lossy(&version.stdout).trim().to_owned();
    Ok(Environment::here(control.trim().to_owned(), version))
}

fn plain(lab: &Lab) -> Result<Vec<Way>> {
    let far = way(
        compared(PLAIN, None),
        lab.outsider("node-a", "plain-client")?,
        lab.outsider("node-b", "plain-server")?,
        Vec::new(),
        Carrier::Kernel,
    );
    let near = way(
        compared(PLAIN_NEAR, None),
        lab.outsider("node-a", "near-client")?,
        lab.outsider("node-a", "near-server")?,
        Vec::new(),
        Carrier::Kernel,
    );
    Ok(vec![far, near])
}

/// The agent of `node-a` relays what stays on it, that of `node-b` encrypts it, that of `node-c` lets it go directly.
fn ours(lab: &Lab) -> Result<Vec<Way>> {
    let cgroup = |node: &str| Ok::<_, anyhow::Error>(lab.node(node)?.cgroup().join("agent"));
    let (a, b, c) = (cgroup("node-a")?, cgroup("node-b")?, cgroup("node-c")?);
    let near = |name, node, prefix: &str, cgroup| {
        Ok::<_, anyhow::Error>(way(
            compared(name, Some(PLAIN_NEAR)),
            lab.pod(node, &format!("{prefix}-client"))?,
            lab.pod(node, &format!("{prefix}-server"))?,
            vec![Agent::new("agent", cgroup)],
            Carrier::Mtls,
        ))
    };
    let mut encrypt = near("mtls, same node, encrypt", "node-b", "encrypt", &b)?;
    // Both ends of the tunnel are its own.
    encrypt.sockets = 4;
    let mut direct = near("mtls, same node, direct", "node-c", "direct", &c)?;
    direct.carrier = Carrier::Direct;
    // The load client's own.
    direct.sockets = 1;
    Ok(vec![
        way(
            compared(MTLS, Some(PLAIN)),
            lab.pod("node-a", "client")?,
            lab.pod("node-b", "server")?,
            vec![Agent::new("client's agent", &a), Agent::new("server's agent", &b)],
            Carrier::Mtls,
        ),
        near("mtls, same node, relay", "node-a", "relay", &a)?,
        encrypt,
        direct,
    ])
}

fn neighbours(meshed: &Lab, bare: &Lab) -> Result<Vec<Way>> {
    let pair = |pods: [Arc<Pod>; 2], name, carrier| {
        let [client, server] = pods;
        way(compared(name, None), client, server, Vec::new(), carrier)
    };
    let plain = [bare.outsider("node-a", "greedy-client")?, bare.outsider("node-b", "greedy-server")?];
    let ours = [meshed.pod("node-a", "greedy-client")?, meshed.pod("node-b", "greedy-server")?];
    Ok(vec![pair(plain, PLAIN, Carrier::Kernel), pair(ours, MTLS, Carrier::Mtls)])
}

/// Plain to the proxy beside the client, or caught by the peer's own redirection.
fn through_peer(lab: &Lab, name: &str, redirects: bool, index: usize) -> Result<Way> {
    let client = lab.outsider("node-a", &format!("{name}-client"))?;
    let server = lab.outsider("node-b", &format!("{name}-server"))?;
    let agents = vec![
        Agent::new("client's agent", &client.node().part(name)?),
        Agent::new("server's agent", &server.node().part(name)?),
    ];
    let mut way = way(compared(name, Some(PLAIN)), client, server, agents, Carrier::Peer(index));
    if !redirects {
        way.address = BESIDE;
    }
    Ok(way)
}

fn way(name: Compared, client: Arc<Pod>, server: Arc<Pod>, agents: Vec<Agent>, carrier: Carrier) -> Way {
    let address = server.addr(PORT);
    Way { name, client, server, address, agents, carrier, sockets: 2 }
}

fn compared(path: &str, baseline: Option<&str>) -> Compared {
    Compared { path: path.into(), baseline: baseline.map(str::to_owned) }
}

/// The same for everybody, before anybody makes a socket.
///
/// Without reuse of ports in TIME_WAIT, a client that opens thousands of connections a second to one address soon looks
/// for a free port longer than it measures. Loopback reuses them by default, a pod's network doesn't: plain TCP would
/// be the only one to suffer.
fn tune(lab: &Lab, congestion_control: Option<&str>) -> Result<()> {
    let nodes = lab.nodes();
    let pods = lab.pods();
    let places = nodes.iter().map(|node| node.netns()).chain(pods.iter().map(|pod| pod.netns()));
    for netns in places {
        netns.within(|| {
            sysctl("ipv4/tcp_tw_reuse", "1")?;
            sysctl("ipv4/ip_local_port_range", "1024 65000")?;
            sysctl("ipv4/ip_local_reserved_ports", LISTENED_ON)?;
            sysctl("core/somaxconn", "8192")?;
            sysctl("ipv4/tcp_max_syn_backlog", "8192")?;
            match congestion_control {
                Some(name) => sysctl("ipv4/tcp_congestion_control", name).with_context(|| {
                    format!(
                        "this kernel has no congestion control {name} for namespaces: modprobe tcp_{name}, and name it in \
                         the host's net.ipv4.tcp_allowed_congestion_control"
                    )
                }),
                None => Ok(()),
            }
        })?;
    }
    Ok(())
}

fn start_mesh(lab: &Lab, args: &Args) -> Result<Mesh> {
    let congestion = args.tunnel_congestion.as_ref().map(|name| format!("--tunnel-congestion={name}"));
    let node_flags = congestion.into_iter().chain(args.agent_flag.iter().cloned()).collect();
    let mut mesh = Mesh::start_with(lab, &Options { node_flags, ..Options::default() })?;
    for (node, mode) in [("node-b", "encrypt"), ("node-c", "direct")] {
        let agent = mesh.agent(node);
        agent.kill();
        let at = agent.args().iter().position(|arg| arg == "--same-node").context("no --same-node")?;
        agent.args()[at + 1] = mode.into();
        agent.start()?;
    }
    Ok(mesh)
}
