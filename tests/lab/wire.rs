//! The wire: an interface to watch in, what crossed it out.
//!
//! A packet socket of our own, so that every TCP segment is judged while it passes and nothing needs to be stored.
//! Segments the kernel could not hand over are counted, and a capture with holes proves nothing.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use memchr::memmem;

use crate::network::Netns;
use crate::packet::{Hello, Records, Segment, hello};
use crate::{MARKER, Pod};

/// Where one of our tunnels ends.
const TUNNEL_PORT: u16 = 15008;

/// A running capture.
#[derive(Debug)]
pub struct Wire {
    stop: Arc<AtomicBool>,
    reader: Option<JoinHandle<Result<Seen>>>,
}

/// What a capture saw.
#[derive(Debug, Default)]
pub struct Seen {
    pub flows: Vec<Flow>,
    pub segments: u64,
    /// Segments that passed without being looked at.
    pub lost: u64,
}

/// One TCP connection (or attempt) on the wire.
#[derive(Debug)]
pub struct Flow {
    pub client: SocketAddr,
    pub server: SocketAddr,
    /// Payload bytes, both directions.
    pub bytes: u64,
    /// The capture saw its first packet.
    pub from_start: bool,
    /// How often the marker stood in the payload in the clear.
    pub markers: u64,
    up: Direction,
    down: Direction,
}

#[derive(Debug, Default)]
struct Direction {
    /// Sequence number of the next new byte.
    next: Option<u32>,
    /// Its first byte was seen, so that records can be followed.
    whole: bool,
    head: Vec<u8>,
    tail: Vec<u8>,
    records: Records,
}

/// What the connections between two places had in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encrypted {
    pub connections: usize,
    pub bytes: u64,
    pub cipher: &'static str,
    pub group: &'static str,
}

impl Wire {
    pub(crate) fn watch(netns: &Netns, interface: &str) -> Result<Self> {
        let socket =
            netns.within(|| packet_socket(interface)).with_context(|| format!("watch {interface}"))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let reader = std::thread::spawn(move || read(&socket, &stopped));
        Ok(Self { stop, reader: Some(reader) })
    }

    /// Ends the capture once everything that has crossed so far is read.
    pub fn finish(mut self) -> Result<Seen> {
        self.stop.store(true, Ordering::Release);
        let reader = self.reader.take().context("a capture ends once")?;
        reader.join().map_err(|_| anyhow::anyhow!("the capture's reader panicked"))?
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
    }
}

impl Seen {
    /// Connections between any address of one pod and any of the other, either way.
    pub fn between<'a>(&'a self, a: &'a Pod, b: &'a Pod) -> impl Iterator<Item = &'a Flow> {
        let of = |pod: &Pod, ip: IpAddr| pod.ip() == ip || pod.ip6() == ip;
        self.flows.iter().filter(move |flow| {
            let (client, server) = (flow.client.ip(), flow.server.ip());
            of(a, client) && of(b, server) || of(b, client) && of(a, server)
        })
    }

    /// How often the marker was seen in the clear, in any connection.
    pub fn markers(&self) -> u64 {
        self.flows.iter().map(|flow| flow.markers).sum()
    }

    /// Asserts that all there was between two pods is TLS 1.3 to port 15008, and that there was something.
    pub fn encrypted(&self, a: &Pod, b: &Pod) -> Result<Encrypted> {
        ensure!(self.lost == 0, "the capture missed {} segments", self.lost);
        ensure!(self.markers() == 0, "the application's marker crossed the wire in the clear");
        let mut sum = Encrypted { connections: 0, bytes: 0, cipher: "", group: "" };
        for flow in self.between(a, b) {
            ensure!(flow.server.port() == TUNNEL_PORT, "{} → {} is not a tunnel", flow.client, flow.server);
            ensure!(!flow.up.records.broken && !flow.down.records.broken, "{flow:?} is not all TLS records");
            sum.bytes += flow.bytes;
            sum.connections += 1;
            if flow.from_start && flow.down.records.count > 0 {
                let hello =
                    flow.hello().with_context(|| format!("{flow:?} does not start with two hellos"))?;
                ensure!(hello.version == Some(0x0304), "{flow:?} is not TLS 1.3: {hello:?}");
                ensure!(!hello.server_name, "{flow:?} names the server in the clear");
                (sum.cipher, sum.group) = (hello.cipher_name(), hello.group_name());
            }
        }
        if sum.bytes == 0 {
            bail!("nothing crossed the wire between {} and {}", a.name(), b.name());
        }
        Ok(sum)
    }
}

impl Flow {
    pub fn hello(&self) -> Option<Hello> {
        hello(&self.up.head, &self.down.head)
    }

    fn new(client: SocketAddr, server: SocketAddr, from_start: bool) -> Self {
        Self {
            client,
            server,
            bytes: 0,
            from_start,
            markers: 0,
            up: Direction::default(),
            down: Direction::default(),
        }
    }
}

impl Direction {
    /// Takes the next bytes; a retransmission brings nothing new.
    fn feed(&mut self, seq: u32, payload: &[u8], finder: &memmem::Finder<'_>) -> u64 {
        let skip = match self.next {
            Some(next) => next.wrapping_sub(seq) as i32,
            None => 0,
        };
        // A gap (skip < 0) can be a lost packet on its way again: look at its bytes, but follow no records over it.
        let fresh = match usize::try_from(skip) {
            Ok(skip) => payload.get(skip..).unwrap_or_default(),
            Err(_) => payload,
        };
        if fresh.is_empty() {
            return 0;
        }
        if skip >= 0 && self.whole {
            self.records.feed(fresh);
            if self.head.len() < 4096 {
                self.head.extend_from_slice(&fresh[..fresh.len().min(4096)]);
            }
        }
        if skip >= 0 {
            self.next = Some(seq.wrapping_add(payload.len() as u32));
        }
        let keep = finder.needle().len() - 1;
        // The marker may be cut by a segment's end: look at the seam first.
        self.tail.extend_from_slice(&fresh[..fresh.len().min(keep)]);
        let mut found = finder.find_iter(&self.tail).count() as u64;
        found += finder.find_iter(fresh).count() as u64;
        if fresh.len() >= keep {
            self.tail.clear();
            self.tail.extend_from_slice(&fresh[fresh.len() - keep..]);
        } else {
            let drop = self.tail.len().saturating_sub(keep);
            self.tail.drain(..drop);
        }
        found
    }
}

fn read(socket: &OwnedFd, stop: &AtomicBool) -> Result<Seen> {
    let mut seen = Seen::default();
    let mut flows: HashMap<(SocketAddr, SocketAddr), usize> = HashMap::new();
    let finder = memmem::Finder::new(MARKER.as_bytes());
    let mut buffer = vec![0; 256 << 10];
    loop {
        let stopping = stop.load(Ordering::Acquire);
        // SAFETY: the buffer is valid for writes of its length during the call.
        let n = unsafe {
            libc::recv(socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), libc::MSG_TRUNC)
        };
        let Ok(n) = usize::try_from(n) else {
            let error = std::io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::EAGAIN) if stopping => break,
                Some(libc::EAGAIN | libc::EINTR) => continue,
                _ => return Err(error).context("read the packet socket"),
            }
        };
        ensure!(n <= buffer.len(), "a frame of {n} bytes");
        if let Some(segment) = Segment::parse(&buffer[..n]) {
            seen.segments += 1;
            note(&mut seen.flows, &mut flows, &segment, &finder);
        }
    }
    seen.lost = lost(socket)?;
    Ok(seen)
}

fn note(
    flows: &mut Vec<Flow>,
    index: &mut HashMap<(SocketAddr, SocketAddr), usize>,
    segment: &Segment<'_>,
    finder: &memmem::Finder<'_>,
) {
    let (src, dst) = (segment.src, segment.dst);
    if segment.syn && !segment.ack {
        // The same addresses again are a new connection, unless this is its first packet sent again.
        let known = index.get(&(src, dst)).and_then(|i| flows.get(*i));
        if known.is_none_or(|flow| flow.up.next != Some(segment.seq.wrapping_add(1))) {
            index.insert((src, dst), flows.len());
            flows.push(Flow::new(src, dst, true));
        }
    }
    let upward = index.contains_key(&(src, dst));
    let key = if upward { (src, dst) } else { (dst, src) };
    let position = *index.entry(key).or_insert_with(|| {
        // Begun before the capture: the tunnel's side is known by its port, else the lower port is the server's.
        let to_server = dst.port() == TUNNEL_PORT || (src.port() != TUNNEL_PORT && dst.port() < src.port());
        let (client, server) = if to_server { (src, dst) } else { (dst, src) };
        flows.push(Flow::new(client, server, false));
        flows.len() - 1
    });
    let Some(flow) = flows.get_mut(position) else { return };
    flow.bytes += segment.payload.len() as u64;
    let direction = if flow.client == src { &mut flow.up } else { &mut flow.down };
    let seq = if segment.syn {
        direction.whole = true;
        direction.next = Some(segment.seq.wrapping_add(1));
        segment.seq.wrapping_add(1)
    } else {
        segment.seq
    };
    flow.markers += direction.feed(seq, segment.payload, finder);
}

fn packet_socket(interface: &str) -> std::io::Result<OwnedFd> {
    let protocol = (libc::ETH_P_ALL as u16).to_be();
    // SAFETY: a plain system call; the descriptor it returns is ours alone.
    let fd =
        unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, i32::from(protocol)) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: `fd` was just opened and nobody else owns it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let index = nix::net::if_::if_nametoindex(interface)?;
    let room: i32 = 256 << 20;
    set(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &room)?;
    let patience = Duration::from_millis(20);
    let patience = libc::timeval { tv_sec: 0, tv_usec: patience.as_micros() as i64 };
    set(&socket, libc::SOL_SOCKET, libc::SO_RCVTIMEO, &patience)?;
    // SAFETY: all-zero is a valid sockaddr_ll.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol;
    address.sll_ifindex = index as i32;
    // SAFETY: the address is a sockaddr_ll of the length given.
    let bound = unsafe { libc::bind(fd, (&raw const address).cast(), size_of::<libc::sockaddr_ll>() as u32) };
    if bound < 0 { Err(std::io::Error::last_os_error()) } else { Ok(socket) }
}

fn set<T>(socket: &OwnedFd, level: i32, option: i32, value: &T) -> std::io::Result<()> {
    // SAFETY: the value is readable for its size during the call.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const *value).cast(), size_of::<T>() as u32)
    };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

/// `struct tpacket_stats`: packets seen, packets dropped for want of room.
fn lost(socket: &OwnedFd) -> Result<u64> {
    let mut stats = [0u32; 2];
    let mut size = size_of_val(&stats) as u32;
    // SAFETY: the buffer is writable for the size given.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            stats.as_mut_ptr().cast(),
            &raw mut size,
        )
    };
    if result < 0 {
        return Err(std::io::Error::last_os_error()).context("ask the packet socket what it lost");
    }
    Ok(stats[1].into())
}
