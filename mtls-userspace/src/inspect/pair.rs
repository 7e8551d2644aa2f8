//! What is true of connections from one pod to another: what policy says, and what the kernel and the certificates of
//! this node's end, or ends, really are.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::Inspection;
use super::certificates;
use super::verdict::{Seen, verdict};
use crate::capture::{Fact, Place};
use crate::explain;
use crate::locate;
use crate::mesh::{Mesh, Workload};
use crate::observe::{CheckRow, End, Enrolment, Pair, Unverifiable, Verification};
use crate::worker::Pod;

pub(super) fn verify(
    inspection: &Inspection,
    mesh: &Mesh,
    pair: &Pair,
) -> Result<Verification, Unverifiable> {
    let (from, source) = pod(mesh, &pair.from)?;
    let (to, destination) = pod(mesh, &pair.to)?;
    let seen = Seen { source: inspection.is_local(&source), destination: inspection.is_local(&destination) };
    if !seen.source && !seen.destination {
        let node = |workload: &Workload| workload.node.as_deref().unwrap_or("no node").to_owned();
        let (first, second) = (node(&source), node(&destination));
        return Err(Unverifiable::Elsewhere {
            from: source.key(),
            to: destination.key(),
            here: inspection.node.to_string(),
            there: if first == second { first } else { format!("{first} or {second}") },
        });
    }
    let explained = explain::explain(mesh, &inspection.setting, &from, &to, pair.port)?;
    let expected = explained.into_iter().next().ok_or(Unverifiable::Starting)?;
    let ends = Ends { source: &source, destination: &destination, port: pair.port };
    let mut checks = Vec::new();
    if seen.source {
        checks.extend(ends.check_source(inspection));
    }
    if seen.destination {
        checks.extend(ends.check_destination(inspection, mesh));
    }
    let unseen = [(seen.source, &source), (seen.destination, &destination)];
    let unseen = unseen.into_iter().filter(|(seen, _)| !seen).map(|(_, workload)| unseen_end(workload));
    let (proof, reasons) = verdict(&expected, seen, &checks);
    Ok(Verification {
        node: inspection.node.to_string(),
        source: source.key(),
        destination: destination.key(),
        port: pair.port,
        verdict: proof,
        reasons,
        checks,
        open: Vec::new(),
        ended: Vec::new(),
        unseen: unseen.collect(),
        expected,
    })
}

fn unseen_end(workload: &Workload) -> String {
    let node = workload.node.as_deref().unwrap_or("a node the manifest does not name");
    format!(
        "{} is on {node}: its certificate, its sockets and its kernel state can be seen by the agent there",
        workload.key()
    )
}

fn pod(mesh: &Mesh, text: &str) -> Result<(explain::End, Arc<Workload>), Unverifiable> {
    let not_a_pod = || Unverifiable::NotAPod { text: text.to_owned() };
    let end: explain::End = text.parse().map_err(|_| not_a_pod())?;
    let explain::End::Pod { namespace, name } = &end else { return Err(not_a_pod()) };
    let found = mesh.workloads.iter().find(|w| *w.namespace == **namespace && *w.name == **name);
    let workload = found.cloned().ok_or_else(|| Unverifiable::UnknownPod { pod: text.to_owned() })?;
    Ok((end, workload))
}

struct Ends<'a> {
    source: &'a Workload,
    destination: &'a Workload,
    port: u16,
}

impl Ends<'_> {
    fn check_source(&self, inspection: &Inspection) -> Vec<CheckRow> {
        if !self.source.enrolled {
            return Vec::new();
        }
        let mut checks = match enrolled(inspection, self.source) {
            Ok(pod) => {
                let place = pod.place.load();
                inspection.capture.examine_source(&pod.socket, place_of(&place), &self.addresses())
            }
            Err(failed) => vec![failed],
        };
        checks.push(certificate(inspection, self.source));
        rows(End::Source, checks)
    }

    fn check_destination(&self, inspection: &Inspection, mesh: &Mesh) -> Vec<CheckRow> {
        if !self.destination.enrolled {
            return Vec::new();
        }
        let modes = mesh.policies.modes(self.destination);
        let mut checks = match enrolled(inspection, self.destination) {
            Ok(pod) => {
                let sources = &self.source.addresses;
                let (place, at) = (pod.place.load(), self.addresses());
                inspection.capture.examine_destination(&pod.socket, place_of(&place), &at, &modes, sources)
            }
            Err(failed) => vec![failed],
        };
        checks.push(certificate(inspection, self.destination));
        rows(End::Destination, checks)
    }

    /// Where the source can dial the destination: of each family that both have.
    fn addresses(&self) -> Vec<SocketAddr> {
        let has_family = |ip: &&IpAddr| self.source.addresses.iter().any(|own| own.is_ipv4() == ip.is_ipv4());
        let dialled = self.destination.addresses.iter().filter(has_family);
        dialled.map(|ip| SocketAddr::new(*ip, self.port)).collect()
    }
}

fn place_of(place: &locate::Place) -> Place<'_> {
    Place { netns: Some(&place.netns), cgroup: place.cgroup.as_deref() }
}

/// The pod as connections see it, or the fact that it is not there.
fn enrolled(inspection: &Inspection, workload: &Workload) -> Result<Arc<Pod>, Fact> {
    let pod = workload.addresses.iter().find_map(|ip| inspection.local.at(*ip));
    let pod = pod.filter(|pod| pod.socket.name() == workload.key());
    let state = inspection.enrolment(workload);
    match (pod, &state) {
        (Some(pod), Some(Enrolment::Enrolled)) => Ok(pod),
        (_, Some(Enrolment::Failed { reason })) => Err(not_enrolled(reason)),
        _ => Err(not_enrolled("enrolment has not finished; ask again")),
    }
}

fn not_enrolled(why: &str) -> Fact {
    Fact { name: "enrolment", holds: false, found: why.to_owned() }
}

fn certificate(inspection: &Inspection, workload: &Workload) -> Fact {
    let current = inspection.identities.current(&workload.identity);
    let (holds, verdict) = certificates::verdict(current.as_deref(), None);
    Fact { name: "certificate", holds, found: format!("{}: {verdict}", workload.identity) }
}

fn rows(end: End, facts: Vec<Fact>) -> Vec<CheckRow> {
    let row = |Fact { name, holds, found }| CheckRow { end, name: name.to_owned(), passed: holds, found };
    facts.into_iter().map(row).collect()
}
