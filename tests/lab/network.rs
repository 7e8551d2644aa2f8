//! Network namespaces: names and address plans in, namespaces joined by veth pairs out.
//!
//! Uses only `ip` from iproute2, so that a person can look at a running lab with the same tool. Never touches the
//! namespace of the caller.

use std::fs::File;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use nix::sched::CloneFlags;

/// Where `ip netns` keeps its names.
pub const NAMES: &str = "/run/netns";

/// A network namespace with a name. The lab's teardown deletes it.
#[derive(Debug)]
pub struct Netns {
    name: String,
    fd: Arc<OwnedFd>,
}

impl Netns {
    pub fn create(name: &str) -> Result<Self> {
        ip(&["netns", "add", name], "")?;
        let path = Path::new(NAMES).join(name);
        let fd = File::open(&path).with_context(|| format!("open {}", path.display()))?;
        let netns = Self { name: name.into(), fd: Arc::new(fd.into()) };
        netns.within(|| {
            // Addresses are usable at once: duplicates cannot exist here, so nothing needs to look for them.
            for (key, value) in [
                ("ipv6/conf/all/accept_dad", "0"),
                ("ipv6/conf/default/accept_dad", "0"),
                ("ipv4/tcp_fastopen", "3"),
                ("ipv4/ping_group_range", "0 2147483647"),
            ] {
                sysctl(key, value)?;
            }
            Ok::<_, anyhow::Error>(())
        })?;
        netns.ip("link set lo up\n")?;
        Ok(netns)
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn path(&self) -> PathBuf {
        Path::new(NAMES).join(&self.name)
    }

    pub fn fd(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.fd)
    }

    /// Runs `work` on a thread of its own inside this namespace. Sockets it returns stay in the namespace.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let entered = scope.spawn(|| {
                nix::sched::setns(self.fd.as_fd(), CloneFlags::CLONE_NEWNET)
                    .expect("cannot enter a network namespace");
                work()
            });
            entered.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Runs `ip` commands, one a line, inside this namespace.
    pub fn ip(&self, batch: &str) -> Result<()> {
        ip(&["-n", &self.name, "-batch", "-"], batch)
    }
}

/// Deletes a namespace by name.
pub fn delete(name: &str) -> Result<()> {
    ip(&["netns", "del", name], "")
}

/// Sets one value below `/proc/sys/net` of the namespace the calling thread is in.
pub fn sysctl(key: &str, value: &str) -> Result<()> {
    let path = Path::new("/proc/sys/net").join(key);
    std::fs::write(&path, value).with_context(|| format!("write {value:?} to {}", path.display()))
}

/// The addresses of one lab: the same in every lab, because namespaces keep labs apart.
pub mod plan {
    use super::*;

    /// What agents are told belongs to the mesh: pods and Services.
    pub const MESH_PREFIXES: [&str; 3] = ["10.30.0.0/16", "10.96.0.0/16", "fd00:30::/32"];

    pub fn node(index: u8) -> Ipv4Addr {
        Ipv4Addr::new(172, 30, 0, index)
    }

    pub fn node6(index: u8) -> Ipv6Addr {
        Ipv6Addr::new(0xfd30, 0, 0, 0, 0, 0, 0, index.into())
    }

    pub fn pod(node: u8, index: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 30, node, index)
    }

    pub fn pod6(node: u8, index: u8) -> Ipv6Addr {
        Ipv6Addr::new(0xfd00, 0x30, node.into(), 0, 0, 0, 0, index.into())
    }

    pub fn service(index: u8) -> IpAddr {
        Ipv4Addr::new(10, 96, 0, index).into()
    }
}

/// Adds a node's port to the wire and tells the node where the other nodes' pods are.
pub fn join_wire(wire: &Netns, node: &Netns, index: u8, nodes: u8) -> Result<()> {
    node.within(|| {
        for (key, value) in [
            ("ipv4/ip_forward", "1"),
            ("ipv6/conf/all/forwarding", "1"),
            ("ipv4/conf/all/rp_filter", "0"),
            ("ipv4/conf/default/rp_filter", "0"),
        ] {
            sysctl(key, value)?;
        }
        Ok::<_, anyhow::Error>(())
    })?;
    wire.ip(&format!(
        "link add port{index} type veth peer name eth0 netns {}\nlink set port{index} master wire up\n",
        node.name()
    ))?;
    let (a4, a6) = (plan::node(index), plan::node6(index));
    let mut batch = format!("addr add {a4}/24 dev eth0\naddr add {a6}/64 dev eth0 nodad\nlink set eth0 up\n");
    for other in (1..=nodes).filter(|other| *other != index) {
        batch += &format!(
            "route add {}/24 via {}\nroute add {}/64 via {}\n",
            plan::pod(other, 0),
            plan::node(other),
            plan::pod6(other, 0),
            plan::node6(other)
        );
    }
    node.ip(&batch)
}

/// Makes the switch that joins nodes.
pub fn lay_wire(wire: &Netns) -> Result<()> {
    wire.ip("link add wire type bridge mcast_snooping 0\nlink set wire up\n")
}

/// Connects a pod to its node with both its addresses, routed and without a bridge, as kindnet, Calico and the big clouds'
/// plugins do: the node's end of each pair has the gateway's address.
pub fn join_node(node: &Netns, pod: &Netns, node_index: u8, index: u8) -> Result<()> {
    let (a4, a6) = (plan::pod(node_index, index), plan::pod6(node_index, index));
    let (gw4, gw6) = (plan::pod(node_index, 1), plan::pod6(node_index, 1));
    node.ip(&format!(
        "link add pod{index} type veth peer name eth0 netns {}\nlink set pod{index} up\n\
         addr add {gw4}/32 dev pod{index}\naddr add {gw6}/128 dev pod{index} nodad\n\
         route add {a4}/32 dev pod{index}\nroute add {a6}/128 dev pod{index}\n",
        pod.name()
    ))?;
    pod.ip(&format!(
        "addr add {a4}/32 dev eth0\naddr add {a6}/128 dev eth0 nodad\nlink set eth0 up\n\
         route add {gw4}/32 dev eth0\nroute add {gw6}/128 dev eth0\n\
         route add default via {gw4}\nroute add default via {gw6}\n"
    ))
}

/// Takes a pod off the network, as a node's crash would: no FIN, no RST, nothing.
pub fn cut(node: &Netns, pod_index: u8) -> Result<()> {
    node.ip(&format!("link del pod{pod_index}\n"))
}

fn ip(args: &[&str], batch: &str) -> Result<()> {
    let mut child = Command::new("ip")
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("run `ip` (Debian package iproute2)")?;
    child.stdin.take().context("ip has no standard input")?.write_all(batch.as_bytes())?;
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!("ip {}: {}\n{batch}", args.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
