//! sk_lookup, in each enrolled pod's namespace: a SYN in; the agent's listener, the ordinary lookup or a drop out.
//!
//! A drop is answered with RST at once. Everything that is not understood is dropped: an address nobody registered, a
//! mode nobody set, a listener that is gone.
//!
//! The pod's own connections show no `lo` as their interface, so they are told by address. From outside, loopback
//! addresses and (IPv4) the pod's own as a source are dropped as martians before they get here. IPv6 lets the pod's own
//! address in as a forged source, but the answer goes to the pod itself, so that nobody can complete the handshake.

use aya_ebpf::bindings::bpf_sk_lookup;
use aya_ebpf::helpers::generated::{bpf_get_prandom_u32, bpf_ktime_get_ns};
use aya_ebpf::programs::SkLookupContext;
use mtls_common::counter::Counter;
use mtls_common::{
    Endpoint, Event, Flow, ListenerKey, ModeKey, OUTBOUND_PORT, PLAINTEXT_PORT, TRUSTED_FLOW_TTL_NS,
    TUNNEL_PORT, event, listener, mode,
};

use crate::direct;
use crate::maps::{LISTENERS, MODES, PODS, TRUSTED, count, emit, is_loopback, mapped, pod_at};

const DROP: u32 = 0;
const PASS: u32 = 1;

const IPPROTO_TCP: u32 = 6;
const AF_INET: u32 = 2;

/// A listener of an older agent in the same reuseport group must not be chosen.
const NO_REUSEPORT: u64 = 2;

pub fn incoming(ctx: &SkLookupContext) -> u32 {
    // SAFETY: readable fields of the context, word by word.
    let (protocol, local, remote) =
        unsafe { ((*ctx.lookup).protocol, local(ctx.lookup), remote(ctx.lookup)) };
    if protocol != IPPROTO_TCP {
        return PASS;
    }
    if is_loopback(&local.addr_be) || is_loopback(&remote.addr_be) || local.addr_be == remote.addr_be {
        return from_inside(ctx, &local, &remote);
    }
    let Some(pod) = pod_at(&local.addr_be) else {
        count(Counter::UnknownAddress);
        return DROP;
    };
    if pod_at(&remote.addr_be) == Some(pod) {
        return from_inside(ctx, &local, &remote);
    }
    from_outside(ctx, pod, &local, &remote)
}

#[inline(always)]
fn from_inside(ctx: &SkLookupContext, local: &Endpoint, remote: &Endpoint) -> u32 {
    match local.port {
        // A captured connection: the pod's own address dials a loopback one, or itself.
        OUTBOUND_PORT => match pod_at(&remote.addr_be) {
            Some(pod) => steer(ctx, pod, listener::OUTBOUND, Counter::SteeredOutbound),
            // From an address that was added since the pod enrolled: the ordinary lookup finds a listener too.
            None if is_loopback(&local.addr_be) && !is_loopback(&remote.addr_be) => PASS,
            None => DROP,
        },
        TUNNEL_PORT => match pod_at(&local.addr_be) {
            Some(pod) => steer(ctx, pod, listener::TUNNEL, Counter::SteeredTunnel),
            None => DROP,
        },
        PLAINTEXT_PORT => DROP,
        _ => PASS,
    }
}

#[inline(always)]
fn from_outside(ctx: &SkLookupContext, pod: u64, local: &Endpoint, remote: &Endpoint) -> u32 {
    match local.port {
        TUNNEL_PORT => return steer(ctx, pod, listener::TUNNEL, Counter::SteeredTunnel),
        OUTBOUND_PORT | PLAINTEXT_PORT => {
            count(Counter::ReservedPort);
            return DROP;
        }
        _ => {}
    }
    match direct::is_admitted(&flow(local, remote)) {
        Some(true) => return PASS,
        Some(false) => return DROP,
        None => {}
    }
    if is_trusted(local, remote) {
        count(Counter::TrustedAccepted);
        return PASS;
    }
    match mode_of(pod, local.port) {
        mode::PERMISSIVE => {
            count(Counter::PlaintextAccepted);
            report(event::PLAINTEXT_ACCEPTED, local, remote);
            PASS
        }
        mode::PROXY => steer(ctx, pod, listener::PLAINTEXT, Counter::SteeredPlaintext),
        _ => {
            count(Counter::StrictRefused);
            report(event::PLAINTEXT_REFUSED, local, remote);
            DROP
        }
    }
}

/// Hands the SYN to one of the agent's listeners; with none there it is dropped, never passed.
#[inline(always)]
fn steer(ctx: &SkLookupContext, netns: u64, kind: u16, counter: Counter) -> u32 {
    // SAFETY: map entries are replaced, never written in place; a helper without arguments.
    let worker = unsafe {
        match PODS.get(netns) {
            Some(pod) if pod.workers != 0 => bpf_get_prandom_u32() % pod.workers,
            _ => 0,
        }
    };
    let mut key = ListenerKey { netns, kind, worker: worker as u16, pad: 0 };
    if LISTENERS.redirect_sk_lookup(ctx, key, NO_REUSEPORT).is_ok() {
        count(counter);
        return PASS;
    }
    key.worker = 0;
    if LISTENERS.redirect_sk_lookup(ctx, key, NO_REUSEPORT).is_ok() {
        count(counter);
        return PASS;
    }
    count(Counter::NoListener);
    DROP
}

#[inline(always)]
fn is_trusted(local: &Endpoint, remote: &Endpoint) -> bool {
    // SAFETY: map entries are replaced, never written in place; a helper without arguments.
    unsafe {
        match TRUSTED.get(flow(local, remote)) {
            Some(dialled) => bpf_ktime_get_ns().wrapping_sub(*dialled) < TRUSTED_FLOW_TTL_NS,
            None => false,
        }
    }
}

#[inline(always)]
fn flow(local: &Endpoint, remote: &Endpoint) -> Flow {
    Flow {
        netns: 0,
        client_addr_be: remote.addr_be,
        server_addr_be: local.addr_be,
        client_port: remote.port,
        server_port: local.port,
        pad: 0,
    }
}

#[inline(always)]
fn mode_of(netns: u64, port: u16) -> u32 {
    // SAFETY: map entries are replaced, never written in place.
    unsafe {
        if let Some(mode) = MODES.get(ModeKey { netns, port, pad: [0; 3] }) {
            return *mode;
        }
        match MODES.get(ModeKey { netns, port: 0, pad: [0; 3] }) {
            Some(mode) => *mode,
            None => mode::STRICT,
        }
    }
}

#[inline(always)]
fn report(kind: u32, local: &Endpoint, remote: &Endpoint) {
    // SAFETY: a helper without arguments.
    let time_ns = unsafe { bpf_ktime_get_ns() };
    emit(Event { time_ns, local: *local, remote: *remote, kind, pad: 0 });
}

#[inline(always)]
unsafe fn local(lookup: *mut bpf_sk_lookup) -> Endpoint {
    // SAFETY: the caller's context.
    unsafe {
        let addr_be = if (*lookup).family == AF_INET {
            mapped((*lookup).local_ip4)
        } else {
            words(&raw const (*lookup).local_ip6)
        };
        Endpoint { addr_be, port: (*lookup).local_port as u16, pad: 0 }
    }
}

#[inline(always)]
unsafe fn remote(lookup: *mut bpf_sk_lookup) -> Endpoint {
    // SAFETY: the caller's context.
    unsafe {
        let addr_be = if (*lookup).family == AF_INET {
            mapped((*lookup).remote_ip4)
        } else {
            words(&raw const (*lookup).remote_ip6)
        };
        Endpoint { addr_be, port: u16::from_be((*lookup).remote_port), pad: 0 }
    }
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
