//! connect4 and connect6: a dialled address in, the same or the pod's outbound listener out.
//!
//! They run for `connect()`, TCP Fast Open's `sendto()` and io_uring alike, and for MPTCP on its first subflow. A
//! connection that must be captured and can't be is refused, never let out.
//!
//! A captured socket dials a random address of 127.0.0.0/8 (`::1` for IPv6) at the outbound port, from the pod's own
//! address. The loopback destination keeps what plain TCP has: as many connections to *each* destination as there are
//! ephemeral ports, and reuse of ports in TIME_WAIT, which the kernel grants to loopback only. The source keeps
//! `getsockname()` right, which is why there is no getsockname hook: blocking, non-blocking, v4-mapped and MPTCP sockets
//! were tried. (With several addresses of one family it is the pod's first, whatever a route would prefer.) A socket bound to a device can't reach loopback
//! addresses; it dials the pod's own address instead, which is local on that device.

use aya_ebpf::bindings::{bpf_sock, bpf_sock_addr};
use aya_ebpf::helpers::generated::{
    bpf_bind, bpf_get_current_ancestor_cgroup_id, bpf_get_current_cgroup_id, bpf_get_current_pid_tgid,
    bpf_get_netns_cookie, bpf_get_prandom_u32, bpf_ktime_get_ns,
};
use aya_ebpf::programs::SockAddrContext;
use aya_log_ebpf::warn;
use mtls_common::counter::Counter;
use mtls_common::{Agent, Endpoint, Note, OUTBOUND_PORT, Pod, note};

use crate::direct;
use crate::maps::{
    AGENTS, HELLO, LOCAL, POD_CGROUPS, PODS, SETTINGS, count, drop_note, is_agent, is_captured, is_loopback,
    is_unspecified, mapped, note as note_of, pod_at, v4_of, write_note,
};

const REFUSE: i32 = 0;
const PASS: i32 = 1;

const IPPROTO_TCP: u32 = 6;
const IPPROTO_MPTCP: u32 = 262;

/// Cgroups are not nested deeper than this; kubelet inside a container inside a container makes nine.
const CGROUP_DEPTH: i32 = 16;

enum Verdict {
    Pass,
    Refuse,
    /// To the outbound listener at a loopback address.
    Redirect([u32; 4]),
    /// To another pod of the node.
    Direct(Endpoint),
}

/// The dialling socket and its pod.
pub struct Dialling<'a> {
    pub ctx: &'a SockAddrContext,
    pub sk: *mut bpf_sock,
    pub netns: u64,
    pub pod: &'a Pod,
    pub dst: Endpoint,
}

pub fn v4(ctx: &SockAddrContext) -> i32 {
    // SAFETY: fields of the context that this attach type may read and write, in the sizes it allows.
    unsafe {
        let addr = ctx.sock_addr;
        let ip_be = (*addr).user_ip4;
        let port = port_of(addr);
        if u32::from_be(ip_be) >> 28 == 0xf {
            return hello(ip_be, port);
        }
        match decide(ctx, Endpoint { addr_be: mapped(ip_be), port, pad: 0 }) {
            Verdict::Pass => PASS,
            Verdict::Refuse => REFUSE,
            Verdict::Redirect(to) => {
                (&raw mut (*addr).user_ip4).write_volatile(to[3]);
                (&raw mut (*addr).user_port).write_volatile(OUTBOUND_PORT.to_be() as u32);
                PASS
            }
            Verdict::Direct(to) => {
                (&raw mut (*addr).user_ip4).write_volatile(to.addr_be[3]);
                (&raw mut (*addr).user_port).write_volatile(to.port.to_be() as u32);
                PASS
            }
        }
    }
}

pub fn v6(ctx: &SockAddrContext) -> i32 {
    // SAFETY: as in `v4`.
    unsafe {
        let addr = ctx.sock_addr;
        let dialled = (&raw const (*addr).user_ip6).cast::<u32>();
        let addr_be = [
            dialled.read_volatile(),
            dialled.add(1).read_volatile(),
            dialled.add(2).read_volatile(),
            dialled.add(3).read_volatile(),
        ];
        match decide(ctx, Endpoint { addr_be, port: port_of(addr), pad: 0 }) {
            Verdict::Pass => PASS,
            Verdict::Refuse => REFUSE,
            Verdict::Redirect(to) => {
                redirect6(addr, &Endpoint { addr_be: to, port: OUTBOUND_PORT, pad: 0 });
                PASS
            }
            Verdict::Direct(to) => {
                redirect6(addr, &to);
                PASS
            }
        }
    }
}

/// Word by word: the verifier refuses wider stores to this context.
#[inline(always)]
unsafe fn redirect6(addr: *mut bpf_sock_addr, to: &Endpoint) {
    // SAFETY: the caller's context belongs to a hook that may write these fields.
    unsafe {
        let dialled = (&raw mut (*addr).user_ip6).cast::<u32>();
        dialled.write_volatile(to.addr_be[0]);
        dialled.add(1).write_volatile(to.addr_be[1]);
        dialled.add(2).write_volatile(to.addr_be[2]);
        dialled.add(3).write_volatile(to.addr_be[3]);
        (&raw mut (*addr).user_port).write_volatile(to.port.to_be() as u32);
    }
}

#[inline(always)]
unsafe fn port_of(addr: *mut bpf_sock_addr) -> u16 {
    // SAFETY: a readable field; it holds the port in network order in its low half.
    u16::from_be(unsafe { (*addr).user_port } as u16)
}

/// An agent makes itself known: it stored a nonce and dials it as an address of 240.0.0.0/4, which nothing else can
/// reach. The kernel then knows the process as the kernel sees it, whatever pid namespace the agent lives in, and the
/// agent knows that the hooks reach its processes. 44 random bits, good for one guess within microseconds.
#[inline(always)]
fn hello(ip_be: u32, port: u16) -> i32 {
    let nonce = (u32::from_be(ip_be) as u64) << 16 | port as u64;
    // SAFETY: plain helpers; map entries are replaced, never written in place.
    unsafe {
        match HELLO.get(nonce) {
            Some(0) => {}
            _ => return PASS,
        }
        let process = (bpf_get_current_pid_tgid() >> 32) as u32;
        let agent = Agent { cgroup: bpf_get_current_cgroup_id(), since_ns: bpf_ktime_get_ns() };
        if AGENTS.insert(process, agent, 0).is_ok() {
            // Tells the agent its process id, and that the nonce is spent.
            let _ = HELLO.insert(nonce, process, 0);
        }
    }
    REFUSE
}

#[inline(always)]
fn decide(ctx: &SockAddrContext, dst: Endpoint) -> Verdict {
    // SAFETY: readable context fields; map entries are replaced, never written in place.
    unsafe {
        let protocol = (*ctx.sock_addr).protocol;
        if protocol != IPPROTO_TCP && protocol != IPPROTO_MPTCP {
            return Verdict::Pass;
        }
        let netns = bpf_get_netns_cookie(ctx.sock_addr.cast());
        match PODS.get(netns) {
            Some(pod) => from_pod(ctx, netns, pod, dst),
            None => from_elsewhere(ctx, netns, dst),
        }
    }
}

#[inline(always)]
fn from_pod(ctx: &SockAddrContext, netns: u64, pod: &Pod, dst: Endpoint) -> Verdict {
    // SAFETY: readable context field.
    let sk = unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk };
    let own =
        is_loopback(&dst.addr_be) || is_unspecified(&dst.addr_be) || pod_at(&dst.addr_be) == Some(netns);
    if own || !is_captured(&dst.addr_be) {
        forget_capture(sk);
        if !own {
            count(Counter::Passed);
        }
        return Verdict::Pass;
    }
    if is_agent() {
        count(Counter::AgentPassed);
        return Verdict::Pass;
    }
    let dialling = Dialling { ctx, sk, netns, pod, dst };
    if let Some(to) = direct::way(&dialling) {
        count(Counter::Direct);
        return Verdict::Direct(to);
    }
    match capture(&dialling) {
        Some(to) => {
            count(Counter::Captured);
            Verdict::Redirect(to)
        }
        None => {
            count(Counter::Refused);
            Verdict::Refuse
        }
    }
}

/// A socket that was captured, then disconnected (`AF_UNSPEC`), and now dials elsewhere.
#[inline(always)]
fn forget_capture(sk: *mut bpf_sock) {
    if let Some(note) = note_of(sk)
        && matches!(note.kind, note::CAPTURED | note::DIRECT)
    {
        drop_note(sk);
    }
}

/// Notes the original destination, and returns the address to dial instead.
#[inline(always)]
fn capture(dialling: &Dialling<'_>) -> Option<[u32; 4]> {
    let Dialling { ctx, sk, dst, .. } = *dialling;
    let own = dialling.own_address();
    if sk.is_null() || is_unspecified(&own) {
        return None;
    }
    if !write_note(sk, Note { kind: note::CAPTURED, peer: dst }) {
        warn!(ctx, "no memory for the note of a captured socket: its connect is refused");
        return None;
    }
    let bound = dialling.bound_address();
    // SAFETY: a readable field of the socket, which was checked for null.
    if unsafe { (*sk).bound_dev_if } != 0 {
        return Some(bound.unwrap_or(own));
    }
    if bound.is_none() {
        let outcome = dialling.bind(&own);
        if outcome != 0 {
            warn!(
                ctx,
                "binding a captured socket to its pod's address failed ({}): its connect is refused", outcome
            );
            return None;
        }
    }
    Some(if dialling.is_v4() { random_loopback() } else { [0, 0, 0, 1u32.to_be()] })
}

impl Dialling<'_> {
    #[inline(always)]
    fn is_v4(&self) -> bool {
        v4_of(&self.dst.addr_be).is_some()
    }

    /// The pod's, of the family dialled; unspecified if it has none.
    #[inline(always)]
    pub fn own_address(&self) -> [u32; 4] {
        if self.is_v4() { self.pod.addr4_be } else { self.pod.addr6_be }
    }

    /// What the application bound its socket to, of the family dialled. The caller checked the socket for null.
    #[inline(always)]
    pub fn bound_address(&self) -> Option<[u32; 4]> {
        // SAFETY: the caller's promise.
        let bound = unsafe { bound_address(self.sk) };
        (!is_unspecified(&bound) && v4_of(&bound).is_some() == self.is_v4()).then_some(bound)
    }

    /// Binds to an address without choosing a port, as IP_BIND_ADDRESS_NO_PORT does. Zero: done.
    #[inline(always)]
    pub fn bind(&self, addr_be: &[u32; 4]) -> i64 {
        // SAFETY: the context belongs to a connect hook.
        unsafe { bind_source(self.ctx, addr_be) }
    }
}

#[inline(always)]
fn random_loopback() -> [u32; 4] {
    // SAFETY: a helper without arguments.
    let random = unsafe { bpf_get_prandom_u32() };
    // 127.1.0.1 to 127.127.255.255: never the network's, the broadcast or a well-known address.
    mapped((0x7f00_0000 | random & 0x007f_ffff | 0x0001_0001).to_be())
}

/// The address a socket is bound to; unspecified if none.
#[inline(always)]
unsafe fn bound_address(sk: *mut bpf_sock) -> [u32; 4] {
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

#[inline(always)]
unsafe fn bind_source(ctx: &SockAddrContext, addr_be: &[u32; 4]) -> i64 {
    const AF_INET: u32 = 2;
    const AF_INET6: u32 = 10;
    // SAFETY: the context belongs to a connect hook; the address is a sockaddr_in or sockaddr_in6 on the stack.
    unsafe {
        if (*ctx.sock_addr).family == AF_INET {
            let mut sockaddr = [AF_INET, addr_be[3], 0, 0];
            bpf_bind(ctx.sock_addr, sockaddr.as_mut_ptr().cast(), 16)
        } else {
            let mut sockaddr = [AF_INET6, 0, addr_be[0], addr_be[1], addr_be[2], addr_be[3], 0];
            bpf_bind(ctx.sock_addr, sockaddr.as_mut_ptr().cast(), 28)
        }
    }
}

/// A namespace that is not an enrolled pod's. The node's own flows to a local pod (kubelet's probes) get a note, so
/// that the pod lets them in even if it is STRICT. A pod on the host network shares the namespace, not the trust.
#[inline(always)]
fn from_elsewhere(ctx: &SockAddrContext, netns: u64, dst: Endpoint) -> Verdict {
    // SAFETY: map entries are replaced, never written in place; readable context field.
    unsafe {
        match SETTINGS.get(0) {
            Some(settings) if settings.host_netns == netns => {}
            _ => return Verdict::Pass,
        }
        if LOCAL.get(dst.addr_be).is_none() {
            return Verdict::Pass;
        }
        let sk = (*ctx.sock_addr).__bindgen_anon_1.sk;
        if in_pod_cgroup() {
            drop_note(sk);
        } else {
            write_note(sk, Note { kind: note::TRUSTED, peer: dst });
        }
    }
    Verdict::Pass
}

#[inline(always)]
fn in_pod_cgroup() -> bool {
    for level in 0..CGROUP_DEPTH {
        // SAFETY: plain helper; zero means that the process is not nested that deep.
        unsafe {
            let cgroup = bpf_get_current_ancestor_cgroup_id(level);
            if cgroup == 0 {
                return false;
            }
            if POD_CGROUPS.get(cgroup).is_some() {
                return true;
            }
        }
    }
    false
}
