//! Everything known of an API server's objects, stripped to what a mesh uses; and snapshots of it, each made from the
//! last with only what has changed computed anew.
//!
//! Each object counts for itself: one that can't be understood is reported by name and its last good version stays,
//! and the others move on.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Instant;

use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;
use kube::api::DynamicObject;

use super::callers::{Caller, Callers, Calling};
use super::kept::{Kept, Uid};
use super::policies::{self, Refused};
use crate::mesh::hosts::Host;
use crate::mesh::interner::Interner;
use crate::mesh::objects::{Key, Placed, called};
use crate::mesh::parts::Parts;
use crate::mesh::pod::{Single, enrols, forget_annotated_place};
use crate::mesh::service::{Front, Slice, Table};
use crate::mesh::{Error, Place, Settings};
use crate::policy::{AuthorizationPolicy, PeerAuthentication};

mod snapshot;

/// A kind that is followed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Kind {
    Namespace,
    Node,
    Pod,
    Service,
    EndpointSlice,
    PeerAuthentication,
    AuthorizationPolicy,
    /// Says what the API server dials; only reports depend on it.
    Caller(Caller),
}

/// An object as it came.
#[derive(Debug)]
pub(super) enum Object {
    Namespace(Box<Namespace>),
    Node(Box<Node>),
    Pod(Box<Pod>),
    Service(Box<Service>),
    EndpointSlice(Box<EndpointSlice>),
    PeerAuthentication(Box<DynamicObject>),
    AuthorizationPolicy(Box<DynamicObject>),
    Caller(Caller, Box<Calling>),
}

pub(super) struct State {
    settings: Settings,
    place: Place,
    /// Whether pods' own annotations may say where they live.
    annotations: bool,
    interner: Interner,
    /// Whether each enrols its pods.
    namespaces: Kept<bool>,
    hosts: Kept<Host>,
    pods: Kept<Single>,
    services: Kept<(Option<Timestamp>, Front)>,
    /// With the `namespace/name` of the Service.
    slices: Kept<(Arc<str>, Slice)>,
    slices_of: HashMap<Arc<str>, HashSet<Key>>,
    tables: HashMap<Arc<str>, Table>,
    peer_authentications: Kept<PeerAuthentication>,
    authorization_policies: Kept<AuthorizationPolicy>,
    callers: Callers,
    /// Objects that can't be understood as they are, with the reason.
    faults: BTreeMap<String, String>,
    fresh: Fresh,
    last: Parts,
    /// Since then pods have changed under the policies.
    outlived: Option<Instant>,
}

/// What has changed since the last snapshot.
#[derive(Default)]
struct Fresh {
    pods: bool,
    hosts: bool,
    policies: bool,
    callers: bool,
    services: HashSet<Arc<str>>,
}

impl State {
    pub(super) fn new(settings: Settings, annotations: bool) -> Self {
        Self {
            settings,
            place: Place { source: "the Kubernetes API".into(), document: None, item: None },
            annotations,
            interner: Interner::default(),
            namespaces: Kept::default(),
            hosts: Kept::default(),
            pods: Kept::default(),
            services: Kept::default(),
            slices: Kept::default(),
            slices_of: HashMap::new(),
            tables: HashMap::new(),
            peer_authentications: Kept::default(),
            authorization_policies: Kept::default(),
            callers: Callers::default(),
            faults: BTreeMap::new(),
            // Of whom nothing is known yet, that is to be said.
            fresh: Fresh { callers: true, ..Fresh::default() },
            last: Parts::default(),
            outlived: None,
        }
    }

    /// Objects that can't be understood as they are, with the reason.
    pub(super) fn faults(&self) -> &BTreeMap<String, String> {
        &self.faults
    }

    pub(super) fn is_fresh(&self) -> bool {
        let Fresh { pods, hosts, policies, callers, services } = &self.fresh;
        *pods || *hosts || *policies || *callers || !services.is_empty()
    }

    /// Whether a kind was listed completely, once.
    pub(super) fn is_complete(&self, kind: Kind) -> bool {
        match kind {
            Kind::Namespace => self.namespaces.complete,
            Kind::Node => self.hosts.complete,
            Kind::Pod => self.pods.complete,
            Kind::Service => self.services.complete,
            Kind::EndpointSlice => self.slices.complete,
            Kind::PeerAuthentication => self.peer_authentications.complete,
            Kind::AuthorizationPolicy => self.authorization_policies.complete,
            Kind::Caller(caller) => self.callers.of(caller).complete,
        }
    }

    /// The kind is not known to the API server. What is known of it stays.
    pub(super) fn absent(&mut self, kind: Kind) {
        match kind {
            Kind::PeerAuthentication => self.peer_authentications.complete = true,
            Kind::AuthorizationPolicy => self.authorization_policies.complete = true,
            Kind::Caller(caller) => {
                self.callers.of_mut(caller).complete = true;
                self.fresh.callers = true;
            }
            _ => {}
        }
    }

    pub(super) fn begin(&mut self, kind: Kind) {
        match kind {
            Kind::Namespace => self.namespaces.begin(),
            Kind::Node => self.hosts.begin(),
            Kind::Pod => self.pods.begin(),
            Kind::Service => self.services.begin(),
            Kind::EndpointSlice => self.slices.begin(),
            Kind::PeerAuthentication => self.peer_authentications.begin(),
            Kind::AuthorizationPolicy => self.authorization_policies.begin(),
            Kind::Caller(caller) => self.callers.of_mut(caller).begin(),
        }
    }

    pub(super) fn end(&mut self, kind: Kind) {
        match kind {
            Kind::Namespace => {
                for (key, _) in self.namespaces.end() {
                    self.enrolment_changed(&key.name);
                }
            }
            Kind::Node => self.fresh.hosts |= !self.hosts.end().is_empty(),
            Kind::Pod => self.fresh.pods |= !self.pods.end().is_empty(),
            Kind::Service => {
                let gone = self.services.end();
                self.fresh.services.extend(gone.into_iter().map(|(_, (_, front))| front.name));
            }
            Kind::EndpointSlice => {
                for (key, (service, _)) in self.slices.end() {
                    self.slice_gone(&key, service);
                }
            }
            Kind::PeerAuthentication => self.fresh.policies |= !self.peer_authentications.end().is_empty(),
            Kind::AuthorizationPolicy => {
                self.fresh.policies |= !self.authorization_policies.end().is_empty();
            }
            Kind::Caller(caller) => {
                self.callers.of_mut(caller).end();
                self.fresh.callers = true;
            }
        }
    }

    pub(super) fn seen(&mut self, object: Object) {
        let metadata = object.metadata();
        let (key, uid) = (Key::of(metadata, &mut self.interner), Uid::of(metadata));
        let called = called(object.kind(), metadata);
        let outcome = match object {
            Object::Namespace(namespace) => {
                let enrolling = enrols(&namespace.metadata);
                self.namespaces.seen(&key, uid);
                if self.namespaces.put(key.clone(), uid, enrolling) != Some(enrolling) {
                    self.enrolment_changed(&key.name);
                    self.fresh.pods = true;
                }
                Ok(())
            }
            Object::Node(node) => {
                let host = Host::read(&node, &mut self.interner);
                self.hosts.seen(&key, uid);
                self.fresh.hosts |= self.hosts.get(&key) != Some(&host);
                self.hosts.put(key, uid, host);
                Ok(())
            }
            Object::Pod(pod) => self.pod(key, uid, *pod),
            Object::Service(service) => self.service(key, uid, *service),
            Object::EndpointSlice(slice) => self.slice(key, uid, *slice),
            Object::PeerAuthentication(written) => {
                let read = policies::peer_authentication(&written, &self.place);
                keep_policy(&mut self.peer_authentications, key, uid, read, &mut self.fresh.policies)
            }
            Object::AuthorizationPolicy(written) => {
                let read = policies::authorization_policy(&written, &self.place);
                keep_policy(&mut self.authorization_policies, key, uid, read, &mut self.fresh.policies)
            }
            Object::Caller(caller, calling) => {
                self.fresh.callers |= self.callers.put(caller, &calling, &mut self.interner);
                Ok(())
            }
        };
        match outcome {
            Ok(()) => drop(self.faults.remove(&called)),
            Err(error) => drop(self.faults.insert(called, error.to_string())),
        }
    }

    pub(super) fn gone(&mut self, object: &Object) {
        let metadata = object.metadata();
        let (key, uid) = (Key::of(metadata, &mut self.interner), Uid::of(metadata));
        let was_there = match object {
            Object::Namespace(_) => {
                let removed = self.namespaces.remove(&key, uid);
                if removed == Some(true) {
                    self.enrolment_changed(&key.name);
                }
                removed.is_some()
            }
            Object::Node(_) => {
                let removed = self.hosts.remove(&key, uid).is_some();
                self.fresh.hosts |= removed;
                removed
            }
            Object::Pod(_) => {
                let removed = self.pods.remove(&key, uid).is_some();
                self.fresh.pods |= removed;
                removed
            }
            Object::Service(_) => {
                let removed = self.services.remove(&key, uid);
                let name = removed.map(|(_, front)| front.name);
                self.fresh.services.extend(name.clone());
                name.is_some()
            }
            Object::EndpointSlice(_) => match self.slices.remove(&key, uid) {
                Some((service, _)) => {
                    self.slice_gone(&key, service);
                    true
                }
                None => false,
            },
            Object::PeerAuthentication(_) => {
                let removed = self.peer_authentications.remove(&key, uid).is_some();
                self.fresh.policies |= removed;
                removed
            }
            Object::AuthorizationPolicy(_) => {
                let removed = self.authorization_policies.remove(&key, uid).is_some();
                self.fresh.policies |= removed;
                removed
            }
            Object::Caller(caller, _) => {
                let removed = self.callers.of_mut(*caller).remove(&key, uid).is_some();
                self.fresh.callers |= removed;
                removed
            }
        };
        // An object that never was in good order has nothing but its fault.
        if was_there || !self.is_kept(object, &key) {
            self.faults.remove(&called(object.kind(), metadata));
        }
    }

    fn is_kept(&self, object: &Object, key: &Key) -> bool {
        match object {
            Object::Namespace(_) => self.namespaces.get(key).is_some(),
            Object::Node(_) => self.hosts.get(key).is_some(),
            Object::Pod(_) => self.pods.get(key).is_some(),
            Object::Service(_) => self.services.get(key).is_some(),
            Object::EndpointSlice(_) => self.slices.get(key).is_some(),
            Object::PeerAuthentication(_) => self.peer_authentications.get(key).is_some(),
            Object::AuthorizationPolicy(_) => self.authorization_policies.get(key).is_some(),
            Object::Caller(caller, _) => self.callers.of(*caller).get(key).is_some(),
        }
    }

    fn pod(&mut self, key: Key, uid: Uid, mut pod: Pod) -> Result<(), Error> {
        if !self.annotations {
            forget_annotated_place(&mut pod.metadata);
        }
        self.fresh.pods |= self.pods.seen(&key, uid).is_some();
        let placed = Placed { object: pod, place: self.place.clone() };
        let Some(mut single) = Single::read(&placed, &self.settings, &mut self.interner)? else {
            self.fresh.pods |= self.pods.remove(&key, uid).is_some();
            return Ok(());
        };
        single.live_in(self.enrolling(&key.namespace));
        if self.pods.get(&key) != Some(&single) {
            self.pods.put(key, uid, single);
            self.fresh.pods = true;
        }
        Ok(())
    }

    fn enrolling(&self, namespace: &Arc<str>) -> bool {
        self.namespaces.get(&in_no_namespace(namespace)).copied().unwrap_or(false)
    }

    fn enrolment_changed(&mut self, namespace: &Arc<str>) {
        let enrolling = self.enrolling(namespace);
        for (key, single) in self.pods.iter_mut() {
            if key.namespace == *namespace {
                self.fresh.pods |= single.live_in(enrolling);
            }
        }
    }

    fn service(&mut self, key: Key, uid: Uid, service: Service) -> Result<(), Error> {
        let replaced = self.services.seen(&key, uid);
        self.fresh.services.extend(replaced.map(|(_, front)| front.name));
        let created = created(&service.metadata);
        let placed = Placed { object: service, place: self.place.clone() };
        let Some(front) = Front::read(&placed)? else {
            let removed = self.services.remove(&key, uid);
            self.fresh.services.extend(removed.map(|(_, front)| front.name));
            return Ok(());
        };
        let now = (created, front);
        if self.services.get(&key) != Some(&now) {
            self.fresh.services.insert(now.1.name.clone());
            self.services.put(key, uid, now);
        }
        Ok(())
    }

    fn slice(&mut self, key: Key, uid: Uid, slice: EndpointSlice) -> Result<(), Error> {
        if let Some((service, _)) = self.slices.seen(&key, uid) {
            self.slice_gone(&key, service);
        }
        let placed = Placed { object: slice, place: self.place.clone() };
        let Some((service, slice)) = Slice::read(&placed, &mut self.interner)? else {
            if let Some((service, _)) = self.slices.remove(&key, uid) {
                self.slice_gone(&key, service);
            }
            return Ok(());
        };
        let now = (self.interner.text(&service), slice);
        if self.slices.get(&key) == Some(&now) {
            return Ok(());
        }
        let service = now.0.clone();
        if let Some((before, _)) = self.slices.put(key.clone(), uid, now)
            && before != service
        {
            self.slice_gone(&key, before);
        }
        self.slices_of.entry(service.clone()).or_default().insert(key);
        self.fresh.services.insert(service);
        Ok(())
    }

    fn slice_gone(&mut self, key: &Key, service: Arc<str>) {
        if let Entry::Occupied(mut slices) = self.slices_of.entry(service.clone()) {
            slices.get_mut().remove(key);
            if slices.get().is_empty() {
                slices.remove();
            }
        }
        self.fresh.services.insert(service);
    }
}

/// Puts a policy in the place of its last version, or keeps that if it is no better.
fn keep_policy<P>(
    kept: &mut Kept<P>,
    key: Key,
    uid: Uid,
    read: Result<P, Box<Refused<P>>>,
    fresh: &mut bool,
) -> Result<(), Error> {
    *fresh |= kept.seen(&key, uid).is_some();
    match read {
        Ok(policy) => {
            kept.put(key, uid, policy);
            *fresh = true;
            Ok(())
        }
        Err(refused) => {
            let Refused { error, instead } = *refused;
            if let (None, Some(instead)) = (kept.get(&key), instead) {
                kept.put(key, uid, instead);
                *fresh = true;
            }
            Err(error)
        }
    }
}

/// The key of a namespace, which is in none itself.
fn in_no_namespace(name: &Arc<str>) -> Key {
    Key { namespace: "".into(), name: name.clone() }
}

fn created(metadata: &ObjectMeta) -> Option<Timestamp> {
    metadata.creation_timestamp.as_ref().map(|time| time.0)
}

impl Object {
    fn metadata(&self) -> &ObjectMeta {
        match self {
            Self::Namespace(it) => &it.metadata,
            Self::Node(it) => &it.metadata,
            Self::Pod(it) => &it.metadata,
            Self::Service(it) => &it.metadata,
            Self::EndpointSlice(it) => &it.metadata,
            Self::PeerAuthentication(it) | Self::AuthorizationPolicy(it) => &it.metadata,
            Self::Caller(_, it) => &it.metadata,
        }
    }

    fn kind(&self) -> &'static str {
        match self {
            Self::Namespace(_) => "Namespace",
            Self::Node(_) => "Node",
            Self::Pod(_) => "Pod",
            Self::Service(_) => "Service",
            Self::EndpointSlice(_) => "EndpointSlice",
            Self::PeerAuthentication(_) => "PeerAuthentication",
            Self::AuthorizationPolicy(_) => "AuthorizationPolicy",
            Self::Caller(caller, _) => caller.kind(),
        }
    }
}
