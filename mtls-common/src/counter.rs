//! What the kernel half counts: slots of the per-CPU counter map, and the names metrics show.

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident = $label:literal),* $(,)?) => {
        #[repr(u32)]
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum Counter {
            $($(#[$doc])* $name),*
        }

        /// By slot.
        pub const NAMES: [&str; [$($label),*].len()] = [$($label),*];
    };
}

counters! {
    /// Connects redirected to the outbound listener.
    Captured = "captured",
    /// Connects of enrolled pods to destinations outside the mesh.
    Passed = "passed",
    /// The agent's own connects, let through.
    AgentPassed = "agent_passed",
    /// Connects refused because the kernel could not note or redirect them.
    Refused = "refused",
    /// Original destinations that could not be published; the agent closes such connections.
    Unpublished = "unpublished",
    /// Connections handed to the outbound listener.
    SteeredOutbound = "steered_outbound",
    /// Connections handed to the tunnel listener.
    SteeredTunnel = "steered_tunnel",
    /// Connections handed to the plaintext listener.
    SteeredPlaintext = "steered_plaintext",
    /// Connections dropped because no listener of the agent was there.
    NoListener = "no_listener",
    /// Plaintext refused by a STRICT port.
    StrictRefused = "strict_refused",
    /// Plaintext accepted by a PERMISSIVE or DISABLE port.
    PlaintextAccepted = "plaintext_accepted",
    /// Flows of the node's own that were let in.
    TrustedAccepted = "trusted_accepted",
    /// Connections to an address in a pod that nobody registered: dropped.
    UnknownAddress = "unknown_address",
    /// Connections from outside to a port only the pod itself may use: dropped.
    ReservedPort = "reserved_port",
    /// Delivered connections whose server sees the original source.
    Delivered = "delivered",
    /// Delivered connections whose server sees a loopback source, because the kernel had no memory for the note.
    Unnamed = "unnamed",
    /// Events that found the ring buffer full.
    LostEvents = "lost_events",
    /// Connects let through to a pod of the same node by a grant.
    Direct = "direct",
    /// Direct connections that the destination's pod let in.
    DirectAccepted = "direct_accepted",
    /// Direct connections refused because their grant was gone, or their record found no room.
    DirectRefused = "direct_refused",
    /// Ends of direct connections that found their ring buffer full.
    LostEndings = "lost_endings",
}
