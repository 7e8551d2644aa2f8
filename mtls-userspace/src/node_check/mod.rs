//! A node before anything is installed on it: its file system and what is attached to its hooks in, findings and what
//! to set out.
//!
//! Looks and never touches. What the kernel can do is tried in [another room](crate::features); this one asks what else
//! lives on the node: its cgroups, its CNI, other meshes, taken ports.

mod cgroups;
mod cni;
mod mounts;
mod ports;

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;

/// The node, as it is seen from here.
#[derive(Clone, Debug)]
pub struct Node {
    /// Where its root file system is: `/` on the node itself.
    pub root: PathBuf,
    /// Names of the BPF programs at the hooks of its cgroups, if they could be listed.
    pub hooks: Option<Vec<String>>,
}

/// One thing that was looked at.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Finding {
    pub what: &'static str,
    pub seen: String,
    pub verdict: Verdict,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(tag = "verdict", rename_all = "snake_case")]
pub enum Verdict {
    Good,
    /// Works, and is worth knowing.
    Known {
        because: String,
    },
    /// Works once this value of the chart is set, or the path patched that it stands for.
    Set {
        value: &'static str,
        to: String,
    },
    /// Can be put right before installing.
    Missing {
        remedy: String,
    },
    /// Does not work together.
    Conflict {
        because: String,
    },
}

/// Why a node could not be looked at.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "cannot read {path}: {source}; on the node itself be root, in a pod mount the node's / and name it with --root"
    )]
    Unreadable { path: PathBuf, source: std::io::Error },
}

impl Verdict {
    /// Whether nothing should be installed as things are.
    pub fn is_obstacle(&self) -> bool {
        matches!(self, Self::Missing { .. } | Self::Conflict { .. })
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Good => f.write_str("good"),
            Self::Known { because } => write!(f, "note: {because}"),
            Self::Set { value, to } => write!(f, "set {value}={to}"),
            Self::Missing { remedy } => write!(f, "MISSING: {remedy}"),
            Self::Conflict { because } => write!(f, "CONFLICT: {because}"),
        }
    }
}

/// Where hooks and pins would be, seen from here.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Places {
    pub cgroup: Option<PathBuf>,
    pub bpffs: PathBuf,
}

/// Finds the places that an agent would be given.
///
/// # Errors
///
/// As [`look`].
pub fn places(root: &Path) -> Result<Places, Error> {
    let mounts = mounts::of_the_node(root)?;
    Ok(Places {
        cgroup: cgroups::root(&mounts).map(|point| inside(root, point)),
        bpffs: inside(root, mounts::BPFFS),
    })
}

/// Looks at everything.
///
/// # Errors
///
/// When what every node has can't be read: then nothing could be said.
pub fn look(node: &Node) -> Result<Vec<Finding>, Error> {
    let mounts = mounts::of_the_node(&node.root)?;
    let mut findings =
        vec![cgroups::hierarchy(&mounts), cgroups::driver(&node.root, &mounts), mounts::bpffs(&mounts)];
    findings.extend(cni::look(node));
    findings.extend(ports::look(&node.root)?);
    Ok(findings)
}

/// A path of the node, seen from here.
fn inside(root: &Path, path: &str) -> PathBuf {
    root.join(path.trim_start_matches('/'))
}

fn read(path: &Path) -> Result<String, Error> {
    std::fs::read_to_string(path).map_err(|source| Error::Unreadable { path: path.into(), source })
}
