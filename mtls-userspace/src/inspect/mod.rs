//! Inspect: questions of people and programs in, rows made from what the rooms hold right now out.
//!
//! It only reads. What it says of this node's pods is looked up in the kernel ([`pair`]), not in a record of what was
//! once set up.

mod certificates;
mod pair;
mod policies;
mod services;
mod verdict;
mod workloads;

use std::sync::Arc;

use arc_swap::ArcSwap;

use crate::capture::Capture;
use crate::explain;
use crate::identity::Identities;
use crate::mesh::{self, Mesh, Workload};
use crate::observe::{
    CertificateRow, Direction, Enrolment, Filter, Flow, Inspector, Judged, Listing, Pair, PodRow, PolicyRow,
    ServiceRow, Unverifiable, Verification, WorkloadRow,
};
use crate::policy::{Peer, Request};
use crate::worker::LocalPods;

/// The rooms that are asked.
pub struct Inspection {
    pub node: Arc<str>,
    pub mesh: mesh::Source,
    pub identities: Arc<Identities>,
    pub capture: Arc<Capture>,
    pub local: Arc<LocalPods>,
    /// How far the enrolment of this node's pods is.
    pub pods: Arc<ArcSwap<Vec<PodRow>>>,
    pub setting: explain::Setting,
}

impl Inspection {
    fn is_local(&self, workload: &Workload) -> bool {
        workload.node.as_deref() == Some(&*self.node)
    }

    fn enrolment(&self, workload: &Workload) -> Option<Enrolment> {
        let pods = self.pods.load();
        let row = pods.iter().find(|row| row.namespace == *workload.namespace && row.name == *workload.name);
        row.map(|row| row.enrolment.clone())
    }
}

impl Inspector for Inspection {
    fn workloads(&self, filter: &Filter) -> Listing<WorkloadRow> {
        workloads::list(self, &self.mesh.current(), filter)
    }

    fn certificates(&self, filter: &Filter) -> Listing<CertificateRow> {
        certificates::list(self, &self.mesh.current(), filter)
    }

    fn services(&self, filter: &Filter) -> Listing<ServiceRow> {
        services::list(&self.mesh.current(), &self.node, filter)
    }

    fn policies(&self, filter: &Filter) -> Listing<PolicyRow> {
        policies::list(&self.mesh.current(), &self.node, filter)
    }

    fn judged(&self, flow: &Flow) -> Judged {
        judged(&self.mesh.current(), flow)
    }

    fn verify(&self, pair: &Pair) -> Result<Verification, Unverifiable> {
        pair::verify(self, &self.mesh.current(), pair)
    }
}

/// An open connection under the snapshot in force: a change that would refuse it resets it, so this is why it lives.
fn judged(mesh: &Mesh, flow: &Flow) -> Judged {
    let known = flow.destination.workload.as_ref().and_then(|_| mesh.workload(flow.address.ip()));
    let Some(destination) = known.filter(|workload| workload.enrolled) else { return Judged::default() };
    let mode = Some(mesh.policies.mode(destination, flow.address.port()).to_string());
    if flow.direction == Direction::Outbound && !flow.path.is_within_node() {
        return Judged { mode, policy: None };
    }
    let peer = flow.source.identity.as_ref().map_or(Peer::Plaintext, Peer::Verified);
    let request = Request { destination, address: flow.address, source_ip: flow.original_src.ip(), peer };
    let policy = mesh.policies.authorize(&request).ok().and_then(|permit| permit.policy().cloned());
    Judged { mode, policy }
}
