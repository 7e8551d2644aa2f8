//! A bounded memory of plaintext peers: sightings in, who came where and when out. Pure: no I/O, no clock.
//!
//! Whatever is not kept is counted, so that nobody takes a gap for silence. Under pressure a peer that came once and
//! longest ago goes first, and an address that the mesh does not know goes before any workload: a scan from many
//! addresses cannot push the mesh's own clients out.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use jiff::Timestamp;

use super::sighting::{Peer, Row, Sighting, Tally};

/// How much is kept. Each row takes about 250 bytes, names included.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Peers of one port that the mesh knows as workloads.
    pub workloads_per_port: usize,
    /// Peers of one port that are only addresses.
    pub addresses_per_port: usize,
    pub rows_per_pod: usize,
    pub rows: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { workloads_per_port: 256, addresses_per_port: 64, rows_per_pod: 2048, rows: 16_384 }
    }
}

/// What is kept of one port.
#[derive(Clone, Debug, Default)]
pub struct Port {
    pub peers: HashMap<Peer, Row>,
    /// Connections of peers that were not kept.
    pub missed: Tally,
}

/// What is kept of one pod.
#[derive(Clone, Debug)]
pub struct Pod {
    netns: u64,
    /// From when on every plaintext connection was noticed.
    pub since: Timestamp,
    /// Ports found to be listened on.
    pub served: BTreeSet<u16>,
    /// Only ports with peers.
    pub ports: BTreeMap<u16, Port>,
    /// Connections of peers that were not kept, to ports of which nothing else is kept.
    pub missed: Tally,
    /// Attempts at ports that nothing listened on.
    pub unserved: Tally,
    rows: usize,
}

#[derive(Debug, Default)]
pub struct Store {
    limits: Limits,
    pods: HashMap<String, Pod>,
    rows: usize,
    /// Connections of peers that were not kept, of all pods that ever were.
    missed: u64,
}

impl Store {
    pub fn new(limits: Limits) -> Self {
        Self { limits, ..Self::default() }
    }

    pub fn pod(&self, key: &str) -> Option<&Pod> {
        self.pods.get(key)
    }

    /// Peers kept now, and connections of peers that were not kept.
    pub fn counts(&self) -> (usize, u64) {
        (self.rows, self.missed)
    }

    /// Observes exactly these pods (key, netns cookie) from now on. Returns the keys of those that are new.
    pub fn observe<'a>(
        &mut self,
        pods: impl Iterator<Item = (String, u64)> + 'a,
        now: Timestamp,
    ) -> Vec<String> {
        let pods: HashMap<String, u64> = pods.collect();
        self.pods.retain(|key, pod| pods.get(key) == Some(&pod.netns));
        self.rows = self.pods.values().map(|pod| pod.rows).sum();
        let mut new: Vec<String> = pods.keys().filter(|key| !self.pods.contains_key(*key)).cloned().collect();
        new.sort();
        for key in &new {
            let netns = pods.get(key).copied().unwrap_or_default();
            self.pods.insert(key.clone(), Pod::new(netns, now));
        }
        new
    }

    /// Ends the observation of a pod.
    pub fn forget(&mut self, pod: &str) {
        if let Some(pod) = self.pods.remove(pod) {
            self.rows -= pod.rows;
        }
    }

    /// Remembers which ports of a pod are listened on.
    pub fn serve(&mut self, pod: &str, ports: BTreeSet<u16>) {
        if let Some(pod) = self.pods.get_mut(pod) {
            pod.served = ports;
        }
    }

    /// Counts an attempt at a port that nothing listens on.
    pub fn unserved(&mut self, pod: &str, at: Timestamp) {
        if let Some(pod) = self.pods.get_mut(pod) {
            pod.unserved.add(1, at);
        }
    }

    pub fn record(&mut self, pod: &str, sighting: &Sighting) {
        if let Some(row) = self.row(pod, sighting) {
            row.connections += u64::from(!sighting.refused);
            row.refused += u64::from(sighting.refused);
            row.first = row.first.min(sighting.at);
            if sighting.at >= row.last {
                (row.last, row.address) = (sighting.at, sighting.address);
            }
        }
    }

    /// Takes up every plaintext connection that is open in a pod now: (port, peer, one of its addresses, how many).
    pub fn found_open(&mut self, pod: &str, open: &[(Sighting, u64)]) {
        for row in self.pods.get_mut(pod).into_iter().flat_map(Pod::rows_mut) {
            row.open = 0;
        }
        for (sighting, count) in open {
            if let Some(row) = self.row(pod, sighting) {
                row.open = *count;
                row.connections = row.connections.max(*count);
                row.last = row.last.max(sighting.at);
            }
        }
    }

    /// Gives peers of a pod that were only addresses, and first seen since `since`, the names they have come to have.
    pub fn name(&mut self, key: &str, since: Timestamp, named: impl Fn(u16, IpAddr) -> Peer) {
        let Some(pod) = self.pods.get_mut(key) else { return };
        for (number, port) in &mut pod.ports {
            let nameless = port.peers.iter().filter(|(peer, row)| peer.is_address() && row.first >= since);
            let renamed: Vec<(Peer, Peer)> = nameless
                .map(|(peer, row)| (peer.clone(), named(*number, row.address)))
                .filter(|(_, name)| !name.is_address())
                .collect();
            for (nameless, name) in renamed {
                let workloads = port.peers.keys().filter(|peer| !peer.is_address()).count();
                if !port.peers.contains_key(&name) && workloads >= self.limits.workloads_per_port {
                    continue;
                }
                let Some(row) = port.peers.remove(&nameless) else { continue };
                match port.peers.get_mut(&name) {
                    Some(known) => known.merge(&row),
                    None => drop(port.peers.insert(name, row)),
                }
            }
        }
        pod.settle();
        self.rows = self.pods.values().map(|pod| pod.rows).sum();
    }

    /// Drops what was last seen before `before`.
    pub fn expire(&mut self, before: Timestamp) {
        for pod in self.pods.values_mut() {
            pod.ports.values_mut().for_each(|port| port.peers.retain(|_, row| row.last >= before));
            pod.settle();
        }
        self.rows = self.pods.values().map(|pod| pod.rows).sum();
    }

    /// The row of a peer, made if there is room. None if not: then the sighting was counted as missed.
    fn row(&mut self, pod: &str, sighting: &Sighting) -> Option<&mut Row> {
        let kept = |store: &Self| {
            let port = store.pods.get(pod)?.ports.get(&sighting.port)?;
            Some(port.peers.contains_key(&sighting.peer))
        };
        let is_new = kept(self) != Some(true);
        if is_new && !self.make_room(pod, sighting) {
            return None;
        }
        let pod = self.pods.get_mut(pod)?;
        if is_new {
            pod.rows += 1;
            self.rows += 1;
        }
        let port = pod.ports.entry(sighting.port).or_default();
        Some(port.peers.entry(sighting.peer.clone()).or_insert(Row {
            address: sighting.address,
            connections: 0,
            refused: 0,
            open: 0,
            first: sighting.at,
            last: sighting.at,
        }))
    }

    /// Frees a row where the limits ask for it. False if the newcomer has to stay out.
    fn make_room(&mut self, key: &str, newcomer: &Sighting) -> bool {
        let Some(pod) = self.pods.get(key) else { return false };
        let is_address = newcomer.peer.is_address();
        let (of_class, allowed) = match is_address {
            true => (pod.in_port(newcomer.port, is_address), self.limits.addresses_per_port),
            false => (pod.in_port(newcomer.port, is_address), self.limits.workloads_per_port),
        };
        let (from, victim) = if of_class >= allowed {
            (
                key.to_owned(),
                pod.weakest(|port, peer| port == newcomer.port && peer.is_address() == is_address),
            )
        } else if pod.rows >= self.limits.rows_per_pod {
            (key.to_owned(), pod.weakest(|_, peer| peer.is_address() || !is_address))
        } else if self.rows >= self.limits.rows {
            let Some((largest, pod)) = self.pods.iter().max_by_key(|(_, pod)| pod.rows) else { return false };
            (largest.clone(), pod.weakest(|_, peer| peer.is_address() || !is_address))
        } else {
            return true;
        };
        let Some((port, peer)) = victim else {
            self.missed += 1;
            if let Some(pod) = self.pods.get_mut(key) {
                pod.miss(newcomer.port, 1, newcomer.at);
            }
            return false;
        };
        if let Some(pod) = self.pods.get_mut(&from) {
            self.missed += pod.evict(port, &peer);
            self.rows -= 1;
        }
        true
    }
}

impl Pod {
    fn new(netns: u64, since: Timestamp) -> Self {
        Self {
            netns,
            since,
            served: BTreeSet::new(),
            ports: BTreeMap::new(),
            missed: Tally::default(),
            unserved: Tally::default(),
            rows: 0,
        }
    }

    pub fn has_peers(&self) -> bool {
        self.rows > 0
    }

    fn rows_mut(&mut self) -> impl Iterator<Item = &mut Row> {
        self.ports.values_mut().flat_map(|port| port.peers.values_mut())
    }

    fn in_port(&self, port: u16, is_address: bool) -> usize {
        let peers = self.ports.get(&port).into_iter().flat_map(|port| port.peers.keys());
        peers.filter(|peer| peer.is_address() == is_address).count()
    }

    /// Of the peers that may go, the one that is missed least.
    fn weakest(&self, may_go: impl Fn(u16, &Peer) -> bool) -> Option<(u16, Peer)> {
        let rows = self.ports.iter().flat_map(|(port, kept)| kept.peers.iter().map(move |row| (*port, row)));
        let candidates = rows.filter(|(port, (peer, _))| may_go(*port, peer));
        let weakest = candidates.min_by_key(|(_, (peer, row))| {
            (!peer.is_address(), row.open > 0, row.connections + row.refused, row.last)
        });
        weakest.map(|(port, (peer, _))| (port, peer.clone()))
    }

    /// Drops a row and counts its connections as missed. Returns how many there were.
    fn evict(&mut self, port: u16, peer: &Peer) -> u64 {
        let Some(row) = self.ports.get_mut(&port).and_then(|port| port.peers.remove(peer)) else { return 0 };
        let count = row.connections + row.refused;
        self.miss(port, count, row.last);
        self.settle();
        count
    }

    fn miss(&mut self, port: u16, count: u64, at: Timestamp) {
        let tally = self.ports.get_mut(&port).map_or(&mut self.missed, |port| &mut port.missed);
        tally.add(count, at);
    }

    /// Drops ports without peers, so that there are never more ports than rows.
    fn settle(&mut self) {
        let mut missed = self.missed;
        self.ports.retain(|_, port| {
            if let (true, Some(last)) = (port.peers.is_empty(), port.missed.last) {
                missed.add(port.missed.count, last);
            }
            !port.peers.is_empty()
        });
        self.missed = missed;
        self.rows = self.ports.values().map(|port| port.peers.len()).sum();
    }
}
