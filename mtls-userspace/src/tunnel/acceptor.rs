//! The server end: an accepted socket in, an authenticated [`ServerTunnel`] out, which gives one [`Request`] after the
//! other. Whether a request is served is not decided here.

use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::SupportedCipherSuite;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::identity::{Identity, SpiffeId};

use super::buffer::HEADROOM;
use super::codec::{MAX_RANGES, Pulled};
use super::frame::{FrameError, MAX_REJECT, Open, Place, RETIRE, RejectReason, Rejection, SharedId};
use super::gate::Gate;
use super::record::{HEADER, TRAILER};
use super::shared::{Shared, SharedTunnel};
use super::stream::{Session, Stream};
use super::{Config, Error, Violation, handshake, socket};

/// How long a retired tunnel waits for a stream that was under way.
const LINGER: Duration = Duration::from_millis(500);

/// Accepts tunnels. Cheap to clone.
#[derive(Clone)]
pub struct Acceptor {
    config: Arc<Config>,
    gate: Arc<Gate>,
}

impl Acceptor {
    pub fn new(config: Arc<Config>) -> Self {
        Self { config, gate: Arc::default() }
    }

    /// The tunnel that adopted a stream, to be gone on with when that is over.
    pub fn resume(&self, stream: Stream, identity: &SpiffeId) -> ServerTunnel {
        ServerTunnel { stream, config: self.config.clone(), ours: identity.clone(), retired: false }
    }

    /// Shakes hands as `identity`; the peer has then proven who it is.
    pub async fn accept(&self, tcp: TcpStream, identity: &Arc<Identity>) -> Result<ServerTunnel, Error> {
        let config = &*self.config;
        let configs = config.tls.of(identity)?;
        socket::prepare_tunnel(&tcp, config)?;
        let shaking = async {
            // A peer that says nothing takes nobody's turn.
            tcp.readable().await?;
            self.gate.pass(|| handshake::server(&tcp, identity, &configs, config)).await
        };
        let established = timeout(config.handshake_timeout, shaking)
            .await
            .map_err(|_| Error::HandshakeTimedOut { waited: config.handshake_timeout })??;
        let session = Box::new(Session {
            tcp,
            codec: established.codec,
            peer: established.peer,
            resumed: established.resumed,
        });
        Ok(ServerTunnel {
            stream: Stream::serve(session),
            config: self.config.clone(),
            ours: identity.svid.id.clone(),
            retired: false,
        })
    }
}

/// A tunnel from a proven peer.
pub struct ServerTunnel {
    stream: Stream,
    config: Arc<Config>,
    ours: SpiffeId,
    /// The client was asked to begin no more streams.
    retired: bool,
}

impl ServerTunnel {
    /// The stream that it carries.
    pub fn stream(&mut self) -> &mut Stream {
        &mut self.stream
    }

    pub fn peer(&self) -> &SpiffeId {
        self.stream.peer()
    }

    pub fn cipher(&self) -> SupportedCipherSuite {
        self.stream.cipher()
    }

    /// Whether the handshake resumed an earlier session.
    pub fn resumed(&self) -> bool {
        self.stream.resumed()
    }

    /// Whether it has carried a stream before; from now on it has.
    pub fn used(&mut self) -> bool {
        self.stream.used()
    }

    /// Leaves this thread's event loop; what is returned makes it again in the runtime of whoever calls it.
    pub fn depart(self) -> io::Result<impl FnOnce() -> io::Result<Self> + Send> {
        let Self { stream, config, ours, retired } = self;
        let departed = stream.depart()?;
        Ok(move || Ok(Self { stream: departed.arrive()?, config, ours, retired }))
    }

    /// The next stream, or `None` when the tunnel has ended while idle. Nothing is lost if the future is dropped.
    ///
    /// What a rejected client had under way is read and thrown away here.
    pub async fn next(&mut self) -> Result<Option<Request<'_>>, Error> {
        match self.ask().await? {
            Some(Asked::Open(open)) => Ok(Some(self.request(open))),
            // Only who looks after shared tunnels as well can say yes.
            Some(_) => Err(Error::Busy),
            None => Ok(None),
        }
    }

    /// As [`Self::next`], for whoever looks after shared tunnels as well.
    pub async fn ask(&mut self) -> Result<Option<Asked>, Error> {
        let asked = self.asked().await;
        if asked.is_err() {
            self.stream.reset();
        }
        asked
    }

    /// The stream that [`Self::ask`] told of.
    pub fn request(&mut self, open: Open) -> Request<'_> {
        Request { open, stream: &mut self.stream }
    }

    /// The tunnel has become a shared one.
    pub fn share(self, id: SharedId) -> Option<SharedTunnel> {
        let Self { stream, config, ours, .. } = self;
        let shared = Shared::serve(id, stream.into_session()?);
        config.served.insert(&ours, &shared);
        Some(SharedTunnel::new(shared, config.idle_server))
    }

    /// Gives this tunnel to the stream that is to go on here; gives it back if there is none, which the client is told.
    pub async fn adopt(self, place: Place) -> Result<Option<Self>, Error> {
        let Self { stream, config, ours, retired } = self;
        let found = config.served.find(&ours, stream.peer(), &place);
        let Some(mut session) = stream.into_session() else { return Ok(None) };
        session.codec.incoming.release_if_empty();
        if !session.codec.incoming.is_empty() {
            return Err(Violation::Frame(FrameError::OutOfOrder("early")).into());
        }
        let session = match found {
            Some(shared) => match shared.adopt(place.lane, session) {
                Ok(()) => return Ok(None),
                Err(session) => session,
            },
            None => session,
        };
        let mut refused = Self { stream: Stream::serve(session), config, ours, retired };
        let rejection = Rejection::new(RejectReason::Unavailable, "no such stream on this agent");
        refuse(&mut refused.stream, &rejection).await?;
        Ok(Some(refused))
    }

    async fn asked(&mut self) -> Result<Option<Asked>, Error> {
        let peer = self.stream.proof();
        let distrusted = |failure| Error::Distrusted { peer: peer.id().clone(), failure };
        let fit = |asked| peer.unfit().map_or(Ok(Some(asked)), |failure| Err(distrusted(failure)));
        let (tcp, codec) = self.stream.split();
        loop {
            if codec.order.closed() {
                return Ok(None);
            }
            if !codec.order.settle() && !codec.order.outbound_ended() {
                return Err(Error::Busy);
            }
            match codec.pull()? {
                Pulled::Open(open) => return fit(Asked::Open(open)),
                Pulled::Share(id) => return fit(Asked::Share(id)),
                Pulled::Adopt(place) => return fit(Asked::Adopt(place)),
                Pulled::Closed | Pulled::Adopted => return Ok(None),
                // A client that was refused meanwhile: what follows is no longer told apart from a next stream.
                Pulled::Raw => return Ok(None),
                Pulled::Fin => continue,
                Pulled::Data | Pulled::Reject(_) => {}
            }
            if codec.incoming.discard() == MAX_RANGES {
                continue;
            }
            // Not longer than the peer's certificate lives: after that it may begin no stream.
            let left = peer.not_after().duration_since(SystemTime::now()).unwrap_or_default();
            let idle = if self.retired { LINGER } else { self.config.idle_server }.min(left);
            let received = tokio::select! {
                received = timeout(idle, codec.incoming.fill(tcp)) => received,
                failure = peer.until_distrusted() => return Err(distrusted(failure)),
            };
            let received = match received {
                Ok(received) => received,
                Err(_) => {
                    let (record, n) = codec.seal_close_notify()?;
                    let _ = socket::send(tcp, &record[..n]);
                    return Ok(None);
                }
            };
            match received {
                Ok(0) => return Ok(None),
                Ok(_) => {}
                // A client that died took no stream with it.
                Err(error) if codec.order.idle() && error.kind() == io::ErrorKind::ConnectionReset => {
                    return Ok(None);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Asks the client to begin no more streams; one that is under way is yet to be served, by going on with
    /// [`Self::ask`]. Gives false if that can't be said on this tunnel, which is then to be closed.
    pub fn retire(&mut self) -> bool {
        let (tcp, codec) = self.stream.split();
        if !codec.order.settle() || !codec.order.may_share() {
            return false;
        }
        let said = codec.seal_frame(&[RETIRE]).map(|(record, n)| socket::send(tcp, &record[..n]));
        self.retired = matches!(said, Ok(Ok(_)));
        self.retired
    }

    /// Ends an idle tunnel politely; a busy one is reset.
    pub fn close(mut self) {
        let (tcp, codec) = self.stream.split();
        if codec.order.settle()
            && let Ok((record, n)) = codec.seal_close_notify()
        {
            let _ = socket::send(tcp, &record[..n]);
        }
    }
}

/// A stream that a peer asks for.
pub struct Request<'a> {
    open: Open,
    stream: &'a mut Stream,
}

impl<'a> Request<'a> {
    pub fn open(&self) -> &Open {
        &self.open
    }

    pub fn peer(&self) -> &SpiffeId {
        self.stream.peer()
    }

    pub fn cipher(&self) -> SupportedCipherSuite {
        self.stream.cipher()
    }

    /// Takes the stream; nothing is sent, the answer begins with the application's first bytes.
    pub fn accept(self) -> (Open, &'a mut Stream) {
        (self.open, self.stream)
    }

    /// Refuses the stream. The tunnel stays usable: go on with [`ServerTunnel::next`].
    pub async fn reject(self, rejection: &Rejection) -> Result<(), Error> {
        refuse(self.stream, rejection).await
    }
}

async fn refuse(stream: &mut Stream, rejection: &Rejection) -> Result<(), Error> {
    let (tcp, codec) = stream.split();
    let mut record = [0; HEADROOM + HEADER + MAX_REJECT + TRAILER];
    let start = codec.seal_head(&mut record[..HEADROOM])?;
    let n = codec.seal_reject(&mut record[HEADROOM..], rejection)?;
    socket::send_all(tcp, &record[start..HEADROOM + n]).await?;
    Ok(())
}

/// What a client does on an idle tunnel.
#[derive(Debug)]
pub enum Asked {
    /// Begins a stream: see [`ServerTunnel::request`].
    Open(Open),
    /// Makes the tunnel a shared one: see [`ServerTunnel::share`].
    Share(SharedId),
    /// Makes it the tunnel of a stream that a shared one carries: see [`ServerTunnel::adopt`].
    Adopt(Place),
}
