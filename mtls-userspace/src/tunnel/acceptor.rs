//! The server end: an accepted socket in, an authenticated [`ServerTunnel`] out, which gives one [`Request`] after the
//! other. Whether a request is served is not decided here.

use std::io;
use std::sync::Arc;
use std::time::SystemTime;

use rustls::SupportedCipherSuite;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::identity::{Identity, SpiffeId};

use super::buffer::HEADROOM;
use super::codec::{MAX_RANGES, Pulled};
use super::frame::{MAX_REJECT, Open, Rejection};
use super::gate::Gate;
use super::record::{HEADER, TRAILER};
use super::stream::{Session, Stream};
use super::{Config, Error, handshake, socket};

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
        Ok(ServerTunnel { stream: Stream::serve(session), config: self.config.clone() })
    }
}

/// A tunnel from a proven peer.
pub struct ServerTunnel {
    stream: Stream,
    config: Arc<Config>,
}

impl ServerTunnel {
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

    /// The next stream, or `None` when the tunnel has ended while idle. Nothing is lost if the future is dropped.
    ///
    /// What a rejected client had under way is read and thrown away here.
    pub async fn next(&mut self) -> Result<Option<Request<'_>>, Error> {
        match self.next_open().await {
            Ok(Some(open)) => Ok(Some(Request { open, stream: &mut self.stream })),
            Ok(None) => Ok(None),
            Err(error) => {
                self.stream.reset();
                Err(error)
            }
        }
    }

    async fn next_open(&mut self) -> Result<Option<Open>, Error> {
        let peer = self.stream.proof();
        let distrusted = |failure| Error::Distrusted { peer: peer.id().clone(), failure };
        let (tcp, codec) = self.stream.split();
        loop {
            if codec.order.closed() {
                return Ok(None);
            }
            if !codec.order.settle() && !codec.order.outbound_ended() {
                return Err(Error::Busy);
            }
            match codec.pull()? {
                Pulled::Open(open) => {
                    return peer.unfit().map_or(Ok(Some(open)), |failure| Err(distrusted(failure)));
                }
                Pulled::Closed => return Ok(None),
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
            let idle = self.config.idle_server.min(left);
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
        let (tcp, codec) = self.stream.split();
        let mut record = [0; HEADROOM + HEADER + MAX_REJECT + TRAILER];
        let start = codec.seal_head(&mut record[..HEADROOM])?;
        let n = codec.seal_reject(&mut record[HEADROOM..], rejection)?;
        socket::send_all(tcp, &record[start..HEADROOM + n]).await?;
        Ok(())
    }
}
