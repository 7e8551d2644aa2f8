//! sock_ops: publishes, when a connection's addresses are known, what was noted on its socket before they were.
//!
//! * A captured client, about to send its SYN: flow → original destination, for the agent.
//! * A trusted client: flow → now, for the pod's `sk_lookup`; withdrawn when the socket closes.
//! * The agent's own client inside a pod: flow → original source, taken by the server's socket when that is established;
//!   withdrawn when the client's closes, so that no later connection with the same addresses can find it.
//!
//! * A direct client and its server: see [`crate::direct`].
//!
//! Both ends of a leg over loopback, and of a direct connection, get a congestion control that doesn't pace: BBR does,
//! also on loopback.

use aya_ebpf::bindings::{BPF_SOCK_OPS_STATE_CB_FLAG, bpf_sock, bpf_sock_ops};
use aya_ebpf::helpers::generated::{
    bpf_get_netns_cookie, bpf_ktime_get_ns, bpf_setsockopt, bpf_sock_ops_cb_flags_set,
};
use aya_ebpf::programs::SockOpsContext;
use aya_log_ebpf::warn;
use mtls_common::counter::Counter;
use mtls_common::{Flow, Note, OUTBOUND_PORT, note};

use crate::direct;
use crate::maps::{
    DELIVERED, ORIGINAL, SETTINGS, TRUSTED, count, is_loopback, mapped, note as note_of, write_note,
};

const TCP_CONNECT: u32 = 3;
const PASSIVE_ESTABLISHED: u32 = 5;
const STATE: u32 = 10;

const TCP_CLOSE: u32 = 7;
const AF_INET: u32 = 2;

pub fn event(ctx: &SockOpsContext) -> u32 {
    match ctx.op() {
        TCP_CONNECT => dialling(ctx),
        PASSIVE_ESTABLISHED => accepted(ctx),
        STATE => changed(ctx),
        _ => {}
    }
    0
}

#[inline(always)]
fn dialling(ctx: &SockOpsContext) {
    let Some(note) = note_of(socket(ctx)) else {
        // Not captured, yet dialling the listener itself: it must not inherit what an earlier flow left.
        if remote_port(ctx) == OUTBOUND_PORT {
            let _ = ORIGINAL.remove(outgoing(ctx));
        }
        return;
    };
    match note.kind {
        note::CAPTURED => {
            if ORIGINAL.insert(outgoing(ctx), note.peer, 0).is_err() {
                count(Counter::Unpublished);
                warn!(ctx, "an original destination could not be published: the connection will be closed");
            }
            set_congestion(ctx);
        }
        note::TRUSTED => {
            let flow = Flow { netns: 0, ..outgoing(ctx) };
            // SAFETY: a helper without arguments.
            let now = unsafe { bpf_ktime_get_ns() };
            if TRUSTED.insert(flow, now, 0).is_ok() {
                watch_close(ctx);
            }
        }
        note::DIRECT => {
            watch_close(ctx);
            direct::dialled(ctx, note);
            set_congestion(ctx);
        }
        note::DELIVERED if DELIVERED.insert(outgoing(ctx), note.peer, 0).is_ok() => {
            watch_close(ctx);
        }
        _ => {}
    }
}

/// A server's socket, just established. The agent delivers from a loopback address to the pod's own, which nothing
/// outside the pod can.
#[inline(always)]
fn accepted(ctx: &SockOpsContext) {
    let remote = remote(ctx);
    if !is_loopback(&remote) {
        if direct::accepted(ctx) {
            watch_close(ctx);
            set_congestion(ctx);
        }
        return;
    }
    let flow = incoming(ctx);
    // SAFETY: entries are replaced, never written in place.
    let Some(peer) = (unsafe { DELIVERED.get(flow) }).copied() else {
        return;
    };
    let _ = DELIVERED.remove(flow);
    if write_note(socket(ctx), Note { kind: note::SERVED, peer }) {
        count(Counter::Delivered);
    } else {
        count(Counter::Unnamed);
        warn!(
            ctx,
            "no memory for the original source of a delivered connection: its server sees a loopback address"
        );
    }
    set_congestion(ctx);
}

#[inline(always)]
fn changed(ctx: &SockOpsContext) {
    // SAFETY: arguments of a state change: the old state, the new one.
    let (old, new) = unsafe {
        let args = (&raw const (*ctx.ops).__bindgen_anon_1.args).cast::<u32>();
        (args.read_volatile(), args.add(1).read_volatile())
    };
    if new != TCP_CLOSE {
        return;
    }
    match note_of(socket(ctx)).map(|note| note.kind) {
        Some(note::TRUSTED) => {
            let _ = TRUSTED.remove(Flow { netns: 0, ..outgoing(ctx) });
        }
        Some(note::DELIVERED) => {
            let _ = DELIVERED.remove(outgoing(ctx));
        }
        Some(note::DIRECT) => direct::client_closed(ctx, old),
        Some(note::DIRECT_SERVED) => direct::server_closed(ctx, old),
        _ => {}
    }
}

#[inline(always)]
fn watch_close(ctx: &SockOpsContext) {
    // SAFETY: the context is the program's own.
    unsafe { bpf_sock_ops_cb_flags_set(ctx.ops, (ctx.cb_flags() | BPF_SOCK_OPS_STATE_CB_FLAG) as i32) };
}

#[inline(always)]
fn set_congestion(ctx: &SockOpsContext) {
    const IPPROTO_TCP: i32 = 6;
    const TCP_CONGESTION: i32 = 13;
    let Some(settings) = SETTINGS.get(0) else { return };
    if settings.congestion[0] == 0 {
        return;
    }
    let name = settings.congestion;
    // SAFETY: a name of sixteen bytes, zero-terminated; the helper copies it. An unknown name leaves the socket as is.
    unsafe {
        bpf_setsockopt(
            ctx.ops.cast(),
            IPPROTO_TCP,
            TCP_CONGESTION,
            name.as_ptr().cast_mut().cast(),
            name.len() as i32,
        )
    };
}

/// The flow of the client socket that the event is about.
#[inline(always)]
pub fn outgoing(ctx: &SockOpsContext) -> Flow {
    Flow {
        // SAFETY: the context is the program's own.
        netns: unsafe { bpf_get_netns_cookie(ctx.ops.cast()) },
        client_addr_be: local(ctx),
        server_addr_be: remote(ctx),
        client_port: ctx.local_port() as u16,
        server_port: remote_port(ctx),
        pad: 0,
    }
}

/// The flow whose server's socket the event is about.
#[inline(always)]
pub fn incoming(ctx: &SockOpsContext) -> Flow {
    Flow {
        // SAFETY: the context is the program's own.
        netns: unsafe { bpf_get_netns_cookie(ctx.ops.cast()) },
        client_addr_be: remote(ctx),
        server_addr_be: local(ctx),
        client_port: remote_port(ctx),
        server_port: ctx.local_port() as u16,
        pad: 0,
    }
}

#[inline(always)]
pub fn socket(ctx: &SockOpsContext) -> *mut bpf_sock {
    // SAFETY: a readable field; null unless it is a full socket.
    unsafe { (*ctx.ops).__bindgen_anon_2.sk }
}

/// Unlike the local port, the remote one is in network order, as a 32-bit number.
#[inline(always)]
fn remote_port(ctx: &SockOpsContext) -> u16 {
    u32::from_be(ctx.remote_port()) as u16
}

#[inline(always)]
fn local(ctx: &SockOpsContext) -> [u32; 4] {
    if ctx.family() == AF_INET {
        return mapped(ctx.local_ip4());
    }
    // SAFETY: a readable field.
    unsafe { words(&raw const (*ctx.ops.cast::<bpf_sock_ops>()).local_ip6) }
}

#[inline(always)]
fn remote(ctx: &SockOpsContext) -> [u32; 4] {
    if ctx.family() == AF_INET {
        return mapped(ctx.remote_ip4());
    }
    // SAFETY: a readable field.
    unsafe { words(&raw const (*ctx.ops.cast::<bpf_sock_ops>()).remote_ip6) }
}

/// Reads word by word: the verifier refuses wider loads from this context.
#[inline(always)]
unsafe fn words(address: *const [u32; 4]) -> [u32; 4] {
    let words = address.cast::<u32>();
    // SAFETY: the caller's pointer is to four words of the context.
    unsafe {
        [
            words.read_volatile(),
            words.add(1).read_volatile(),
            words.add(2).read_volatile(),
            words.add(3).read_volatile(),
        ]
    }
}
