//! The client end: a destination workload in, a [`Stream`] on a tunnel to it out.
//!
//! Takes an idle tunnel if there is one, else dials and shakes hands. Before a stream can begin, the server has proven
//! to be the expected workload. Nothing here falls back to plaintext.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use rustls::SupportedCipherSuite;
use tokio::time::timeout;

use crate::identity::{Identity, SpiffeId};

use super::codec::Pulled;
use super::frame::{FIN, Open, Place, Rejection};
use super::gate::Gate;
use super::pool::{Home, Key, Pool, Road};
use super::shared::{Lane, Shared, Shares, Way};
use super::stream::{Session, Stream};
use super::verify::{Expected, HandshakeFailure};
use super::{Config, Error, handshake, socket};

/// Where a stream is to go, and as whom.
#[derive(Debug, Clone, Copy)]
pub struct Target<'a> {
    /// Speaks for the dialling workload.
    pub identity: &'a Arc<Identity>,
    /// Who must answer.
    pub expected: &'a SpiffeId,
    /// The dialling pod's network namespace, by its cookie: no other pod's connections use its tunnels.
    pub netns: u64,
    /// The destination pod's tunnel port.
    pub address: SocketAddr,
}

/// What carries a stream.
pub enum Carried {
    /// A tunnel of its own.
    Alone(Stream),
    /// A lane of a shared one.
    Shared(Lane),
}

impl Carried {
    pub fn cipher(&self) -> SupportedCipherSuite {
        match self {
            Self::Alone(stream) => stream.cipher(),
            Self::Shared(lane) => lane.cipher(),
        }
    }

    /// Whether the tunnel was there before this stream.
    pub fn reused(&self) -> bool {
        match self {
            Self::Alone(stream) => stream.reused(),
            Self::Shared(lane) => lane.reused(),
        }
    }

    /// Whether the handshake of a new tunnel resumed an earlier session.
    pub fn resumed(&self) -> bool {
        match self {
            Self::Alone(stream) => stream.resumed(),
            Self::Shared(lane) => lane.resumed(),
        }
    }
}

/// Opens streams; one per worker, which owns its idle tunnels.
#[derive(Clone)]
pub struct Connector {
    config: Arc<Config>,
    pool: Arc<Pool>,
    shares: Arc<Shares>,
    gate: Arc<Gate>,
}

impl Connector {
    pub fn new(config: Arc<Config>) -> Self {
        let pool = Pool::new(config.idle_client, config.idle_per_destination, config.idle_total);
        config.peers.serve(&pool);
        Self { config, pool, shares: Arc::default(), gate: Arc::default() }
    }

    /// A stream to the target, on an idle tunnel or on a new one over the socket that `dial` makes: non-blocking,
    /// unconnected, in the dialling pod's network namespace.
    pub async fn open(
        &self,
        target: Target<'_>,
        open: Open,
        dial: impl FnOnce() -> io::Result<socket2::Socket>,
    ) -> Result<Stream, Error> {
        let key = target.key();
        let (session, proof, reused) = self.session(&target, &key, dial).await?;
        Ok(Stream::open(session, open, proof, self.home(key), reused))
    }

    /// As [`Self::open`], but on a tunnel that streams going the same way share, where [`Config::share`] says so and the
    /// peer knows how.
    pub async fn carry(
        &self,
        target: Target<'_>,
        open: Open,
        dial: impl FnOnce() -> io::Result<socket2::Socket>,
    ) -> Result<Carried, Error> {
        if !self.config.share {
            return self.open(target, open, dial).await.map(Carried::Alone);
        }
        let key = target.key();
        let way = self.shares.way(&key);
        if let Some(lane) = way.lane(target.expected, &open) {
            return Ok(Carried::Shared(lane));
        }
        let failures = way.failures();
        let making = way.making.lock().await;
        if let Some(lane) = way.lane(target.expected, &open) {
            return Ok(Carried::Shared(lane));
        }
        if way.failures() != failures {
            // What this stream waited for led to no tunnel to share: a crowd need not find that out one by one.
            drop(making);
            return self.open(target, open, dial).await.map(Carried::Alone);
        }
        let made = self.begin_sharing(&target, key, &way, open, dial).await;
        if !matches!(made, Ok(Carried::Shared(_))) {
            way.failed();
        }
        made
    }

    /// A new tunnel to share and its first lane, or a tunnel for this stream alone if the peer does not know how to share.
    async fn begin_sharing(
        &self,
        target: &Target<'_>,
        key: Key,
        way: &Way,
        open: Open,
        dial: impl FnOnce() -> io::Result<socket2::Socket>,
    ) -> Result<Carried, Error> {
        let (session, proof, reused) = self.session(target, &key, dial).await?;
        if !session.codec.order.may_share() {
            return Ok(Carried::Alone(Stream::open(session, open, proof, self.home(key), reused)));
        }
        let shared = Shared::begin(session).await?;
        let lane = shared.open(&open, reused).ok_or(Error::Busy)?;
        tokio::spawn(shared.clone().drive(self.config.idle_client));
        way.add(shared);
        Ok(Carried::Shared(lane))
    }

    /// A tunnel of its own for a stream that is on a lane; it goes on there once both ends have left the lane.
    pub async fn adopt(
        &self,
        target: Target<'_>,
        place: Place,
        dial: impl FnOnce() -> io::Result<socket2::Socket>,
    ) -> Result<Stream, Error> {
        let key = target.key();
        let (mut session, _proof, reused) = self.session(&target, &key, dial).await?;
        if !session.codec.order.may_share() {
            super::pool::close(session);
            return Err(Error::NotAdopted("the peer's agent does not know how".into()));
        }
        let asked = timeout(self.config.handshake_timeout, ask_to_adopt(&mut session, place));
        let waited = self.config.handshake_timeout;
        let refused = asked.await.map_err(|_| Error::HandshakeTimedOut { waited })??;
        let home = self.home(key);
        match refused {
            None => Ok(Stream::go_on(session, home, reused)),
            Some(rejection) => {
                session.codec.order.settle();
                home.put(session);
                Err(Error::NotAdopted(rejection.detail))
            }
        }
    }

    /// An idle tunnel to the target, or a new one; says whether it is an old one.
    async fn session(
        &self,
        target: &Target<'_>,
        key: &Key,
        dial: impl FnOnce() -> io::Result<socket2::Socket>,
    ) -> Result<(Box<Session>, Expected, bool), Error> {
        let Target { identity, expected, address, .. } = *target;
        // The address may have passed to another workload since the tunnel was made: identity is asked every time.
        while let Some(session) = self.pool.take(key) {
            if let Ok(proof) = session.peer.expect(expected) {
                return Ok((session, proof, true));
            }
            super::pool::close(session);
        }
        let session = self.gate.pass(|| self.establish(identity, address, dial)).await?;
        match session.peer.expect(expected) {
            Ok(proof) => Ok((session, proof, false)),
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
        let tcp = timeout(config.connect_timeout, socket::connect(dialled, address))
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

    /// Closes every idle tunnel, and the shared ones as soon as they are; for a worker that drains.
    pub fn close_idle(&self) {
        self.shares.retire();
        self.pool.clear();
    }
}

impl Target<'_> {
    fn key(&self) -> Key {
        Key {
            source: self.identity.svid.id.clone(),
            version: self.identity.version,
            road: Road { netns: self.netns, address: self.address },
        }
    }
}

/// Says ADOPT and waits for the answer: a rejection, or none.
async fn ask_to_adopt(session: &mut Session, place: Place) -> Result<Option<Rejection>, Error> {
    let Session { tcp, codec, .. } = session;
    let (record, n) = codec.seal_frame(&place.encode_adopt())?;
    codec.order.asked_to_adopt();
    socket::send_all(tcp, &record[..n]).await?;
    loop {
        match codec.pull()? {
            Pulled::Adopted => return Ok(None),
            Pulled::Reject(rejection) => {
                let (record, n) = codec.seal_frame(&[FIN])?;
                codec.order.sent_end();
                socket::send_all(tcp, &record[..n]).await?;
                return Ok(Some(rejection));
            }
            Pulled::Data => {}
            _ => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
        }
        if codec.incoming.fill(tcp).await? == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
    }
}

fn refuse(session: Box<Session>, failure: HandshakeFailure, expected: &SpiffeId) -> Error {
    let Session { tcp, codec, peer, .. } = *session;
    let error = Error::Identity { failure, expected: expected.to_string(), found: Some(peer.id().clone()) };
    handshake::refuse(&tcp, codec, error)
}
