//! What TLS still needs after the handshake: each direction's traffic secret, from which its next key is made
//! (RFC 8446, 7.2), and the client's part of rustls until the session ticket has come.
//!
//! rustls' kernel connection would make the next keys as well, but keeps the peer's chain and its whole key schedule
//! for as long as the tunnel lives, 1.5 KiB of an idle connection's memory. rustls names the secrets only to a
//! [`KeyLog`], so that is how they come here; nothing is ever logged.

use std::cell::RefCell;

use aws_lc_rs::hkdf::{HKDF_SHA256, HKDF_SHA384, KeyType, Prk};
use rustls::client::ClientConnectionData;
use rustls::crypto::cipher::{AeadKey, Iv};
use rustls::crypto::hash::HashAlgorithm;
use rustls::kernel::KernelConnection;
use rustls::{CipherSuite, ConnectionTrafficSecrets, KeyLog, SupportedCipherSuite};
use zeroize::{Zeroize, Zeroizing};

use super::codec::NEW_SESSION_TICKET;
use super::order::Role;
use super::record::{Opener, RecordError, Sealer};
use super::{Error, Violation};

const CLIENT_SECRET: &str = "CLIENT_TRAFFIC_SECRET_0";
const SERVER_SECRET: &str = "SERVER_TRAFFIC_SECRET_0";

/// One direction's traffic secret; as long as the suite's hash, at most SHA-384's.
type Secret = Zeroizing<[u8; 48]>;

/// What one handshake derived.
#[derive(Default)]
pub(crate) struct Heard {
    client: Option<Secret>,
    server: Option<Secret>,
}

thread_local! {
    static HEARD: RefCell<Heard> = const { RefCell::new(Heard { client: None, server: None }) };
}

/// Hears the secrets of the handshake that this thread is in.
#[derive(Debug)]
pub(super) struct Ear;

impl KeyLog for Ear {
    fn will_log(&self, label: &str) -> bool {
        matches!(label, CLIENT_SECRET | SERVER_SECRET)
    }

    fn log(&self, label: &str, _client_random: &[u8], secret: &[u8]) {
        let mut kept = Secret::new([0; 48]);
        let Some(room) = kept.get_mut(..secret.len()) else { return };
        room.copy_from_slice(secret);
        HEARD.with_borrow_mut(|heard| match label {
            CLIENT_SECRET => heard.client = Some(kept),
            SERVER_SECRET => heard.server = Some(kept),
            _ => {}
        });
    }
}

impl Heard {
    /// Adds what rustls derived in the call that has just returned on this thread. To be called after every one, so
    /// that no handshake can hear another's.
    pub fn listen(&mut self) {
        let Heard { client, server } = HEARD.take();
        self.client = client.or(self.client.take());
        self.server = server.or(self.server.take());
    }
}

/// Makes the next key of either direction.
pub(crate) struct Schedule {
    suite: SupportedCipherSuite,
    sending: Secret,
    receiving: Secret,
    role: Role,
    /// A client's, until the one ticket that servers send has been stored.
    awaiting_ticket: Option<Box<KernelConnection<ClientConnectionData>>>,
}

impl Schedule {
    pub fn client(heard: Heard, kernel: KernelConnection<ClientConnectionData>) -> Result<Self, Error> {
        let (client, server) = both(heard)?;
        Ok(Self {
            suite: kernel.negotiated_cipher_suite(),
            sending: client,
            receiving: server,
            role: Role::Client,
            awaiting_ticket: Some(Box::new(kernel)),
        })
    }

    pub fn server(heard: Heard, suite: SupportedCipherSuite) -> Result<Self, Error> {
        let (client, server) = both(heard)?;
        Ok(Self { suite, sending: server, receiving: client, role: Role::Server, awaiting_ticket: None })
    }

    pub fn suite(&self) -> SupportedCipherSuite {
        self.suite
    }

    pub fn role(&self) -> Role {
        self.role
    }

    pub fn next_sealer(&mut self) -> Result<Sealer, RecordError> {
        Sealer::new(0, &advance(self.suite, &mut self.sending)?)
    }

    pub fn next_opener(&mut self) -> Result<Opener, RecordError> {
        Opener::new(0, &advance(self.suite, &mut self.receiving)?)
    }

    /// Stores the first session ticket; further ones are of no use.
    pub fn ticket(&mut self, payload: &[u8]) -> Result<(), Error> {
        if self.role == Role::Server {
            return Err(Violation::Handshake(NEW_SESSION_TICKET).into());
        }
        let Some(mut kernel) = self.awaiting_ticket.take() else { return Ok(()) };
        kernel.handle_new_session_ticket(payload).map_err(Error::tls)
    }
}

fn both(heard: Heard) -> Result<(Secret, Secret), Error> {
    heard.client.zip(heard.server).ok_or(RecordError::UnusableKey.into())
}

/// Replaces a traffic secret by its successor; returns the successor's record key.
fn advance(
    suite: SupportedCipherSuite,
    secret: &mut Secret,
) -> Result<ConnectionTrafficSecrets, RecordError> {
    let hash = suite.tls13().map(|suite| suite.common.hash_provider.algorithm());
    let (algorithm, length) = match hash {
        Some(HashAlgorithm::SHA256) => (HKDF_SHA256, 32),
        Some(HashAlgorithm::SHA384) => (HKDF_SHA384, 48),
        _ => return Err(RecordError::UnusableKey),
    };
    let prk = Prk::new_less_safe(algorithm, secret.get(..length).ok_or(RecordError::UnusableKey)?);
    let mut next = Secret::new([0; 48]);
    expand_label(&prk, b"traffic upd", next.get_mut(..length).ok_or(RecordError::UnusableKey)?)?;
    *secret = next;
    let prk = Prk::new_less_safe(algorithm, secret.get(..length).ok_or(RecordError::UnusableKey)?);
    let key_length = if suite.suite() == CipherSuite::TLS13_AES_128_GCM_SHA256 { 16 } else { 32 };
    let mut key = Zeroizing::new([0; 32]);
    let mut iv = [0; 12];
    expand_label(&prk, b"key", key.get_mut(..key_length).ok_or(RecordError::UnusableKey)?)?;
    expand_label(&prk, b"iv", &mut iv)?;
    let (key, iv) = (AeadKey::from(*key), Iv::from(iv));
    match suite.suite() {
        CipherSuite::TLS13_AES_128_GCM_SHA256 => Ok(ConnectionTrafficSecrets::Aes128Gcm { key, iv }),
        CipherSuite::TLS13_AES_256_GCM_SHA384 => Ok(ConnectionTrafficSecrets::Aes256Gcm { key, iv }),
        CipherSuite::TLS13_CHACHA20_POLY1305_SHA256 => {
            Ok(ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv })
        }
        _ => Err(RecordError::UnusableKey),
    }
}

/// HKDF-Expand-Label with an empty context (RFC 8446, 7.1), as long as `out`.
fn expand_label(prk: &Prk, label: &[u8], out: &mut [u8]) -> Result<(), RecordError> {
    struct Length(usize);
    impl KeyType for Length {
        fn len(&self) -> usize {
            self.0
        }
    }
    const PREFIX: &[u8] = b"tls13 ";
    let length = (out.len() as u16).to_be_bytes();
    let info = [&length[..], &[(PREFIX.len() + label.len()) as u8], PREFIX, label, &[0]];
    let expanded = prk.expand(&info, Length(out.len())).and_then(|okm| okm.fill(out));
    expanded.map_err(|_| {
        out.zeroize();
        RecordError::UnusableKey
    })
}
