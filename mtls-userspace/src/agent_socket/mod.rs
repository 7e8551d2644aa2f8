//! The agent's own socket: CNI plugins and succeeding agents in, one JSON object a line in either direction.
//!
//! A unix socket beside the admin API's, for the agent's own user only. Unlike the admin API it may change what the agent
//! does, and open files may come with a line.

mod line;

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use line::{Ask, Conversation, Error};

/// The first line of whoever calls.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// A pod's network was just made; its namespace comes along as an open file.
    Add(Attachment),
    /// Whether a pod's network is still protected.
    Check(Attachment),
    /// A pod's network is about to be unmade.
    Del { container: String },
    /// Only these containers' networks are still there.
    Gc { containers: Vec<String> },
    /// Whether anybody answers.
    Status,
    /// An agent that wants to take this one's place.
    Succeed { version: String, pid: u32 },
}

/// A container's network, as a CNI plugin is told of it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Attachment {
    pub container: String,
    pub namespace: String,
    pub name: String,
    /// Runtimes that don't tell it leave the pod to be known by its name.
    pub uid: Option<String>,
    pub addresses: Vec<IpAddr>,
    /// How long the caller waits for an answer.
    pub patience_ms: u64,
}

/// What a CNI plugin is told.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// Identity, listeners and kernel state of the pod are in place.
    Protected,
    /// The pod takes no part in the mesh.
    NotEnrolled,
    /// Done, or nothing to do.
    Done,
    Failed {
        reason: String,
    },
}

/// Where the socket is, beside the admin API's.
pub fn beside(admin_socket: &Path) -> PathBuf {
    admin_socket.with_file_name(match admin_socket.file_stem().and_then(|stem| stem.to_str()) {
        // Several agents of one directory, as in a lab, name theirs apart.
        Some(stem) if stem != "admin" => format!("{stem}.agent.sock"),
        _ => "agent.sock".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_socket_stands_beside_the_admin_apis() {
        assert_eq!(beside(Path::new("/run/mtls/admin.sock")), Path::new("/run/mtls/agent.sock"));
        assert_eq!(beside(Path::new("/tmp/lab/node-a.sock")), Path::new("/tmp/lab/node-a.agent.sock"));
    }
}
