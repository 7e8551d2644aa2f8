//! Control: the mesh and the certificates in; enrolment, and what is still allowed of what is open, follow.
//!
//! One loop, and the only place where enrolment changes. It does nothing to the kernel while another agent has this one's
//! place.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::oneshot;

use crate::cni::Admissions;
use crate::config::Config;
use crate::direct::Direct;
use crate::enrolment::Enrolment;
use crate::identity::{Identities, SpiffeId};
use crate::mesh::{self, Mesh};
use crate::observe::{self, Observer, PodRow, Readiness};
use crate::policy::{Peer, Request};
use crate::succession::{Part, Phase, Predecessor, Reign};

/// Whom it follows, and what it moves.
pub struct Control {
    pub config: Arc<Config>,
    pub source: mesh::Source,
    pub identities: Arc<Identities>,
    pub enrolment: Enrolment,
    pub admissions: Arc<Admissions>,
    pub observer: Observer,
    pub direct: Arc<Direct>,
    /// What the admin API shows of this node's pods.
    pub pods: Arc<ArcSwap<Vec<PodRow>>>,
    pub reign: Arc<Reign>,
    /// Whom to tell that every pod is enrolled.
    pub settled: Option<oneshot::Sender<()>>,
}

impl Control {
    /// Waits until this agent can prove whatever its predecessor can, or that one is gone.
    pub async fn await_certificates(&self, predecessor: &mut Predecessor, succession: &observe::Condition) {
        let mut mesh_changes = self.source.subscribe();
        let mut identity_changes = self.identities.subscribe();
        loop {
            mesh_changes.mark_unchanged();
            identity_changes.mark_unchanged();
            let mesh = self.source.current();
            let wanted: HashSet<_> = mesh.identities_on(&self.config.node).cloned().collect();
            self.identities.want(wanted.clone());
            let is_missing =
                |id: &&SpiffeId| self.identities.current(id).is_none() && predecessor.has(&id.to_string());
            let Some(missing) = wanted.iter().find(is_missing) else { return };
            succession.not_ready(format!(
                "the agent that runs here has a certificate for {missing}, this one not yet"
            ));
            tokio::select! {
                changed = mesh_changes.changed() => if changed.is_err() { return },
                changed = identity_changes.changed() => if changed.is_err() { return },
                () = predecessor.gone() => return,
            }
        }
    }

    /// Follows until there is nothing left to follow.
    pub async fn run(mut self, readiness: Readiness) {
        let pods_ready = readiness.condition("pods");
        let identities_ready = readiness.condition("identities");
        let mut mesh_changes = self.source.subscribe();
        let mut identity_changes = self.identities.subscribe();
        let mut arrivals = self.admissions.subscribe();
        let mut phases = self.reign.subscribe();
        let mut hold = Some(self.reign.hold(Part::Control));
        loop {
            let rules = *phases.borrow_and_update() < Phase::Frozen;
            match (rules, &hold) {
                (true, None) => {
                    hold = Some(self.reign.hold(Part::Control));
                    self.enrolment.renew();
                }
                (false, Some(_)) => hold = None,
                _ => {}
            }
            arrivals.mark_unchanged();
            mesh_changes.mark_unchanged();
            identity_changes.mark_unchanged();
            let mesh = self.source.current();
            let wanted: HashSet<_> = mesh.identities_on(&self.config.node).cloned().collect();
            self.identities.want(wanted.clone());
            if rules {
                self.enrolment.reconcile(&mesh).await;
                self.revoke(&mesh);
                self.enrolment.verify(&self.identities);
            } else {
                // What this agent carries is still judged here.
                let carried = |flow: &observe::Flow| flow.path != observe::Path::Direct;
                self.observer.revoke(&|flow| refused_now(&mesh, flow).filter(|_| carried(flow)));
            }
            self.pods.store(Arc::new(self.enrolment.rows(&mesh)));
            if self.enrolment.failed().is_empty()
                && let Some(settled) = self.settled.take()
            {
                let _ = settled.send(());
            }

            match self.enrolment.failed().iter().next() {
                None => pods_ready.set_ready(),
                Some((name, reason)) => pods_ready.not_ready(format!("{name}: {reason}")),
            }
            match wanted.iter().find(|id| self.identities.current(id).is_none()) {
                None => identities_ready.set_ready(),
                Some(id) => identities_ready.not_ready(format!("no certificate for {id} yet")),
            }
            // Pods that could not be enrolled are tried again soon; a namespace replaced under its path is noticed.
            let again =
                if self.enrolment.is_settled() { Duration::from_secs(5) } else { Duration::from_secs(1) };
            tokio::select! {
                changed = mesh_changes.changed() => if changed.is_err() { return },
                changed = identity_changes.changed() => if changed.is_err() { return },
                changed = arrivals.changed() => if changed.is_err() { return },
                changed = phases.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(again) => {}
            }
        }
    }

    /// Ends open connections that the mesh in force refuses: those that this agent carries end themselves.
    fn revoke(&self, mesh: &Mesh) {
        let direct = tokio::task::block_in_place(|| self.direct.follow_up());
        self.observer.revoke(&|flow| self.direct.unwanted(flow).or_else(|| refused_now(mesh, flow)));
        tokio::task::block_in_place(|| self.direct.enforce(mesh, &direct));
    }
}

/// Whether an open connection would be refused under this snapshot, and by what.
fn refused_now(mesh: &Mesh, flow: &observe::Flow) -> Option<Arc<str>> {
    let destination = flow.destination.workload.as_ref()?;
    // The workload as it is now: its labels may have changed.
    let Some(now) = mesh.workload(flow.address.ip()).filter(|now| now.key() == destination.key()) else {
        return Some("the destination pod is gone".into());
    };
    let judged_here = flow.direction == observe::Direction::Inbound || flow.path.is_within_node();
    if !judged_here {
        return None;
    }
    let peer = match &flow.source.identity {
        Some(identity) => Peer::Verified(identity),
        None => Peer::Plaintext,
    };
    let request =
        Request { destination: now, address: flow.address, source_ip: flow.original_src.ip(), peer };
    mesh.policies.authorize(&request).err().map(|denied| denied.to_string().into())
}
