//! Pods and nodes as they cross the wire, less everything the mesh has no use for: an API server's JSON in, objects with
//! only the fields that are read here out.
//!
//! A pod of a real cluster is six to ten kilobytes, of which the mesh uses some three hundred bytes. What is not named
//! below is skipped by the parser and never becomes memory.

use std::borrow::Cow;
use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Container, ContainerPort, Node, NodeAddress, NodeSpec, NodeStatus, Pod, PodIP, PodSpec, PodStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::core::{ClusterResourceScope, NamespaceResourceScope};
use serde::Deserialize;

/// A pod without what the mesh has no use for.
#[derive(Clone, Debug, Deserialize)]
#[serde(from = "PodJson")]
pub(super) struct LeanPod(pub Pod);

/// A node without what the mesh has no use for.
#[derive(Clone, Debug, Deserialize)]
#[serde(from = "NodeJson")]
pub(super) struct LeanNode(pub Node);

#[derive(Deserialize)]
struct PodJson {
    metadata: Metadata,
    spec: Option<Spec>,
    status: Option<Status>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Metadata {
    name: Option<String>,
    namespace: Option<String>,
    uid: Option<String>,
    resource_version: Option<String>,
    creation_timestamp: Option<Time>,
    deletion_timestamp: Option<Time>,
    labels: Option<BTreeMap<String, String>>,
    annotations: Option<Annotations>,
}

/// Of all annotations those that say where a pod lives or which pod it is.
#[derive(Deserialize)]
struct Annotations {
    #[serde(rename = "mtls.dev/netns")]
    netns: Option<String>,
    #[serde(rename = "mtls.dev/cgroup")]
    cgroup: Option<String>,
    #[serde(rename = "kubernetes.io/config.hash")]
    hash: Option<String>,
    #[serde(rename = "kubernetes.io/config.mirror")]
    mirror: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Spec {
    node_name: Option<String>,
    service_account_name: Option<String>,
    service_account: Option<String>,
    host_network: Option<bool>,
    containers: Option<Vec<ContainerJson>>,
    init_containers: Option<Vec<ContainerJson>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ContainerJson {
    restart_policy: Option<String>,
    ports: Option<Vec<Port>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Port {
    name: Option<String>,
    container_port: i32,
    protocol: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Status {
    phase: Option<String>,
    #[serde(rename = "podIP")]
    pod_ip: Option<String>,
    #[serde(rename = "podIPs")]
    pod_ips: Option<Vec<Ip>>,
    start_time: Option<Time>,
}

#[derive(Deserialize)]
struct Ip {
    ip: String,
}

#[derive(Deserialize)]
struct NodeJson {
    metadata: Metadata,
    spec: Option<NodeSpecJson>,
    status: Option<NodeStatusJson>,
}

#[derive(Deserialize)]
struct NodeSpecJson {
    #[serde(rename = "podCIDR")]
    pod_cidr: Option<String>,
    #[serde(rename = "podCIDRs")]
    pod_cidrs: Option<Vec<String>>,
}

#[derive(Deserialize)]
struct NodeStatusJson {
    addresses: Option<Vec<Address>>,
}

#[derive(Deserialize)]
struct Address {
    #[serde(rename = "type")]
    kind: String,
    address: String,
}

impl From<PodJson> for LeanPod {
    fn from(PodJson { metadata, spec, status }: PodJson) -> Self {
        let containers = |all: Option<Vec<ContainerJson>>| {
            all.into_iter().flatten().map(Container::from).collect::<Vec<_>>()
        };
        let spec = spec.map(|spec| PodSpec {
            node_name: spec.node_name,
            service_account_name: spec.service_account_name,
            service_account: spec.service_account,
            host_network: spec.host_network,
            containers: containers(spec.containers),
            init_containers: Some(containers(spec.init_containers)),
            ..PodSpec::default()
        });
        let status = status.map(|status| PodStatus {
            phase: status.phase,
            pod_ip: status.pod_ip,
            pod_ips: status.pod_ips.map(|all| all.into_iter().map(|it| PodIP { ip: it.ip }).collect()),
            start_time: status.start_time,
            ..PodStatus::default()
        });
        Self(Pod { metadata: metadata.into(), spec, status })
    }
}

impl From<ContainerJson> for Container {
    fn from(ContainerJson { restart_policy, ports }: ContainerJson) -> Self {
        let port = |Port { name, container_port, protocol }| ContainerPort {
            name,
            container_port,
            protocol,
            ..ContainerPort::default()
        };
        let ports = ports.map(|ports| ports.into_iter().map(port).collect());
        Self { restart_policy, ports, ..Self::default() }
    }
}

impl From<NodeJson> for LeanNode {
    fn from(NodeJson { metadata, spec, status }: NodeJson) -> Self {
        let spec = spec.map(|NodeSpecJson { pod_cidr, pod_cidrs }| NodeSpec {
            pod_cidr,
            pod_cidrs,
            ..NodeSpec::default()
        });
        let address = |Address { kind, address }| NodeAddress { type_: kind, address };
        let status = status.map(|status| NodeStatus {
            addresses: status.addresses.map(|all| all.into_iter().map(address).collect()),
            ..NodeStatus::default()
        });
        Self(Node { metadata: metadata.into(), spec, status })
    }
}

impl From<Metadata> for ObjectMeta {
    fn from(metadata: Metadata) -> Self {
        Self {
            name: metadata.name,
            namespace: metadata.namespace,
            uid: metadata.uid,
            resource_version: metadata.resource_version,
            creation_timestamp: metadata.creation_timestamp,
            deletion_timestamp: metadata.deletion_timestamp,
            labels: metadata.labels,
            annotations: metadata.annotations.and_then(Annotations::named),
            ..Self::default()
        }
    }
}

impl Annotations {
    fn named(self) -> Option<BTreeMap<String, String>> {
        let all = [
            ("mtls.dev/netns", self.netns),
            ("mtls.dev/cgroup", self.cgroup),
            ("kubernetes.io/config.hash", self.hash),
            ("kubernetes.io/config.mirror", self.mirror),
        ];
        let there: BTreeMap<_, _> =
            all.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect();
        (!there.is_empty()).then_some(there)
    }
}

macro_rules! resource {
    ($lean:ty, $object:ty, $scope:ty) => {
        impl kube::Resource for $lean {
            type DynamicType = ();
            type Scope = $scope;

            fn kind((): &()) -> Cow<'_, str> {
                <$object as kube::Resource>::kind(&())
            }

            fn group((): &()) -> Cow<'_, str> {
                <$object as kube::Resource>::group(&())
            }

            fn version((): &()) -> Cow<'_, str> {
                <$object as kube::Resource>::version(&())
            }

            fn plural((): &()) -> Cow<'_, str> {
                <$object as kube::Resource>::plural(&())
            }

            fn meta(&self) -> &ObjectMeta {
                &self.0.metadata
            }

            fn meta_mut(&mut self) -> &mut ObjectMeta {
                &mut self.0.metadata
            }
        }
    };
}

resource!(LeanPod, Pod, NamespaceResourceScope);
resource!(LeanNode, Node, ClusterResourceScope);

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::mesh::interner::Interner;
    use crate::mesh::objects::Placed;
    use crate::mesh::pod::Single;
    use crate::mesh::{Place, Settings};

    /// Whatever the mesh reads of a pod it must read of a lean one, or it would not be noticed before it is missed.
    #[test]
    fn a_lean_pod_is_as_good_as_a_whole_one() {
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": "web-1", "namespace": "shop", "uid": "u", "resourceVersion": "7",
                "creationTimestamp": "2026-01-01T00:00:00Z", "deletionTimestamp": "2026-01-02T00:00:00Z",
                "labels": { "app": "web", "istio.io/dataplane-mode": "ambient" },
                "annotations": {
                    "mtls.dev/netns": "/n", "mtls.dev/cgroup": "/c", "other": "o",
                    "kubernetes.io/config.mirror": "m",
                    "kubernetes.io/config.hash": "0123456789abcdef0123456789abcdef",
                },
                "managedFields": [{ "manager": "kubelet", "fieldsV1": { "f:status": {} } }],
            },
            "spec": {
                "nodeName": "node-a", "serviceAccountName": "web", "hostNetwork": false,
                "containers": [{ "name": "a", "ports": [{ "name": "http", "containerPort": 80 },
                { "containerPort": 53, "protocol": "UDP" }] }],
                "initContainers": [
                    { "name": "b", "restartPolicy": "Always", "ports": [{ "containerPort": 81 }] },
                    { "name": "c", "ports": [{ "containerPort": 82 }] },
                ],
                "volumes": [{ "name": "v" }],
            },
            "status": {
                "phase": "Running", "podIP": "10.0.0.1", "podIPs": [{ "ip": "10.0.0.1" }, { "ip": "fd00::1" }],
                "startTime": "2026-01-01T00:00:01Z", "conditions": [{ "type": "Ready", "status": "True" }],
            },
        });
        let settings = Settings {
            trust_domain: "cluster.local".parse().unwrap(),
            root_namespace: "istio-system".into(),
        };
        let single = |object: Pod| {
            let place = Place { source: "test".into(), document: None, item: None };
            let placed = Placed { object, place };
            Single::read(&placed, &settings, &mut Interner::default()).unwrap().unwrap()
        };
        let whole = single(serde_json::from_value(pod.clone()).unwrap());
        let lean: LeanPod = serde_json::from_value(pod).unwrap();
        assert_eq!(lean.0.metadata.resource_version.as_deref(), Some("7"));
        assert_eq!(single(lean.0), whole);
        assert_eq!(whole.workload.ports.len(), 2);
        assert_eq!(whole.workload.uid.as_deref(), Some("0123456789abcdef0123456789abcdef"));
    }
}
