//! The agent's listeners in a pod. They share ports with those of an older agent; which one gets a connection is the
//! kernel half's choice, not the reuseport group's.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::AsRawFd;

use mtls_common::{OUTBOUND_PORT, PLAINTEXT_PORT, TUNNEL_PORT};
use socket2::{Domain, SockRef, Socket, Type};

use super::Listeners;
use super::error::Error;
use super::netns::Netns;

const BACKLOG: i32 = 4096;

pub(super) fn listeners(pod: &str, netns: &Netns, workers: usize) -> Result<Vec<Listeners>, Error> {
    let open = |port| listen(pod, netns, port);
    (0..workers)
        .map(|_| {
            Ok(Listeners {
                outbound: open(OUTBOUND_PORT)?,
                inbound: open(TUNNEL_PORT)?,
                plaintext: open(PLAINTEXT_PORT)?,
            })
        })
        .collect()
}

fn listen(pod: &str, netns: &Netns, port: u16) -> Result<TcpListener, Error> {
    netns.within(|| wildcard(port)).and_then(|outcome| outcome).map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => Error::PortTaken { pod: pod.into(), port, source },
        _ => Error::Listen { pod: pod.into(), port, source },
    })
}

/// Both families, or IPv4 alone where the kernel has no IPv6.
fn wildcard(port: u16) -> io::Result<TcpListener> {
    match bound(Domain::IPV6, SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)) => {
            bound(Domain::IPV4, SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)))
        }
        outcome => outcome,
    }
}

fn bound(domain: Domain, addr: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(domain, Type::STREAM.nonblocking(), None)?;
    if domain == Domain::IPV6 {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.bind(&addr.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Gives the agent's end of a connection over loopback the congestion control that the application's end gets: one
/// that doesn't pace. A name the kernel doesn't know leaves the socket as it is.
pub fn loopback_leg(socket: &impl AsRawFd, congestion: Option<&str>) {
    let name = congestion.unwrap_or("cubic");
    if name.is_empty() {
        return;
    }
    let borrowed = super::sys::borrow(socket);
    let socket = SockRef::from(&borrowed);
    if socket.set_tcp_congestion(name.as_bytes()).is_err() && congestion.is_none() {
        let _ = socket.set_tcp_congestion(b"reno");
    }
}
