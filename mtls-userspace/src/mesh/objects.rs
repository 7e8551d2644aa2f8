//! The Kubernetes objects a mesh is built from, each stripped to what a mesh uses as soon as it is read: what a
//! directory of a hundred thousand pods is kept as between two changes.

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::error::{Error, Place};
use super::hosts::Host;
use super::interner::Interner;
use super::pod::WrittenPod;
use super::service::{Slice, WrittenService};
use crate::policy::{AuthorizationPolicy, PeerAuthentication};

/// One object as it was written; namespaced ones have their namespace set.
#[derive(Clone, Debug)]
pub(super) struct Placed<T> {
    pub object: T,
    pub place: Place,
}

/// Namespace (empty for what has none) and name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Key {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

/// Where in its file an object stands: as in [`Place`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Spot {
    pub document: Option<u32>,
    pub item: Option<u32>,
}

/// One object, stripped.
#[derive(Debug)]
pub(super) struct Stripped<T> {
    pub key: Key,
    pub spot: Spot,
    pub object: T,
}

/// The objects of one file, in its order.
#[derive(Debug)]
pub struct Objects {
    /// What errors call the file.
    pub(super) source: Arc<str>,
    /// Whether each enrols its pods.
    pub(super) namespaces: Vec<Stripped<bool>>,
    pub(super) nodes: Vec<Stripped<Host>>,
    /// None: a pod that has ended, or has neither address nor node yet.
    pub(super) pods: Vec<Stripped<Option<WrittenPod>>>,
    /// None: a Service without an address of its own.
    pub(super) services: Vec<Stripped<Option<WrittenService>>>,
    /// None: a slice of names, or of no Service.
    pub(super) endpoint_slices: Vec<Stripped<Option<WrittenSlice>>>,
    pub(super) peer_authentications: Vec<Stripped<PeerAuthentication>>,
    pub(super) authorization_policies: Vec<Stripped<AuthorizationPolicy>>,
}

/// With the `namespace/name` of the Service.
pub(super) type WrittenSlice = (Arc<str>, Slice);

/// The parts of a mesh that objects have a say in.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Concerned {
    /// Pods and the namespaces that enrol them.
    pub pods: bool,
    pub nodes: bool,
    /// Services and their slices.
    pub services: bool,
    pub policies: bool,
}

impl Concerned {
    pub(super) const ALL: Self = Self { pods: true, nodes: true, services: true, policies: true };

    pub(super) fn add(&mut self, other: Self) {
        self.pods |= other.pods;
        self.nodes |= other.nodes;
        self.services |= other.services;
        self.policies |= other.policies;
    }
}

impl Key {
    pub(super) fn of(metadata: &ObjectMeta, interner: &mut Interner) -> Self {
        Self {
            namespace: interner.text(metadata.namespace.as_deref().unwrap_or_default()),
            name: metadata.name.as_deref().unwrap_or_default().into(),
        }
    }

    /// `Kind namespace/name`, as errors and warnings call an object.
    pub(super) fn called(&self, kind: &str) -> String {
        match &*self.namespace {
            "" => format!("{kind} {}", self.name),
            _ => format!("{kind} {self}"),
        }
    }
}

/// Of what has a namespace.
impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl Objects {
    pub(super) fn none(source: Arc<str>) -> Self {
        Self {
            source,
            namespaces: Vec::new(),
            nodes: Vec::new(),
            pods: Vec::new(),
            services: Vec::new(),
            endpoint_slices: Vec::new(),
            peer_authentications: Vec::new(),
            authorization_policies: Vec::new(),
        }
    }

    /// Gives back what lists had in reserve.
    pub(super) fn shrink(&mut self) {
        self.namespaces.shrink_to_fit();
        self.nodes.shrink_to_fit();
        self.pods.shrink_to_fit();
        self.services.shrink_to_fit();
        self.endpoint_slices.shrink_to_fit();
        self.peer_authentications.shrink_to_fit();
        self.authorization_policies.shrink_to_fit();
    }

    pub(super) fn place(&self, spot: Spot) -> Place {
        Place { source: self.source.clone(), document: spot.document, item: spot.item }
    }

    pub(super) fn concerned(&self) -> Concerned {
        Concerned {
            pods: !(self.pods.is_empty() && self.namespaces.is_empty()),
            nodes: !self.nodes.is_empty(),
            services: !(self.services.is_empty() && self.endpoint_slices.is_empty()),
            policies: !(self.peer_authentications.is_empty() && self.authorization_policies.is_empty()),
        }
    }

    /// Kind and name of every object, kind by kind.
    pub fn heads(&self) -> impl Iterator<Item = (&'static str, &Key)> {
        self.spots(Concerned::ALL).map(|(kind, key, _)| (kind, key))
    }

    /// As [`Self::heads`], with the place of each.
    pub(super) fn placed(&self) -> impl Iterator<Item = (&'static str, &Key, Place)> {
        self.spots(Concerned::ALL).map(|(kind, key, spot)| (kind, key, self.place(spot)))
    }

    fn spots(&self, concerned: Concerned) -> impl Iterator<Item = (&'static str, &Key, Spot)> {
        fn of<'o, T>(
            kind: &'static str,
            all: &'o [Stripped<T>],
            concerned: bool,
        ) -> impl Iterator<Item = (&'static str, &'o Key, Spot)> {
            all.iter().filter(move |_| concerned).map(move |it| (kind, &it.key, it.spot))
        }
        of("Namespace", &self.namespaces, concerned.pods)
            .chain(of("Node", &self.nodes, concerned.nodes))
            .chain(of("Pod", &self.pods, concerned.pods))
            .chain(of("Service", &self.services, concerned.services))
            .chain(of("EndpointSlice", &self.endpoint_slices, concerned.services))
            .chain(of("PeerAuthentication", &self.peer_authentications, concerned.policies))
            .chain(of("AuthorizationPolicy", &self.authorization_policies, concerned.policies))
    }

    /// Takes out the object that stands there.
    pub(super) fn remove(&mut self, spot: Spot) {
        self.namespaces.retain(|it| it.spot != spot);
        self.nodes.retain(|it| it.spot != spot);
        self.pods.retain(|it| it.spot != spot);
        self.services.retain(|it| it.spot != spot);
        self.endpoint_slices.retain(|it| it.spot != spot);
        self.peer_authentications.retain(|it| it.spot != spot);
        self.authorization_policies.retain(|it| it.spot != spot);
    }
}

/// An error for each object that is defined again.
pub(super) fn duplicates<'o>(
    files: impl Iterator<Item = &'o Objects> + Clone,
    concerned: Concerned,
) -> Vec<Error> {
    let all = || files.clone().flat_map(|file| file.spots(concerned).map(move |it| (file, it)));
    let mut seen: HashSet<(&str, &Key)> = HashSet::new();
    let mut duplicates = Vec::new();
    for (file, (kind, key, spot)) in all() {
        if seen.insert((kind, key)) {
            continue;
        }
        // Rare; only then is it worth finding out where the first one is.
        if let Some((other, (_, _, there))) = all().find(|(_, it)| (it.0, it.1) == (kind, key)) {
            let (first, second) = (other.place(there), file.place(spot));
            duplicates.push(Error::Duplicate { object: key.called(kind), first, second });
        }
    }
    duplicates
}

/// `Kind namespace/name`, as errors and warnings call an object.
pub(super) fn called(kind: &str, metadata: &ObjectMeta) -> String {
    let name = metadata.name.as_deref().unwrap_or_default();
    match &metadata.namespace {
        Some(namespace) => format!("{kind} {namespace}/{name}"),
        None => format!("{kind} {name}"),
    }
}

pub(super) fn namespace(metadata: &ObjectMeta) -> &str {
    metadata.namespace.as_deref().unwrap_or("default")
}
