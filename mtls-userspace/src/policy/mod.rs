//! Policy: (peer, workload, port) in, [`Authorized`] or a [`Denied`] reason out. Pure: no I/O, no clock.
//!
//! A decision is taken from the snapshot's compiled policies. STRICT comes first: plaintext to a STRICT port is
//! refused before any `AuthorizationPolicy` is looked at.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use crate::identity::SpiffeId;
use crate::mesh::Workload;

mod authorization;
mod index;
mod invalid;
mod listing;
mod pattern;
mod peer_authentication;
mod schema;
mod selector;
mod warning;

pub use invalid::Invalid;
pub use listing::{Listed, Says, Scope};
pub use schema::{Action, AuthorizationPolicy, PeerAuthentication};
pub use selector::Selectable;
pub use warning::{Problem, Warning};

use authorization::{Decision, Scopes};
use index::Connection;
use peer_authentication::Levels;

/// What a port accepts. The effective mode, after mesh, namespace, workload and port level were combined.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Mode {
    Strict,
    #[default]
    Permissive,
    Disable,
}

/// The effective modes of one workload, as the kernel half enforces them.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PortModes {
    /// For every port without an entry of its own.
    pub default: Mode,
    pub ports: BTreeMap<u16, Mode>,
    /// An `AuthorizationPolicy` applies: plaintext that the mode accepts must be judged by the agent first.
    pub judged: bool,
}

impl PortModes {
    pub fn of(&self, port: u16) -> Mode {
        self.ports.get(&port).copied().unwrap_or(self.default)
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Strict => "STRICT",
            Self::Permissive => "PERMISSIVE",
            Self::Disable => "DISABLE",
        })
    }
}

/// As in `STRICT` or `STRICT, 8080 PERMISSIVE`.
impl fmt::Display for PortModes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.default)?;
        self.ports.iter().try_for_each(|(port, mode)| write!(f, ", {port} {mode}"))?;
        if self.judged { f.write_str(", authorization policies apply") } else { Ok(()) }
    }
}

/// A connection that asks to be let in.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    pub destination: &'a Workload,
    /// The pod's own address and port, never a Service's.
    pub address: SocketAddr,
    /// The client pod's address, as the server will see it.
    pub source_ip: IpAddr,
    pub peer: Peer<'a>,
}

/// Who asks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Peer<'a> {
    /// Proven by the handshake, or on one node by the kernel's record of which pod owns the socket.
    Verified(&'a SpiffeId),
    Plaintext,
}

/// Proof that a connection was let in; only this room makes one.
#[derive(PartialEq, Eq, Debug)]
pub struct Authorized {
    policy: Option<Arc<str>>,
    dry_run: Option<Verdict>,
}

impl Authorized {
    /// The ALLOW policy (`namespace/name`) that let it in. `None` if no ALLOW policy applies to the workload.
    pub fn policy(&self) -> Option<&Arc<str>> {
        self.policy.as_ref()
    }

    /// What would have happened if the dry-run policies were enforced. `None` if none concerns this connection.
    pub fn dry_run(&self) -> Option<&Verdict> {
        self.dry_run.as_ref()
    }
}

/// A refusal. Its text is what access logs say.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{}", self.verdict())]
pub struct Denied {
    pub reason: Reason,
    /// The policy (`namespace/name`) that decided. `None` if none did: [`Reason::NoAllowMatched`].
    pub policy: Option<Arc<str>>,
    /// What would have happened if the dry-run policies were enforced. `None` if none concerns this connection.
    pub dry_run: Option<Verdict>,
}

impl Denied {
    fn verdict(&self) -> Verdict {
        Verdict::Denied { reason: self.reason, policy: self.policy.clone() }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Reason {
    /// Plaintext to a STRICT port.
    StrictMode,
    DenyPolicy,
    /// ALLOW policies apply to the workload and none of them matches.
    NoAllowMatched,
}

/// An outcome that was not enforced.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    Allowed { policy: Option<Arc<str>> },
    Denied { reason: Reason, policy: Option<Arc<str>> },
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Allowed { policy: None } => f.write_str("allowed: no ALLOW policy applies"),
            Self::Allowed { policy: Some(name) } => write!(f, "allowed by AuthorizationPolicy {name}"),
            Self::Denied { reason: Reason::StrictMode, policy: Some(name) } => {
                write!(f, "plaintext to a STRICT port, denied by PeerAuthentication {name}")
            }
            Self::Denied { reason: Reason::StrictMode, policy: None } => {
                f.write_str("plaintext to a STRICT port")
            }
            Self::Denied { reason: Reason::DenyPolicy, policy } => {
                write!(f, "denied by AuthorizationPolicy {}", policy.as_deref().unwrap_or("unknown"))
            }
            Self::Denied { reason: Reason::NoAllowMatched, .. } => f.write_str("no ALLOW policy matched"),
        }
    }
}

/// Every policy of a snapshot, compiled.
#[derive(Debug, Default)]
pub struct Policies {
    enforced: Levels,
    /// Modes if the dry-run policies were enforced too; `None` without such policies.
    dry_run: Option<Levels>,
    authorization: Scopes,
    warnings: Vec<Warning>,
    listed: Vec<Listed>,
}

impl Policies {
    /// Compiles policies. `workloads` serve only to warn of policies that concern nobody.
    pub fn new<'a>(
        peer_authentications: impl Iterator<Item = &'a PeerAuthentication> + Clone,
        authorization_policies: impl Iterator<Item = &'a AuthorizationPolicy>,
        workloads: &[Arc<Workload>],
        root_namespace: &str,
    ) -> Self {
        let selectable = Selectable::new(workloads.iter().map(Arc::as_ref).filter(|w| w.enrolled));
        let authorization_policies: Vec<_> = authorization_policies.collect();
        let listed = listing::all(
            peer_authentications.clone(),
            authorization_policies.iter().copied(),
            root_namespace,
        );
        let mut warnings = Vec::new();
        let all = || peer_authentications.clone();
        let enforced =
            Levels::new(all().filter(peer_authentication::enforced), root_namespace, &mut warnings);
        let dry_run = all().any(|p| !peer_authentication::enforced(&p)).then(|| {
            let mut repeated = Vec::new();
            let levels = Levels::new(all(), root_namespace, &mut repeated);
            repeated.retain(|warning| !warnings.contains(warning));
            warnings.append(&mut repeated);
            levels
        });
        peer_authentication::check_selection(all(), &selectable, root_namespace, &mut warnings);
        let authorization =
            Scopes::new(authorization_policies.into_iter(), &selectable, root_namespace, &mut warnings);
        Self { enforced, dry_run, authorization, warnings, listed }
    }

    /// The effective PeerAuthentication modes of a workload.
    pub fn modes(&self, workload: &Workload) -> PortModes {
        self.with_judgement(self.enforced.effective(workload).modes(), workload)
    }

    fn with_judgement(&self, modes: PortModes, workload: &Workload) -> PortModes {
        PortModes { judged: !self.authorization.applicable(workload).is_empty(), ..modes }
    }

    /// The effective mode of one port of a workload, without building the whole table.
    pub fn mode(&self, workload: &Workload, port: u16) -> Mode {
        self.enforced.effective(workload).of(port).0
    }

    /// The effective mode of one port of a workload, and the policy (`namespace/name`) that set it.
    pub fn mode_set_by(&self, workload: &Workload, port: u16) -> (Mode, Option<&Arc<str>>) {
        self.enforced.effective(workload).of(port)
    }

    /// As [`Self::mode_set_by`], if the dry-run policies were enforced too; `None` if that would change nothing for
    /// this port.
    pub fn dry_run_mode_set_by(&self, workload: &Workload, port: u16) -> Option<(Mode, Option<&Arc<str>>)> {
        let (mode, policy) = self.dry_run.as_ref()?.effective(workload).of(port);
        (mode != self.mode(workload, port)).then_some((mode, policy))
    }

    /// The modes if the dry-run policies were enforced too; `None` if that would change nothing for this workload.
    pub fn dry_run_modes(&self, workload: &Workload) -> Option<PortModes> {
        let modes = self.with_judgement(self.dry_run.as_ref()?.effective(workload).modes(), workload);
        (modes != self.modes(workload)).then_some(modes)
    }

    /// Decides about a connection. Calling it again on a newer snapshot tells whether an open connection may stay.
    ///
    /// # Errors
    ///
    /// The refusal: reset the connection and log it.
    pub fn authorize(&self, request: &Request<'_>) -> Result<Authorized, Denied> {
        let id = match request.peer {
            Peer::Verified(id) => Some(id),
            Peer::Plaintext => None,
        };
        let service_account = id.map(|id| format!("{}/{}", id.namespace(), id.service_account()));
        let connection = Connection {
            principal: id.map(SpiffeId::principal),
            namespace: id.map(|id| &**id.namespace()),
            service_account: service_account.as_deref(),
            source_ip: request.source_ip.to_canonical(),
            destination_ip: request.address.ip().to_canonical(),
            port: request.address.port(),
        };
        let applicable = self.authorization.applicable(request.destination);
        let verdict =
            strict(&self.enforced, request).unwrap_or_else(|| applicable.decide(&connection).into());
        let dry_run = (self.dry_run.is_some() || applicable.has_dry_run())
            .then(|| {
                strict(self.dry_run.as_ref().unwrap_or(&self.enforced), request)
                    .unwrap_or_else(|| applicable.decide_with_dry_run(&connection).into())
            })
            .filter(|with_dry_run| applicable.has_dry_run() || *with_dry_run != verdict);
        match verdict {
            Verdict::Allowed { policy } => Ok(Authorized { policy, dry_run }),
            Verdict::Denied { reason, policy } => Err(Denied { reason, policy, dry_run }),
        }
    }

    /// Every policy that was read, in force or not, sorted by name and kind.
    pub fn listed(&self) -> &[Listed] {
        &self.listed
    }

    /// What policies do not do although their authors may think so.
    pub fn warnings(&self) -> &[Warning] {
        &self.warnings
    }
}

/// Plaintext to a port that `levels` make STRICT.
fn strict(levels: &Levels, request: &Request<'_>) -> Option<Verdict> {
    if request.peer != Peer::Plaintext {
        return None;
    }
    match levels.effective(request.destination).of(request.address.port()) {
        (Mode::Strict, policy) => {
            Some(Verdict::Denied { reason: Reason::StrictMode, policy: policy.cloned() })
        }
        _ => None,
    }
}

impl From<Decision> for Verdict {
    fn from(decision: Decision) -> Self {
        match decision {
            Decision::Allow(policy) => Self::Allowed { policy },
            Decision::Deny(policy) => Self::Denied { reason: Reason::DenyPolicy, policy: Some(policy) },
            Decision::NoAllowMatched => Self::Denied { reason: Reason::NoAllowMatched, policy: None },
        }
    }
}

/// `namespace/name`: how logs and metrics call a policy.
fn name_of(metadata: &ObjectMeta) -> Arc<str> {
    let part = |part: &Option<String>| part.clone().unwrap_or_default();
    format!("{}/{}", part(&metadata.namespace), part(&metadata.name)).into()
}
