//! What a pod of a DaemonSet does that has done its work: it stays, and accepts connections for its readiness probe.

use std::convert::Infallible;
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener};

use anyhow::Context;

/// Accepts connections on a port until the process is ended, in both families where the node has both.
///
/// # Errors
///
/// When the port is taken.
pub fn stay(port: u16) -> anyhow::Result<Infallible> {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))
        .or_else(|_| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)))
        .with_context(|| format!("listening on port {port}; give another one to --stay"))?;
    loop {
        // One that went away before it was accepted is no reason to end.
        drop(listener.accept());
    }
}
