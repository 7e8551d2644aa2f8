//! A SOCKHASH with a verdict program attached: pairs of sockets in, each handed by the kernel what the other receives.
//!
//! Eleven instructions, written out: an object of their own would have to be built, found and kept.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use crate::capture::{bpf, owned};

const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE: libc::c_int = 2;
const PROG_LOAD: libc::c_int = 5;
const PROG_ATTACH: libc::c_int = 8;

/// `enum bpf_map_type`, `bpf_prog_type`, `bpf_attach_type`.
const SOCKHASH: u32 = 18;
const SK_SKB: u32 = 14;
const STREAM_VERDICT: u32 = 5;

/// Helpers.
const GET_SOCKET_COOKIE: i32 = 46;
const SK_REDIRECT_HASH: i32 = 72;

pub(super) struct Verdict {
    map: OwnedFd,
    _program: OwnedFd,
}

impl Verdict {
    pub fn attach() -> io::Result<Self> {
        // Key: the cookie of the socket that receives. Value: the socket that sends it on.
        let mut create = [SOCKHASH, 8, 4, 1 << 16];
        // SAFETY: numbers alone.
        let map = owned(unsafe { bpf(MAP_CREATE, &mut create) }?);
        let program = load(map.as_raw_fd())?;
        let mut attach = [map.as_raw_fd() as u32, program.as_raw_fd() as u32, STREAM_VERDICT, 0];
        // SAFETY: descriptors and numbers.
        unsafe { bpf(PROG_ATTACH, &mut attach) }?;
        Ok(Self { map, _program: program })
    }

    /// From here on what either receives is the kernel's to pass on. A socket that is closed leaves by itself.
    pub fn join(&self, one: &impl AsRawFd, other: &impl AsRawFd) -> io::Result<()> {
        let keys = [cookie(one)?, cookie(other)?];
        for (key, value) in keys.iter().zip([other.as_raw_fd(), one.as_raw_fd()]) {
            let mut update =
                [self.map.as_raw_fd() as u64, (&raw const *key) as u64, (&raw const value) as u64, 0];
            // SAFETY: key and value have the map's sizes and live through the call.
            unsafe { bpf(MAP_UPDATE, &mut update) }?;
        }
        Ok(())
    }
}

/// `return bpf_sk_redirect_hash(skb, map, &cookie, 0)`: to the sending side of whom the map names, or dropped.
fn load(map: RawFd) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct LoadAttr {
        kind: u32,
        count: u32,
        instructions: u64,
        license: u64,
    }
    let program = [
        op(0xbf, 6, 1, 0, 0),                   // r6 = skb
        op(0x85, 0, 0, 0, GET_SOCKET_COOKIE),   // r0 = its socket's cookie
        op(0x7b, 10, 0, -8, 0),                 // on the stack
        op(0xbf, 1, 6, 0, 0),                   // r1 = skb
        op(0x18, 2, 1, 0, map),                 // r2 = map, in two
        op(0, 0, 0, 0, 0),
        op(0xbf, 3, 10, 0, 0),                  // r3 = where the cookie is
        op(0x07, 3, 0, 0, -8),
        op(0xb7, 4, 0, 0, 0),                   // r4 = no flags: to be sent, not received
        op(0x85, 0, 0, 0, SK_REDIRECT_HASH),
        op(0x95, 0, 0, 0, 0),
    ];
    let mut attr = LoadAttr {
        kind: SK_SKB,
        count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
    };
    // SAFETY: instructions and licence live through the call.
    unsafe { bpf(PROG_LOAD, &mut attr) }.map(owned)
}

/// `struct bpf_insn`.
fn op(code: u8, to: u8, from: u8, offset: i16, number: i32) -> u64 {
    let registers = if cfg!(target_endian = "big") { to << 4 | from } else { from << 4 | to };
    let [a, b] = offset.to_ne_bytes();
    let [c, d, e, f] = number.to_ne_bytes();
    u64::from_ne_bytes([code, registers, a, b, c, d, e, f])
}

fn cookie(socket: &impl AsRawFd) -> io::Result<u64> {
    let mut cookie = 0u64;
    let mut length = size_of_val(&cookie) as libc::socklen_t;
    let (fd, to) = (socket.as_raw_fd(), (&raw mut cookie).cast());
    // SAFETY: the kernel writes eight bytes.
    match unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_COOKIE, to, &raw mut length) } {
        0 => Ok(cookie),
        _ => Err(io::Error::last_os_error()),
    }
}
