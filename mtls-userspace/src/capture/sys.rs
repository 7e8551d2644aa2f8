//! System calls that neither aya nor std offers. `unsafe` of this room lives here.

use std::ffi::CString;
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use mtls_common::Note;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

#[derive(Clone, Copy)]
#[repr(u32)]
pub(super) enum AttachType {
    SockOps = 3,
    Connect4 = 10,
    Connect6 = 11,
    Getpeername4 = 29,
    Getpeername6 = 30,
    SkLookup = 36,
}

/// What a link is attached to. Zero: it is gone.
pub(super) enum LinkTarget {
    Cgroup { id: u64 },
    Netns { inode: u32 },
    Other,
}

const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_OBJ_PIN: libc::c_int = 6;
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_PROG_QUERY: libc::c_int = 16;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_LINK_UPDATE: libc::c_int = 29;

const BPF_LINK_TYPE_CGROUP: u32 = 3;
const BPF_LINK_TYPE_NETNS: u32 = 5;

/// # Safety
///
/// `attr` must be what `command` expects, or the head of it, without implicit padding, and pointers in it valid for the
/// call.
pub(crate) unsafe fn bpf<T>(command: libc::c_int, attr: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: the caller's promise; the kernel reads size_of::<T>() bytes, and takes the rest for zero.
    let outcome = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(outcome) }
}

pub(crate) fn owned(fd: libc::c_long) -> OwnedFd {
    // SAFETY: the kernel has just given us this descriptor, and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(fd as RawFd) }
}

#[repr(C)]
struct ObjectAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

/// A map that is there to be pinned: one number by another.
pub(super) fn create_hash() -> io::Result<OwnedFd> {
    #[repr(C)]
    struct CreateAttr {
        kind: u32,
        key_size: u32,
        value_size: u32,
        max_entries: u32,
    }
    const BPF_MAP_TYPE_HASH: u32 = 1;
    let mut attr = CreateAttr { kind: BPF_MAP_TYPE_HASH, key_size: 4, value_size: 4, max_entries: 1 };
    // SAFETY: numbers only.
    unsafe { bpf(BPF_MAP_CREATE, &mut attr) }.map(owned)
}

pub(super) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = ObjectAttr { path: path.as_ptr() as u64, fd: object.as_raw_fd() as u32, flags: 0 };
    // SAFETY: the path lives until the call returns.
    unsafe { bpf(BPF_OBJ_PIN, &mut attr) }.map(drop)
}

pub(super) fn pinned(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = ObjectAttr { path: path.as_ptr() as u64, fd: 0, flags: 0 };
    // SAFETY: the path lives until the call returns.
    unsafe { bpf(BPF_OBJ_GET, &mut attr) }.map(owned)
}

#[repr(C)]
struct LinkAttr {
    program_or_link: u32,
    target_or_program: u32,
    attach_type_or_flags: u32,
    flags: u32,
}

pub(super) fn attach(program: BorrowedFd<'_>, target: impl AsFd, to: AttachType) -> io::Result<OwnedFd> {
    let mut attr = LinkAttr {
        program_or_link: program.as_raw_fd() as u32,
        target_or_program: target.as_fd().as_raw_fd() as u32,
        attach_type_or_flags: to as u32,
        flags: 0,
    };
    // SAFETY: descriptors and numbers only.
    unsafe { bpf(BPF_LINK_CREATE, &mut attr) }.map(owned)
}

/// Puts another program behind a link, without a moment in which none is attached.
pub(super) fn replace(link: impl AsFd, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = LinkAttr {
        program_or_link: link.as_fd().as_raw_fd() as u32,
        target_or_program: program.as_raw_fd() as u32,
        attach_type_or_flags: 0,
        flags: 0,
    };
    // SAFETY: descriptors and numbers only.
    unsafe { bpf(BPF_LINK_UPDATE, &mut attr) }.map(drop)
}

pub(super) fn link_target(link: impl AsFd) -> io::Result<LinkTarget> {
    Ok(link_info(link)?.target)
}

pub(super) struct LinkInfo {
    pub target: LinkTarget,
    /// Id of the program behind the link.
    pub program: u32,
}

pub(super) fn link_info(link: impl AsFd) -> io::Result<LinkInfo> {
    #[repr(C)]
    struct InfoAttr {
        fd: u32,
        len: u32,
        info: u64,
    }
    /// Head of `struct bpf_link_info`; `target` is its union's first eight bytes.
    #[repr(C)]
    #[derive(Default)]
    struct Info {
        kind: u32,
        id: u32,
        program: u32,
        pad: u32,
        target: [u32; 2],
        attach_type: u32,
        end: u32,
    }
    let mut info = Info::default();
    let mut attr = InfoAttr {
        fd: link.as_fd().as_raw_fd() as u32,
        len: size_of::<Info>() as u32,
        info: std::ptr::from_mut(&mut info) as u64,
    };
    // SAFETY: the kernel writes at most `len` bytes to `info`, which is plain integers.
    unsafe { bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr) }?;
    let [low, high] = info.target;
    let target = match info.kind {
        BPF_LINK_TYPE_CGROUP => {
            let mut bytes = [0; 8];
            bytes[..4].copy_from_slice(&low.to_ne_bytes());
            bytes[4..].copy_from_slice(&high.to_ne_bytes());
            LinkTarget::Cgroup { id: u64::from_ne_bytes(bytes) }
        }
        BPF_LINK_TYPE_NETNS => LinkTarget::Netns { inode: low },
        _ => LinkTarget::Other,
    };
    Ok(LinkInfo { target, program: info.program })
}

/// Ids of the programs that run for sockets of a cgroup, its ancestors' included.
pub(super) fn effective_programs(cgroup: impl AsFd, at: AttachType) -> io::Result<Vec<u32>> {
    const EFFECTIVE: u32 = 1;
    #[repr(C)]
    struct QueryAttr {
        target: u32,
        attach_type: u32,
        query_flags: u32,
        attach_flags: u32,
        ids: u64,
        count: u32,
        pad: u32,
    }
    let mut ids = vec![0u32; 64];
    let mut attr = QueryAttr {
        target: cgroup.as_fd().as_raw_fd() as u32,
        attach_type: at as u32,
        query_flags: EFFECTIVE,
        attach_flags: 0,
        ids: ids.as_mut_ptr() as u64,
        count: ids.len() as u32,
        pad: 0,
    };
    // SAFETY: the kernel writes at most `count` ids to `ids`, which lives until the call returns.
    unsafe { bpf(BPF_PROG_QUERY, &mut attr) }?;
    ids.truncate(attr.count as usize);
    Ok(ids)
}

/// Writes a socket's note. Not by aya, whose map would have to be locked on the data path.
pub(super) fn write_note(map: BorrowedFd<'_>, socket: RawFd, note: &Note) -> io::Result<()> {
    #[repr(C)]
    struct ElementAttr {
        map: u64,
        key: u64,
        value: u64,
        flags: u64,
    }
    let mut attr = ElementAttr {
        map: map.as_raw_fd() as u64,
        key: std::ptr::from_ref(&socket) as u64,
        value: std::ptr::from_ref(note) as u64,
        flags: 0,
    };
    // SAFETY: key and value have the map's sizes and live until the call returns.
    unsafe { bpf(BPF_MAP_UPDATE_ELEM, &mut attr) }.map(drop)
}

/// Identifies the socket's network namespace; never used twice.
pub(super) fn netns_cookie(socket: &impl AsRawFd) -> io::Result<u64> {
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let mut cookie = 0u64;
    let mut len = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes to `cookie`.
    let outcome = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            std::ptr::from_mut(&mut cookie).cast(),
            &mut len,
        )
    };
    if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(cookie) }
}

/// Lets a bound socket choose its port when it connects, so that a port serves many destinations.
pub(super) fn bind_without_port(socket: &impl AsRawFd) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the kernel reads an int.
    let outcome = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            libc::IP_BIND_ADDRESS_NO_PORT,
            std::ptr::from_ref(&on).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The clock of the kernel half's time stamps.
pub(super) fn monotonic() -> Duration {
    // SAFETY: all zeroes is a valid timespec.
    let mut time: libc::timespec = unsafe { zeroed() };
    // SAFETY: the kernel writes a timespec. It can't fail for this clock.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// For callers that hold a socket by `AsRawFd` only, as tokio's and socket2's offer alike.
pub(super) fn borrow(socket: &impl AsRawFd) -> BorrowedFd<'_> {
    // SAFETY: the borrow of the socket's owner keeps the descriptor open.
    unsafe { BorrowedFd::borrow_raw(socket.as_raw_fd()) }
}

/// A record of a ring buffer; none if it is too short for one.
pub(super) fn record<T: aya::Pod>(bytes: &[u8]) -> Option<T> {
    if bytes.len() < size_of::<T>() {
        return None;
    }
    // SAFETY: long enough, of a type that may have any bits, and read without assuming alignment.
    Some(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

/// Registers with the tokio runtime we are on.
pub(super) fn readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the descriptor is owned by what we return, which never gives it away, so it stays open and the same.
    Ok(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?)
}
