//! Capture: pods in, captured streams out; the only room that speaks to the kernel half.
//!
//! [`Capture::start`] loads the kernel half, or adopts what an earlier agent left pinned; [`Capture::enrol`] fences a
//! pod, opens the agent's listeners in it and captures its connects. Nothing here decides policy, and nothing here is
//! undone by the end of the process: enforcement outlives it, in pinned kernel objects. [`Capture::release`] and
//! [`Capture::retain`] undo it.

mod address;

mod diag;
mod direct;
mod enrol;
mod error;
mod events;
mod examine;
mod kernel;
mod listen;
mod modes;
mod netns;
mod node;
mod pin;
mod pod;
mod preflight;
pub mod probe;
mod sys;

use std::net::{IpAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::policy::PortModes;

pub use direct::{DirectFlow, DirectRecord, Ending, Endings, How};
pub use error::Error;
pub use events::{Event, EventKind, Events};
pub(crate) use preflight::mounted as mounted_cgroup_root;

pub use examine::{Examined, Fact, Place};
pub use listen::loopback_leg;
pub use mtls_common::{OUTBOUND_PORT, PLAINTEXT_PORT, TUNNEL_PORT};
pub use node::Capture;
pub use pin::release;
pub use pod::LocalPod;
pub(crate) use sys::{bpf, owned};

pub struct Config {
    /// The cgroup2 directory whose processes are seen: those of the pods, and the agent itself. The root of the
    /// mounted hierarchy if absent.
    pub cgroup_root: Option<PathBuf>,
    /// A directory in a mounted BPF file system.
    pub bpffs: PathBuf,
    /// Listeners of each kind per pod.
    pub workers: usize,
    /// Congestion control of connections over loopback. Absent: `cubic`, or `reno` where that is missing. Empty: the
    /// system's default.
    pub congestion: Option<String>,
    /// Whether connections may be ended from outside; else those that would have to be are an error.
    pub destroy: bool,
}

pub struct Enrolment<'a> {
    /// `namespace/name`.
    pub name: &'a str,
    pub netns: &'a Path,
    pub cgroup: Option<&'a Path>,
    /// From the manifest; addresses found in the pod are added.
    pub addresses: &'a [IpAddr],
    pub modes: &'a PortModes,
}

pub struct Enrolled {
    pub pod: Arc<LocalPod>,
    /// One for each worker.
    pub listeners: Vec<Listeners>,
    /// The pod was fenced already, by an earlier agent or by this one.
    pub was_fenced: bool,
}

/// Non-blocking listeners in the pod's namespace.
#[derive(Debug)]
pub struct Listeners {
    /// Connections of the pod's own application.
    pub outbound: TcpListener,
    /// Tunnels from other agents.
    pub inbound: TcpListener,
    /// Plaintext from outside the pod; the accepted socket's local address is what the client dialled.
    pub plaintext: TcpListener,
}
