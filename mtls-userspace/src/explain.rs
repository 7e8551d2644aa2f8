//! What would happen to a connection, without making one: a question and a [`Mesh`] in, an [`Explanation`] out.
//!
//! Follows the walk that [`crate::connection`] writes out and the kernel half's decisions before it, from the same
//! snapshot and by the same policy room. Pure: no I/O, no clock.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::capture::{OUTBOUND_PORT, PLAINTEXT_PORT, TUNNEL_PORT};
use crate::config::SameNode;
use crate::mesh::{Mesh, Workload};
use crate::observe::Path;
use crate::policy::{Mode, Peer, Request, Verdict};

/// One end as people write it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum End {
    Pod { namespace: String, name: String },
    Address(IpAddr),
}

/// How agents are configured, as far as it decides about a connection.
#[derive(Clone, Debug, Default)]
pub struct Setting {
    /// Empty: exactly the addresses in the mesh are captured.
    pub prefixes: Vec<IpNet>,
    pub same_node: SameNode,
}

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Error {
    #[error("{text:?} is neither a pod, written NAMESPACE/NAME, nor an IP address")]
    End { text: String },
    #[error("there is no pod {key}; pods that are finished or have no address yet are not in the mesh")]
    UnknownPod { key: String },
    #[error("{from} and {to} have no addresses of the same family")]
    Family { from: String, to: String },
    #[error("service {service} has no ready endpoint for port {port}: connections to it are refused")]
    NoEndpoint { service: Arc<str>, port: u16 },
}

/// What would happen to one connection. `mtls policy explain` and the admin socket show it as JSON.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Explanation {
    pub from: EndRow,
    pub to: EndRow,
    pub port: u16,
    /// `namespace/name` of the Service that was dialled.
    pub service: Option<String>,
    pub captured: bool,
    pub why_captured: String,
    /// `tunnel`, `same_node`, `direct`, `plaintext`, `passthrough`, as in the access log; `inside` a pod nothing is touched.
    pub path: String,
    /// What somebody between the two pods would see.
    pub wire: String,
    /// Both ends are proven to each other, and nothing readable leaves a pod.
    pub protected: bool,
    /// Of the destination's port; absent where no policy applies, because the destination is not enrolled.
    pub mode: Option<ModeRow>,
    /// The mode if the dry-run policies were enforced, where that differs.
    pub dry_run_mode: Option<ModeRow>,
    pub allowed: bool,
    pub verdict: String,
    /// The policy that decides; absent where none does.
    pub policy: Option<String>,
    /// The verdict if the dry-run policies were enforced, if any concerns this connection.
    pub dry_run: Option<String>,
    pub notes: Vec<String>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct EndRow {
    /// `namespace/name`.
    pub workload: Option<String>,
    pub address: String,
    /// SPIFFE ID of an enrolled pod.
    pub identity: Option<String>,
    pub enrolled: bool,
    pub node: Option<String>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ModeRow {
    pub mode: String,
    /// `namespace/name` of the PeerAuthentication that set it; absent for the default.
    pub policy: Option<String>,
}

/// Explains a connection; one to a Service's address once per endpoint.
///
/// # Errors
///
/// When an end is not in the mesh, or nobody would answer.
pub fn explain(
    mesh: &Mesh,
    setting: &Setting,
    from: &End,
    to: &End,
    port: u16,
) -> Result<Vec<Explanation>, Error> {
    let source = Side::of(mesh, from)?;
    let target = Side::of(mesh, to)?;
    let vip = target.addresses.first().and_then(|ip| Some((*ip, mesh.service(*ip)?)));
    if let Some((ip, service)) = vip {
        let address = SocketAddr::new(ip, port);
        let endpoints = mesh.served(address).map(|served| served.endpoints).unwrap_or_default();
        if endpoints.is_empty() {
            return Err(Error::NoEndpoint { service: service.clone(), port });
        }
        let explained = endpoints.into_iter().map(|(endpoint, workload)| {
            let target = Side { workload, addresses: vec![endpoint.ip()] };
            connection(mesh, setting, &source, &target, endpoint.port(), Some((ip, service)))
        });
        return explained.collect();
    }
    Ok(vec![connection(mesh, setting, &source, &target, port, None)?])
}

/// An end as the mesh knows it.
struct Side {
    workload: Option<Arc<Workload>>,
    addresses: Vec<IpAddr>,
}

impl Side {
    fn of(mesh: &Mesh, end: &End) -> Result<Self, Error> {
        match end {
            End::Address(address) => {
                let address = address.to_canonical();
                Ok(Self { workload: mesh.workload(address).cloned(), addresses: vec![address] })
            }
            End::Pod { namespace, name } => {
                let found = mesh.workloads.iter().find(|w| *w.namespace == **namespace && *w.name == **name);
                let workload =
                    found.ok_or_else(|| Error::UnknownPod { key: format!("{namespace}/{name}") })?;
                Ok(Self { addresses: workload.addresses.clone(), workload: Some(workload.clone()) })
            }
        }
    }

    fn enrolled(&self) -> Option<&Arc<Workload>> {
        self.workload.as_ref().filter(|workload| workload.enrolled)
    }

    fn name(&self) -> String {
        match (&self.workload, self.addresses.first()) {
            (Some(workload), _) => workload.key(),
            (None, Some(address)) => address.to_string(),
            (None, None) => String::new(),
        }
    }

    fn row(&self, address: String) -> EndRow {
        let workload = self.workload.as_ref();
        EndRow {
            workload: workload.map(|workload| workload.key()),
            address,
            identity: self.enrolled().map(|workload| workload.identity.to_string()),
            enrolled: self.enrolled().is_some(),
            node: workload.and_then(|workload| workload.node.as_deref().map(str::to_owned)),
        }
    }
}

fn connection(
    mesh: &Mesh,
    setting: &Setting,
    source: &Side,
    target: &Side,
    port: u16,
    service: Option<(IpAddr, &Arc<str>)>,
) -> Result<Explanation, Error> {
    let pairs = source.addresses.iter().flat_map(|from| target.addresses.iter().map(move |to| (*from, *to)));
    let (from_ip, to_ip) = pairs
        .into_iter()
        .find(|(from, to)| from.is_ipv4() == to.is_ipv4())
        .ok_or_else(|| Error::Family { from: source.name(), to: target.name() })?;
    let address = SocketAddr::new(to_ip, port);
    let dialled = service.map_or(to_ip, |(vip, _)| vip);
    let (captured, why_captured) = capture(mesh, setting, source, target, dialled);

    let set_by = |(mode, policy): (Mode, Option<&Arc<str>>)| ModeRow {
        mode: mode.to_string(),
        policy: policy.map(|policy| policy.to_string()),
    };
    let judged = target.enrolled();
    let mode = judged.map(|workload| mesh.policies.mode_set_by(workload, port));
    let dry_run_mode = judged.and_then(|workload| mesh.policies.dry_run_mode_set_by(workload, port));
    let path = path(setting, source, target, captured, mode.map(|(mode, _)| mode));
    let decision = decide(mesh, source, target, path, from_ip, address);
    let mut notes = Vec::new();
    if !decision.allowed && path == Some(Path::Plaintext) && source.workload.is_none() {
        notes.push(
            "connections that the node's own processes open (kubelet's probes) are let in whatever the mode"
                .to_owned(),
        );
    }
    Ok(Explanation {
        from: source.row(from_ip.to_string()),
        to: target.row(address.to_string()),
        port,
        service: service.map(|(_, name)| name.to_string()),
        captured,
        why_captured,
        path: path.map_or("inside", Path::as_str).to_owned(),
        wire: wire(path, from_ip, address, decision.allowed),
        protected: matches!(path, None | Some(Path::Tunnel | Path::SameNode)),
        mode: mode.map(set_by),
        dry_run_mode: dry_run_mode.map(set_by),
        allowed: decision.allowed,
        verdict: decision.verdict,
        policy: decision.policy,
        dry_run: decision.dry_run,
        notes,
    })
}

/// What the kernel half does with the dialling socket.
fn capture(mesh: &Mesh, setting: &Setting, source: &Side, target: &Side, dialled: IpAddr) -> (bool, String) {
    let Some(from) = source.enrolled() else {
        return (false, format!("no: {} is not enrolled", source.name()));
    };
    if same_pod(source, target) {
        return (false, "no: a pod's connections to itself are left alone".to_owned());
    }
    let covered = if setting.prefixes.is_empty() {
        mesh.captured_addresses().binary_search(&dialled).is_ok()
    } else {
        setting.prefixes.iter().any(|prefix| prefix.contains(&dialled))
    };
    match covered {
        true => (true, format!("yes: {} is enrolled and {dialled} is in the mesh", from.key())),
        false => (false, format!("no: {dialled} is outside the mesh")),
    }
}

fn same_pod(source: &Side, target: &Side) -> bool {
    match (&source.workload, &target.workload) {
        (Some(from), Some(to)) => from.key() == to.key(),
        _ => false,
    }
}

/// The way the bytes take; `None` within one pod.
fn path(setting: &Setting, source: &Side, target: &Side, captured: bool, mode: Option<Mode>) -> Option<Path> {
    if same_pod(source, target) {
        return None;
    }
    let node = |side: &Side| side.workload.as_ref().and_then(|workload| workload.node.clone());
    Some(match (captured, mode) {
        (true, Some(Mode::Strict | Mode::Permissive)) => {
            let neighbours = node(source).is_some() && node(source) == node(target);
            match setting.same_node {
                SameNode::Relay if neighbours => Path::SameNode,
                SameNode::Direct if neighbours => Path::Direct,
                _ => Path::Tunnel,
            }
        }
        (_, Some(_)) => Path::Plaintext,
        (_, None) => Path::Passthrough,
    })
}

struct Decision {
    allowed: bool,
    verdict: String,
    policy: Option<String>,
    dry_run: Option<String>,
}

impl Decision {
    fn without_policy(allowed: bool, verdict: &str) -> Self {
        Self { allowed, verdict: verdict.to_owned(), policy: None, dry_run: None }
    }
}

fn decide(
    mesh: &Mesh,
    source: &Side,
    target: &Side,
    path: Option<Path>,
    source_ip: IpAddr,
    address: SocketAddr,
) -> Decision {
    let Some(path) = path else {
        return Decision::without_policy(true, "allowed: inside a pod nothing is judged");
    };
    let Some(destination) = target.enrolled() else {
        return Decision::without_policy(
            true,
            "allowed: the destination is not enrolled, so no policy applies",
        );
    };
    if [OUTBOUND_PORT, PLAINTEXT_PORT, TUNNEL_PORT].contains(&address.port()) {
        return Decision::without_policy(false, "refused: this port of an enrolled pod is the agent's own");
    }
    let peer = match (path, source.enrolled()) {
        (Path::Tunnel | Path::SameNode | Path::Direct, Some(from)) => Peer::Verified(&from.identity),
        _ => Peer::Plaintext,
    };
    let request = Request { destination, address, source_ip, peer };
    let (verdict, dry_run) = match mesh.policies.authorize(&request) {
        Ok(permit) => (Verdict::Allowed { policy: permit.policy().cloned() }, permit.dry_run().cloned()),
        Err(denied) => (Verdict::Denied { reason: denied.reason, policy: denied.policy }, denied.dry_run),
    };
    let text = verdict.to_string();
    let (allowed, policy) = match verdict {
        Verdict::Allowed { policy } => (true, policy),
        Verdict::Denied { policy, .. } => (false, policy),
    };
    Decision {
        allowed,
        verdict: text,
        policy: policy.map(|policy| policy.to_string()),
        dry_run: dry_run.map(|verdict| verdict.to_string()),
    }
}

fn wire(path: Option<Path>, from: IpAddr, to: SocketAddr, allowed: bool) -> String {
    match path {
        None => "nothing: the pod's own loopback".to_owned(),
        Some(Path::SameNode) => "nothing: the bytes stay on the two pods' loopbacks".to_owned(),
        Some(Path::Direct) => {
            format!(
                "the application's own bytes between {from} and {to} on the node's pod network, and on no other (the \
                 first connection of a pair is relayed)"
            )
        }
        Some(Path::Tunnel) => {
            format!("TLS 1.3 between {from} and {}", SocketAddr::new(to.ip(), TUNNEL_PORT))
        }
        Some(Path::Plaintext | Path::Passthrough) if allowed => {
            format!(
                "the application's own bytes between {from} and {to}, readable unless it encrypts them itself"
            )
        }
        Some(Path::Plaintext | Path::Passthrough) => {
            format!("a SYN from {from} to {to}, answered with RST")
        }
    }
}

impl FromStr for End {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        if let Ok(address) = text.parse() {
            return Ok(Self::Address(address));
        }
        match text.split_once('/') {
            Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
                Ok(Self::Pod { namespace: namespace.to_owned(), name: name.to_owned() })
            }
            _ => Err(Error::End { text: text.to_owned() }),
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod { namespace, name } => write!(f, "{namespace}/{name}"),
            Self::Address(address) => address.fmt(f),
        }
    }
}
