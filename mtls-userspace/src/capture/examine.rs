//! What really is in force for a pod: looked up in the kernel at the moment of asking, not in our own memory of it.
//! Changes nothing.

use std::fs::File;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use ipnet::IpNet;
use mtls_common::{ListenerKey, ModeKey, OUTBOUND_PORT, TUNNEL_PORT, claim, listener, map, mode};

use super::address::{key4, key6, words};
use super::diag::Tcp;
use super::error::Error;
use super::kernel::HOOKS;
use super::modes::KernelModes;
use super::netns::Netns;
use super::node::{Capture, on};
use super::pod::LocalPod;
use super::sys::{self, LinkTarget};
use crate::policy::PortModes;

/// One thing that must hold for a pod to be protected.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fact {
    /// A name that stays.
    pub name: &'static str,
    pub holds: bool,
    /// What was found, where.
    pub found: String,
}

/// Where the manifest says that a pod lives.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    pub netns: Option<&'a Path>,
    pub cgroup: Option<&'a Path>,
}

impl Capture {
    /// Whether the pod's connections to `to` are captured: all addresses of the destination pod that it can dial.
    pub fn examine_source(&self, pod: &LocalPod, place: Place<'_>, to: &[SocketAddr]) -> Vec<Fact> {
        vec![
            fact("namespace", namespace(pod, place)),
            fact("connect_hooks", self.hooks(place)),
            fact("capture_entry", self.capture_entry(pod)),
            fact("listeners", self.listeners(pod, listener::OUTBOUND, OUTBOUND_PORT)),
            fact("destination_captured", self.captures(to)),
            fact("direct_connections", direct(pod, to)),
        ]
    }

    /// Whether only what has proven itself, or what `modes` let in, reaches `at`, addresses of the pod with one port.
    pub fn examine_destination(
        &self,
        pod: &LocalPod,
        place: Place<'_>,
        at: &[SocketAddr],
        modes: &PortModes,
        sources: &[IpAddr],
    ) -> Vec<Fact> {
        let port = at.first().map_or(0, SocketAddr::port);
        vec![
            fact("namespace", namespace(pod, place)),
            fact("fence", self.fence(pod)),
            fact("address", self.addresses(pod, at)),
            fact("listeners", self.listeners(pod, listener::TUNNEL, TUNNEL_PORT)),
            fact("mode", self.mode(pod, port, modes)),
            fact("plaintext_connections", plaintext(pod, port, sources)),
        ]
    }

    /// The pinned hooks run for sockets of the pod's cgroup.
    fn hooks(&self, place: Place<'_>) -> Outcome {
        let cgroup = place.cgroup.unwrap_or_else(|| self.cgroup_root());
        let at = cgroup.display();
        let opened = File::open(cgroup).map_err(|source| Error::Cgroup { path: cgroup.into(), source })?;
        for (name, attach) in HOOKS {
            let Some(link) = self.pins.link_info(name)? else {
                return Ok((false, format!("the hook {name} is not pinned")));
            };
            let running = sys::effective_programs(&opened, attach)
                .map_err(|source| Error::Cgroup { path: cgroup.into(), source })?;
            if !running.contains(&link.program) {
                return Ok((false, format!("the hook {name} does not run for sockets of {at}")));
            }
        }
        Ok((true, format!("{} hooks run for sockets of {at}", HOOKS.len())))
    }

    fn capture_entry(&self, pod: &LocalPod) -> Outcome {
        let cookie = pod.netns_cookie();
        match self.state().control.pods.get(&cookie, 0) {
            Ok(row) if row.workers > 0 => {
                Ok((true, format!("map {} has namespace {cookie:#x}: {} workers", map::PODS, row.workers)))
            }
            _ => Ok((false, format!("map {} lacks namespace {cookie:#x}: nothing is captured", map::PODS))),
        }
    }

    /// The agent listens in the pod, and the kernel half knows those sockets: it forgets them when they are closed.
    fn listeners(&self, pod: &LocalPod, kind: u16, port: u16) -> Outcome {
        let cookie = pod.netns_cookie();
        let steered = {
            let state = self.state();
            let known: Result<Vec<ListenerKey>, _> = state.control.listeners.keys().collect();
            let known = known.map_err(on(map::LISTENERS, "reading"))?;
            known.iter().filter(|key| key.netns == cookie && key.kind == kind).count()
        };
        let (listening, _) = pod.sockets()?;
        let found = format!("port {port} in the pod: {steered} sockets in map {}", map::LISTENERS);
        Ok((listening.contains(&port) && steered > 0, found))
    }

    fn captures(&self, to: &[SocketAddr]) -> Outcome {
        let state = self.state();
        let is_missing = |ip: &IpAddr| match IpNet::from(*ip) {
            IpNet::V4(v4) => state.control.captured4.get(&key4(v4), 0).is_err(),
            IpNet::V6(v6) => state.control.captured6.get(&key6(v6), 0).is_err(),
        };
        let maps = format!("maps {} and {}", map::CAPTURED4, map::CAPTURED6);
        Ok(match to.iter().map(SocketAddr::ip).find(is_missing) {
            Some(ip) => (false, format!("{maps} do not cover {ip}")),
            None => (true, format!("{maps} cover {}", list(to.iter().map(SocketAddr::ip)))),
        })
    }

    /// The lookup program decides about everything that arrives in the pod's namespace.
    fn fence(&self, pod: &LocalPod) -> Outcome {
        let Some(link) = self.pins.lookup_info(pod.netns_cookie())? else {
            return Ok((false, "the pod's sk_lookup link is not pinned".to_owned()));
        };
        let inode = pod.netns.inode()?;
        match link.target {
            LinkTarget::Netns { inode: at } if u64::from(at) == inode => {
                Ok((true, format!("sk_lookup program {} is attached to net:[{inode}]", link.program)))
            }
            _ => Ok((false, format!("the pinned sk_lookup link is not attached to net:[{inode}]"))),
        }
    }

    fn addresses(&self, pod: &LocalPod, at: &[SocketAddr]) -> Outcome {
        let state = self.state();
        let is_not_ours = |ip: &IpAddr| {
            let local = state.control.local.get(&words(*ip), 0);
            !local.is_ok_and(|local| local.netns == pod.netns_cookie() && local.claim == claim::MANIFEST)
        };
        Ok(match at.iter().map(SocketAddr::ip).find(is_not_ours) {
            Some(ip) => (false, format!("map {} does not give {ip} to the pod", map::LOCAL)),
            None => {
                (true, format!("map {} gives {} to the pod", map::LOCAL, list(at.iter().map(SocketAddr::ip))))
            }
        })
    }

    /// The kernel enforces the mode that policy asks for.
    fn mode(&self, pod: &LocalPod, port: u16, modes: &PortModes) -> Outcome {
        let state = self.state();
        let key = |port| ModeKey { netns: pod.netns_cookie(), port, pad: [0; 3] };
        let held = state.control.modes.get(&key(port), 0).or_else(|_| state.control.modes.get(&key(0), 0));
        let wanted = KernelModes::from(modes).of(port);
        Ok(match held {
            // As the kernel half reads it: a pod without modes is strict.
            Err(_) => (wanted == mode::STRICT, format!("map {} has no mode for the pod", map::MODES)),
            Ok(held) => {
                (held == wanted, format!("map {} says {} for port {port}", map::MODES, mode_name(held)))
            }
        })
    }
}

type Outcome = Result<(bool, String), Error>;

fn fact(name: &'static str, outcome: Outcome) -> Fact {
    let (holds, found) = outcome.unwrap_or_else(|error| (false, chain(&error)));
    Fact { name, holds, found }
}

fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain(source)),
        None => error.to_string(),
    }
}

/// The path of the manifest still leads to the namespace that was enrolled.
fn namespace(pod: &LocalPod, place: Place<'_>) -> Outcome {
    let Some(path) = place.netns else {
        return Ok((false, "the manifest names no network namespace".to_owned()));
    };
    let failed =
        |what| move |source| Error::Netns { pod: pod.name().to_owned(), path: path.to_owned(), what, source };
    let now = Netns::open(path).map_err(failed("opening"))?.cookie();
    let at = path.display();
    Ok(match now == pod.netns_cookie() {
        true => (true, format!("{at} is the enrolled namespace {now:#x}")),
        false => (false, format!("{at} is another namespace ({now:#x}) than the one that is enrolled")),
    })
}

/// Captured sockets are connected to the listener. One that is connected to the destination itself was not captured,
/// unless the kernel half let it through by a grant.
fn direct(pod: &LocalPod, to: &[SocketAddr]) -> Outcome {
    let (_, connected) = pod.sockets()?;
    let is_ungranted = |socket: &&Tcp| !pod.is_direct(socket.local, socket.remote);
    let count = connected.iter().filter(|tcp| to.contains(&tcp.remote)).filter(is_ungranted).count();
    Ok((count == 0, format!("{count} open connections of the pod go to {} past the agent", list(to))))
}

fn plaintext(pod: &LocalPod, port: u16, sources: &[IpAddr]) -> Outcome {
    let (_, connected) = pod.sockets()?;
    let is_from_source = |remote: SocketAddr| sources.contains(&remote.ip());
    let of_pair = connected.iter().filter(|tcp| tcp.local.port() == port && is_from_source(tcp.remote));
    let count = of_pair.filter(|tcp| pod.is_plaintext(tcp)).count();
    Ok((count == 0, format!("{count} open plaintext connections of the source to port {port}")))
}

fn mode_name(mode: u32) -> &'static str {
    match mode {
        mode::STRICT => "STRICT",
        mode::PROXY => "PERMISSIVE, plaintext judged by the agent",
        mode::PERMISSIVE => "PERMISSIVE",
        _ => "an unknown mode",
    }
}

fn list(items: impl IntoIterator<Item = impl ToString>) -> String {
    items.into_iter().map(|item| item.to_string()).collect::<Vec<_>>().join(", ")
}
