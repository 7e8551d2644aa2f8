#![no_std]
//! The contract between the kernel half and the userspace half: layouts and names, no logic.
//!
//! Addresses are IPv6 words in network order (`_be`); an IPv4 address is written v4-mapped, so that one layout serves
//! both families. Ports are in host order. A pod is known by its network namespace's cookie, which the kernel never
//! uses twice. Every layout has explicit padding and its size asserted, because the maps outlive both halves.

pub mod counter;
pub mod layout;

pub use layout::*;

/// Names the directory of pinned maps and links. Raise it with every change of a layout or of a pinned map.
pub const LAYOUT: u32 = 2;

/// Where a captured connection of the pod's own application arrives.
pub const OUTBOUND_PORT: u16 = 15001;
/// Where plaintext from outside the pod arrives when L4 authorization has to look at it.
pub const PLAINTEXT_PORT: u16 = 15006;
/// Where tunnels from other agents arrive.
pub const TUNNEL_PORT: u16 = 15008;

/// How long after its SYN was sent a trusted local flow may still be opened, in nanoseconds.
pub const TRUSTED_FLOW_TTL_NS: u64 = 120_000_000_000;

/// Names of the pinned maps; at most 15 characters, as kernel objects are.
pub mod map {
    pub const AGENTS: &str = "AGENTS";
    pub const CAPTURED4: &str = "CAPTURED4";
    pub const CAPTURED6: &str = "CAPTURED6";
    pub const CHOICES: &str = "CHOICES";
    pub const COUNTERS: &str = "COUNTERS";
    pub const DELIVERED: &str = "DELIVERED";
    pub const DIRECT: &str = "DIRECT";
    pub const GRANTS: &str = "GRANTS";
    pub const HELLO: &str = "HELLO";
    pub const LEASE: &str = "LEASE";
    pub const LISTENERS: &str = "LISTENERS";
    pub const LOCAL: &str = "LOCAL";
    pub const MODES: &str = "MODES";
    pub const NOTES: &str = "NOTES";
    pub const ORIGINAL: &str = "ORIGINAL";
    pub const POD_CGROUPS: &str = "POD_CGROUPS";
    pub const PODS: &str = "PODS";
    pub const SETTINGS: &str = "SETTINGS";
    pub const TRUSTED: &str = "TRUSTED";

    /// Not pinned: each agent reads the events of its own programs.
    pub const EVENTS: &str = "EVENTS";
    /// Not pinned: as the events.
    pub const ENDINGS: &str = "ENDINGS";

    pub const PINNED: [&str; 19] = [
        AGENTS,
        CAPTURED4,
        CAPTURED6,
        CHOICES,
        COUNTERS,
        DELIVERED,
        DIRECT,
        GRANTS,
        HELLO,
        LEASE,
        LISTENERS,
        LOCAL,
        MODES,
        NOTES,
        ORIGINAL,
        POD_CGROUPS,
        PODS,
        SETTINGS,
        TRUSTED,
    ];
}

/// Names of the kernel half's constants that userspace sets before loading.
pub mod constant {
    /// Not zero: this kernel can tell a subflow of MPTCP from a socket of TCP.
    pub const TELLS_MPTCP: &str = "TELLS_MPTCP";
}

/// Names of the programs, which are those of their pinned links too.
pub mod program {
    pub const CONNECT4: &str = "connect4";
    pub const CONNECT6: &str = "connect6";
    pub const GETPEERNAME4: &str = "getpeername4";
    pub const GETPEERNAME6: &str = "getpeername6";
    pub const SOCK_OPS: &str = "mtls_sock_ops";
    pub const SK_LOOKUP: &str = "mtls_sk_lookup";

    pub const ALL: [&str; 6] = [CONNECT4, CONNECT6, GETPEERNAME4, GETPEERNAME6, SOCK_OPS, SK_LOOKUP];
}
