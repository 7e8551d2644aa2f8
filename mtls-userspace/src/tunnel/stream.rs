//! One application connection's time on a tunnel: what the relay moves bytes through.
//!
//! A stream that ended cleanly in both directions leaves a reusable tunnel behind; any other end takes the tunnel with
//! it by TCP reset, so that the far application sees a reset too and never a clean end.

use std::io;

use rustls::SupportedCipherSuite;
use tokio::net::TcpStream;

use crate::identity::SpiffeId;

use super::Codec;
use super::frame::Open;
use super::peers::Peer;
use super::pool::Home;
use super::socket;
use super::verify::Expected;

/// A tunnel: its socket, its codec, and who is at the other end.
pub(crate) struct Session {
    pub tcp: TcpStream,
    pub codec: Codec,
    pub peer: Peer,
    pub resumed: bool,
}

/// A tunnel on its way to another thread's event loop.
pub(crate) struct Moving {
    tcp: std::net::TcpStream,
    codec: Codec,
    peer: Peer,
    resumed: bool,
}

impl Session {
    /// Leaves this thread's event loop. A socket that can't is closed.
    pub fn depart(self: Box<Self>) -> io::Result<Box<Moving>> {
        let Self { tcp, codec, peer, resumed } = *self;
        Ok(Box::new(Moving { tcp: tcp.into_std()?, codec, peer, resumed }))
    }
}

impl Moving {
    pub fn arrive(self: Box<Self>) -> io::Result<Box<Session>> {
        let Self { tcp, codec, peer, resumed } = *self;
        Ok(Box::new(Session { tcp: TcpStream::from_std(tcp)?, codec, peer, resumed }))
    }
}

/// A stream on its way to another thread's event loop. Dropped, it takes its tunnel with it.
pub struct Departed {
    moving: Box<Moving>,
    home: Option<Home>,
    reused: bool,
}

impl Departed {
    /// Goes on in the runtime of whoever calls.
    pub fn arrive(self) -> io::Result<Stream> {
        let Self { moving, home, reused } = self;
        Ok(Stream { session: Some(moving.arrive()?), home, reused, aborted: false })
    }
}

/// A stream on a tunnel. Dropped after both directions ended, a client's tunnel goes back to its pool; dropped
/// earlier, the tunnel is reset.
pub struct Stream {
    /// Taken only by drop.
    session: Option<Box<Session>>,
    home: Option<Home>,
    reused: bool,
    aborted: bool,
}

impl Stream {
    /// A client's stream. Its OPEN leaves with the first bytes relayed.
    pub(crate) fn open(
        mut session: Box<Session>,
        open: Open,
        _proof: Expected,
        home: Home,
        reused: bool,
    ) -> Self {
        session.codec.begin(open);
        Self::go_on(session, home, reused)
    }

    /// A client's stream that another tunnel carried before.
    pub(crate) fn go_on(session: Box<Session>, home: Home, reused: bool) -> Self {
        Self { session: Some(session), home: Some(home), reused, aborted: false }
    }

    /// A server's tunnel, which carries one stream after the other.
    pub(crate) fn serve(session: Box<Session>) -> Self {
        Self { session: Some(session), home: None, reused: false, aborted: false }
    }

    /// The tunnel itself, for what is no stream.
    pub(crate) fn into_session(mut self) -> Option<Box<Session>> {
        self.session.take()
    }

    /// Leaves this thread's event loop, with nothing of it under way in a relay. A stream that can't takes its tunnel with
    /// it.
    pub fn depart(mut self) -> io::Result<Departed> {
        let Some(session) = self.session.take() else { return Err(io::ErrorKind::NotConnected.into()) };
        let moving = session.depart()?;
        Ok(Departed { moving, home: self.home.take(), reused: self.reused })
    }

    /// A server's tunnel carries its first stream.
    pub(crate) fn used(&mut self) -> bool {
        std::mem::replace(&mut self.reused, true)
    }

    fn session(&self) -> &Session {
        self.session.as_deref().expect("taken only by drop")
    }

    pub fn peer(&self) -> &SpiffeId {
        self.session().peer.id()
    }

    /// The peer, to be asked whether it is still trusted.
    pub fn proof(&self) -> Peer {
        self.session().peer.clone()
    }

    pub fn cipher(&self) -> SupportedCipherSuite {
        self.session().codec.suite()
    }

    /// Whether this stream runs on a tunnel that carried another before.
    pub fn reused(&self) -> bool {
        self.reused
    }

    /// Whether the tunnel's handshake resumed an earlier session.
    pub fn resumed(&self) -> bool {
        self.session().resumed
    }

    pub(crate) fn split(&mut self) -> (&TcpStream, &mut Codec) {
        let session = self.session.as_deref_mut().expect("taken only by drop");
        (&session.tcp, &mut session.codec)
    }

    /// Aborts: when this is dropped the TCP connection is reset, whatever the state of its streams.
    pub(crate) fn reset(&mut self) {
        self.aborted = true;
        socket::reset_on_close(&self.session().tcp);
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let Some(mut session) = self.session.take() else { return };
        if self.aborted {
            return;
        }
        let settled = session.codec.order.settle();
        match self.home.take() {
            _ if session.codec.order.closed() => {}
            _ if !settled => socket::reset_on_close(&session.tcp),
            Some(home) => home.put(session),
            None => {}
        }
    }
}
