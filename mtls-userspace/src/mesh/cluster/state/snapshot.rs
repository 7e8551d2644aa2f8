//! Snapshots of the state: each made from the last, with only what has changed computed anew.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::jiff::Timestamp;

use super::{State, in_no_namespace};
use crate::mesh::hosts::Hosts;
use crate::mesh::objects::Key;
use crate::mesh::pod::Single;
use crate::mesh::service::Services;
use crate::mesh::{Mesh, Warning, Workload};
use crate::policy::Policies;

/// What policies say about pods that come and go (whom they select) is looked over this often at most.
const POLICIES_LOOKED_OVER: Duration = Duration::from_secs(10);

impl State {
    /// A snapshot of what is known now.
    pub(in crate::mesh::cluster) fn build(&mut self, generation: u64) -> Mesh {
        let fresh = std::mem::take(&mut self.fresh);
        self.interner.sweep_if_grown();
        if fresh.pods {
            self.last.claims.clear();
            let (workloads, by_address) = self.workloads();
            let starting = self.pods.iter().filter(|(key, single)| {
                // Whether it is enrolled is not known before its namespace is; nothing may be decided about it.
                let namespace = self.namespaces.get(&in_no_namespace(&key.namespace));
                single.workload.addresses.is_empty() && namespace.is_some()
            });
            let starting = starting.map(|(_, single)| single.workload.clone()).collect();
            self.last.workloads = Arc::new(workloads);
            self.last.starting = Arc::new(starting);
            self.last.by_address = Arc::new(by_address);
            self.outlived.get_or_insert_with(Instant::now);
        }
        if fresh.hosts {
            self.last.hosts = Arc::new(Hosts::new(self.hosts.values()));
        }
        if fresh.callers {
            self.last.calls = Arc::new(self.callers.calls());
        }
        if !fresh.services.is_empty() {
            self.services_anew(fresh.services);
        }
        if fresh.policies || self.policies_due().is_some_and(|due| due <= Instant::now()) {
            self.outlived = None;
            self.last.policies = Arc::new(Policies::new(
                self.peer_authentications.values(),
                self.authorization_policies.values(),
                &self.last.workloads,
                &self.settings.root_namespace,
            ));
        }
        self.last.mesh(generation)
    }

    /// When the policies are to be looked over, because pods have come and gone under them.
    pub(in crate::mesh::cluster) fn policies_due(&self) -> Option<Instant> {
        let is_any = !self.peer_authentications.is_empty() || !self.authorization_policies.is_empty();
        self.outlived.filter(|_| is_any).map(|since| since + POLICIES_LOOKED_OVER)
    }

    /// Gives each address to one pod. Pods that have none yet are among them, pods that have lost it are not.
    fn workloads(&mut self) -> (Vec<Arc<Workload>>, HashMap<IpAddr, Arc<Workload>>) {
        let mut owners: HashMap<IpAddr, &Single> = HashMap::with_capacity(self.last.by_address.len() + 16);
        let mut lost: HashMap<&Key, Vec<IpAddr>> = HashMap::new();
        let mut keys: HashMap<IpAddr, &Key> = HashMap::new();
        for (key, single) in self.pods.iter().filter(|(_, single)| !single.host_network) {
            for address in &single.workload.addresses {
                let Some(other) = owners.insert(*address, single) else { continue };
                // Rare; only then is it worth finding out who the other is.
                let other_key = keys.get(address).copied().or_else(|| {
                    self.pods.iter().find(|(_, it)| std::ptr::eq(*it, other)).map(|(key, _)| key)
                });
                let Some(other_key) = other_key else { continue };
                // Of two that nothing tells apart an enrolled one: a wrong identity is refused, plaintext is not.
                let rank = |it: &Single, key: &Key| (it.age, it.workload.enrolled, key.clone());
                let (winner, loser) = if rank(single, key) > rank(other, other_key) {
                    ((single, key), other_key)
                } else {
                    ((other, other_key), key)
                };
                owners.insert(*address, winner.0);
                keys.insert(*address, winner.1);
                lost.entry(loser).or_default().push(*address);
                self.last.claims.push(Warning::ClaimedAddress {
                    address: *address,
                    newer: winner.0.workload.key(),
                    older: format!("{}/{}", loser.namespace, loser.name),
                });
            }
        }
        let workloads = self.pods.iter().filter_map(|(key, single)| match lost.get(key) {
            None => (!single.workload.addresses.is_empty()).then(|| single.workload.clone()),
            Some(lost) => {
                let mut workload = Workload::clone(&single.workload);
                workload.addresses.retain(|address| !lost.contains(address));
                (!workload.addresses.is_empty()).then(|| Arc::new(workload))
            }
        });
        let workloads = workloads.collect();
        let by_address = owners.into_iter().map(|(address, single)| (address, single.workload.clone()));
        (workloads, by_address.collect())
    }

    fn services_anew(&mut self, names: HashSet<Arc<str>>) {
        for name in names {
            let key = name
                .split_once('/')
                .map(|(namespace, name)| Key { namespace: self.interner.text(namespace), name: name.into() });
            let front = key.and_then(|key| self.services.get(&key)).map(|(_, front)| front);
            match front {
                Some(front) => {
                    let keys = self.slices_of.get(&name).into_iter().flatten();
                    let slices = keys.filter_map(|key| self.slices.get(key)).map(|(_, slice)| slice);
                    drop(self.tables.insert(name, front.table(slices)));
                }
                None => drop(self.tables.remove(&name)),
            }
        }
        let mut services = Services::default();
        let mut owners: HashMap<IpAddr, (&Option<Timestamp>, &Arc<str>)> = HashMap::new();
        let tabled = self
            .services
            .values()
            .filter_map(|(created, front)| self.tables.get(&front.name).map(|table| (created, front, table)));
        for (created, front, table) in tabled {
            for vip in &front.vips {
                // A Service made anew may have the address of one whose end we have not heard of yet.
                match owners.entry(*vip) {
                    Entry::Occupied(mut owner) if *owner.get() < (created, &front.name) => {
                        owner.insert((created, &front.name));
                        services.remove(*vip);
                        services.add(*vip, table);
                    }
                    Entry::Occupied(_) => {}
                    Entry::Vacant(vacant) => {
                        vacant.insert((created, &front.name));
                        services.add(*vip, table);
                    }
                }
            }
        }
        self.last.affinities = self.services.values().filter_map(|(_, front)| front.warning()).collect();
        self.last.services = Arc::new(services);
    }
}
