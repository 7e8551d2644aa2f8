//! sock_diag: the TCP sockets of a namespace out, and the end of some of them in. Netlink by hand: two requests.

use std::collections::HashSet;
use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4};

use socket2::{Domain, Protocol, Socket, Type};

const NETLINK_SOCK_DIAG: i32 = 4;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IPPROTO_TCP: u8 = 6;

const HEADER: usize = 16;
/// `struct inet_diag_sockid`.
const ID: usize = 48;
/// `struct inet_diag_msg` up to and including its id.
const MESSAGE: usize = 4 + ID;

/// `struct inet_diag_msg`; attributes follow.
const BODY: usize = 72;
const INET_DIAG_INFO: u16 = 2;

const SYN_SENT: u32 = 1 << 2;
const LISTEN: u32 = 1 << 10;
/// Everything that carries or may yet carry data: not SYN_SENT, TIME_WAIT, CLOSE, LISTEN.
const CONNECTED: u32 = 1 << 1 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 11 | 1 << 12;
/// What a handshake has opened and nobody has closed on both sides: ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT.
const ESTABLISHED: u32 = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 8;

/// A netlink socket in the namespace where it was opened.
pub(super) struct Diag(Socket);

/// A TCP socket, and what names it to the kernel.
pub(super) struct Tcp {
    pub local: SocketAddr,
    pub remote: SocketAddr,
    family: u8,
    id: [u8; ID],
    state: u8,
    /// `tcpi_bytes_acked` and `tcpi_bytes_received`.
    acknowledged: u64,
    received: u64,
}

impl Diag {
    /// Opens in the calling thread's namespace.
    pub fn open() -> io::Result<Self> {
        Ok(Self(Socket::new(
            Domain::from(libc::AF_NETLINK),
            Type::RAW,
            Some(Protocol::from(NETLINK_SOCK_DIAG)),
        )?))
    }

    pub fn listening_ports(&self) -> io::Result<HashSet<u16>> {
        Ok(self.sockets(LISTEN)?.into_iter().map(|socket| socket.local.port()).collect())
    }

    /// Ports that something listens on, on an address that can be dialled from outside.
    pub fn reachable_ports(&self) -> io::Result<HashSet<u16>> {
        let listening = self.sockets(LISTEN)?.into_iter().map(|socket| socket.local);
        Ok(listening.filter(|local| !local.ip().is_loopback()).map(|local| local.port()).collect())
    }

    pub fn connected(&self) -> io::Result<Vec<Tcp>> {
        self.sockets(CONNECTED)
    }

    /// Whatever a connect or a handshake has made and nobody has ended.
    pub fn alive(&self) -> io::Result<Vec<Tcp>> {
        self.sockets(CONNECTED | SYN_SENT)
    }

    pub fn established(&self) -> io::Result<Vec<Tcp>> {
        self.sockets(ESTABLISHED)
    }

    /// Ends a connection as if it had been reset: both applications see it. False if it was gone already.
    pub fn destroy(&self, socket: &Tcp) -> io::Result<bool> {
        self.0.send(&request(SOCK_DESTROY, NLM_F_REQUEST | NLM_F_ACK, socket.family, 0, &socket.id))?;
        let mut ended = true;
        let mut outcome = Ok(());
        self.answers(|kind, payload| {
            if kind == NLMSG_ERROR {
                match error(payload) {
                    Some(0) => {}
                    Some(libc::ENOENT) => ended = false,
                    Some(errno) => outcome = Err(io::Error::from_raw_os_error(errno)),
                    None => outcome = Err(io::ErrorKind::InvalidData.into()),
                }
            }
            true
        })?;
        outcome.map(|()| ended)
    }

    fn sockets(&self, states: u32) -> io::Result<Vec<Tcp>> {
        let mut sockets = Vec::new();
        for family in [AF_INET, AF_INET6] {
            let flags = NLM_F_REQUEST | NLM_F_DUMP;
            self.0.send(&request(SOCK_DIAG_BY_FAMILY, flags, family, states, &[0; ID]))?;
            let mut outcome = Ok(());
            self.answers(|kind, payload| match kind {
                NLMSG_DONE => true,
                NLMSG_ERROR => {
                    outcome = Err(error(payload)
                        .map_or(io::ErrorKind::InvalidData.into(), io::Error::from_raw_os_error));
                    true
                }
                _ => {
                    sockets.extend(Tcp::parse(payload));
                    false
                }
            })?;
            outcome?;
        }
        Ok(sockets)
    }

    /// Reads messages until `last` says that one was the last.
    fn answers(&self, mut last: impl FnMut(u16, &[u8]) -> bool) -> io::Result<()> {
        let mut buffer = vec![0; 32 * 1024];
        loop {
            let len = (&self.0).read(&mut buffer)?;
            let mut rest = buffer.get(..len).unwrap_or_default();
            while let Some((kind, payload, after)) = message(rest) {
                if last(kind, payload) {
                    return Ok(());
                }
                rest = after;
            }
        }
    }
}

impl Tcp {
    /// A socket that is known by its addresses, IPv4 both.
    pub fn between(local: SocketAddrV4, remote: SocketAddrV4) -> Self {
        /// `INET_DIAG_NOCOOKIE`, twice.
        const ANY: [u8; 8] = [0xff; 8];
        let mut id = [0; ID];
        let ports = [local.port(), remote.port()].map(u16::to_be_bytes).concat();
        let (ips, none) = ([local.ip().octets(), remote.ip().octets()], [0; 12]);
        let bytes = [&ports[..], &ips[0], &none, &ips[1], &none, &[0; 4], &ANY].concat();
        id.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
        Self {
            local: local.into(),
            remote: remote.into(),
            family: AF_INET,
            id,
            state: 0,
            acknowledged: 0,
            received: 0,
        }
    }

    fn parse(payload: &[u8]) -> Option<Self> {
        let family = *payload.first()?;
        let id: [u8; ID] = payload.get(4..MESSAGE)?.try_into().ok()?;
        let port = |at: usize| Some(u16::from_be_bytes(id.get(at..at + 2)?.try_into().ok()?));
        let ip = |at: usize| -> Option<IpAddr> {
            Some(match family {
                AF_INET => IpAddr::from(Ipv4Addr::from(<[u8; 4]>::try_from(id.get(at..at + 4)?).ok()?)),
                _ => IpAddr::from(Ipv6Addr::from(<[u8; 16]>::try_from(id.get(at..at + 16)?).ok()?))
                    .to_canonical(),
            })
        };
        let [acknowledged, received] = payload.get(BODY..).and_then(counts).unwrap_or_default();
        Some(Self {
            local: SocketAddr::new(ip(4)?, port(0)?),
            remote: SocketAddr::new(ip(20)?, port(2)?),
            family,
            id,
            state: *payload.get(1)?,
            acknowledged,
            received,
        })
    }

    /// Application bytes sent and acknowledged, and received, of a socket that has dialled: its SYN counts, and so does
    /// each FIN.
    pub fn bytes_of_client(&self) -> (u64, u64) {
        const FIN_WAIT2: u8 = 5;
        const CLOSE_WAIT: u8 = 8;
        const LAST_ACK: u8 = 9;
        const CLOSING: u8 = 11;
        let fin_acknowledged = u64::from(self.state == FIN_WAIT2);
        let fin_received = u64::from([CLOSE_WAIT, LAST_ACK, CLOSING].contains(&self.state));
        (self.acknowledged.saturating_sub(1 + fin_acknowledged), self.received.saturating_sub(fin_received))
    }
}

/// `struct nlmsghdr`, then `struct inet_diag_req_v2`.
fn request(kind: u16, flags: u16, family: u8, states: u32, id: &[u8; ID]) -> Vec<u8> {
    let len = (HEADER + 8 + ID) as u32;
    let mut bytes = Vec::with_capacity(len as usize);
    bytes.extend(len.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend([family, IPPROTO_TCP, 1 << (INET_DIAG_INFO - 1), 0]);
    bytes.extend(states.to_ne_bytes());
    bytes.extend(id);
    bytes
}

/// Acknowledged and received bytes out of `struct tcp_info`, the attribute INET_DIAG_INFO.
fn counts(mut attributes: &[u8]) -> Option<[u64; 2]> {
    const BYTES_ACKED: usize = 120;
    const BYTES_RECEIVED: usize = 128;
    loop {
        let short = |at: usize| Some(u16::from_ne_bytes(attributes.get(at..at + 2)?.try_into().ok()?));
        let (len, kind) = (usize::from(short(0)?), short(2)?);
        let value = attributes.get(4..len)?;
        if kind == INET_DIAG_INFO {
            let long = |at: usize| Some(u64::from_ne_bytes(value.get(at..at + 8)?.try_into().ok()?));
            return Some([long(BYTES_ACKED)?, long(BYTES_RECEIVED)?]);
        }
        attributes = attributes.get(len.next_multiple_of(4)..)?;
    }
}

/// The first message: its kind, its payload, and what follows it.
fn message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let len = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let payload = bytes.get(HEADER..len)?;
    Some((kind, payload, bytes.get(len.next_multiple_of(4)..).unwrap_or_default()))
}

/// `struct nlmsgerr` begins with a negated error number.
fn error(payload: &[u8]) -> Option<i32> {
    Some(-i32::from_ne_bytes(payload.get(..4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_answer_of_the_kernel_panics(bytes: Vec<u8>) {
            if let Some((_, payload, _)) = message(&bytes) {
                let _ = (Tcp::parse(payload), error(payload));
            }
            let _ = counts(&bytes);
        }
    }

    #[test]
    fn counts_are_found_behind_other_attributes() {
        let mut info = [0u8; 216];
        info[120..128].copy_from_slice(&7u64.to_ne_bytes());
        info[128..136].copy_from_slice(&9u64.to_ne_bytes());
        let attribute = |kind: u16, value: &[u8]| {
            let len = (4 + value.len()) as u16;
            let padding = vec![0; value.len().next_multiple_of(4) - value.len()];
            [&len.to_ne_bytes()[..], &kind.to_ne_bytes(), value, &padding].concat()
        };
        let attributes = [attribute(8, &[1]), attribute(INET_DIAG_INFO, &info)].concat();
        assert_eq!(counts(&attributes), Some([7, 9]));
        assert_eq!(counts(&attributes[..20]), None);
    }

    #[test]
    fn a_socket_known_by_its_addresses_is_the_one_that_is_listed() {
        let (local, remote) = ("127.0.0.1:1".parse().unwrap(), "10.0.0.2:65535".parse().unwrap());
        let known = Tcp::between(local, remote);
        let listed = Tcp::parse(&[&[AF_INET, 1, 0, 0][..], &known.id].concat()).unwrap();
        assert_eq!((listed.local, listed.remote), (local.into(), remote.into()));
    }

    #[test]
    fn a_message_is_what_its_length_says() {
        let sent = request(SOCK_DESTROY, 0, AF_INET, 0, &[7; ID]);
        let mut two = sent.clone();
        two.extend(&sent);
        let Some((kind, payload, rest)) = message(&two) else { panic!("no message") };
        assert_eq!((kind, payload.len(), rest), (SOCK_DESTROY, 8 + ID, &sent[..]));
        assert!(message(&sent[..sent.len() - 1]).is_none());
    }
}
