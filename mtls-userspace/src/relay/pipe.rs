//! A pipe between two sockets: bytes move by splice(2), as references to the kernel's pages, and never come to userspace.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::Interest;
use tokio::net::TcpStream;

/// Asked for; the kernel may give less. A pipe holds one piece of a page or less in each of its places.
const SIZE: libc::c_int = 1 << 20;
const PAGE: usize = 4096;
/// Places that one TLS record may take. A kernel before 6.5 loses the pieces of a record for which there is none
/// (`tls_sw_splice_read`), so a record is taken out only while this many are free.
const PLACES_PER_RECORD: usize = 46;

pub(crate) struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    /// Records that may be taken into the empty pipe.
    pub records: usize,
    held: usize,
}

impl Pipe {
    pub fn new() -> io::Result<Self> {
        let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        // Refused beyond the user's share of pipe memory; a small pipe works as well, with more calls.
        let _ = fcntl(&write, FcntlArg::F_SETPIPE_SZ(SIZE));
        let size = fcntl(&write, FcntlArg::F_GETPIPE_SZ)?;
        let places = usize::try_from(size).unwrap_or(0) / PAGE;
        Ok(Self { read, write, records: (places / PLACES_PER_RECORD).max(1), held: 0 })
    }

    /// Bytes in the pipe.
    pub fn held(&self) -> usize {
        self.held
    }

    /// Takes what the source has, at most `limit` bytes. `WouldBlock` with bytes in the pipe may mean either a drained
    /// source or a full pipe; 0 is the source's end.
    pub fn fill(&mut self, source: &TcpStream, limit: usize) -> io::Result<usize> {
        let n = source.try_io(Interest::READABLE, || splice(source.as_fd(), self.write.as_fd(), limit))?;
        self.held += n;
        Ok(n)
    }

    /// Gives the sink as much of what is held as it takes.
    pub fn drain(&mut self, sink: &TcpStream) -> io::Result<usize> {
        let n = sink.try_io(Interest::WRITABLE, || splice(self.read.as_fd(), sink.as_fd(), self.held))?;
        self.held -= n.min(self.held);
        Ok(n)
    }
}

fn splice(from: BorrowedFd<'_>, to: BorrowedFd<'_>, length: usize) -> io::Result<usize> {
    const FLAGS: libc::c_uint = libc::SPLICE_F_MOVE | libc::SPLICE_F_NONBLOCK;
    let (from, to) = (from.as_raw_fd(), to.as_raw_fd());
    loop {
        // SAFETY: both descriptors are borrowed for the call, and no offset is passed.
        let n = unsafe { libc::splice(from, std::ptr::null_mut(), to, std::ptr::null_mut(), length, FLAGS) };
        match usize::try_from(n) {
            Ok(n) => return Ok(n),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
}
