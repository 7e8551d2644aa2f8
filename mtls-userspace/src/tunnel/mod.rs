//! The tunnel: an identity and a peer's address in, an authenticated [`Stream`] out, and the same from the other end.
//!
//! `mtls/1` over TLS 1.3 with mutual SPIFFE identities: one application connection at a time on one TLS connection,
//! which is reused when both directions have ended cleanly, or many small ones on a shared one (`shared`). This room
//! proves who the peer is; it never decides what the peer may do, and never touches the application's socket.
//!
//! ```text
//! client:  Connector::open ─► (pool │ dial, handshake, identity proven) ─► Stream ─► relay ─► pool
//! server:  Acceptor::accept ─► ServerTunnel::ask ─► Request ─► Stream ─► relay ─► ask …
//!
//! shared:  Connector::carry ─► Lane ─► relay ─► (fast: Connector::adopt ─► Stream ─► relay ─► pool)
//!          ServerTunnel::ask ─► SharedTunnel::next ─► Lane ─► relay ─► (adopted: Stream ─► relay ─► ask …)
//! ```

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::{AlertDescription, CipherSuite};
use rustls_pki_types::CertificateDer;

use crate::identity::{Identity, SpiffeId};

use verify::Subject;

mod acceptor;
mod buffer;
mod codec;
mod connector;
mod frame;
mod gate;
mod handshake;
mod incoming;
mod kernel;
mod key;
mod order;
mod peers;
mod pool;
mod record;
mod schedule;
mod shared;
mod socket;
mod stream;
mod sweep;
mod tls;
mod unsent;
mod verify;

pub use acceptor::{Acceptor, Asked, Request, ServerTunnel};
pub use connector::{Carried, Connector, Target};
pub use frame::{
    Frame, FrameError, MAX_DETAIL, MAX_OPEN, MAX_REJECT, MAX_TRACE, Open, Place, RejectReason, Rejection,
    SharedId, WINDOW,
};
pub use kernel::RecordCost;
pub use order::{Order, Role, Version};
pub use peers::{Peer, Peers};
pub use record::{ContentType, Opener, RecordError, Sealer, whole_record};
pub use shared::{Lane, LaneRequest, MAX_LANES, Served, SharedTunnel};
pub use stream::{Departed, Stream};
pub use tls::TlsConfigs;
pub use verify::HandshakeFailure;

pub(crate) use buffer::{Buffer, HEADROOM, SLOT, SLOTS, Size, release_spare_buffers};
pub(crate) use codec::{Codec, MAX_RANGES, OUR_KEY_UPDATE, Pulled};
pub(crate) use frame::MAX_DATA;
pub(crate) use incoming::Incoming;
pub(crate) use kernel::{receive_record, send_record};
pub(crate) use record::TRAILER as RECORD_END;
pub(crate) use shared::{Ending, Failure, Heard, LaneState, Sink};
pub(crate) use socket::{
    UNSENT, accepts_congestion, bound_receive, connect, failed, finish_on_close, is_reset, low_water,
    receive, receive_vectored, reset_on_close, send, send_now, send_vectored,
};
pub(crate) use unsent::Unsent;

/// Bytes after which a connection lets the worker's others have their turn: after one large read, in fact. More makes
/// those beside eight fast streams wait twice as long, and moves no more bytes.
pub(crate) const TURN: usize = 128 * 1024;

/// A tunnel's memory besides its socket, its keys and its peer's certificate.
#[cfg(test)]
pub(crate) fn session_size() -> usize {
    size_of::<stream::Session>()
}

/// Limits and times of the tunnels; shared by all workers, because sessions resume across them.
#[derive(Debug)]
pub struct Config {
    /// TCP connect to a peer's tunnel port.
    pub connect_timeout: Duration,
    /// From the first byte of a handshake to its end.
    pub handshake_timeout: Duration,
    /// Client side; must be shorter than the server's, so that the client never takes a tunnel that is just closing.
    pub idle_client: Duration,
    pub idle_server: Duration,
    /// Longest wait between TCP retransmissions: fifteen of them without an answer end a tunnel to a dead peer, with
    /// two seconds after about half a minute. `None` leaves it to the kernel; those before 6.15 know nothing else.
    pub retransmit: Option<Duration>,
    /// A tunnel's receive window, which bounds how far a writer runs ahead of a reader that sleeps; `None` leaves it
    /// to the kernel's tuning. 2 MiB are 16 Gbit/s at a millisecond's round trip.
    pub receive_window: Option<usize>,
    /// Congestion control of the tunnels' connections; `None` leaves the host's.
    pub congestion: Option<String>,
    /// Whether streams that exchange little share the tunnels from one pod to another.
    pub share: bool,
    /// Idle tunnels a worker keeps to one destination, and in all.
    pub idle_per_destination: usize,
    pub idle_total: usize,
    /// Records under one key before a KeyUpdate; AES-GCM is safe to 2^24.
    pub rekey_after: u64,
    /// Bytes moved on a stream after which this end makes it raw; `None` leaves that to the peer.
    pub raw_after: Option<u64>,
    /// Suites whose records are handed to the kernel on raw streams. Where that fails, userspace goes on.
    pub kernel: Vec<CipherSuite>,
    /// The kernel takes a direction's next key as well. Without it a stream ends where one is due.
    pub kernel_rekey: bool,
    /// What was built for each identity version.
    pub tls: TlsConfigs,
    /// Whom the open tunnels lead to.
    pub peers: Peers,
    /// The shared tunnels that are served.
    pub served: Served,
}

impl Config {
    /// Tries what the kernel must be able to do for this configuration.
    ///
    /// # Errors
    ///
    /// Names the option that cannot be.
    pub fn check(&self) -> Result<(), Error> {
        match &self.congestion {
            Some(name) => socket::accepts_congestion(name)
                .map_err(|source| Error::UnknownCongestion { name: name.clone(), source }),
            None => Ok(()),
        }
    }

    /// To be called with each identity that has changed: peers that its roots and revocation lists no longer vouch for
    /// lose their tunnels at once, idle or in use.
    ///
    /// # Errors
    ///
    /// When nothing can be judged by this identity; what was trusted before still is.
    pub fn trust(&self, identity: &Arc<Identity>) -> Result<(), Error> {
        let configs = self.tls.of(identity)?;
        self.peers.judge_all(identity, &configs.verifier);
        Ok(())
    }

    /// Takes a peer in after its handshake.
    fn admit(
        &self,
        identity: &Identity,
        role: Role,
        chain: Option<&[CertificateDer<'_>]>,
    ) -> Result<Peer, HandshakeFailure> {
        let chain = chain.unwrap_or_default();
        let leaf = chain.first().ok_or(HandshakeFailure::NoCertificate)?;
        let id = &identity.svid.id;
        let subject = Subject::read(leaf, id.trust_domain(), SystemTime::now())?;
        let peer = self.peers.admit(identity, role, subject, chain);
        // Known from here on to whoever judges anew; what became true during the handshake is asked here.
        if let Some(newer) = self.tls.newer(identity) {
            self.peers.judge(&peer, &newer.verifier);
        }
        peer.distrusted().map_or(Ok(peer), Err)
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(10),
            handshake_timeout: Duration::from_secs(10),
            idle_client: Duration::from_secs(60),
            idle_server: Duration::from_secs(90),
            retransmit: Some(Duration::from_secs(2)),
            receive_window: Some(2 << 20),
            congestion: None,
            share: true,
            idle_per_destination: 64,
            idle_total: 1024,
            rekey_after: 1 << 22,
            raw_after: None,
            kernel: Vec::new(),
            kernel_rekey: false,
            tls: TlsConfigs::default(),
            peers: Peers::default(),
            served: Served::default(),
        }
    }
}

/// What a peer did that the protocol does not allow. Always the peer's fault; the tunnel is reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("malformed alert")]
    Alert,
    #[error("handshake message of type {0} where none is allowed")]
    Handshake(u8),
    #[error("application data inside a handshake message")]
    Interleaved,
    #[error("key updates without end")]
    KeyUpdates,
    #[error("handshake flight larger than {0} bytes")]
    Flight(usize),
    #[error("control records larger than their headroom")]
    Headroom,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot open a socket for a tunnel to {address}: {source}")]
    Dial { address: SocketAddr, source: io::Error },

    #[error("cannot connect to the tunnel port {address}: {source}; is an agent serving that pod?")]
    Connect { address: SocketAddr, source: io::Error },

    #[error("no answer from the tunnel port {address} within {} s", waited.as_secs_f32())]
    ConnectTimedOut { address: SocketAddr, waited: Duration },

    #[error("the peer did not finish the handshake within {} s", waited.as_secs_f32())]
    HandshakeTimedOut { waited: Duration },

    #[error("handshake failed ({failure}): {source}")]
    Handshake { failure: HandshakeFailure, source: rustls::Error },

    #[error("the peer is not who it must be ({failure}): expected {expected}, found {found:?}")]
    Identity { failure: HandshakeFailure, expected: String, found: Option<SpiffeId> },

    #[error("the peer refused us with the TLS alert {alert:?}; its log says more")]
    Refused { alert: AlertDescription },

    #[error("the peer closed the connection during the handshake")]
    HandshakeCut,

    #[error("the peer broke the protocol: {0}")]
    Protocol(Violation),

    #[error("TLS after the handshake failed: {0}")]
    Tls(rustls::Error),

    #[error("the certificate or key of {id} cannot be used: {source}")]
    Credentials { id: SpiffeId, source: rustls::Error },

    #[error("the trust bundle of {id} holds a root that is no certificate: {source}")]
    Bundle { id: SpiffeId, source: webpki::Error },

    #[error(
        "the peer changed its key, or asked for ours, while the kernel carries the records, and that takes no second key \
         (Linux 6.14 does; see the feature ktls-rekey); `--kernel-tls off` keeps records in userspace"
    )]
    KeyInKernel,

    #[error("the tunnel's connection failed: {0}")]
    Io(#[from] io::Error),

    #[error("{peer} is no longer trusted: {failure}")]
    Distrusted { peer: SpiffeId, failure: HandshakeFailure },

    #[error(
        "--tunnel-congestion {name}: this kernel cannot ({source}); it has what \
         /proc/sys/net/ipv4/tcp_available_congestion_control lists, and the modules tcp_NAME that it can load"
    )]
    UnknownCongestion { name: String, source: io::Error },

    #[error("the tunnel is in the middle of another stream")]
    Busy,

    #[error("the peer does not let the stream go on in a tunnel of its own: {0}")]
    NotAdopted(Box<str>),
}

impl Error {
    fn tls(source: rustls::Error) -> Self {
        Self::Tls(source)
    }

    /// The metrics label, where there is no authenticated peer, or none any more.
    pub fn handshake_failure(&self) -> Option<HandshakeFailure> {
        match self {
            Self::Handshake { failure, .. } | Self::Identity { failure, .. } => Some(*failure),
            Self::Refused { alert } => Some(HandshakeFailure::of_alert(*alert)),
            Self::Protocol(_) => Some(HandshakeFailure::Protocol),
            Self::HandshakeTimedOut { .. } => Some(HandshakeFailure::Timeout),
            Self::HandshakeCut => Some(HandshakeFailure::Io),
            Self::Distrusted { failure, .. } => Some(*failure),
            _ => None,
        }
    }
}

impl<V: Into<Violation>> From<V> for Error {
    fn from(violation: V) -> Self {
        Self::Protocol(violation.into())
    }
}
