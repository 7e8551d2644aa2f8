//! The network of a namespace that has none, for labs and trials: loopback, addresses, a veth pair. Netlink by hand.
//!
//! Works in the calling thread's network namespace. The data path needs none of it.

use std::ffi::CString;
use std::io::{self, Read};
use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

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
const IFLA_IFNAME: u16 = 3;
const IFLA_LINKINFO: u16 = 18;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const VETH_INFO_PEER: u16 = 1;

pub(crate) fn loopback_up() -> io::Result<()> {
    up(LOOPBACK)
}

pub(crate) fn up(interface: u32) -> io::Result<()> {
    request(RTM_NEWLINK, 0, &link(interface, IFF_UP))
}

/// The number of the interface with this name.
pub(crate) fn index(name: &str) -> io::Result<u32> {
    let name = CString::new(name)?;
    // SAFETY: a NUL-terminated string that lives through the call.
    match unsafe { libc::if_nametoindex(name.as_ptr()) } {
        0 => Err(io::Error::last_os_error()),
        index => Ok(index),
    }
}

/// Usable at once, without asking whether somebody else has it; `prefix` bits lead to its neighbours.
pub(crate) fn add_address(interface: u32, ip: IpAddr, prefix: u8) -> io::Result<()> {
    let (family, bytes) = match ip {
        IpAddr::V4(v4) => (libc::AF_INET, v4.octets().to_vec()),
        IpAddr::V6(v6) => (libc::AF_INET6, v6.octets().to_vec()),
    };
    // `struct ifaddrmsg`: family, prefix length, flags, scope, index; then two attributes with the address.
    let mut body = vec![family as u8, prefix, IFA_F_NODAD, 0];
    body.extend(interface.to_ne_bytes());
    for kind in [IFA_LOCAL, IFA_ADDRESS] {
        body.extend(attribute(kind, &bytes));
    }
    request(RTM_NEWADDR, NLM_F_CREATE, &body)
}

/// Makes an address usable within the namespace, and nowhere else.
pub(crate) fn add_to_loopback(ip: IpAddr) -> io::Result<()> {
    add_address(LOOPBACK, ip, if ip.is_ipv4() { 32 } else { 128 })
}

/// Makes a veth pair: one end here, the other in the namespace `peer`, both with the same name, both down.
pub(crate) fn veth(name: &str, peer: BorrowedFd<'_>) -> io::Result<()> {
    let name = CString::new(name)?;
    let name = attribute(IFLA_IFNAME, name.as_bytes_with_nul());
    let namespace = attribute(IFLA_NET_NS_FD, &peer.as_raw_fd().to_ne_bytes());
    let other = attribute(VETH_INFO_PEER, &[link(0, 0), name.clone(), namespace].concat());
    let info = [attribute(IFLA_INFO_KIND, b"veth"), attribute(IFLA_INFO_DATA, &other)].concat();
    request(RTM_NEWLINK, NLM_F_CREATE, &[link(0, 0), name, attribute(IFLA_LINKINFO, &info)].concat())
}

/// `struct ifinfomsg`: family, type, index, flags, which of them change.
fn link(interface: u32, flags: u32) -> Vec<u8> {
    [0, interface, flags, flags].map(u32::to_ne_bytes).concat()
}

/// `struct nlattr`, padded to four bytes.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = [(4 + value.len() as u16).to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
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
