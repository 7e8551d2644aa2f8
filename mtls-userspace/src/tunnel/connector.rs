//! The client end: a destination workload in, a [`Stream`] on a tunnel to it out.
//!
//! Takes an idle tunnel if there is one, else dials and shakes hands. Before a stream can begin, the server has proven
//! to be the expected workload. Nothing here falls back to plaintext.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

use crate::identity::{Identity, SpiffeId};

use super::frame::Open;
use super::gate::Gate;
use super::pool::{Home, Key, Pool};
use super::stream::{Session, Stream};
use super::verify::HandshakeFailure;
use super::{Config, Error, handshake, socket};

/// Where a stream is to go, and as whom.
#[derive(Debug)]
pub struct Target<'a> {
    /// Speaks for the dialling workload.
    pub identity: &'a Arc<Identity>,
    /// Who must answer.
    pub expected: &'a SpiffeId,
    /// The destination pod's tunnel port.
    pub address: SocketAddr,
    pub open: Open,
}

/// Opens streams; one per worker, which owns its idle tunnels.
#[derive(Clone)]
pub struct Connector {
    config: Arc<Config>,
    pool: Arc<Pool>,
    gate: Arc<Gate>,
}

impl Connector {
    pub fn new(config: Arc<Config>) -> Self {
        let pool = Pool::new(config.idle_client, config.idle_per_destination, config.idle_total);
        config.peers.serve(&pool);
        Self { config, pool, gate: Arc::default() }
    }

    /// A stream to the target, on an idle tunnel or on a new one over the socket that `dial` makes: non-blocking,
    /// unconnected, in the dialling pod's network namespace.
    pub async fn open(
        &self,
        target: Target<'_>,
        dial: impl FnOnce() -> io::Result<socket2::Socket>,
    ) -> Result<Stream, Error> {
        let Target { identity, expected, address, open } = target;
        let key = Key { source: identity.svid.id.clone(), version: identity.version, address };
        // The address may have passed to another workload since the tunnel was made: identity is asked every time.
        while let Some(session) = self.pool.take(&key) {
            if let Ok(proof) = session.peer.expect(expected) {
                return Ok(Stream::open(session, open, proof, self.home(key), true));
            }
            super::pool::close(session);
        }
        let session = self.gate.pass(|| self.establish(identity, address, dial)).await?;
        match session.peer.expect(expected) {
            Ok(proof) => Ok(Stream::open(session, open, proof, self.home(key), false)),
            Err(failure) => Err(refuse(session, failure, expected)),
        }
    }

    async fn establish(
        &self,
        identity: &Arc<Identity>,
        address: SocketAddr,
        dial: impl FnOnce() -> io::Result<socket2::Socket>,
    ) -> Result<Box<Session>, Error> {
        let config = &*self.config;
        let configs = config.tls.of(identity)?;
        let dialled = dial().map_err(|source| Error::Dial { address, source })?;
        let connecting = TcpSocket::from_std_stream(dialled.into()).connect(address);
        let tcp: TcpStream = timeout(config.connect_timeout, connecting)
            .await
            .map_err(|_| Error::ConnectTimedOut { address, waited: config.connect_timeout })?
            .map_err(|source| Error::Connect { address, source })?;
        socket::prepare_tunnel(&tcp, config)?;
        let shaking = self.gate.pass(|| handshake::client(&tcp, identity, &configs, config));
        let established = timeout(config.handshake_timeout, shaking)
            .await
            .map_err(|_| Error::HandshakeTimedOut { waited: config.handshake_timeout })??;
        Ok(Box::new(Session {
            tcp,
            codec: established.codec,
            peer: established.peer,
            resumed: established.resumed,
        }))
    }

    fn home(&self, key: Key) -> Home {
        Home { pool: Arc::downgrade(&self.pool), key }
    }

    /// Idle tunnels kept.
    pub fn idle(&self) -> usize {
        self.pool.len()
    }

    /// Closes every idle tunnel; for a worker that drains.
    pub fn close_idle(&self) {
        self.pool.clear();
    }
}

fn refuse(session: Box<Session>, failure: HandshakeFailure, expected: &SpiffeId) -> Error {
    let Session { tcp, codec, peer, .. } = *session;
    let error = Error::Identity { failure, expected: expected.to_string(), found: Some(peer.id().clone()) };
    handshake::refuse(&tcp, codec, error)
}
