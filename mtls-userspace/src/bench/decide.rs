//! What a decision about a connection costs in a mesh of any size: a directory of manifests in, times out. No traffic.

use std::hint::black_box;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::addr::OriginalDst;
use crate::mesh::{self, Destination, Mesh};
use crate::policy::{Peer, Request};

/// Decisions between two looks at the clock.
const ROUND: u32 = 1000;

#[derive(Debug, Serialize)]
pub struct Decisions {
    /// Reading the manifests and building the mesh.
    pub load_seconds: f64,
    /// From the dialled address to the pod that answers.
    pub resolve_ns: f64,
    /// Whether policy lets the connection in; none if the address leads to nobody who is enrolled.
    pub authorize_ns: Option<f64>,
}

/// Decides about connections from `from`, a pod's address, to `to`, for about so long each.
///
/// # Errors
///
/// When the manifests can't be read.
pub fn decide(
    manifests: PathBuf,
    settings: mesh::Settings,
    node: &str,
    (from, to): (SocketAddr, SocketAddr),
    duration: Duration,
) -> Result<Decisions, mesh::Error> {
    let begun = Instant::now();
    let source = mesh::Source::directory(manifests, settings)?;
    let load_seconds = begun.elapsed().as_secs_f64();
    let mesh = source.current();
    let to = OriginalDst::new(to);
    let resolve_ns = time(duration, || drop(black_box(mesh.resolve(black_box(to), node))));
    Ok(Decisions { load_seconds, resolve_ns, authorize_ns: authorize(&mesh, node, from, to, duration) })
}

fn authorize(mesh: &Mesh, node: &str, from: SocketAddr, to: OriginalDst, duration: Duration) -> Option<f64> {
    let source = mesh.workload(from.ip())?;
    let Destination::Workload { workload, address, .. } = mesh.resolve(to, node) else { return None };
    let request = Request {
        destination: &workload,
        address,
        source_ip: from.ip(),
        peer: Peer::Verified(&source.identity),
    };
    Some(time(duration, || drop(black_box(mesh.policies.authorize(black_box(&request))))))
}

/// Nanoseconds of one call.
fn time(duration: Duration, mut call: impl FnMut()) -> f64 {
    let begun = Instant::now();
    let mut calls = 0;
    while calls == 0 || begun.elapsed() < duration {
        (0..ROUND).for_each(|_| call());
        calls += ROUND;
    }
    begun.elapsed().as_nanos() as f64 / f64::from(calls)
}
