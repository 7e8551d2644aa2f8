//! Connections that end before they have a destination: reported as refused, with what is known of them.

use std::net::SocketAddr;

use rustls::SupportedCipherSuite;
use tokio::net::TcpStream;

use crate::addr::{OriginalSrc, canonical};
use crate::capture;
use crate::identity::SpiffeId;
use crate::observe::{Direction, Flow, Party, Path, Refusal};
use crate::worker::{Pod, Worker};

/// The kernel half recorded nothing: there is nowhere to send the connection.
pub fn not_captured(worker: &Worker, pod: &Pod, app: &TcpStream) {
    if let (Ok(from), Ok(to)) = (app.peer_addr().map(canonical), app.local_addr().map(canonical)) {
        let workload = pod.workload.load_full();
        let flow = Flow {
            direction: Direction::Outbound,
            path: Path::Passthrough,
            source: Party { identity: Some(workload.identity.clone()), workload: Some(workload) },
            destination: Party::default(),
            original_dst: None,
            address: to,
            original_src: OriginalSrc::new(from),
            service: None,
            cipher: None,
        };
        worker.observer.refused(flow, Refusal::NoOriginalDestination);
    }
}

/// A peer that has proven who it is broke the protocol before it named a destination.
pub fn broke_protocol(
    worker: &Worker,
    pod: &Pod,
    from: SocketAddr,
    peer: &SpiffeId,
    cipher: SupportedCipherSuite,
) {
    let workload = pod.workload.load_full();
    let Some(ip) = workload.addresses.iter().find(|ip| ip.is_ipv4() == from.is_ipv4()).copied() else {
        return;
    };
    let flow = Flow {
        direction: Direction::Inbound,
        path: Path::Tunnel,
        source: Party {
            workload: worker.mesh.current().workload(from.ip()).cloned(),
            identity: Some(peer.clone()),
        },
        destination: Party { identity: Some(workload.identity.clone()), workload: Some(workload) },
        original_dst: None,
        address: SocketAddr::new(ip, capture::TUNNEL_PORT),
        original_src: OriginalSrc::new(from),
        service: None,
        cipher: cipher.suite().as_str(),
    };
    worker.observer.refused(flow, Refusal::Protocol);
}
