//! What each room's errors are called in the access log and in metrics, and what the peer agent is told of them.
//!
//! One name for each outcome, in one place: both agents' logs say the same of one connection.

use std::io;
use std::sync::Arc;

use crate::observe::{Direction, Ending, Flow, Path, Refusal};
use crate::relay::End;
use crate::tunnel::{self, RejectReason, Rejection};

/// The application could not be dialled.
pub fn unreachable(error: &io::Error) -> Refusal {
    match error.kind() {
        io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset => Refusal::ConnectRefused,
        io::ErrorKind::TimedOut => Refusal::ConnectTimeout,
        io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => Refusal::PeerUnreachable,
        _ => Refusal::Io,
    }
}

/// The tunnel to the peer agent could not be had.
pub fn no_tunnel(error: &tunnel::Error) -> Refusal {
    if let Some(failure) = error.handshake_failure() {
        return Refusal::Handshake(failure);
    }
    match error {
        tunnel::Error::Connect { .. } | tunnel::Error::ConnectTimedOut { .. } => Refusal::PeerUnreachable,
        tunnel::Error::Credentials { .. } | tunnel::Error::Bundle { .. } => Refusal::NoCertificate,
        _ => Refusal::Io,
    }
}

/// What the client's agent is told.
pub fn rejection(refusal: &Refusal) -> Rejection {
    let reason = match refusal {
        Refusal::Denied(_) | Refusal::ForgedSource | Refusal::Stale => RejectReason::Denied,
        Refusal::ConnectRefused => RejectReason::ConnectionRefused,
        Refusal::ConnectTimeout => RejectReason::TimedOut,
        Refusal::Overloaded => RejectReason::Unavailable,
        _ => RejectReason::Unreachable,
    };
    Rejection::new(reason, &refusal.to_string())
}

/// What the destination's agent told.
fn rejected(rejection: &Rejection) -> Refusal {
    match rejection.reason {
        RejectReason::Denied => Refusal::DeniedByPeer { detail: rejection.detail.as_ref().into() },
        RejectReason::ConnectionRefused => Refusal::ConnectRefused,
        RejectReason::TimedOut => Refusal::ConnectTimeout,
        RejectReason::Unavailable => Refusal::Overloaded,
        RejectReason::Unreachable | RejectReason::Other(_) => Refusal::PeerUnreachable,
    }
}

/// How a relayed connection ended.
pub fn ending(end: End, flow: &Flow, revoked_by: Option<Arc<str>>) -> Ending {
    // The relay's "application" is the source, except where a tunnel is delivered.
    let source_first = flow.direction == Direction::Outbound || flow.path != Path::Tunnel;
    match end {
        End::Clean => Ending::Clean,
        End::AppReset if source_first => Ending::ResetBySource,
        End::AppReset => Ending::ResetByDestination,
        End::PeerReset if source_first => Ending::ResetByDestination,
        End::PeerReset => Ending::ResetBySource,
        End::Rejected(rejection) => Ending::Rejected(rejected(&rejection)),
        End::Revoked => Ending::Revoked(revoked_by.unwrap_or_default()),
        End::Truncated => Ending::Truncated,
        End::Tunnel(error) => Ending::Error(error.to_string().into()),
        End::Io(error) => Ending::Error(error.to_string().into()),
    }
}
