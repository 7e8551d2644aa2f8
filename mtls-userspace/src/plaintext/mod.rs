//! Plaintext to this node's pods: who still speaks it in, readiness for STRICT out.
//!
//! Three sources, none of which an mTLS connection ever touches: the kernel half's events for what it accepted or
//! refused alone, the agent's own listener for what policy had to judge, and a list of the sockets in a pod for
//! connections older than the observation. The first two only drop a few bytes into an [`Inbox`]; a task of the control
//! runtime files them. The kubelet's probes appear in none of the three: STRICT lets them through. Beside what was seen
//! stands what is to be expected: the ports that the API server will call for its webhooks and aggregated APIs.
//!
//! Everything is in memory and bounded. It is not kept over a restart on purpose: while no agent runs nobody observes,
//! so an observation that went on over the gap would promise more than was seen.

mod inbox;
mod report;
mod sighting;
mod store;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};

use crate::capture::{self, Capture};
use crate::mesh::{self, Mesh, ServerCall, Workload};
use crate::policy::{Mode, PortModes};
use crate::worker::{LocalPods, Pod};

pub use inbox::{Inbox, Seen};
pub use report::{
    Asked, CallRow, DryRunRow, Facts, Observed, PeerRow, PortFacts, PortRow, Report, TallyRow, WorkloadRow,
};
pub use sighting::{Peer, Row, Sighting, Source, Tally};
pub use store::{Limits, Store};

/// The longest window that can be asked for; what is older is forgotten.
pub const LONGEST_WINDOW: Duration = Duration::from_secs(30 * 24 * 3600);

/// How long a sighting may wait to be filed, and a pod to be observed.
const ROUND: Duration = Duration::from_secs(1);
/// How often the sockets of pods with plaintext peers are listed, so that a long connection's last sight is recent.
const LOOK: Duration = Duration::from_secs(60);
/// How late the mesh may hear of a client: a peer first seen longer before it had no name, whoever has its address now.
const NAMED_LATE: SignedDuration = SignedDuration::from_secs(60);
/// Reports that follow each other faster share a look.
const FRESH: Duration = Duration::from_secs(5);

/// Files what the inbox gets, and answers what is known.
pub struct Watch {
    node: Arc<str>,
    mesh: mesh::Source,
    local: Arc<LocalPods>,
    capture: Arc<Capture>,
    inbox: Arc<Inbox>,
    state: Mutex<State>,
}

struct State {
    store: Store,
    lost: Tally,
    /// The kernel half's count of lost events at the last round.
    kernel_lost: u64,
    looked: Instant,
    /// Of the mesh whose names the peers have.
    generation: u64,
    blind: Option<String>,
}

/// How much is remembered, for metrics.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    pub peers: u64,
    /// Connections of peers for which there was no room.
    pub not_kept: u64,
    /// Sightings that came faster than they were taken in.
    pub lost: u64,
}

impl Watch {
    /// # Errors
    ///
    /// When the kernel half's counters cannot be read.
    pub fn new(
        node: Arc<str>,
        mesh: mesh::Source,
        local: Arc<LocalPods>,
        capture: Arc<Capture>,
        inbox: Arc<Inbox>,
    ) -> Result<Self, capture::Error> {
        let state = State {
            store: Store::default(),
            lost: Tally::default(),
            kernel_lost: capture.lost_events()?,
            looked: Instant::now(),
            generation: 0,
            blind: None,
        };
        Ok(Self { node, mesh, local, capture, inbox, state: Mutex::new(state) })
    }

    /// Files until `stopped`.
    pub async fn run(self: Arc<Self>, stopped: impl Future<Output = ()>) {
        let mut stopped = std::pin::pin!(stopped);
        loop {
            tokio::select! {
                () = self.inbox.filling() => {}
                () = tokio::time::sleep(ROUND) => {}
                () = &mut stopped => return,
            }
            let watch = self.clone();
            let round = move || {
                let mut state = watch.state();
                watch.file(&mut state);
                if state.looked.elapsed() >= LOOK {
                    watch.look(&mut state, |pod| pod.has_peers());
                }
            };
            if let Err(error) = tokio::task::spawn_blocking(round).await {
                tracing::error!(%error, "plaintext peers could not be filed");
            }
        }
    }

    /// Says why events come no more: from now on nothing is ready.
    pub fn blind(&self, why: String) {
        self.state().blind = Some(why);
    }

    pub fn counts(&self) -> Counts {
        let state = self.state();
        let (peers, not_kept) = state.store.counts();
        Counts { peers: peers as u64, not_kept, lost: state.lost.count }
    }

    /// Everything known now. Lists sockets, so that it blocks for a while.
    pub fn facts(&self) -> Facts {
        let mut state = self.state();
        self.file(&mut state);
        if state.looked.elapsed() >= FRESH {
            self.look(&mut state, |_| true);
        }
        let mesh = self.mesh.current();
        let calls = mesh.server_calls();
        let workloads = mesh.enrolled_on(&self.node);
        Facts {
            node: self.node.clone(),
            at: Timestamp::now(),
            lost: state.lost,
            blind: state.blind.clone(),
            unread_callers: mesh.unread_callers().to_vec(),
            workloads: workloads.map(|it| observed(&mesh, it, &state.store, &calls)).collect(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Follows the pods, and empties the inbox into the store.
    fn file(&self, state: &mut State) {
        let now = Timestamp::now();
        let (seen, mut lost) = self.inbox.take();
        match self.capture.lost_events() {
            Ok(count) => {
                lost += count.saturating_sub(state.kernel_lost);
                state.kernel_lost = count;
            }
            Err(error) => tracing::warn!(%error, "cannot tell whether the kernel lost events"),
        }
        if lost > 0 {
            state.lost.add(lost, now);
        }
        let pods: HashMap<String, Arc<Pod>> =
            self.local.all().into_iter().map(|pod| (pod.workload.load().key(), pod)).collect();
        let cookies = pods.iter().map(|(key, pod)| (key.clone(), pod.socket.netns_cookie()));
        for key in state.store.observe(cookies, now) {
            if let Some(pod) = pods.get(&key) {
                self.begin(&mut state.store, &key, pod);
            }
        }
        let mesh = self.mesh.current();
        if std::mem::replace(&mut state.generation, mesh.generation) != mesh.generation {
            let since = now.checked_sub(NAMED_LATE).unwrap_or(now);
            for (key, pod) in &pods {
                let workload = pod.workload.load();
                state.store.name(key, since, |port, address| peer(&mesh, &workload, port, address));
            }
        }
        // Ports are listed once a round and pod, and only for the sake of one that is not known.
        let mut listed = HashSet::new();
        for seen in seen {
            let Some(pod) = self.local.owner(seen.destination.ip()) else { continue };
            let workload = pod.workload.load();
            let (key, port) = (workload.key(), seen.destination.port());
            if !is_served(&state.store, &key, &workload, port) && listed.insert(key.clone()) {
                self.list_ports(&mut state.store, &key, &pod);
            }
            let at = Timestamp::try_from(seen.at).unwrap_or(now);
            if is_served(&state.store, &key, &workload, port) {
                let peer = peer(&mesh, &workload, port, seen.source);
                let refused = seen.refused;
                state.store.record(&key, &Sighting { port, peer, address: seen.source, at, refused });
            } else {
                state.store.unserved(&key, at);
            }
        }
    }

    /// A pod's first look. Without it the pod stays unobserved, and the next round tries again.
    fn begin(&self, store: &mut Store, key: &str, pod: &Pod) {
        let listed = self.list_ports(store, key, pod);
        let is_open = is_open(&self.mesh.current().policies.modes(&pod.workload.load()));
        if !listed || is_open && !self.list_open(store, key, pod) {
            store.forget(key);
        }
    }

    /// Lists the sockets of the pods that are not STRICT throughout and of which `wanted` is true.
    fn look(&self, state: &mut State, wanted: impl Fn(&store::Pod) -> bool) {
        state.looked = Instant::now();
        let longest = SignedDuration::try_from(LONGEST_WINDOW).unwrap_or(SignedDuration::MAX);
        state.store.expire(Timestamp::now().checked_sub(longest).unwrap_or(Timestamp::MIN));
        for pod in self.local.all() {
            let workload = pod.workload.load();
            let key = workload.key();
            let is_wanted = state.store.pod(&key).is_some_and(&wanted);
            if is_wanted && is_open(&self.mesh.current().policies.modes(&workload)) {
                self.list_ports(&mut state.store, &key, &pod);
                self.list_open(&mut state.store, &key, &pod);
            }
        }
    }

    fn list_ports(&self, store: &mut Store, key: &str, pod: &Pod) -> bool {
        let ports = pod.socket.served_ports();
        let ports =
            ports.inspect_err(|error| tracing::warn!(pod = key, %error, "cannot list the ports it serves"));
        ports.map(|ports| store.serve(key, ports.into_iter().collect())).is_ok()
    }

    fn list_open(&self, store: &mut Store, key: &str, pod: &Pod) -> bool {
        let open = match pod.socket.open_plaintext() {
            Ok(open) => open,
            Err(error) => {
                tracing::warn!(pod = key, %error, "cannot list its plaintext connections");
                return false;
            }
        };
        let (mesh, now, workload) = (self.mesh.current(), Timestamp::now(), pod.workload.load());
        let mut peers: HashMap<(u16, Peer), (IpAddr, u64)> = HashMap::new();
        for (port, address) in open {
            let peer = peer(&mesh, &workload, port, address);
            peers.entry((port, peer)).or_insert((address, 0)).1 += 1;
        }
        let rows = peers.into_iter().map(|((port, peer), (address, count))| {
            (Sighting { port, peer, address, at: now, refused: false }, count)
        });
        store.found_open(key, &rows.collect::<Vec<_>>());
        true
    }
}

fn is_open(modes: &PortModes) -> bool {
    modes.default != Mode::Strict || modes.ports.values().any(|mode| *mode != Mode::Strict)
}

fn is_served(store: &Store, key: &str, workload: &Workload, port: u16) -> bool {
    workload.ports.iter().any(|(_, declared)| *declared == port)
        || store.pod(key).is_some_and(|pod| pod.served.contains(&port))
}

fn peer(mesh: &Mesh, destination: &Workload, port: u16, address: IpAddr) -> Peer {
    match mesh.workload(address) {
        Some(client) => Peer {
            source: Source::Workload(client.key().into()),
            by_disable: client.enrolled && mesh.policies.mode(destination, port) == Mode::Disable,
        },
        None => Peer { source: Source::Address(address), by_disable: false },
    }
}

/// By the address and port of the pod that is reached.
type Calls<'a> = HashMap<SocketAddr, Vec<&'a ServerCall>>;

fn observed(mesh: &Mesh, workload: &Workload, store: &Store, calls: &Calls<'_>) -> Observed {
    let modes = mesh.policies.modes(workload);
    let dry_run = mesh.policies.dry_run_modes(workload);
    let kept = store.pod(&workload.key());
    let mut ports: BTreeSet<u16> = workload.ports.iter().map(|(_, port)| *port).collect();
    ports.extend(modes.ports.keys().chain(dry_run.iter().flat_map(|modes| modes.ports.keys())));
    ports.extend(kept.into_iter().flat_map(|pod| pod.served.iter().chain(pod.ports.keys())));
    let own = calls.iter().filter(|(address, _)| workload.addresses.contains(&address.ip()));
    let mut called = BTreeMap::<u16, BTreeSet<ServerCall>>::new();
    for (address, calls) in own {
        called.entry(address.port()).or_default().extend(calls.iter().copied().cloned());
    }
    ports.extend(called.keys());
    ports.retain(|port| modes.of(*port) != Mode::Strict);
    let tightened = |dry: &PortModes| {
        dry.default == Mode::Strict && modes.default != Mode::Strict
            || ports.iter().any(|port| dry.of(*port) == Mode::Strict)
    };
    Observed {
        namespace: workload.namespace.clone(),
        name: workload.name.clone(),
        identity: workload.identity.to_string(),
        modes: modes.to_string(),
        is_open: is_open(&modes),
        dry_run_tightens: dry_run.as_ref().is_some_and(tightened),
        since: kept.map(|pod| pod.since),
        missed: kept.map(|pod| pod.missed).unwrap_or_default(),
        unserved: kept.map(|pod| pod.unserved).unwrap_or_default(),
        ports: ports
            .into_iter()
            .map(|port| {
                let called_by = called.remove(&port).unwrap_or_default().into_iter().collect();
                let has_own_mode = modes.ports.contains_key(&port);
                let facts = port_facts(mesh, workload, port, kept);
                (port, PortFacts { called_by, has_own_mode, ..facts })
            })
            .collect(),
    }
}

fn port_facts(mesh: &Mesh, workload: &Workload, port: u16, kept: Option<&store::Pod>) -> PortFacts {
    let (mode, set_by) = mesh.policies.mode_set_by(workload, port);
    let dry_run = mesh.policies.dry_run_mode_set_by(workload, port);
    let found = kept.and_then(|pod| pod.ports.get(&port));
    let is_enrolled = |peer: &Peer, row: &Row| match (&peer.source, mesh.workload(row.address)) {
        (Source::Workload(key), Some(now)) => now.enrolled && now.key() == **key,
        _ => false,
    };
    let peers = || found.into_iter().flat_map(|port| &port.peers);
    let nodes = peers().filter(|(peer, _)| peer.is_address());
    let nodes = nodes.filter_map(|(_, row)| Some((row.address, mesh.node_at(row.address)?.clone())));
    PortFacts {
        mode,
        set_by: set_by.map(ToString::to_string),
        dry_run: dry_run.map(|(mode, policy)| (mode, policy.map(ToString::to_string))),
        is_served: kept.is_some_and(|pod| pod.served.contains(&port)),
        nodes: nodes.collect(),
        peers: peers().map(|(peer, row)| (peer.clone(), row.clone(), is_enrolled(peer, row))).collect(),
        missed: found.map(|port| port.missed).unwrap_or_default(),
        called_by: Vec::new(),
        has_own_mode: false,
    }
}
