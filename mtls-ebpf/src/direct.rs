//! Direct connections: between two pods of this node, without an agent in the middle.
//!
//! The agent writes a grant once policy has let a pod dial an address; for a Service's address, a list of all endpoints
//! to choose from. From then on
//!
//! 1. connect lets the pod's sockets dial that address themselves ([`way`]);
//! 2. before the SYN leaves, the flow is recorded with the pod that dials it ([`dialled`]): the pod is known by the
//!    namespace its socket lives in, and the source address must be that pod's, so that nobody else can make the record;
//! 3. `sk_lookup` in the destination's pod lets in exactly the flows that are recorded ([`is_admitted`]);
//! 4. the record stays until both sockets are closed ([`client_closed`], [`server_closed`]), and then goes to the agent
//!    with what each socket knows of the bytes it sent.
//!
//! A grant is void without the lease of the agent that gave it, and without that agent's listener in the dialling pod,
//! which the kernel drops at the moment in which the agent dies. The record is made before the grant is looked at for
//! the last time, and the agent takes a grant back before it reads the records: a connection that was judged by an older
//! policy is either refused here or found there.

use aya_ebpf::cty::c_void;
use aya_ebpf::helpers::generated::{
    bpf_get_netns_cookie, bpf_get_prandom_u32, bpf_ktime_get_ns, bpf_map_lookup_elem, bpf_setsockopt,
    bpf_sk_release, bpf_skc_to_mptcp_sock,
};
use aya_ebpf::programs::SockOpsContext;
use aya_log_ebpf::warn;
use mtls_common::counter::Counter;
use mtls_common::{Direct, Ended, Endpoint, Flow, GrantKey, ListenerKey, Note, UNSEEN_END, listener, note};

use crate::connect::Dialling;
use crate::maps::{
    CHOICES, DIRECT, ENDINGS, GRANTS, LEASE, LISTENERS, count, is_unspecified, pod_at, write_note,
};
use crate::sock_ops::{incoming, outgoing, socket};

/// Set by userspace; a constant to the verifier, which then never looks at a helper that the kernel lacks.
#[unsafe(no_mangle)]
static TELLS_MPTCP: u32 = 0;

const TCP_SYN_SENT: u32 = 2;
const TCP_FIN_WAIT2: u32 = 5;
const TCP_LAST_ACK: u32 = 9;
const TCP_CLOSING: u32 = 11;

/// The address of another pod that a pod's socket may dial itself. The socket is then noted, and bound to its pod's.
#[inline(always)]
pub fn way(dialling: &Dialling<'_>) -> Option<Endpoint> {
    let Dialling { sk, netns, dst, .. } = *dialling;
    let to = endpoint(netns, &dst)?;
    if sk.is_null() || !has_listener(netns) {
        return None;
    }
    // SAFETY: a readable field of the socket, which was checked for null. A socket bound to a device is refused by
    // `abandon` less surely, and one of MPTCP outlives the reset of its subflow: both go through the agent.
    if unsafe { (*sk).bound_dev_if } != 0 || is_mptcp(sk) {
        return None;
    }
    // Policy judged the pod by this address.
    let own = dialling.own_address();
    match dialling.bound_address() {
        Some(bound) if bound == own => {}
        None if !is_unspecified(&own) && dialling.bind(&own) == 0 => {}
        _ => return None,
    }
    write_note(sk, Note { kind: note::DIRECT, peer: dst }).then_some(to)
}

/// What is dialled, or an endpoint of the Service that is, each as likely as the others.
#[inline(always)]
fn endpoint(netns: u64, dst: &Endpoint) -> Option<Endpoint> {
    if granted(netns, dst).is_some() {
        return Some(*dst);
    }
    // SAFETY: entries are replaced, never written in place; a helper without arguments.
    unsafe {
        let choice = CHOICES.get(GrantKey { netns, to: *dst, pad: 0 })?;
        if choice.count == 0 || LEASE.get(0)?.epoch != choice.epoch {
            return None;
        }
        let at = bpf_get_prandom_u32() % choice.count;
        let to = choice.endpoints.get(at as usize)?;
        granted(netns, to).map(|_| *to)
    }
}

/// The pod that a grant in force leads to.
#[inline(always)]
fn granted(netns: u64, to: &Endpoint) -> Option<u64> {
    // SAFETY: entries are replaced, never written in place; the lease's two words are written in place, and whichever
    // of them is older is a lease that was in force. A helper without arguments.
    unsafe {
        let grant = GRANTS.get(GrantKey { netns, to: *to, pad: 0 })?;
        let lease = LEASE.get(0)?;
        let in_force = lease.epoch == grant.epoch && bpf_ktime_get_ns() < lease.until_ns;
        (in_force && pod_at(&to.addr_be) == Some(grant.server)).then_some(grant.server)
    }
}

/// Whether the agent still listens in a pod: a socket leaves the map when it is closed, as all of a dead process's are.
#[inline(always)]
fn has_listener(netns: u64) -> bool {
    let key = ListenerKey { netns, kind: listener::OUTBOUND, worker: 0, pad: 0 };
    // SAFETY: a map and a key of its size; what is found is released.
    unsafe {
        let found =
            bpf_map_lookup_elem((&raw const LISTENERS) as *mut c_void, (&raw const key).cast::<c_void>());
        if found.is_null() {
            return false;
        }
        bpf_sk_release(found);
    }
    true
}

#[inline(always)]
fn is_mptcp(sk: *mut aya_ebpf::bindings::bpf_sock) -> bool {
    // SAFETY: a static that userspace sets before loading; a socket that was checked for null.
    unsafe { (&raw const TELLS_MPTCP).read_volatile() != 0 && !bpf_skc_to_mptcp_sock(sk.cast()).is_null() }
}

/// A noted socket is about to send its SYN.
#[inline(always)]
pub fn dialled(ctx: &SockOpsContext, note: &Note) {
    let flow = Flow { netns: 0, ..outgoing(ctx) };
    // SAFETY: the context is the program's own; a helper without arguments.
    let (client, since_ns) = unsafe { (bpf_get_netns_cookie(ctx.ops.cast()), bpf_ktime_get_ns()) };
    // Under an address of another pod it would take that pod's record.
    if pod_at(&flow.client_addr_be) != Some(client) {
        count(Counter::DirectRefused);
        return abandon(ctx);
    }
    // An earlier connection with these addresses, whose server's socket was never closed.
    end(&flow, true);
    let to = Endpoint { addr_be: flow.server_addr_be, port: flow.server_port, pad: 0 };
    let server = pod_at(&to.addr_be).unwrap_or(0);
    let record = Direct { client, server, since_ns, dialled: note.peer, ..Direct::default() };
    if DIRECT.insert(flow, record, 0).is_err() {
        count(Counter::DirectRefused);
        warn!(ctx, "a direct connection could not be recorded: it is led astray");
        return abandon(ctx);
    }
    // Now that the agent can find the record: is there still a grant?
    if granted(client, &to) != Some(server) {
        count(Counter::DirectRefused);
        if let Some(record) = DIRECT.get_ptr_mut(flow) {
            // SAFETY: an entry of the map; nobody else writes this field before the SYN has been sent.
            unsafe { (*record).refused = 1 };
        }
    }
}

/// Without a record the destination's pod would take the connection for plaintext from anywhere. Bound to loopback,
/// the socket has no way to any other pod; it gives up after one more try.
#[inline(always)]
fn abandon(ctx: &SockOpsContext) {
    const SOL_SOCKET: i32 = 1;
    const SO_BINDTODEVICE: i32 = 25;
    const IPPROTO_TCP: i32 = 6;
    const TCP_SYNCNT: i32 = 7;
    let device = *b"lo\0\0";
    let once = 1u32;
    // SAFETY: options with values of their sizes; the helper copies them.
    unsafe {
        bpf_setsockopt(ctx.ops.cast(), SOL_SOCKET, SO_BINDTODEVICE, device.as_ptr().cast_mut().cast(), 4);
        bpf_setsockopt(ctx.ops.cast(), IPPROTO_TCP, TCP_SYNCNT, (&raw const once).cast_mut().cast(), 4);
    }
}

/// What the record says about a SYN; none without a record.
#[inline(always)]
pub fn is_admitted(flow: &Flow) -> Option<bool> {
    // SAFETY: single words that only ever change from zero.
    let is_admitted = unsafe {
        let record = DIRECT.get(flow)?;
        record.refused == 0 && record.accepted == 0
    };
    if is_admitted {
        count(Counter::DirectAccepted);
    }
    Some(is_admitted)
}

/// A server's socket was just established. True if a direct connection is what established it.
#[inline(always)]
pub fn accepted(ctx: &SockOpsContext) -> bool {
    // Nobody else pays for looking.
    if LEASE.get(0).is_none_or(|lease| lease.epoch == 0) {
        return false;
    }
    let flow = incoming(ctx);
    let Some(record) = DIRECT.get_ptr_mut(Flow { netns: 0, ..flow }) else { return false };
    // SAFETY: an entry of the map; nobody writes this field.
    if flow.netns != unsafe { (*record).server } {
        // Somebody who uses the same addresses in a namespace of his own.
        return false;
    }
    let is_noted = write_note(socket(ctx), Note { kind: note::DIRECT_SERVED, peer: Endpoint::default() });
    // SAFETY: an entry of the map; only the server's socket writes these fields.
    unsafe {
        (*record).accepted = 1;
        if !is_noted {
            (*record).server_end = UNSEEN_END;
        }
    }
    true
}

#[inline(always)]
pub fn client_closed(ctx: &SockOpsContext, old: u32) {
    let flow = Flow { netns: 0, ..outgoing(ctx) };
    let Some(record) = DIRECT.get_ptr_mut(flow) else { return };
    // SAFETY: an entry of the map; only the client's socket writes these fields.
    let is_over = unsafe {
        // Its own SYN was acknowledged too.
        (*record).sent = acknowledged(ctx, old).saturating_sub(1);
        (*record).client_end = old;
        (*record).server_end != 0 || (old == TCP_SYN_SENT && (*record).accepted == 0)
    };
    if is_over {
        end(&flow, true);
    }
}

#[inline(always)]
pub fn server_closed(ctx: &SockOpsContext, old: u32) {
    let flow = Flow { netns: 0, ..incoming(ctx) };
    let Some(record) = DIRECT.get_ptr_mut(flow) else { return };
    // SAFETY: an entry of the map; only the server's socket writes these fields.
    let is_over = unsafe {
        (*record).received = acknowledged(ctx, old);
        (*record).server_end = old;
        (*record).client_end != 0
    };
    if is_over {
        end(&flow, false);
    }
}

/// Bytes of a closed socket that its peer has acknowledged, without its FIN.
#[inline(always)]
fn acknowledged(ctx: &SockOpsContext, old: u32) -> u64 {
    // SAFETY: readable fields.
    let (bytes, next, unacknowledged) =
        unsafe { ((*ctx.ops).bytes_acked, (*ctx.ops).snd_nxt, (*ctx.ops).snd_una) };
    let fin = match old {
        TCP_FIN_WAIT2 => 1,
        TCP_LAST_ACK | TCP_CLOSING if next == unacknowledged => 1,
        _ => 0,
    };
    bytes.saturating_sub(fin)
}

/// Takes a record away and tells the agent. Both sockets may be closed at once: one of them succeeds.
#[inline(always)]
fn end(flow: &Flow, client_last: bool) {
    // SAFETY: copied before it is removed.
    let Some(direct) = (unsafe { DIRECT.get(flow) }).copied() else { return };
    if DIRECT.remove(flow).is_err() {
        return;
    }
    match ENDINGS.reserve::<Ended>(0) {
        Some(mut room) => {
            // SAFETY: a helper without arguments.
            let time_ns = unsafe { bpf_ktime_get_ns() };
            room.write(Ended { time_ns, flow: *flow, direct, client_last: client_last.into(), pad: 0 });
            room.submit(0);
        }
        None => count(Counter::LostEndings),
    }
}
