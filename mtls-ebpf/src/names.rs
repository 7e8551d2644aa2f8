//! getpeername4 and getpeername6: the peer that the socket has in, the peer that the application should see out.
//!
//! The kernel runs them for `accept()` as well. There are no getsockname hooks: a captured socket's local address is the
//! pod's own, because connect binds it (see `connect`), and a served socket's is the one the original client dialled.

use aya_ebpf::bindings::bpf_sock;
use aya_ebpf::helpers::generated::bpf_get_netns_cookie;
use aya_ebpf::programs::SockAddrContext;
use mtls_common::{Endpoint, Flow, OUTBOUND_PORT, note};

use crate::maps::{ORIGINAL, mapped, note as note_of, v4_of};

const PASS: i32 = 1;

pub fn peer4(ctx: &SockAddrContext) -> i32 {
    // SAFETY: fields of the context that this attach type may read and write, in the sizes it allows.
    unsafe {
        let addr = ctx.sock_addr;
        if let Some(peer) = original(ctx, mapped((*addr).user_ip4))
            && let Some(v4_be) = v4_of(&peer.addr_be)
        {
            (&raw mut (*addr).user_ip4).write_volatile(v4_be);
            (&raw mut (*addr).user_port).write_volatile(peer.port.to_be() as u32);
        }
    }
    PASS
}

pub fn peer6(ctx: &SockAddrContext) -> i32 {
    // SAFETY: as in `peer4`.
    unsafe {
        let addr = ctx.sock_addr;
        let shown = (&raw mut (*addr).user_ip6).cast::<u32>();
        let shown_be = [
            shown.read_volatile(),
            shown.add(1).read_volatile(),
            shown.add(2).read_volatile(),
            shown.add(3).read_volatile(),
        ];
        if let Some(peer) = original(ctx, shown_be) {
            shown.write_volatile(peer.addr_be[0]);
            shown.add(1).write_volatile(peer.addr_be[1]);
            shown.add(2).write_volatile(peer.addr_be[2]);
            shown.add(3).write_volatile(peer.addr_be[3]);
            (&raw mut (*addr).user_port).write_volatile(peer.port.to_be() as u32);
        }
    }
    PASS
}

#[inline(always)]
unsafe fn original(ctx: &SockAddrContext, peer_be: [u32; 4]) -> Option<Endpoint> {
    // SAFETY: readable context fields.
    unsafe {
        let sk = (*ctx.sock_addr).__bindgen_anon_1.sk;
        if let Some(note) = note_of(sk) {
            return matches!(note.kind, note::CAPTURED | note::SERVED | note::DIRECT).then_some(note.peer);
        }
        // An MPTCP socket has no note: connect ran on its first subflow, whose addresses it shares.
        if (*ctx.sock_addr).user_port as u16 != OUTBOUND_PORT.to_be() || sk.is_null() {
            return None;
        }
        let flow = Flow {
            netns: bpf_get_netns_cookie(ctx.sock_addr.cast()),
            client_addr_be: local_address(sk),
            server_addr_be: peer_be,
            client_port: (*sk).src_port as u16,
            server_port: OUTBOUND_PORT,
            pad: 0,
        };
        ORIGINAL.get(flow).copied()
    }
}

#[inline(always)]
unsafe fn local_address(sk: *mut bpf_sock) -> [u32; 4] {
    const AF_INET: u32 = 2;
    // SAFETY: the caller checked the socket for null; single words, as the verifier wants them.
    unsafe {
        if (*sk).family == AF_INET {
            return mapped((*sk).src_ip4);
        }
        let source = (&raw const (*sk).src_ip6).cast::<u32>();
        [
            source.read_volatile(),
            source.add(1).read_volatile(),
            source.add(2).read_volatile(),
            source.add(3).read_volatile(),
        ]
    }
}
