//! The product itself: the connect hook captures, agents carry. Between two nodes, and within one in every way that
//! `--same-node` knows.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::ValueEnum;

use super::{Carrier, Path};
use crate::compare::place::{CLIENT, Lab, PORT, Pair, Place, Process, SERVER, until, write};
use crate::config::SameNode;

const CA: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 15012);
const FIRST_ADMIN_PORT: u16 = 15020;

/// Where the server's pod is, as the client's agent sees it.
enum Agents {
    OtherNode,
    SameNode(SameNode),
}

pub(super) fn paths() -> Vec<Box<dyn Path>> {
    let same = SameNode::value_variants().iter().map(|way| Agents::SameNode(*way));
    std::iter::once(Agents::OtherNode).chain(same).map(|agents| Box::new(agents) as Box<dyn Path>).collect()
}

impl Agents {
    /// The word of `--same-node`.
    fn word(&self) -> String {
        let way = match self {
            Self::OtherNode => SameNode::default(),
            Self::SameNode(way) => *way,
        };
        way.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    fn nodes(&self) -> &'static [&'static str] {
        match self {
            Self::OtherNode => &["a", "b"],
            Self::SameNode(_) => &["a"],
        }
    }
}

impl Path for Agents {
    fn name(&self) -> String {
        match self {
            Self::OtherNode => "agent, connect hook, between nodes".into(),
            Self::SameNode(_) => format!("agent, connect hook, same node, {}", self.word()),
        }
    }

    fn about(&self) -> String {
        match self {
            Self::OtherNode => "the product: two agents and mutual TLS".into(),
            Self::SameNode(_) => format!("the product: one agent with --same-node {}", self.word()),
        }
    }

    fn start(&self, lab: &Lab) -> Result<Carrier> {
        let (dir, cgroup, bpffs) = lab.set()?;
        let cgroup_of = |node: &str, who: &str| Some(cgroup.join(node).join(who));
        let last = self.nodes().last().copied().unwrap_or("a");
        let pair = Pair::make(cgroup_of("a", "client"), cgroup_of(last, "server"))?;
        let manifests = dir.join("manifests");
        fs::create_dir_all(&manifests)?;
        write(&manifests.join("mesh.yaml"), &mesh(&pair, last))?;
        let agents_place = Place::make(cgroup_of("a", "ca"))?;
        let root = dir.join("root.pem");
        let tokens = dir.join("tokens.yaml");
        let secret: u128 = rand::random();
        let token = |node: &str| format!("{secret:032x}-{node}");
        let lines: String = self.nodes().iter().map(|node| format!("{node}: {}\n", token(node))).collect();
        write(&tokens, &lines)?;
        let text = |path: &PathBuf| path.to_string_lossy().into_owned();
        let mut authority = Process::start(agents_place.mtls(&[
            "ca",
            "--listen",
            &CA.to_string(),
            "--root-out",
            &text(&root),
            "--manifests",
            &text(&manifests),
            "--tokens",
            &text(&tokens),
        ])?)?;
        until("the authority serves", || {
            authority.alive()?;
            Ok((root.exists() && agents_place.within(|| TcpStream::connect(CA).is_ok())?).then_some(()))
        })
        .context("the certificate authority")?;
        let mut agents = Vec::new();
        for (number, node) in self.nodes().iter().enumerate() {
            let admin = SocketAddr::from((Ipv4Addr::LOCALHOST, FIRST_ADMIN_PORT + number as u16));
            let token_file = dir.join(format!("{node}.token"));
            write(&token_file, &token(node))?;
            // The agent's process must be below its root, too.
            let here = Place::beside(&agents_place, cgroup_of(node, "agent"))?;
            let command = here.mtls(&[
                "node",
                "--node",
                node,
                "--manifests",
                &text(&manifests),
                "--ca-address",
                &format!("https://{CA}"),
                "--ca-root",
                &text(&root),
                "--ca-token-file",
                &text(&token_file),
                "--cgroup-root",
                &text(&cgroup.join(node)),
                "--bpffs",
                &text(&bpffs.join(node)),
                "--admin",
                &admin.to_string(),
                "--admin-socket",
                &text(&dir.join(format!("{node}.sock"))),
                "--same-node",
                &self.word(),
                "--access-log",
                "off",
                "--mesh-prefix",
                "10.88.0.0/24",
                // Soon enough to be seen in a short run.
                "--kernel-tls-after",
                "1048576",
            ])?;
            fs::create_dir_all(bpffs.join(node))?;
            agents.push((Process::start(command)?, admin));
        }
        for (agent, admin) in &mut agents {
            until("the agent is ready", || {
                agent.alive()?;
                Ok(agents_place.within(|| is_ready(*admin))?.then_some(()))
            })
            .context("the agent")?;
        }
        let processes: Vec<Process> = agents.into_iter().map(|(agent, _)| agent).collect();
        let by_processes = self.word() != "direct";
        Ok(Carrier { processes, _silent: vec![authority], pair, dial: (SERVER, PORT).into(), by_processes })
    }
}

/// `/healthz/ready` says 200.
fn is_ready(admin: SocketAddr) -> bool {
    let ask = || {
        let mut stream = TcpStream::connect(admin)?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        stream.write_all(b"GET /healthz/ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        std::io::Result::Ok(answer.starts_with("HTTP/1.1 200"))
    };
    ask().unwrap_or(false)
}

/// Two pods of an enrolled namespace, STRICT.
fn mesh(pair: &Pair, server_node: &str) -> String {
    let pod = |name: &str, node: &str, ip: std::net::IpAddr, place: &Place| {
        let cgroup = place.cgroup().map(|dir| dir.display().to_string()).unwrap_or_default();
        format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\n  namespace: lab\n  annotations:\n    \
             mtls.dev/netns: {}\n    mtls.dev/cgroup: {cgroup}\nspec:\n  nodeName: {node}\n  \
             serviceAccountName: {name}\n  containers: [{{name: c, image: c, ports: [{{containerPort: {PORT}}}]}}]\n\
             status:\n  podIP: {ip}\n  podIPs: [{{ip: {ip}}}]\n",
            place.netns().display()
        )
    };
    format!(
        "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: lab\n  labels: {{istio.io/dataplane-mode: ambient}}\n{}{}\
         ---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: default, namespace: \
         istio-system}}\nspec: {{mtls: {{mode: STRICT}}}}\n",
        pod("client", "a", CLIENT, &pair.client),
        pod("server", server_node, SERVER, &pair.server),
    )
}
