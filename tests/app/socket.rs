//! Sockets of every kind the kernel offers for TCP: options in, a connected or listening socket out.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::time::Duration;

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

/// What kind of socket, and from where.
#[derive(clap::Args, Clone, Default)]
pub struct Kind {
    /// Multipath TCP.
    #[arg(long)]
    pub mptcp: bool,
    /// An IPv6 socket for an IPv4 address.
    #[arg(long)]
    pub mapped: bool,
    /// Send the first bytes with the SYN (TCP Fast Open), so that nobody calls connect().
    #[arg(long)]
    pub fast_open: bool,
    /// Connect without blocking, and wait with poll().
    #[arg(long)]
    pub nonblocking: bool,
    /// Connect, send and receive through io_uring.
    #[arg(long)]
    pub io_uring: bool,
    /// Bind to this address first; port 0 leaves the port to the kernel.
    #[arg(long)]
    pub bind: Option<SocketAddr>,
    /// Bind to this device first.
    #[arg(long)]
    pub device: Option<String>,
    /// Set this SO_MARK first.
    #[arg(long)]
    pub mark: Option<u32>,
    /// Refuse IPv4 on an IPv6 listener.
    #[arg(long)]
    pub v6only: bool,
}

impl Kind {
    /// A socket that is ready to connect to `to`.
    pub fn open(&self, to: SocketAddr) -> io::Result<Socket> {
        let six = self.mapped || to.is_ipv6();
        let protocol = if self.mptcp { Protocol::from(libc::IPPROTO_MPTCP) } else { Protocol::TCP };
        let socket =
            Socket::new(if six { Domain::IPV6 } else { Domain::IPV4 }, Type::STREAM, Some(protocol))?;
        if let Some(mark) = self.mark {
            socket.set_mark(mark)?;
        }
        if let Some(device) = &self.device {
            socket.bind_device(Some(device.as_bytes()))?;
        }
        if let Some(bind) = self.bind {
            socket.bind(&self.address(bind).into())?;
        }
        Ok(socket)
    }

    /// Connects as asked. Fast Open only prepares: its first write connects.
    pub fn connect(&self, to: SocketAddr, limit: Duration) -> io::Result<TcpStream> {
        let socket = self.open(to)?;
        let address: SockAddr = self.address(to).into();
        if self.nonblocking {
            socket.connect_timeout(&address, limit)?;
        } else if !self.fast_open {
            // The limit of a blocking connect is the send time-out.
            socket.set_write_timeout(Some(limit))?;
            socket.connect(&address).map_err(|error| match error.raw_os_error() {
                Some(libc::EINPROGRESS) => io::Error::from_raw_os_error(libc::ETIMEDOUT),
                _ => error,
            })?;
            socket.set_write_timeout(None)?;
        }
        Ok(socket.into())
    }

    /// Connects and sends the first bytes in one call.
    pub fn send_first(&self, stream: &TcpStream, to: SocketAddr, bytes: &[u8]) -> io::Result<usize> {
        let address: SockAddr = self.address(to).into();
        // SAFETY: bytes and address are readable for the lengths given.
        let sent = unsafe {
            libc::sendto(
                stream.as_raw_fd(),
                bytes.as_ptr().cast(),
                bytes.len(),
                libc::MSG_FASTOPEN | libc::MSG_NOSIGNAL,
                address.as_ptr().cast(),
                address.len(),
            )
        };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }

    pub fn listen(&self, on: SocketAddr) -> io::Result<TcpListener> {
        let socket = self.open(on)?;
        socket.set_reuse_address(true)?;
        if on.is_ipv6() {
            socket.set_only_v6(self.v6only)?;
        }
        if self.fast_open {
            let queue: i32 = 64;
            // SAFETY: the value is readable for its size.
            let result = unsafe {
                libc::setsockopt(
                    socket.as_raw_fd(),
                    libc::IPPROTO_TCP,
                    libc::TCP_FASTOPEN,
                    (&raw const queue).cast(),
                    size_of::<i32>() as u32,
                )
            };
            if result < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        socket.bind(&on.into())?;
        socket.listen(4096)?;
        Ok(socket.into())
    }

    pub fn address(&self, of: SocketAddr) -> SocketAddr {
        match of.ip() {
            IpAddr::V4(ip) if self.mapped => SocketAddr::new(IpAddr::V6(ip.to_ipv6_mapped()), of.port()),
            IpAddr::V4(_) | IpAddr::V6(Ipv6Addr { .. }) => of,
        }
    }
}

/// Makes the close that follows a reset instead of a clean end.
pub fn reset(stream: TcpStream) -> io::Result<()> {
    let socket = Socket::from(stream);
    socket.set_linger(Some(Duration::ZERO))
}

/// The protocol the kernel says a socket speaks: 6, or 262 for Multipath TCP.
pub fn protocol(stream: &TcpStream) -> i32 {
    let mut value = 0i32;
    let mut size = size_of::<i32>() as u32;
    // SAFETY: value and size are writable and of the sizes given.
    unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PROTOCOL,
            (&raw mut value).cast(),
            &raw mut size,
        );
    }
    value
}
