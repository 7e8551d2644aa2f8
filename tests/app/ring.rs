//! The same through io_uring: the kernel connects, accepts, sends and receives on its own, without the usual calls.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd};

use anyhow::{Context, Result};
use io_uring::{IoUring, opcode, types};
use serde_json::{Value, json};
use socket2::{SockAddr, SockAddrStorage};

use crate::ending;
use crate::socket::Kind;

/// Connects, sends a message, reads it back.
pub fn echo(kind: &Kind, to: SocketAddr, message: &[u8]) -> Result<Value> {
    let mut ring = IoUring::new(8).context("set up io_uring")?;
    let socket = kind.open(to)?;
    let fd = types::Fd(socket.as_raw_fd());
    let address: SockAddr = kind.address(to).into();
    let connect = opcode::Connect::new(fd, address.as_ptr().cast(), address.len()).build();
    if let Err(error) = complete(&mut ring, &connect) {
        return Ok(json!({ "connected": false, "ended": ending(&Err(error)) }));
    }
    let send = opcode::Send::new(fd, message.as_ptr(), message.len() as u32).build();
    let mut back = vec![0u8; message.len()];
    let receive =
        opcode::Recv::new(fd, back.as_mut_ptr(), back.len() as u32).flags(libc::MSG_WAITALL).build();
    let exchanged = complete(&mut ring, &send).and_then(|_| complete(&mut ring, &receive));
    let stream = TcpStream::from(socket);
    Ok(json!({
        "connected": true, "local": stream.local_addr().ok(), "peer": stream.peer_addr().ok(),
        "ended": ending(&exchanged.map(|n| n as usize)),
        "echoed": if back == message { message.len() } else { 0 },
    }))
}

/// Accepts one connection; the address is the one the kernel writes beside it.
pub fn accept(listener: &TcpListener) -> Result<(TcpStream, SocketAddr)> {
    let mut ring = IoUring::new(8).context("set up io_uring")?;
    let mut storage = SockAddrStorage::zeroed();
    let mut size = storage.size_of();
    // SAFETY: any view of the storage will do, since only its address is used.
    let address: &mut libc::sockaddr = unsafe { storage.view_as() };
    let accept =
        opcode::Accept::new(types::Fd(listener.as_raw_fd()), &raw mut *address, &raw mut size).build();
    let fd = complete(&mut ring, &accept).context("accept through io_uring")?;
    // SAFETY: the kernel has just given us this descriptor.
    let stream = unsafe { TcpStream::from_raw_fd(fd) };
    // SAFETY: the kernel has written an address of this size into the storage.
    let address = unsafe { SockAddr::new(storage, size) };
    Ok((stream, address.as_socket().context("accept gave no IP address")?))
}

/// Submits one operation whose buffers outlive this call, and waits for it.
fn complete(ring: &mut IoUring, entry: &io_uring::squeue::Entry) -> io::Result<i32> {
    // SAFETY: the caller's buffers live until this function returns, and it returns after completion.
    unsafe { ring.submission().push(entry) }.map_err(io::Error::other)?;
    ring.submit_and_wait(1)?;
    let result = ring.completion().next().map(|done| done.result()).unwrap_or(-libc::EIO);
    if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(result) }
}
