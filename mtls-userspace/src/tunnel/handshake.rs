//! A TLS handshake over a socket: rustls speaks, this file carries its bytes, and the secrets go to the record layer.
//!
//! Never reads a byte into rustls that comes after the handshake: those stay in [`Incoming`] for the record layer.

use std::sync::Arc;

use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, InsufficientSizeError, UnbufferedStatus};
use rustls::{CommonState, HandshakeKind, PeerMisbehaved};
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;

use crate::identity::Identity;

use super::codec::Codec;
use super::incoming::Incoming;
use super::order::{Role, Version};
use super::peers::Peer;
use super::record::{HEADER, MAX_RECORD, RecordError};
use super::schedule::{Heard, Schedule};
use super::socket;
use super::tls::{Configs, agreed};
use super::verify::HandshakeFailure;
use super::{Config, Error, Violation};

/// What a finished handshake leaves.
pub(crate) struct Established {
    pub codec: Codec,
    pub peer: Peer,
    pub resumed: bool,
}

pub(crate) async fn client(
    tcp: &TcpStream,
    identity: &Arc<Identity>,
    configs: &Configs,
    config: &Config,
) -> Result<Established, Error> {
    // An address is never sent as SNI; it only keeps the sessions of different servers apart.
    let name = ServerName::IpAddress(tcp.peer_addr()?.ip().into());
    let mut connection =
        Box::new(UnbufferedClientConnection::new(configs.client.clone(), name).map_err(Error::tls)?);
    let (incoming, heard) = drive(tcp, &mut *connection).await?;
    let proven = outcome(&connection, identity, config, Role::Server);
    let version = agreed(connection.alpn_protocol()).unwrap_or(Version::Plain);
    let (secrets, kernel) = connection.dangerous_into_kernel_connection().map_err(Error::tls)?;
    let codec = Codec::new(secrets, Schedule::client(heard, kernel)?, incoming, version, config)?;
    established(tcp, codec, proven)
}

pub(crate) async fn server(
    tcp: &TcpStream,
    identity: &Arc<Identity>,
    configs: &Configs,
    config: &Config,
) -> Result<Established, Error> {
    let mut connection =
        Box::new(UnbufferedServerConnection::new(configs.server.clone()).map_err(Error::tls)?);
    let (incoming, heard) = drive(tcp, &mut *connection).await?;
    let proven = outcome(&connection, identity, config, Role::Client);
    let version = agreed(connection.alpn_protocol()).unwrap_or(Version::Plain);
    let suite = connection.negotiated_cipher_suite().ok_or(RecordError::UnusableKey)?;
    let (secrets, _) = connection.dangerous_into_kernel_connection().map_err(Error::tls)?;
    let codec = Codec::new(secrets, Schedule::server(heard, suite)?, incoming, version, config)?;
    established(tcp, codec, proven)
}

fn established(
    tcp: &TcpStream,
    codec: Codec,
    proven: Result<(Peer, bool), Error>,
) -> Result<Established, Error> {
    match proven {
        Ok((peer, resumed)) => Ok(Established { codec, peer, resumed }),
        Err(error) => Err(refuse(tcp, codec, error)),
    }
}

/// Tells the peer by alert why it is refused, as far as the socket takes it at once.
pub(crate) fn refuse(tcp: &TcpStream, mut codec: Codec, error: Error) -> Error {
    let alert = error.handshake_failure().unwrap_or(HandshakeFailure::Protocol).alert();
    if let Ok((record, n)) = codec.seal_alert(alert) {
        let _ = socket::send(tcp, &record[..n]);
    }
    error
}

/// Everything to be known about a peer, whose role is `role`, before its connection may carry a stream.
fn outcome(
    connection: &CommonState,
    identity: &Arc<Identity>,
    config: &Config,
    role: Role,
) -> Result<(Peer, bool), Error> {
    if agreed(connection.alpn_protocol()).is_none() {
        let source = rustls::Error::NoApplicationProtocol;
        return Err(Error::Handshake { failure: HandshakeFailure::Protocol, source });
    }
    let ours = identity.svid.id.trust_domain();
    let admitted = config.admit(identity, role, connection.peer_certificates());
    let peer = admitted.map_err(|failure| Error::Identity {
        failure,
        expected: format!("a SPIFFE ID of {ours}"),
        found: None,
    })?;
    Ok((peer, connection.handshake_kind() == Some(HandshakeKind::Resumed)))
}

/// The two rustls connections, which share everything but a type.
trait Side {
    type Data;

    fn process<'c, 'i>(&'c mut self, bytes: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;

    fn handshaking(&self) -> bool;

    /// Our last flight is followed by our first record at once, and may share its segment.
    const LAST_FLIGHT_MORE: bool;
}

impl Side for UnbufferedClientConnection {
    type Data = ClientConnectionData;

    fn process<'c, 'i>(&'c mut self, bytes: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(bytes)
    }

    fn handshaking(&self) -> bool {
        self.is_handshaking()
    }

    const LAST_FLIGHT_MORE: bool = true;
}

impl Side for UnbufferedServerConnection {
    type Data = ServerConnectionData;

    fn process<'c, 'i>(&'c mut self, bytes: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(bytes)
    }

    fn handshaking(&self) -> bool {
        self.is_handshaking()
    }

    const LAST_FLIGHT_MORE: bool = false;
}

enum Step {
    Again,
    Transmit,
    Blocked,
    Done,
    Failed(rustls::Error),
}

async fn drive<C: Side>(tcp: &TcpStream, connection: &mut C) -> Result<(Incoming, Heard), Error> {
    let mut incoming = Incoming::default();
    let mut heard = Heard::default();
    // What rustls has been shown and not let go of. One record more at a time, so that it never takes what follows
    // the handshake; never less, because it may refer back to a message it holds in part.
    let mut window = 0;
    let mut out = Vec::with_capacity(4096);
    loop {
        let UnbufferedStatus { discard, state } = connection.process(incoming.head(window));
        heard.listen();
        let step = match state {
            Ok(ConnectionState::EncodeTlsData(mut flight)) => {
                encode(&mut out, |room| flight.encode(room));
                Step::Again
            }
            Ok(ConnectionState::TransmitTlsData(flight)) => {
                flight.done();
                Step::Transmit
            }
            Ok(ConnectionState::BlockedHandshake) => Step::Blocked,
            Ok(ConnectionState::WriteTraffic(_)) => Step::Done,
            Ok(_) => Step::Failed(rustls::Error::PeerMisbehaved(PeerMisbehaved::TooMuchEarlyDataReceived)),
            Err(source) => Step::Failed(source),
        };
        incoming.consume(discard);
        window = window.saturating_sub(discard);
        match step {
            Step::Again => {}
            Step::Transmit => {
                if C::LAST_FLIGHT_MORE && !connection.handshaking() {
                    socket::send_all_more(tcp, &out).await?;
                } else {
                    socket::send_all(tcp, &out).await?;
                }
                out.clear();
            }
            Step::Blocked => window += more(tcp, &mut incoming, window).await?,
            Step::Done => return Ok((incoming, heard)),
            Step::Failed(source) => {
                alert(connection, &mut incoming, window, &mut out);
                let _ = socket::send_all(tcp, &out).await;
                return Err(Error::Handshake { failure: HandshakeFailure::of(&source), source });
            }
        }
    }
}

/// Waits until a whole record stands behind the first `window` bytes; returns its length.
async fn more(tcp: &TcpStream, incoming: &mut Incoming, window: usize) -> Result<usize, Error> {
    loop {
        let behind = incoming.unread().get(window..).unwrap_or_default();
        if let Some(length) = handshake_record(behind) {
            return Ok(length);
        }
        if incoming.is_full() {
            return Err(Violation::Flight(incoming.unread().len()).into());
        }
        if incoming.fill(tcp).await? == 0 {
            return Err(Error::HandshakeCut);
        }
    }
}

/// The length of the record at the head of `bytes`, once it is all there. What can't be a record is given to rustls
/// at once, which knows the alert for it.
fn handshake_record(bytes: &[u8]) -> Option<usize> {
    let valid = |&[kind, major, _, high, low]: &[u8; HEADER]| {
        let length = HEADER + usize::from(u16::from_be_bytes([high, low]));
        ((20..=23).contains(&kind) && major == 3 && length <= MAX_RECORD).then_some(length)
    };
    match bytes.first_chunk::<HEADER>().map(valid)? {
        Some(length) => (length <= bytes.len()).then_some(length),
        None => Some(bytes.len()),
    }
}

fn encode(out: &mut Vec<u8>, mut flight: impl FnMut(&mut [u8]) -> Result<usize, EncodeError>) {
    let at = out.len();
    let mut written = flight(&mut []);
    if let Err(EncodeError::InsufficientSize(InsufficientSizeError { required_size })) = written {
        out.resize(at + required_size, 0);
        written = flight(&mut out[at..]);
    }
    out.truncate(at + written.unwrap_or(0));
}

/// Collects the alert that rustls wants to send after it refused something. Asked once: after that rustls would look
/// at the refused bytes again.
fn alert<C: Side>(connection: &mut C, incoming: &mut Incoming, window: usize, out: &mut Vec<u8>) {
    if let Ok(ConnectionState::EncodeTlsData(mut flight)) = connection.process(incoming.head(window)).state {
        encode(out, |room| flight.encode(room));
    }
}
