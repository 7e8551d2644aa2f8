//! Succession: one agent takes another's place on its node, and no connection is refused.
//!
//! | the successor | its predecessor |
//! |---|---|
//! | *succeed*: is starting | gives up the admin API's port, so that a probe of readiness reaches the one that starts |
//! | *take over*: has the mesh, and every certificate that its predecessor has | changes nothing in the kernel from now on, and gives up its sockets |
//! | *drain*: has enrolled every pod | accepts what its listeners still hold, closes them, and keeps what is open until it is told to end |
//!
//! Both ends notice when the other goes away. Before *drain* the predecessor goes on as if nothing had been; after it,
//! with no listener left, it ends, to be started anew. What is open on it ends with it: a connection's keys and buffers
//! are in its memory alone.

mod reign;
mod successor;

use serde::{Deserialize, Serialize};

pub use reign::{Hold, Part, Phase, Reign};
pub use successor::{Error, Predecessor};

/// What a successor says after [`Request::Succeed`](crate::agent_socket::Request::Succeed).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Step {
    TakeOver,
    Drain,
}

/// What its predecessor answers.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Reply {
    /// The port is free.
    Welcome { pid: u32, version: String, identities: Vec<String> },
    /// Another agent is succeeding, or has.
    Taken,
    /// Kernel and sockets are the successor's.
    Yours,
    /// Said again and again, once it drains.
    Draining { open: u64 },
}

/// An agent whose place was taken, and what is still open on it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PredecessorRow {
    pub pid: u32,
    pub version: String,
    pub open: u64,
}
