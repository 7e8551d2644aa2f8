//! What the agent has a choice about, each tried on a connection over loopback.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use super::choice::Choice;
use super::ktls;
use crate::capture::probe::{self, Obstacle, Outcome};

/// Nothing here waits for anybody but the kernel.
const PATIENCE: Duration = Duration::from_secs(2);

pub(super) const RECORD: &[u8] = b"what the one end sends and the other must get";

pub(super) fn attempt(choice: Choice) -> Outcome {
    match choice {
        Choice::KtlsAes128Gcm => ktls::attempt(ktls::Cipher::Aes128Gcm),
        Choice::KtlsAes256Gcm => ktls::attempt(ktls::Cipher::Aes256Gcm),
        Choice::KtlsChacha20Poly1305 => ktls::attempt(ktls::Cipher::Chacha20Poly1305),
        Choice::KtlsRekey => ktls::rekey(),
        Choice::Splice => splice().map_err(Obstacle::of),
        Choice::TcpRtoMax => tcp_rto_max().map_err(Obstacle::of),
        Choice::SocketDestroy => probe::socket_destroy(),
    }
}

/// Two connected sockets, neither of which waits for long.
pub(super) fn pair() -> io::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let near = TcpStream::connect_timeout(&listener.local_addr()?, PATIENCE)?;
    let (far, _) = listener.accept()?;
    for socket in [&near, &far] {
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
    }
    Ok((near, far))
}

/// From a socket through a pipe into another.
fn splice() -> io::Result<String> {
    let ((mut source, from), (to, mut sink)) = (pair()?, pair()?);
    source.write_all(RECORD)?;
    let mut ends = [0; 2];
    // SAFETY: the kernel writes two descriptors.
    if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: both are new and nobody else knows them.
    let [read, write] = ends.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
    for (from, to) in [(from.as_raw_fd(), write.as_raw_fd()), (read.as_raw_fd(), to.as_raw_fd())] {
        let (none, flags) = (std::ptr::null_mut(), libc::SPLICE_F_MOVE);
        // SAFETY: descriptors and numbers; no offsets.
        let moved = unsafe { libc::splice(from, none, to, none, RECORD.len(), flags) };
        match usize::try_from(moved) {
            Ok(moved) if moved == RECORD.len() => {}
            Ok(_) => return Err(io::ErrorKind::WriteZero.into()),
            Err(_) => return Err(io::Error::last_os_error()),
        }
    }
    expect(&mut sink, RECORD)?;
    Ok("socket to pipe to socket".into())
}

fn tcp_rto_max() -> io::Result<String> {
    /// linux/tcp.h; libc does not name it yet.
    const TCP_RTO_MAX_MS: libc::c_int = 44;
    let milliseconds: libc::c_int = 2000;
    let (near, _far) = pair()?;
    set(&near, libc::IPPROTO_TCP, TCP_RTO_MAX_MS, &milliseconds.to_ne_bytes())?;
    Ok(format!("{milliseconds} ms"))
}

pub(super) fn set(
    socket: &impl AsRawFd,
    level: libc::c_int,
    name: libc::c_int,
    value: &[u8],
) -> io::Result<()> {
    let (at, length) = (value.as_ptr().cast(), value.len() as libc::socklen_t);
    // SAFETY: pointer and length describe one slice that lives through the call.
    match unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, at, length) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Reads exactly that.
pub(super) fn expect(from: &mut impl Read, expected: &[u8]) -> io::Result<()> {
    let mut got = vec![0; expected.len()];
    from.read_exact(&mut got)?;
    if got == expected { Ok(()) } else { Err(io::Error::other("other bytes arrived than were sent")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_linux_splices() {
        assert_eq!(splice().unwrap(), "socket to pipe to socket");
    }

    #[test]
    fn bytes_that_changed_on_the_way_are_noticed() {
        assert!(expect(&mut &b"abc"[..], b"abc").is_ok());
        assert!(expect(&mut &b"abd"[..], b"abc").is_err());
        assert!(expect(&mut &b"ab"[..], b"abc").is_err());
    }
}
