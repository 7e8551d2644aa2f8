//! The Kubernetes objects a mesh is built from, each with the place it was read. Whatever reads objects, files or an
//! API server, hands on this.

use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::Place;
use crate::policy::{AuthorizationPolicy, PeerAuthentication};

/// One object; namespaced ones have their namespace set.
#[derive(Clone, Debug)]
pub struct Placed<T> {
    pub object: T,
    pub place: Place,
}

/// Objects without duplicates.
#[derive(Clone, Debug, Default)]
pub struct Objects {
    pub namespaces: Vec<Placed<Namespace>>,
    pub nodes: Vec<Placed<Node>>,
    pub pods: Vec<Placed<Pod>>,
    pub services: Vec<Placed<Service>>,
    pub endpoint_slices: Vec<Placed<EndpointSlice>>,
    pub peer_authentications: Vec<Placed<PeerAuthentication>>,
    pub authorization_policies: Vec<Placed<AuthorizationPolicy>>,
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
