//! An enrolled pod on this node: sockets inside it, and what the kernel half knows of its connections.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use mtls_common::{Flow, Note, OUTBOUND_PORT, PLAINTEXT_PORT, TUNNEL_PORT, note};
use socket2::{Domain, Socket, Type};

use super::address::{endpoint, socket_addr, words};
use super::diag::{Diag, Tcp};
use super::direct::DirectFlow;
use super::error::Error;
use super::kernel::Flows;
use super::netns::Netns;
use super::sys;
use crate::addr::{OriginalDst, OriginalSrc, canonical};

pub struct LocalPod {
    pub(super) name: String,
    pub(super) netns: Netns,
    pub(super) flows: Arc<Flows>,
    pub(super) destroy: bool,
}

impl LocalPod {
    /// `namespace/name`.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn netns_cookie(&self) -> u64 {
        self.netns.cookie()
    }

    /// A non-blocking TCP socket in the pod's namespace, for dialling `to`. The calling thread visits the namespace.
    pub fn socket(&self, to: SocketAddr) -> io::Result<Socket> {
        let open = || Socket::new(Domain::for_address(to), Type::STREAM.nonblocking(), None);
        self.netns.within(open)?
    }

    /// What the application dialled, by the addresses of the outbound listener's accepted socket.
    pub fn original_destination(&self, peer: SocketAddr, local: SocketAddr) -> Result<OriginalDst, Error> {
        let (peer, local) = (canonical(peer), canonical(local));
        let original = self.flows.original.get(&self.flow(peer, local), 0);
        match original {
            Ok(original) => Ok(OriginalDst::new(socket_addr(original))),
            Err(_) => Err(Error::NotCaptured { pod: self.name.clone(), peer }),
        }
    }

    /// Makes the application that `socket` is about to dial at `to` see `source` as its client.
    ///
    /// Binds the socket to a loopback address. That tells the kernel half a delivered connection from any other, since
    /// nothing outside the pod can come from there, and gives the pod as many deliveries at once as it likes: from the
    /// pod's own address there would be one per ephemeral port and server port, with a minute in TIME_WAIT after each.
    pub fn announce_source(&self, socket: &Socket, to: SocketAddr, source: OriginalSrc) -> Result<(), Error> {
        let announce = || {
            let peer = endpoint(source.addr());
            sys::write_note(
                self.flows.notes.fd().as_fd(),
                socket.as_raw_fd(),
                &Note { kind: note::DELIVERED, peer },
            )?;
            sys::bind_without_port(socket)?;
            let from: IpAddr = match to {
                SocketAddr::V4(_) => loopback(rand::random()).into(),
                SocketAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
            };
            socket.bind(&SocketAddr::new(from, 0).into())
        };
        announce().map_err(|source| Error::Announce { pod: self.name.clone(), source })
    }

    /// Resets the pod's end of a connection, whichever end it is. False: it is gone already.
    pub fn reset(&self, connection: DirectFlow) -> Result<bool, Error> {
        let failed = |what| move |source| Error::Diag { pod: self.name.clone(), what, source };
        let diag = self.netns.within(Diag::open).and_then(|diag| diag).map_err(failed("opening"))?;
        let DirectFlow { client, server } = connection;
        let is_end = |tcp: &&Tcp| [(client, server), (server, client)].contains(&(tcp.local, tcp.remote));
        let mut ended = false;
        for tcp in diag.alive().map_err(failed("listing connections"))?.iter().filter(is_end) {
            ended |= diag.destroy(tcp).map_err(failed("SOCK_DESTROY (needs CONFIG_INET_DIAG_DESTROY)"))?;
        }
        Ok(ended)
    }

    /// Application bytes of the connections that the pod has dialled, as its kernel counts them: sent and
    /// acknowledged, received.
    pub fn dialled_bytes(&self) -> Result<HashMap<DirectFlow, (u64, u64)>, Error> {
        let failed = |what| move |source| Error::Diag { pod: self.name.clone(), what, source };
        let diag = self.netns.within(Diag::open).and_then(|diag| diag).map_err(failed("opening"))?;
        let alive = diag.alive().map_err(failed("listing connections"))?;
        let bytes = alive
            .iter()
            .map(|tcp| (DirectFlow { client: tcp.local, server: tcp.remote }, tcp.bytes_of_client()));
        Ok(bytes.collect())
    }

    /// Ports of the pod that can be dialled from outside and that something of its own listens on.
    pub fn served_ports(&self) -> Result<HashSet<u16>, Error> {
        let failed = |what| move |source| Error::Diag { pod: self.name.clone(), what, source };
        let diag = self.netns.within(Diag::open).and_then(|diag| diag).map_err(failed("opening"))?;
        let mut ports = diag.reachable_ports().map_err(failed("listing listeners"))?;
        ports.retain(|port| !is_ours(*port));
        Ok(ports)
    }

    /// Open plaintext connections from outside the pod, as (port dialled, client); without those of the node's own
    /// (probes). Costs a walk over every connection of the machine.
    pub fn open_plaintext(&self) -> Result<Vec<(u16, IpAddr)>, Error> {
        let failed = |what| move |source| Error::Diag { pod: self.name.clone(), what, source };
        let diag = self.netns.within(Diag::open).and_then(|diag| diag).map_err(failed("opening"))?;
        let served = diag.listening_ports().map_err(failed("listing listeners"))?;
        let open = diag.established().map_err(failed("listing connections"))?;
        let plaintext =
            open.iter().filter(|tcp| served.contains(&tcp.local.port()) && self.is_plaintext(tcp));
        Ok(plaintext.map(|tcp| (tcp.local.port(), tcp.remote.ip())).collect())
    }

    /// Whether the address is this pod's, by its manifest or by its interfaces.
    pub fn has_address(&self, ip: IpAddr) -> bool {
        self.flows.local.get(&words(ip), 0).is_ok_and(|local| local.netns == self.netns_cookie())
    }

    /// Resets every open plaintext connection that came from outside the pod to a port for which `ports` is true.
    /// Connections of the node's own (probes) stay. Returns how many there were.
    pub fn reset_plaintext(&self, ports: &dyn Fn(u16) -> bool) -> Result<usize, Error> {
        let failed = |what| move |source| Error::Diag { pod: self.name.clone(), what, source };
        let diag = self.netns.within(Diag::open).and_then(|diag| diag).map_err(failed("opening"))?;
        // A connection whose local port is not one that something listens on was dialled by the pod.
        let served = diag.listening_ports().map_err(failed("listing listeners"))?;
        let mut reset = 0;
        for socket in diag.connected().map_err(failed("listing connections"))? {
            let port = socket.local.port();
            if served.contains(&port) && ports(port) && self.is_plaintext(&socket) {
                if !self.destroy {
                    return Err(Error::PlaintextStays { pod: self.name.clone(), port });
                }
                let ended =
                    diag.destroy(&socket).map_err(failed("SOCK_DESTROY (needs CONFIG_INET_DIAG_DESTROY)"))?;
                reset += usize::from(ended);
            }
        }
        Ok(reset)
    }

    /// Ports that something in the pod listens on, the agent or the pod itself.
    pub(super) fn listening_ports(&self) -> Result<HashSet<u16>, Error> {
        let failed = |what| move |source| Error::Diag { pod: self.name.clone(), what, source };
        let diag = self.netns.within(Diag::open).and_then(|diag| diag).map_err(failed("opening"))?;
        diag.listening_ports().map_err(failed("listing listeners"))
    }

    /// The pod's TCP sockets, as the kernel lists them: ports that are listened on, and connections.
    pub(super) fn sockets(&self) -> Result<(HashSet<u16>, Vec<Tcp>), Error> {
        let failed = |what| move |source| Error::Diag { pod: self.name.clone(), what, source };
        let diag = self.netns.within(Diag::open).and_then(|diag| diag).map_err(failed("opening"))?;
        let listening = diag.listening_ports().map_err(failed("listing listeners"))?;
        Ok((listening, diag.connected().map_err(failed("listing connections"))?))
    }

    pub(super) fn is_plaintext(&self, socket: &Tcp) -> bool {
        let (local, remote) = (socket.local, socket.remote);
        let is_own = local.ip() == remote.ip() || remote.ip().is_loopback() || self.has_address(remote.ip());
        let is_trusted = || {
            let flow = Flow { netns: 0, ..self.flow(remote, local) };
            self.flows.trusted.get(&flow, 0).is_ok()
        };
        !is_ours(local.port()) && !is_own && !is_trusted() && !self.is_direct(remote, local)
    }

    /// Whether the kernel half recorded the connection as one between pods of this node that it let through itself.
    pub(super) fn is_direct(&self, client: SocketAddr, server: SocketAddr) -> bool {
        let flow = Flow { netns: 0, ..self.flow(client, server) };
        self.flows.direct.get(&flow, 0).is_ok()
    }

    fn flow(&self, client: SocketAddr, server: SocketAddr) -> Flow {
        Flow {
            netns: self.netns_cookie(),
            client_addr_be: words(client.ip()),
            server_addr_be: words(server.ip()),
            client_port: client.port(),
            server_port: server.port(),
            pad: 0,
        }
    }
}

/// Whether the port belongs to the agent in every enrolled pod.
fn is_ours(port: u16) -> bool {
    matches!(port, OUTBOUND_PORT | PLAINTEXT_PORT | TUNNEL_PORT)
}

/// 127.128.0.1 to 127.254.255.255: apart from those that captured connections dial.
fn loopback(random: u32) -> Ipv4Addr {
    Ipv4Addr::from(0x7f80_0001 | random & 0x007e_ffff)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn deliveries_come_from_loopback(random: u32) {
            let from = loopback(random);
            prop_assert!(from.is_loopback() && from.octets()[1] >= 128);
            prop_assert!(from != Ipv4Addr::new(127, 255, 255, 255));
        }
    }
}
