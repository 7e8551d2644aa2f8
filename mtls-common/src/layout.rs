//! Keys and values of the maps.

/// An address and port.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Endpoint {
    pub addr_be: [u32; 4],
    pub port: u16,
    pub pad: u16,
}

/// A TCP connection. `netns` is zero where a flow is node-global.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Flow {
    pub netns: u64,
    pub client_addr_be: [u32; 4],
    pub server_addr_be: [u32; 4],
    pub client_port: u16,
    pub server_port: u16,
    pub pad: u32,
}

/// What a socket's storage says about it.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Note {
    /// One of `note::*`.
    pub kind: u32,
    /// Captured and direct: the original destination. Delivered and served: the original source. Otherwise unused.
    pub peer: Endpoint,
}

pub mod note {
    /// A pod's client socket that was redirected to the outbound listener.
    pub const CAPTURED: u32 = 1;
    /// A client socket of the node's own (kubelet), dialling a local pod.
    pub const TRUSTED: u32 = 2;
    /// The agent's own socket, dialling the serving application in its pod.
    pub const DELIVERED: u32 = 3;
    /// The serving application's accepted socket, opposite to a delivered one.
    pub const SERVED: u32 = 4;
    /// A pod's client socket that dials another pod of the node past the agent.
    pub const DIRECT: u32 = 5;
    /// The serving application's accepted socket, opposite to a direct one.
    pub const DIRECT_SERVED: u32 = 6;
}

/// An enrolled pod whose connects are captured. Keyed by netns cookie.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Pod {
    /// Listeners of each kind to choose from.
    pub workers: u32,
    pub pad: u32,
    /// Source addresses of captured connections; zero: the pod has none of that family.
    pub addr4_be: [u32; 4],
    pub addr6_be: [u32; 4],
}

/// The pod behind an address of this node. Keyed by address.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Local {
    /// Zero if shared.
    pub netns: u64,
    /// One of `claim::*`.
    pub claim: u32,
    pub pad: u32,
}

pub mod claim {
    /// The pod's manifest names the address.
    pub const MANIFEST: u32 = 1;
    /// The address was found on an interface in the pod.
    pub const FOUND: u32 = 2;
    /// Found in several pods (say, a bridge of a container engine inside a pod): it identifies none of them.
    pub const SHARED: u32 = 3;
}

/// Mode of a pod's port; port zero stands for every port without an entry.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct ModeKey {
    pub netns: u64,
    pub port: u16,
    pub pad: [u16; 3],
}

/// Kernel modes, rising with strictness, so that the larger of two is the stricter.
pub mod mode {
    pub const PERMISSIVE: u32 = 1;
    /// Plaintext goes to the plaintext listener, never directly to the application.
    pub const PROXY: u32 = 2;
    pub const STRICT: u32 = 3;
}

/// A listener of the agent in a pod.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct ListenerKey {
    pub netns: u64,
    /// One of `listener::*`.
    pub kind: u16,
    pub worker: u16,
    pub pad: u32,
}

pub mod listener {
    pub const OUTBOUND: u16 = 0;
    pub const TUNNEL: u16 = 1;
    pub const PLAINTEXT: u16 = 2;
}

/// An agent process. Keyed by its process id in the initial pid namespace.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Agent {
    pub cgroup: u64,
    /// When it said hello, on the monotonic clock.
    pub since_ns: u64,
}

#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Settings {
    /// The namespace whose processes' flows to local pods are trusted: the agent's own.
    pub host_netns: u64,
    /// Congestion control of loopback legs, zero-terminated; empty leaves the system's.
    pub congestion: [u8; 16],
}

/// Plaintext from outside a pod.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Event {
    /// Monotonic clock.
    pub time_ns: u64,
    pub local: Endpoint,
    pub remote: Endpoint,
    /// One of `event::*`.
    pub kind: u32,
    pub pad: u32,
}

pub mod event {
    pub const PLAINTEXT_ACCEPTED: u32 = 1;
    pub const PLAINTEXT_REFUSED: u32 = 2;
}

/// A pod, and an address that it dials: one granted to it, or a Service's to choose an endpoint for.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct GrantKey {
    /// The dialling pod.
    pub netns: u64,
    pub to: Endpoint,
    pub pad: u32,
}

#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Grant {
    /// Of the agent that gave it; without that agent's lease it is void.
    pub epoch: u64,
    /// The pod that must have the address.
    pub server: u64,
}

/// As many endpoints of a Service are chosen from in the kernel.
pub const CHOICES_MAX: usize = 8;

/// All endpoints that connections to a Service's address may go to.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Choice {
    /// As a grant's.
    pub epoch: u64,
    pub count: u32,
    pub endpoints: [Endpoint; CHOICES_MAX],
    pub pad: u32,
}

/// An agent that is there to take grants back.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Lease {
    /// When the agent started, on the monotonic clock; zero before the first.
    pub epoch: u64,
    /// On the monotonic clock.
    pub until_ns: u64,
}

/// A connection between two pods of this node that no agent carries. Keyed by its flow, node-global.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Direct {
    /// Netns cookies.
    pub client: u64,
    pub server: u64,
    /// When it was dialled, on the monotonic clock.
    pub since_ns: u64,
    /// Application bytes the server's kernel acknowledged; known once the client's socket is closed.
    pub sent: u64,
    /// Application bytes the client's kernel acknowledged; known once the server's socket is closed.
    pub received: u64,
    /// What the application dialled.
    pub dialled: Endpoint,
    /// Not zero: the destination's pod answers with RST.
    pub refused: u32,
    /// Not zero: the handshake is over, and nobody else is let in by this record.
    pub accepted: u32,
    /// TCP state that each socket was closed in; zero while it is open.
    pub client_end: u32,
    pub server_end: u32,
    pub pad: u32,
}

/// `Direct::server_end` of a server's socket whose end will not be seen.
pub const UNSEEN_END: u32 = 255;

/// A direct connection that is over.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Ended {
    pub time_ns: u64,
    pub flow: Flow,
    pub direct: Direct,
    /// Not zero: the client's socket was the last to be closed.
    pub client_last: u32,
    pub pad: u32,
}

macro_rules! layouts {
    ($($layout:ty = $size:literal),* $(,)?) => {$(
        const _: () = assert!(core::mem::size_of::<$layout>() == $size);
        // SAFETY: repr(C), integers only, and the size shows that no implicit padding is left.
        #[cfg(feature = "user")]
        unsafe impl aya::Pod for $layout {}
    )*};
}

layouts! {
    Endpoint = 20,
    Flow = 48,
    Note = 24,
    Pod = 40,
    Local = 16,
    ModeKey = 16,
    ListenerKey = 16,
    Agent = 16,
    Settings = 24,
    Event = 56,
    GrantKey = 32,
    Grant = 16,
    Choice = 176,
    Lease = 16,
    Direct = 80,
    Ended = 144,
}
