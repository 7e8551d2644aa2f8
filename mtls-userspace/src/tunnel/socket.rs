//! Socket calls that tokio has no name for: receive and send that know a short count means "drained" or "full", and
//! options of sockets on either side of a tunnel.

use std::io::{self, IoSlice, IoSliceMut, Read};
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::io::Interest;
use tokio::net::TcpStream;

use super::Config;

/// Connects a non-blocking socket. A destination on this machine has answered by the time the kernel returns, which asking
/// it again tells without a turn of the event loop.
pub(crate) async fn connect(socket: socket2::Socket, to: SocketAddr) -> io::Result<TcpStream> {
    let to = to.into();
    let under_way = |error: &io::Error| {
        matches!(error.raw_os_error(), Some(libc::EINPROGRESS | libc::EALREADY | libc::EINTR))
    };
    let begun = match socket.connect(&to) {
        Err(error) if under_way(&error) => socket.connect(&to),
        other => other,
    };
    let waits = match begun {
        Ok(()) => false,
        Err(error) if under_way(&error) => true,
        Err(error) => return Err(error),
    };
    let stream = TcpStream::from_std(socket.into())?;
    if waits {
        stream.writable().await?;
        if let Some(error) = stream.take_error()? {
            return Err(error);
        }
    }
    Ok(stream)
}

/// Receives if the socket is thought readable. After a short read it is thought drained, and the next call says
/// `WouldBlock` without asking the kernel: an edge-triggered event will follow if more arrives.
pub(crate) fn receive(socket: &TcpStream, into: &mut [u8]) -> io::Result<usize> {
    let room = into.len();
    read(socket, room, |mut socket| socket.read(into))
}

/// Receives, asking the kernel even if tokio thinks there is nothing.
pub(crate) fn receive_now(socket: &TcpStream, into: &mut [u8]) -> io::Result<usize> {
    retry(SockRef::from(socket), |mut socket| socket.read(into))
}

/// As [`receive`], into several places.
pub(crate) fn receive_vectored(socket: &TcpStream, into: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
    let room = into.iter().map(|slice| slice.len()).sum();
    read(socket, room, |mut socket| socket.read_vectored(into))
}

fn read(
    socket: &TcpStream,
    room: usize,
    call: impl FnMut(&socket2::Socket) -> io::Result<usize>,
) -> io::Result<usize> {
    let mut short = None;
    let result = socket.try_io(Interest::READABLE, || {
        let n = retry(SockRef::from(socket), call)?;
        if 0 < n && n < room {
            short = Some(n);
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(n)
    });
    match short {
        Some(n) => Ok(n),
        None => result,
    }
}

/// Sends if the socket is thought writable; a short count means its buffer is full.
pub(crate) fn send(socket: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
    write(socket, bytes.len(), |socket| socket.send_with_flags(bytes, libc::MSG_NOSIGNAL))
}

/// Sends, asking the kernel even if tokio has not heard yet that there is room.
pub(crate) fn send_now(socket: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
    retry(SockRef::from(socket), |socket| socket.send_with_flags(bytes, libc::MSG_NOSIGNAL))
}

/// As [`send`], from several places.
pub(crate) fn send_vectored(socket: &TcpStream, bytes: &[IoSlice<'_>]) -> io::Result<usize> {
    let length = bytes.iter().map(|slice| slice.len()).sum();
    write(socket, length, |socket| socket.send_vectored_with_flags(bytes, libc::MSG_NOSIGNAL))
}

fn write(
    socket: &TcpStream,
    length: usize,
    call: impl FnMut(&socket2::Socket) -> io::Result<usize>,
) -> io::Result<usize> {
    let mut short = None;
    let result = socket.try_io(Interest::WRITABLE, || {
        let n = retry(SockRef::from(socket), call)?;
        if n < length {
            short = Some(n);
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(n)
    });
    match short {
        Some(n) => Ok(n),
        None => result,
    }
}

fn retry(
    socket: SockRef<'_>,
    mut call: impl FnMut(&socket2::Socket) -> io::Result<usize>,
) -> io::Result<usize> {
    loop {
        match call(&socket) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// Sends all of it, waiting as needed.
pub(crate) async fn send_all(socket: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match send(socket, bytes) {
            Ok(n) => bytes = &bytes[n..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => socket.writable().await?,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// As [`send_all`], telling the kernel that more follows at once, so that both leave in one segment.
pub(crate) async fn send_all_more(socket: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    const FLAGS: i32 = libc::MSG_NOSIGNAL | libc::MSG_MORE;
    while !bytes.is_empty() {
        match write(socket, bytes.len(), |socket| socket.send_with_flags(bytes, FLAGS)) {
            Ok(n) => bytes = &bytes[n..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => socket.writable().await?,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Makes the coming close an RST: unsent bytes are dropped and the peer sees a reset at once.
pub(crate) fn reset_on_close(socket: &TcpStream) {
    // Fails only on a socket that has no peer any more.
    let _ = SockRef::from(socket).set_linger(Some(Duration::ZERO));
}

/// Takes [`reset_on_close`] back: what is still unsent is delivered after the close.
pub(crate) fn finish_on_close(socket: &TcpStream) {
    let _ = SockRef::from(socket).set_linger(None);
}

/// Bytes that may wait unsent in a socket's send buffer. More would let a writer run further ahead of a reader that
/// sleeps, and leave the core's cache before they are sent.
pub(crate) const UNSENT: u32 = 128 * 1024;

/// Options of a socket that carries a tunnel.
///
/// Not `TCP_USER_TIMEOUT`: it also counts the time a live peer's window is closed, and so ends the connection of a
/// reader that sleeps (`tcp_probe_timer`).
pub(crate) fn prepare_tunnel(socket: &TcpStream, config: &Config) -> io::Result<()> {
    let socket = SockRef::from(socket);
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_notsent_lowat(UNSENT)?;
    if let Some(name) = &config.congestion {
        socket.set_tcp_congestion(name.as_bytes())?;
    }
    if let Some(longest) = config.retransmit {
        // A kernel that has no such option keeps its longer waits.
        let _ = set_rto_max(&socket, longest);
    }
    if let Some(bytes) = config.receive_window {
        // Half of a buffer is the kernel's own, as it reckons.
        bound_receive(&socket, 2 * bytes)?;
        // The handshake has left the window at what the host's default buffer allows, and a fixed one is not tuned.
        set_number(&*socket, libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP, bytes)?;
    }
    socket.set_tcp_keepalive(
        &TcpKeepalive::new()
            .with_time(Duration::from_secs(30))
            .with_interval(Duration::from_secs(10))
            .with_retries(3),
    )
}

/// Whether connections may have this congestion control; the kernel loads its module if need be.
pub(crate) fn accepts_congestion(name: &str) -> io::Result<()> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
    socket.set_tcp_congestion(name.as_bytes())
}

fn set_rto_max(socket: &socket2::Socket, longest: Duration) -> io::Result<()> {
    /// linux/tcp.h; libc does not name it yet.
    const TCP_RTO_MAX_MS: libc::c_int = 44;
    let milliseconds = usize::try_from(longest.as_millis()).unwrap_or(usize::MAX);
    set_number(socket, libc::IPPROTO_TCP, TCP_RTO_MAX_MS, milliseconds)
}

/// From here on the socket is readable when so many bytes are there, or no more will come. Where some are already, the
/// kernel looks again.
pub(crate) fn low_water(socket: &impl AsRawFd, bytes: usize) -> io::Result<()> {
    set_number(socket, libc::SOL_SOCKET, libc::SO_RCVLOWAT, bytes)
}

/// Sets an option that is a `c_int`; what is too large for one is the largest.
fn set_number(
    socket: &impl AsRawFd,
    level: libc::c_int,
    option: libc::c_int,
    value: usize,
) -> io::Result<()> {
    let value = libc::c_int::try_from(value).unwrap_or(libc::c_int::MAX);
    // SAFETY: the pointer and length describe one c_int that lives through the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            size_of_val(&value) as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Fixes the receive buffer; a window clamp alone is undone by the kernel's tuning.
pub(crate) fn bound_receive(socket: &socket2::Socket, bytes: usize) -> io::Result<()> {
    // The kernel doubles what is asked for, to cover its own overhead.
    let asked = bytes / 2;
    // With CAP_NET_ADMIN also beyond net.core.rmem_max, which is 208 KiB on most hosts; without it, what that allows.
    set_number(socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, asked)
        .or_else(|_| socket.set_recv_buffer_size(asked))
}

/// Whether an error on a socket says that its other end is gone.
pub(crate) fn is_reset(error: &io::Error) -> bool {
    use io::ErrorKind::*;
    matches!(error.kind(), ConnectionReset | BrokenPipe | ConnectionAborted | NotConnected | TimedOut)
}

/// Whether the kernel has reported an error on the socket that nobody has met in a call yet.
pub(crate) fn failed(socket: &TcpStream) -> bool {
    socket.try_io(Interest::ERROR, || Ok(())).is_ok()
}
