//! What a connection is to an observer: who, to whom, by which way, and how it ended.
//!
//! Everything here that becomes a metric label is an enum or comes from the mesh; nothing is taken from the wire.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use crate::addr::{OriginalDst, OriginalSrc};
use crate::identity::SpiffeId;
use crate::mesh::Workload;
use crate::policy::{Denied, Reason};
use crate::tunnel::HandshakeFailure;

/// Which end of the connection this agent stands at.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Direction {
    /// The source's agent: the connection was dialled by a pod of this node.
    Outbound,
    /// The destination's agent: the connection is delivered to a pod of this node.
    Inbound,
}

impl Direction {
    pub(super) const ALL: [Self; 2] = [Self::Outbound, Self::Inbound];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
        }
    }

    pub(super) fn other(self) -> Self {
        match self {
            Self::Outbound => Self::Inbound,
            Self::Inbound => Self::Outbound,
        }
    }

    /// Istio's `reporter` label.
    pub(super) fn reporter(self) -> &'static str {
        match self {
            Self::Outbound => "source",
            Self::Inbound => "destination",
        }
    }
}

/// How the bytes travel between the two agents.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Path {
    /// Mutual TLS to the peer's agent.
    Tunnel,
    /// Both pods on this node: authorized with both identities, relayed without leaving the agent. Reported once,
    /// by either direction; Istio's metrics get it as reported by the source and by the destination.
    SameNode,
    /// Both pods on this node: authorized with both identities, then from pod to pod without an agent. Reported as
    /// [`Path::SameNode`] is.
    Direct,
    /// Plain TCP accepted by an enrolled destination.
    Plaintext,
    /// Plain TCP to a destination that is not enrolled, or nobody knows.
    Passthrough,
}

impl Path {
    pub(super) const ALL: [Self; 5] =
        [Self::Tunnel, Self::SameNode, Self::Direct, Self::Plaintext, Self::Passthrough];

    /// Whether this agent stands at both ends, and judges for both.
    pub fn is_within_node(self) -> bool {
        matches!(self, Self::SameNode | Self::Direct)
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tunnel => "tunnel",
            Self::SameNode => "same_node",
            Self::Direct => "direct",
            Self::Plaintext => "plaintext",
            Self::Passthrough => "passthrough",
        }
    }

    /// Istio's `connection_security_policy`. Only a real mutual TLS session is called one: a same-node relay is
    /// authenticated, but there is no TLS for an auditor to find.
    pub(super) fn security_policy(self) -> &'static str {
        match self {
            Self::Tunnel => "mutual_tls",
            Self::SameNode | Self::Direct | Self::Plaintext => "none",
            Self::Passthrough => "unknown",
        }
    }
}

/// One end of a connection.
#[derive(Clone, Debug, Default)]
pub struct Party {
    /// The pod that owns the address, if the mesh knows it.
    pub workload: Option<Arc<Workload>>,
    /// Proven by the handshake, or by the kernel on one node; never looked up by address.
    pub identity: Option<SpiffeId>,
}

/// A connection as the walk knows it once it is set up, or refused.
#[derive(Clone, Debug)]
pub struct Flow {
    pub direction: Direction,
    pub path: Path,
    pub source: Party,
    pub destination: Party,
    /// What the application dialled; absent where only the resolved address is known.
    pub original_dst: Option<OriginalDst>,
    /// The destination pod's own address and port: a VIP already resolved.
    pub address: SocketAddr,
    pub original_src: OriginalSrc,
    /// `namespace/name` of the Service that was dialled.
    pub service: Option<Arc<str>>,
    /// The TLS cipher suite's standard name.
    pub cipher: Option<&'static str>,
}

/// Why a connection never came to be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// By this agent's policy room.
    Denied(Denied),
    /// By the destination's agent, whose words go to the log; being from the wire, never to a metric.
    DeniedByPeer {
        detail: Arc<str>,
    },
    /// The Service has no ready endpoint, or does not serve the port.
    NoEndpoint,
    /// The peer asked for an address that is not of the pod whose tunnel it came through.
    WrongPod,
    /// The peer claims a client address that is neither its own nor of a pod with its identity.
    ForgedSource,
    /// The kernel half recorded no original destination: something in the pod dialled the agent's listener itself,
    /// or the record found no room.
    NoOriginalDestination,
    /// The kernel half let the connection go directly, but policy, or the agent that had allowed it, had changed
    /// meanwhile. Dialled again it is judged anew.
    Stale,
    /// No certificate for the workload yet, or it has run out.
    NoCertificate,
    /// The peer agent could not be reached.
    PeerUnreachable,
    Handshake(HandshakeFailure),
    /// The destination application refuses: nothing listens on the port.
    ConnectRefused,
    /// The destination application does not answer in time.
    ConnectTimeout,
    /// The peer broke the tunnel protocol where it should have named a destination.
    Protocol,
    /// A limit of this agent was reached.
    Overloaded,
    /// A system call on this node failed.
    Io,
}

impl Refusal {
    /// The `reason` label.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Denied(denied) => match denied.reason {
                Reason::StrictMode => "plaintext_to_strict",
                Reason::DenyPolicy => "deny_policy",
                Reason::NoAllowMatched => "no_allow_matched",
            },
            Self::DeniedByPeer { .. } => "denied_by_peer",
            Self::NoEndpoint => "no_endpoint",
            Self::WrongPod => "wrong_pod",
            Self::ForgedSource => "forged_source",
            Self::NoOriginalDestination => "no_original_destination",
            Self::Stale => "stale",
            Self::NoCertificate => "no_certificate",
            Self::PeerUnreachable => "peer_unreachable",
            Self::Handshake(_) => "handshake",
            Self::ConnectRefused => "connect_refused",
            Self::ConnectTimeout => "connect_timeout",
            Self::Protocol => "protocol",
            Self::Overloaded => "overloaded",
            Self::Io => "io",
        }
    }

    /// Istio's `response_flags`.
    pub(super) fn response_flags(&self) -> &'static str {
        match self {
            Self::Denied(_) | Self::DeniedByPeer { .. } | Self::ForgedSource => "DENY",
            Self::Handshake(_) | Self::NoCertificate => "TLS_FAILURE",
            _ => "CONNECT",
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Denied(denied) => denied.fmt(f),
            Self::DeniedByPeer { detail } => write!(f, "the destination's agent: {detail}"),
            Self::NoEndpoint => f.write_str("the service has no ready endpoint for this port"),
            Self::WrongPod => f.write_str("the destination address is not of the pod whose tunnel was used"),
            Self::ForgedSource => {
                f.write_str("the client address is neither the peer's nor of a pod with its identity")
            }
            Self::NoOriginalDestination => f.write_str("the kernel recorded no original destination"),
            Self::Stale => f.write_str("it was allowed by a policy or an agent that is no longer in force"),
            Self::NoCertificate => f.write_str("the workload has no valid certificate"),
            Self::PeerUnreachable => f.write_str("the peer's agent cannot be reached"),
            Self::Handshake(failure) => write!(f, "handshake failed: {}", failure.as_str()),
            Self::ConnectRefused => f.write_str("the destination application refused the connection"),
            Self::ConnectTimeout => f.write_str("the destination application did not answer in time"),
            Self::Protocol => f.write_str("the peer broke the tunnel protocol"),
            Self::Overloaded => f.write_str("a limit of this agent was reached"),
            Self::Io => f.write_str("a system call on this node failed"),
        }
    }
}

/// How an open connection ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Ending {
    /// Both directions ended with FIN.
    Clean,
    ResetBySource,
    ResetByDestination,
    /// The far side said no after this side had accepted.
    Rejected(Refusal),
    /// Policy changed, and this names the policy that now refuses; or the peer is no longer trusted.
    Revoked(Arc<str>),
    /// The tunnel ended without an end of stream: bytes may be missing.
    Truncated,
    /// Something on this node failed.
    Error(Arc<str>),
    /// The task that carried the connection stopped without saying how it ended.
    Aborted,
}

impl Ending {
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Clean => "clean",
            Self::ResetBySource => "reset_by_source",
            Self::ResetByDestination => "reset_by_destination",
            Self::Rejected(_) => "rejected",
            Self::Revoked(_) => "revoked",
            Self::Truncated => "truncated",
            Self::Error(_) => "error",
            Self::Aborted => "aborted",
        }
    }

    pub(super) fn reason(&self) -> Option<String> {
        match self {
            Self::Rejected(refusal) => Some(refusal.to_string()),
            Self::Revoked(reason) | Self::Error(reason) => Some(reason.to_string()),
            _ => None,
        }
    }

    /// Istio's `response_flags`: Envoy's downstream, upstream and local resets, the ambient proxy's words for the rest.
    pub(super) fn response_flags(&self, direction: Direction) -> &'static str {
        match (self, direction) {
            (Self::Clean, _) => "-",
            (Self::ResetBySource, _) | (Self::Truncated, Direction::Inbound) => "DC",
            (Self::ResetByDestination, _) | (Self::Truncated, Direction::Outbound) => "UC",
            (Self::Rejected(refusal), _) => refusal.response_flags(),
            (Self::Revoked(_), _) => "DENY",
            (Self::Error(_) | Self::Aborted, _) => "LR",
        }
    }
}
