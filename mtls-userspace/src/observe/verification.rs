//! The answer to an auditor's question about one pair of pods, as JSON has it.

use serde::{Deserialize, Serialize};

use super::inspection::EndedRow;
use super::status::ConnectionRow;
use crate::explain::Explanation;

/// Who dials whom. Pods are `namespace/name`.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pair {
    pub from: String,
    pub to: String,
    pub port: u16,
}

/// What is known about connections of a pair, from the agent's and the kernel's state.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Verification {
    /// The node of the agent that looked.
    pub node: String,
    pub source: String,
    pub destination: String,
    pub port: u16,
    pub verdict: Proof,
    /// Why the verdict is not better; empty when proven.
    pub reasons: Vec<String>,
    /// What policy and configuration say would happen.
    pub expected: Explanation,
    pub checks: Vec<CheckRow>,
    /// Open now, newest first, at most ten.
    pub open: Vec<ConnectionRow>,
    /// The last ones that ended or were refused, newest first, at most ten.
    pub ended: Vec<EndedRow>,
    /// What this agent cannot see, and where it could be seen.
    pub unseen: Vec<String>,
}

/// What is proven of a pair.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Proof {
    /// Mutual TLS on the wire, both identities proven.
    Encrypted,
    /// Nothing on a wire; both identities proven by the kernel's record of who owns which socket.
    SameNode,
    /// Both identities proven by the kernel, but the bytes cross the node's own network as they are.
    Direct,
    /// There is no connection to protect: it would be refused.
    Refused,
    /// Bytes would be readable, or are.
    Plaintext,
    /// It ought to be protected, but something does not fit or cannot be seen from here.
    Unproven,
}

impl Proof {
    /// Both ends are proven to each other, and nothing readable leaves a pod.
    pub fn is_protected(self) -> bool {
        matches!(self, Self::Encrypted | Self::SameNode)
    }
}

/// One thing that was looked at.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CheckRow {
    pub end: End,
    /// A name that stays: `connect_hooks`, `listeners`, `certificate` …
    pub name: String,
    pub passed: bool,
    /// What was found, where.
    pub found: String,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    Source,
    Destination,
}

/// Why nothing can be said about a pair.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Unverifiable {
    #[error("there is no pod {pod}; pods that are finished or have no address yet are not in the mesh")]
    UnknownPod { pod: String },
    #[error("{text:?} is not a pod, written NAMESPACE/NAME")]
    NotAPod { text: String },
    #[error("neither {from} nor {to} is on node {here}; ask the agent of {there}")]
    Elsewhere { from: String, to: String, here: String, there: String },
    #[error("{0}")]
    Pair(#[from] crate::explain::Error),
    #[error("the agent is still starting; ask again")]
    Starting,
}
