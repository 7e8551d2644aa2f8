//! A TLS handshake over a socket: rustls speaks, this file carries its bytes, and the secrets go to the record layer.
//!
//! Never reads a byte into rustls that comes after the handshake: those stay in [`Incoming`] for the record layer.

use std::sync::Arc;
use std::time::SystemTime;

use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, InsufficientSizeError, UnbufferedStatus};
use rustls::{CommonState, HandshakeKind, PeerMisbehaved};
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;

use crate::identity::Identity;

use super::codec::{Codec, Incoming, Kernel};
use super::record::HEADER;
use super::socket;
use super::tls::{ALPN, Configs};
use super::verify::{HandshakeFailure, Peer};
use super::{Error, Violation};

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
    rekey_after: u64,
) -> Result<Established, Error> {
    // An address is never sent as SNI; it only keeps the sessions of different servers apart.
    let name = ServerName::IpAddress(tcp.peer_addr()?.ip().into());
    let mut connection =
        Box::new(UnbufferedClientConnection::new(configs.client.clone(), name).map_err(Error::tls)?);
    let incoming = drive(tcp, &mut *connection).await?;
    let (peer, resumed) = match outcome(&connection, identity) {
        Ok(proven) => proven,
        Err(error) => {
            let (secrets, kernel) = connection.dangerous_into_kernel_connection().map_err(Error::tls)?;
            return Err(refuse(
                tcp,
                Codec::new(secrets, Kernel::Client(kernel), incoming, rekey_after)?,
                error,
            ));
        }
    };
    let (secrets, kernel) = connection.dangerous_into_kernel_connection().map_err(Error::tls)?;
    let codec = Codec::new(secrets, Kernel::Client(kernel), incoming, rekey_after)?;
    Ok(Established { codec, peer, resumed })
}

pub(crate) async fn server(
    tcp: &TcpStream,
    identity: &Arc<Identity>,
    configs: &Configs,
    rekey_after: u64,
) -> Result<Established, Error> {
    let mut connection =
        Box::new(UnbufferedServerConnection::new(configs.server.clone()).map_err(Error::tls)?);
    let incoming = drive(tcp, &mut *connection).await?;
    let proven = outcome(&connection, identity);
    let (secrets, kernel) = connection.dangerous_into_kernel_connection().map_err(Error::tls)?;
    let codec = Codec::new(secrets, Kernel::Server(kernel), incoming, rekey_after)?;
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

/// Everything to be known about a peer before its connection may carry a stream.
fn outcome(connection: &CommonState, identity: &Arc<Identity>) -> Result<(Peer, bool), Error> {
    if connection.alpn_protocol() != Some(ALPN) {
        let source = rustls::Error::NoApplicationProtocol;
        return Err(Error::Handshake { failure: HandshakeFailure::Protocol, source });
    }
    let ours = identity.svid.id.trust_domain();
    let peer = Peer::read(connection.peer_certificates(), ours, SystemTime::now()).map_err(|failure| {
        Error::Identity { failure, expected: format!("a SPIFFE ID of {ours}"), found: None }
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
}

async fn drive<C: Side>(tcp: &TcpStream, connection: &mut C) -> Result<Incoming, Error> {
    let mut incoming = Incoming::default();
    // Records offered to rustls: one at a time, so that it never takes what follows the handshake; more only while a
    // handshake message spans them.
    let mut offered = 1;
    let mut out = Vec::with_capacity(4096);
    loop {
        let bytes: &mut [u8] = match &mut incoming.buffer {
            Some(buffer) if connection.handshaking() => {
                let whole = records(&buffer[incoming.start..incoming.end], offered);
                &mut buffer[incoming.start..incoming.start + whole]
            }
            _ => &mut [],
        };
        let offered_bytes = bytes.len();
        let UnbufferedStatus { discard, state } = connection.process(bytes);
        let step = match state {
            Ok(ConnectionState::EncodeTlsData(mut flight)) => {
                encode(&mut out, |room| flight.encode(room))?;
                Step::Again
            }
            Ok(ConnectionState::TransmitTlsData(flight)) => {
                flight.done();
                Step::Transmit
            }
            Ok(ConnectionState::BlockedHandshake) => Step::Blocked,
            Ok(ConnectionState::WriteTraffic(_)) => Step::Done,
            Ok(_) => {
                let source = rustls::Error::PeerMisbehaved(PeerMisbehaved::IllegalMiddleboxChangeCipherSpec);
                return Err(Error::Handshake { failure: HandshakeFailure::Protocol, source });
            }
            Err(source) => {
                alert(connection, &mut out);
                let _ = socket::send_all(tcp, &out).await;
                return Err(Error::Handshake { failure: HandshakeFailure::of(&source), source });
            }
        };
        if discard > 0 {
            incoming.start += discard;
            offered = 1;
            incoming.release_if_empty();
        }
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
            Step::Done => return Ok(incoming),
            Step::Blocked if discard > 0 => {}
            Step::Blocked => {
                // Another whole record may complete the message; otherwise more must arrive.
                let more = incoming.buffer.as_ref().is_some_and(|buffer| {
                    records(&buffer[incoming.start..incoming.end], offered + 1) > offered_bytes
                });
                if offered_bytes > 0 && more {
                    offered += 1;
                } else {
                    if incoming.is_full() {
                        return Err(Violation::Flight(incoming.end).into());
                    }
                    if incoming.fill(tcp).await? == 0 {
                        return Err(Error::HandshakeCut);
                    }
                }
            }
        }
    }
}

/// The length of the first `count` whole records in `bytes`, or of fewer if there are fewer.
fn records(bytes: &[u8], count: usize) -> usize {
    let mut at = 0;
    for _ in 0..count {
        let Some(&[_, _, _, high, low]) = bytes.get(at..).and_then(<[u8]>::first_chunk::<HEADER>) else {
            break;
        };
        let next = at + HEADER + usize::from(u16::from_be_bytes([high, low]));
        if next > bytes.len() {
            break;
        }
        at = next;
    }
    at
}

fn encode(
    out: &mut Vec<u8>,
    mut flight: impl FnMut(&mut [u8]) -> Result<usize, EncodeError>,
) -> Result<(), Error> {
    let at = out.len();
    let mut room = 0;
    loop {
        out.resize(at + room, 0);
        match flight(&mut out[at..]) {
            Ok(n) => {
                out.truncate(at + n);
                return Ok(());
            }
            Err(EncodeError::InsufficientSize(InsufficientSizeError { required_size })) => {
                room = required_size;
            }
            Err(EncodeError::AlreadyEncoded) => {
                out.truncate(at);
                return Ok(());
            }
        }
    }
}

/// Collects the alert that rustls wants to send after it refused something.
fn alert<C: Side>(connection: &mut C, out: &mut Vec<u8>) {
    while let ConnectionState::EncodeTlsData(mut flight) = match connection.process(&mut []).state {
        Ok(state) => state,
        Err(_) => return,
    } {
        if encode(out, |room| flight.encode(room)).is_err() {
            return;
        }
    }
}
