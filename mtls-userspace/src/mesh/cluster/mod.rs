//! An API server's objects as a live mesh: a cluster in, snapshots out.
//!
//! Follows every kind by itself; what one of them lacks, the others don't wait for once all were there. Snapshots are
//! made when changes have gathered for a moment, and the busier the cluster is the longer that moment is, so that they
//! never take more than a small share of a core.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{Namespace, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Api, ApiResource, DynamicObject};
use kube::core::GroupVersionKind;
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::Settings;
use super::source::Shared;
use crate::kubernetes::{Change, Cluster, Ended, Trouble, follow as follow_kind, while_absent};
use callers::{Caller, Calling};
use lean::{LeanNode, LeanPod};
use state::{Kind, Object, State};

mod callers;
mod kept;
mod lean;
mod policies;
mod state;

/// After the first of several changes: those of one deployment come together.
const GATHER: Duration = Duration::from_millis(20);
/// Snapshots take at most this part of the time (one in twenty).
const IDLE_PER_BUILD: u32 = 19;
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// How often somebody who waits for the start is told why.
const SAY_AGAIN: Duration = Duration::from_secs(10);
/// Objects in one answer: at ten kilobytes each, what is in memory at one time stays small.
const PAGE: u32 = 250;
/// Of definitions of custom resources, which may have a megabyte each.
const FEW: u32 = 8;
/// Objects under way from the followers to the state.
const QUEUE: usize = 256;
/// Of objects that can't be understood, so many are named in one line.
const NAMED: usize = 3;

/// How much of a cluster to follow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scope {
    /// Everything that decides about connections. `annotations`: believe what pods' annotations say of where they live,
    /// which is for laboratories: whoever may make a pod could name another pod's network namespace.
    Traffic { annotations: bool },
    /// Who runs where: pods and their namespaces.
    Workloads,
}

/// Ends the following when dropped.
pub(super) struct Following {
    _tasks: JoinSet<()>,
}

struct Message {
    kind: Kind,
    change: Change<Object>,
}

pub(super) async fn follow(cluster: Cluster, settings: Settings, scope: Scope) -> (Arc<Shared>, Following) {
    let (send, receive) = mpsc::channel(QUEUE);
    let mut tasks = JoinSet::new();
    let kinds = start(&mut tasks, &cluster, scope, &send);
    let mut follower = Follower {
        state: State::new(settings, matches!(scope, Scope::Traffic { annotations: true })),
        kinds,
        server: cluster.server,
        messages: receive,
        troubles: BTreeMap::new(),
        since: None,
        known_faults: BTreeMap::new(),
        generation: 1,
        pause: GATHER,
    };
    follower.begin().await;
    let started = Instant::now();
    let mesh = follower.state.build(1);
    follower.pause = pause(started.elapsed());
    let shared = Shared::new(mesh);
    follower.report(&shared);
    let feeding = shared.clone();
    tasks.spawn(async move { follower.run(&feeding).await });
    (shared, Following { _tasks: tasks })
}

/// Starts a follower for each kind, and returns those without which nothing can be decided.
fn start(
    tasks: &mut JoinSet<()>,
    cluster: &Cluster,
    scope: Scope,
    send: &mpsc::Sender<Message>,
) -> Vec<Kind> {
    let client = || cluster.client.clone();
    let to = |kind| (kind, send.clone());
    let namespaces: Api<Namespace> = Api::all(client());
    let namespace: fn(Namespace) -> Object = |it| Object::Namespace(Box::new(it));
    tasks.spawn(one([namespaces], "namespaces", to(Kind::Namespace), namespace));
    let pods: Api<LeanPod> = Api::all(client());
    let pod: fn(LeanPod) -> Object = |it| Object::Pod(Box::new(it.0));
    tasks.spawn(one([pods], "pods", to(Kind::Pod), pod));
    if scope == Scope::Workloads {
        return vec![Kind::Namespace, Kind::Pod];
    }
    let nodes: Api<LeanNode> = Api::all(client());
    let node: fn(LeanNode) -> Object = |it| Object::Node(Box::new(it.0));
    tasks.spawn(one([nodes], "nodes", to(Kind::Node), node));
    let services: Api<Service> = Api::all(client());
    let service: fn(Service) -> Object = |it| Object::Service(Box::new(it));
    tasks.spawn(one([services], "services", to(Kind::Service), service));
    let slices: Api<EndpointSlice> = Api::all(client());
    let slice: fn(EndpointSlice) -> Object = |it| Object::EndpointSlice(Box::new(it));
    tasks.spawn(one([slices], "endpointslices.discovery.k8s.io", to(Kind::EndpointSlice), slice));
    // Definitions older than Istio 1.22 serve the same objects as v1beta1 only.
    let policies = |kind| {
        ["v1", "v1beta1"].map(|version| {
            let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("security.istio.io", version, kind));
            Api::all_with(client(), &resource)
        })
    };
    let mode: fn(DynamicObject) -> Object = |it| Object::PeerAuthentication(Box::new(it));
    let what = "peerauthentications.security.istio.io";
    tasks.spawn(one(policies("PeerAuthentication"), what, to(Kind::PeerAuthentication), mode));
    let rules: fn(DynamicObject) -> Object = |it| Object::AuthorizationPolicy(Box::new(it));
    let what = "authorizationpolicies.security.istio.io";
    tasks.spawn(one(policies("AuthorizationPolicy"), what, to(Kind::AuthorizationPolicy), rules));
    for caller in Caller::ALL {
        let callers: Api<Calling> = Api::all_with(client(), &caller.resource());
        let calling = move |it| Object::Caller(caller, Box::new(it));
        tasks.spawn(one([callers], caller.plural(), to(Kind::Caller(caller)), calling));
    }
    vec![
        Kind::Namespace,
        Kind::Node,
        Kind::Pod,
        Kind::Service,
        Kind::EndpointSlice,
        Kind::PeerAuthentication,
        Kind::AuthorizationPolicy,
    ]
}

/// Follows a kind under the first of its versions that the API server has, and asks again while it has none.
async fn one<K, const VERSIONS: usize>(
    versions: [Api<K>; VERSIONS],
    what: &'static str,
    (kind, send): (Kind, mpsc::Sender<Message>),
    object: impl Fn(K) -> Object + Send + Sync + 'static,
) where
    K: kube::Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let message = |change| {
        let change = match change {
            Change::Restart => Change::Restart,
            Change::Seen(it) => Change::Seen(object(it)),
            Change::Gone(it) => Change::Gone(object(it)),
            Change::Complete => Change::Complete,
            Change::Well => Change::Well,
            Change::Trouble(trouble) => Change::Trouble(trouble),
        };
        Message { kind, change }
    };
    let page = if kind == Kind::Caller(Caller::CustomResources) { FEW } else { PAGE };
    loop {
        for api in &versions {
            match follow_kind(api.clone(), what, page, &send, message).await {
                Ended::Absent => {}
                Ended::Unheard => return,
            }
        }
        let absent = Change::Trouble(Trouble::Absent { what });
        if send.send(Message { kind, change: absent }).await.is_err() {
            return;
        }
        while_absent().await;
    }
}

/// Feeds what comes into the state, and the state's snapshots to whoever uses them.
struct Follower {
    state: State,
    kinds: Vec<Kind>,
    server: String,
    messages: mpsc::Receiver<Message>,
    /// Kinds that can't be followed now.
    troubles: BTreeMap<Kind, Trouble>,
    /// When the first of the troubles that are there now began.
    since: Option<Instant>,
    /// Faults that were logged already.
    known_faults: BTreeMap<String, String>,
    generation: u64,
    pause: Duration,
}

impl Follower {
    /// Until everything was listed once.
    async fn begin(&mut self) {
        let begun = Instant::now();
        let mut again = tokio::time::interval(SAY_AGAIN);
        again.reset();
        while let Some(missing) = self.missing() {
            tokio::select! {
                message = self.messages.recv() => match message {
                    Some(message) => self.take(message),
                    None => std::future::pending().await,
                },
                _ = again.tick() => {
                    let reasons: BTreeSet<String> = self.troubles.values().map(ToString::to_string).collect();
                    tracing::warn!(
                        server = self.server,
                        missing,
                        reasons = Vec::from_iter(reasons).join("; "),
                        "still waiting for the API server's objects; nothing is enrolled before they are there"
                    );
                }
            }
        }
        tracing::info!(server = self.server, took = ?begun.elapsed(), "the API server's objects are there");
    }

    fn missing(&self) -> Option<String> {
        let missing = self.kinds.iter().filter(|kind| !self.state.is_complete(**kind));
        let missing: Vec<String> = missing.map(|kind| format!("{kind:?}")).collect();
        (!missing.is_empty()).then(|| missing.join(", "))
    }

    async fn run(mut self, shared: &Shared) {
        let mut built = Instant::now();
        let mut due: Option<Instant> = None;
        loop {
            let looked_over = self.state.policies_due();
            let next = due.into_iter().chain(looked_over).min();
            let message = tokio::select! {
                message = self.messages.recv() => message,
                () = sleep_until(next) => {
                    let started = Instant::now();
                    self.generation += 1;
                    shared.publish(self.state.build(self.generation));
                    (built, due) = (Instant::now(), None);
                    self.pause = pause(built - started);
                    continue;
                }
            };
            let Some(message) = message else { return };
            self.take(message);
            // More of them are often there already.
            while let Ok(message) = self.messages.try_recv() {
                self.take(message);
            }
            self.report(shared);
            if self.state.is_fresh() && due.is_none() {
                due = Some((Instant::now() + GATHER).max(built + self.pause));
            }
        }
    }

    fn take(&mut self, Message { kind, change }: Message) {
        match change {
            Change::Restart => self.state.begin(kind),
            Change::Seen(object) => {
                self.state.seen(object);
                self.well(kind);
            }
            Change::Gone(object) => {
                self.state.gone(&object);
                self.well(kind);
            }
            Change::Complete => {
                self.state.end(kind);
                self.well(kind);
            }
            Change::Well => self.well(kind),
            Change::Trouble(trouble) => {
                if matches!(trouble, Trouble::Absent { .. }) {
                    self.state.absent(kind);
                }
                if self.troubles.get(&kind) != Some(&trouble) {
                    tracing::warn!(server = self.server, "{trouble}");
                    self.troubles.insert(kind, trouble);
                    self.since.get_or_insert_with(Instant::now);
                }
            }
        }
    }

    fn well(&mut self, kind: Kind) {
        if self.troubles.remove(&kind).is_some() {
            tracing::info!(server = self.server, ?kind, "objects are followed again");
        }
        if self.troubles.is_empty() {
            self.since = None;
        }
    }

    /// Says what is wrong: in the log once, and to those who ask for as long as it is.
    fn report(&mut self, shared: &Shared) {
        let faults = self.state.faults();
        let new: Vec<_> =
            faults.iter().filter(|(object, it)| self.known_faults.get(*object) != Some(it)).collect();
        for (_, fault) in &new {
            tracing::error!(error = %fault, "an object is refused; its last good version, or something stricter, stays");
            shared.count_error();
        }
        if !new.is_empty() || self.known_faults.len() != faults.len() {
            self.known_faults = faults.clone();
        }
        let away = self.troubles.values().filter(|it| !matches!(it, Trouble::Absent { .. }));
        let mut sentences: Vec<String> = away.map(ToString::to_string).collect();
        sentences.dedup();
        if let (Some(since), false) = (self.since, sentences.is_empty()) {
            sentences.push(format!("what was known {} s ago stays in force", since.elapsed().as_secs()));
        }
        sentences.extend(faults.values().take(NAMED).cloned());
        if let Some(more) = faults.len().checked_sub(NAMED).filter(|more| *more > 0) {
            sentences.push(format!("and {more} more objects that can't be understood"));
        }
        shared.say((!sentences.is_empty()).then(|| sentences.join("; ")));
    }
}

fn pause(build: Duration) -> Duration {
    (build * IDLE_PER_BUILD).clamp(GATHER, LONGEST_PAUSE)
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}
