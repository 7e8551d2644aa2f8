//! The network of a namespace that has none: loopback, and addresses on it. Netlink by hand: two requests.

use std::io::{self, Read};
use std::net::IpAddr;

use socket2::{Domain, Protocol, Socket, Type};

const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const NLM_F_REQUEST_ACK: u16 = 1 | 4;
const NLM_F_CREATE: u16 = 0x400;
const NLMSG_ERROR: u16 = 2;

/// The loopback interface's number, in every namespace.
const LOOPBACK: u32 = 1;
const IFF_UP: u32 = 1;
const IFA_F_NODAD: u8 = 2;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;

pub(super) fn loopback_up() -> io::Result<()> {
    // `struct ifinfomsg`: family, type, index, flags, which of them change.
    let mut body = vec![0; 4];
    body.extend([LOOPBACK, IFF_UP, IFF_UP].map(u32::to_ne_bytes).concat());
    request(RTM_NEWLINK, 0, &body)
}

/// Usable at once, by itself and nothing else.
pub(super) fn add_address(ip: IpAddr) -> io::Result<()> {
    let (family, bytes) = match ip {
        IpAddr::V4(v4) => (libc::AF_INET, v4.octets().to_vec()),
        IpAddr::V6(v6) => (libc::AF_INET6, v6.octets().to_vec()),
    };
    // `struct ifaddrmsg`: family, prefix length, flags, scope, index; then two attributes with the address.
    let mut body = vec![family as u8, bytes.len() as u8 * 8, IFA_F_NODAD, 0];
    body.extend(LOOPBACK.to_ne_bytes());
    for kind in [IFA_LOCAL, IFA_ADDRESS] {
        body.extend((4 + bytes.len() as u16).to_ne_bytes());
        body.extend(kind.to_ne_bytes());
        body.extend(&bytes);
    }
    request(RTM_NEWADDR, NLM_F_CREATE, &body)
}

fn request(kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
    let socket =
        Socket::new(Domain::from(libc::AF_NETLINK), Type::RAW, Some(Protocol::from(libc::NETLINK_ROUTE)))?;
    let mut message = (16 + body.len() as u32).to_ne_bytes().to_vec();
    message.extend(kind.to_ne_bytes());
    message.extend((NLM_F_REQUEST_ACK | flags).to_ne_bytes());
    message.extend([0; 8]);
    message.extend(body);
    socket.send(&message)?;
    let mut answer = [0; 1024];
    let length = (&socket).read(&mut answer)?;
    let answer = answer.get(..length).unwrap_or_default();
    let kind = answer.get(4..6).and_then(|bytes| bytes.try_into().ok()).map(u16::from_ne_bytes);
    // `struct nlmsgerr` begins with a negated error number, zero for success.
    let errno = answer.get(16..20).and_then(|bytes| bytes.try_into().ok()).map(i32::from_ne_bytes);
    match (kind, errno) {
        (Some(NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(NLMSG_ERROR), Some(errno)) => Err(io::Error::from_raw_os_error(-errno)),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}
