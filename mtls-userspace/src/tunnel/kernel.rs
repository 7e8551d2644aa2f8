//! The kernel's record layer (kTLS): a direction's key and record counter in, and from then on the socket takes and
//! gives plaintext while records travel.
//!
//! Set per direction and for good: a socket never comes back from it, and takes another key from Linux 6.14 on. Never used
//! on a socket that is in a sockmap: the two are not safe together, and the data path has no sockmap.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM};
use tokio::io::Interest;
use tokio::net::TcpStream;
use zeroize::Zeroizing;

use super::key::Key;

mod cost;

pub use cost::RecordCost;

/// The largest `struct tls12_crypto_info_*` that is used: version, cipher, IV, key, salt, record counter.
const INFO: usize = 2 + 2 + 8 + 32 + 4 + 8;

/// More than one call can make the kernel seal: a pipe's worth of page-sized records.
pub(super) const RECORDS_PER_CALL: u64 = 512;

pub(super) fn send_in_kernel(socket: &TcpStream, key: &Key) -> io::Result<()> {
    hand_over(socket.as_fd(), libc::TLS_TX, key)
}

/// Nothing may have been received that is not a whole record taken out.
pub(super) fn receive_in_kernel(socket: &TcpStream, key: &Key) -> io::Result<()> {
    hand_over(socket.as_fd(), libc::TLS_RX, key)
}

fn hand_over(socket: BorrowedFd<'_>, direction: libc::c_int, key: &Key) -> io::Result<()> {
    match set(socket, libc::IPPROTO_TCP, libc::TCP_ULP, b"tls") {
        // The other direction was handed over before.
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
        other => other?,
    }
    let (info, length) = crypto_info(key);
    set(socket, libc::SOL_TLS, direction, info.get(..length).unwrap_or_default())
}

/// `struct tls12_crypto_info_*` of linux/tls.h for this key, and its length: bytes without padding.
fn crypto_info(key: &Key) -> (Zeroizing<[u8; INFO]>, usize) {
    let (salt, iv) = key.iv.split_at(4);
    let counter = key.sequence.to_be_bytes();
    // TLS 1.3's nonce base is the salt and the IV together; ChaCha20 has it all in the IV.
    let (cipher, parts): (_, [&[u8]; 4]) = if *key.algorithm() == AES_128_GCM {
        (libc::TLS_CIPHER_AES_GCM_128, [iv, key.secret(), salt, &counter])
    } else if *key.algorithm() == AES_256_GCM {
        (libc::TLS_CIPHER_AES_GCM_256, [iv, key.secret(), salt, &counter])
    } else {
        (libc::TLS_CIPHER_CHACHA20_POLY1305, [&key.iv, key.secret(), &[], &counter])
    };
    let mut info = Zeroizing::new([0; INFO]);
    let head = [libc::TLS_1_3_VERSION.to_ne_bytes(), cipher.to_ne_bytes()].concat();
    let mut at = 0;
    for part in [&head[..]].into_iter().chain(parts) {
        if let Some(room) = info.get_mut(at..at + part.len()) {
            room.copy_from_slice(part);
        }
        at += part.len();
    }
    (info, at)
}

fn set(socket: BorrowedFd<'_>, level: libc::c_int, name: libc::c_int, value: &[u8]) -> io::Result<()> {
    // SAFETY: pointer and length describe one slice that lives through the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            value.as_ptr().cast(),
            value.len() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The kernel's counter of records sent under `key`, which was handed over.
pub(super) fn records_sent(socket: &TcpStream, key: &Key) -> io::Result<u64> {
    let (mut info, length) = crypto_info(key);
    let mut size = length as libc::socklen_t;
    // SAFETY: the pointer leads to INFO bytes, `size` says no more than that, and both live through the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_TLS,
            libc::TLS_TX,
            info.as_mut_ptr().cast(),
            &raw mut size,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    let counter = info.get(length - 8..length).and_then(|bytes| bytes.first_chunk());
    Ok(counter.map_or(u64::MAX, |bytes| u64::from_be_bytes(*bytes)))
}

/// Room for one control message with one byte in it, as aligned as the kernel's header wants.
type Control = [u64; 4];

/// Sends one whole record of another type than application data, if the socket has room.
pub(super) fn send_control(socket: &TcpStream, kind: u8, content: &[u8]) -> io::Result<()> {
    socket.try_io(Interest::WRITABLE, || send_record(socket.as_fd(), kind, content))
}

pub(crate) fn send_record(socket: BorrowedFd<'_>, kind: u8, content: &[u8]) -> io::Result<()> {
    let mut control = Control::default();
    let mut part = libc::iovec { iov_base: content.as_ptr().cast_mut().cast(), iov_len: content.len() };
    // SAFETY: all-zero is a valid msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    // SAFETY: arithmetic alone.
    message.msg_controllen = unsafe { libc::CMSG_SPACE(1) } as _;
    // SAFETY: `control` is aligned and larger than CMSG_SPACE(1), so that there is a first header with room for a byte.
    unsafe {
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_level = libc::SOL_TLS;
        (*header).cmsg_type = libc::TLS_SET_RECORD_TYPE;
        (*header).cmsg_len = libc::CMSG_LEN(1) as _;
        *libc::CMSG_DATA(header) = kind;
    }
    // SAFETY: `message` points to `part` and `control`, which live through the call; the kernel only reads them.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
    match usize::try_from(sent) {
        Ok(sent) if sent == content.len() => Ok(()),
        Ok(_) => Err(io::ErrorKind::WriteZero.into()),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// Receives the record that is next, whatever its type; returns the type and its length.
pub(super) fn receive_control(socket: &TcpStream, into: &mut [u8]) -> io::Result<(u8, usize)> {
    receive_record(socket.as_fd(), into)
}

pub(crate) fn receive_record(socket: BorrowedFd<'_>, into: &mut [u8]) -> io::Result<(u8, usize)> {
    let mut control = Control::default();
    let mut part = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    // SAFETY: all-zero is a valid msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of::<Control>() as _;
    // SAFETY: `message` points to `part` and `control`, which live through the call.
    let received = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, 0) };
    let received = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
    // SAFETY: the kernel set `msg_controllen` to what it wrote into `control`.
    let kind = unsafe {
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (!header.is_null()
            && (*header).cmsg_level == libc::SOL_TLS
            && (*header).cmsg_type == libc::TLS_GET_RECORD_TYPE)
            .then(|| *libc::CMSG_DATA(header))
    };
    let kind =
        kind.ok_or_else(|| io::Error::new(io::ErrorKind::UnexpectedEof, "no record from the kernel"))?;
    Ok((kind, received))
}
