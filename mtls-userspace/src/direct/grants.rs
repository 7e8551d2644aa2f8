//! Grants: which pod may dial which address past the agent, kept in step with policy.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::{Direct, LEASE};
use crate::addr::OriginalDst;
use crate::capture::{self, Capture};
use crate::mesh::{Destination, Mesh, Workload};
use crate::policy::{Peer, Request};
use crate::worker::Pod;

/// The kernel half has room for as many.
const MOST: usize = 16_384;
const MOST_SERVICES: usize = 4096;

#[derive(Default)]
pub(super) struct Grants {
    /// Of the mesh by which every grant was judged.
    generation: u64,
    /// A grant could not be taken back: none is in force until all are.
    stuck: bool,
    /// By netns cookie of the client, and the address dialled.
    given: HashMap<(u64, SocketAddr), Given>,
    /// Services' addresses, and their endpoints, every one of which is granted.
    services: HashMap<(u64, SocketAddr), Vec<SocketAddr>>,
}

struct Given {
    client: Arc<Pod>,
    server: Arc<Pod>,
}

impl Direct {
    pub(super) fn grant(&self, client: &Arc<Pod>, to: SocketAddr) {
        let mut grants = self.grants();
        if let Some(mesh) = self.mesh_of(&grants) {
            self.grant_by(&mesh, &mut grants, client, to);
        }
    }

    /// Grants every endpoint of a Service, if they are all pods of this node.
    pub(super) fn grant_service(&self, client: &Arc<Pod>, service: OriginalDst) {
        let key = (client.socket.netns_cookie(), service.addr());
        let mut grants = self.grants();
        let Some(mesh) = self.mesh_of(&grants) else { return };
        if grants.services.contains_key(&key) || grants.services.len() >= MOST_SERVICES {
            return;
        }
        let Some(endpoints) = self.endpoints(&mesh, service) else { return };
        if !endpoints.iter().all(|to| self.grant_by(&mesh, &mut grants, client, *to)) {
            return;
        }
        grants.services.insert(key, endpoints.clone());
        if let Err(error) = self.capture.let_choose(&client.socket, service.addr(), &endpoints) {
            tracing::warn!(pod = client.socket.name(), %service, %error, "connections stay relayed");
            grants.services.remove(&key);
        }
    }

    /// The mesh in force, if grants are to be judged by it: another may be about to be in force.
    fn mesh_of(&self, grants: &Grants) -> Option<Arc<Mesh>> {
        let mesh = self.mesh.current();
        (!grants.stuck && grants.generation == mesh.generation).then_some(mesh)
    }

    /// All endpoints of a Service, if the kernel half can choose among so many.
    fn endpoints(&self, mesh: &Mesh, service: OriginalDst) -> Option<Vec<SocketAddr>> {
        let endpoints = mesh.eligible(service, &self.node, Capture::MOST_ENDPOINTS)?;
        (1..=Capture::MOST_ENDPOINTS).contains(&endpoints.len()).then_some(endpoints)
    }

    /// Whether the client has the grant now.
    fn grant_by(&self, mesh: &Mesh, grants: &mut Grants, client: &Arc<Pod>, to: SocketAddr) -> bool {
        let key = (client.socket.netns_cookie(), to);
        let Some(server) = self.local.at(to.ip()) else { return false };
        let is_given = |given: &Given| given.server.socket.netns_cookie() == server.socket.netns_cookie();
        if grants.given.get(&key).is_some_and(is_given) {
            return true;
        }
        if grants.given.len() >= MOST
            || !is_allowed(mesh, &self.node, &client.workload.load(), &server.workload.load(), to)
        {
            return false;
        }
        grants.given.insert(key, Given { client: client.clone(), server: server.clone() });
        match self.capture.grant(&client.socket, to, &server.socket) {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(pod = client.socket.name(), %to, %error, "connections stay relayed");
                grants.given.remove(&key);
                false
            }
        }
    }

    /// Takes back every grant that `mesh` would refuse. Called before it is in force: nobody gives a grant by the older
    /// one once this is done.
    pub(super) fn keep_granted(&self, mesh: &Mesh) {
        let mut grants = self.grants();
        grants.generation = mesh.generation;
        let refused = |given: &Given, to| {
            !is_allowed(mesh, &self.node, &given.client.workload.load(), &given.server.workload.load(), to)
        };
        let withdrawn: Vec<_> =
            grants.given.iter().filter(|((_, to), given)| refused(given, *to)).map(|(key, _)| *key).collect();
        for (client, to) in withdrawn {
            match self.capture.withdraw(client, to) {
                Ok(()) => drop(grants.given.remove(&(client, to))),
                Err(error) => {
                    tracing::error!(%error, "a grant cannot be taken back: none stays in force");
                    grants.stuck = true;
                }
            }
        }
        let Grants { given, services, stuck, .. } = &mut *grants;
        let is_changed = |(client, service): &(u64, SocketAddr), endpoints: &Vec<SocketAddr>| {
            let now = self.endpoints(mesh, OriginalDst::new(*service));
            now.as_ref() != Some(endpoints) || !endpoints.iter().all(|to| given.contains_key(&(*client, *to)))
        };
        let changed = services.iter().filter(|(key, endpoints)| is_changed(key, endpoints));
        for (client, service) in changed.map(|(key, _)| *key).collect::<Vec<_>>() {
            match self.capture.withdraw_choice(client, service) {
                Ok(()) => drop(services.remove(&(client, service))),
                Err(error) => {
                    tracing::error!(%error, "a Service's endpoints cannot be changed: no grant stays in force");
                    *stuck = true;
                }
            }
        }
        if grants.stuck
            && let Err(error) = self.capture.hold_lease(Duration::ZERO)
        {
            tracing::error!(%error, "grants stay in force for at most {LEASE:?}");
        }
    }

    /// Puts the grants in force for a while; not before every one that should be gone is. False: a later agent has
    /// taken over.
    pub(super) fn renew(&self) -> Result<bool, capture::Error> {
        let mut grants = self.grants();
        if grants.stuck {
            self.capture.withdraw_all()?;
            grants.given.clear();
            grants.services.clear();
            grants.stuck = false;
        }
        self.capture.hold_lease(LEASE)
    }
}

/// Whether connections of one pod to an address of another would be relayed within this node, and let in.
fn is_allowed(mesh: &Mesh, node: &str, client: &Workload, server: &Workload, to: SocketAddr) -> bool {
    if [capture::OUTBOUND_PORT, capture::PLAINTEXT_PORT, capture::TUNNEL_PORT].contains(&to.port()) {
        return false;
    }
    // The address that the kernel half makes such a connection come from.
    let Some(source_ip) = client.addresses.iter().find(|ip| ip.is_ipv4() == to.is_ipv4()).copied() else {
        return false;
    };
    let Some(now) = mesh.workload(source_ip).filter(|now| now.enrolled && is_same(now, client)) else {
        return false;
    };
    match mesh.resolve(OriginalDst::new(to), node) {
        Destination::Workload { workload, address, service: None }
            if address == to && is_same(&workload, server) && workload.node.as_deref() == Some(node) =>
        {
            let peer = Peer::Verified(&now.identity);
            let request = Request { destination: &workload, address, source_ip, peer };
            mesh.policies.authorize(&request).is_ok()
        }
        _ => false,
    }
}

fn is_same(one: &Workload, other: &Workload) -> bool {
    one.namespace == other.namespace && one.name == other.name && one.identity == other.identity
}
