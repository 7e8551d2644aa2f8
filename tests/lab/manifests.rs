//! Manifests: pods, Services and policies in the lab's terms in, Kubernetes objects in files out.
//!
//! Files appear and change whole (written elsewhere, then renamed), so that a reader never sees half of one.

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::atomic::Ordering;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::kubernetes::ApiServer;
use crate::network::plan;
use crate::{Lab, Pod};

/// Where API servers listen.
const API_PORT: u16 = 6443;

/// A declared container or Service port.
#[derive(Clone, Debug)]
pub struct Port {
    pub name: String,
    pub port: u16,
}

/// Modes of a PeerAuthentication.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Strict,
    Permissive,
    Disable,
}

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Self::Strict => "STRICT",
            Self::Permissive => "PERMISSIVE",
            Self::Disable => "DISABLE",
        }
    }
}

/// Where a PeerAuthentication applies.
#[derive(Clone, Debug)]
pub enum Level<'a> {
    Mesh,
    Namespace(&'a str),
    Workload(&'a Pod),
    /// A workload, with other modes for some of its ports.
    Ports(&'a Pod, &'a [(u16, Mode)]),
}

/// A Kubernetes object and the name of its file.
pub(crate) struct Manifest {
    pub file: String,
    pub object: Value,
}

impl Lab {
    /// Puts a manifest into force, replacing one of the same kind and name.
    pub(crate) fn write(&self, manifest: &Manifest) -> Result<()> {
        let text = serde_yaml_ng::to_string(&manifest.object)?;
        self.write_text(&manifest.file, &text)?;
        self.api.get().map_or(Ok(()), |api| api.apply(&manifest.object).map(drop))
    }

    /// An API server on the first node that has what the manifests have, and follows them from then on.
    pub fn api_server(&self) -> Result<&ApiServer> {
        if let Some(api) = self.api.get() {
            return Ok(api);
        }
        let node = self.nodes().first().context("a lab without nodes")?;
        let listener = node.netns().within(|| TcpListener::bind(SocketAddr::new(node.ip(), API_PORT)))?;
        let api = ApiServer::start(listener)?;
        for (at, node) in self.nodes().iter().enumerate() {
            let role = if at == 0 { "control-plane" } else { "worker" };
            let labels = json!({ format!("node-role.kubernetes.io/{role}"): "" });
            api.apply(&json!({
                "apiVersion": "v1", "kind": "Node", "metadata": { "name": node.name(), "labels": labels },
                "status": { "addresses": [{ "type": "InternalIP", "address": node.ip() }] },
            }))?;
        }
        for entry in std::fs::read_dir(self.dir().join("manifests"))? {
            api.apply(&serde_yaml_ng::from_str(&std::fs::read_to_string(entry?.path())?)?)?;
        }
        Ok(self.api.get_or_init(|| api))
    }

    /// Puts any text where agents look for manifests.
    pub fn write_text(&self, file: &str, text: &str) -> Result<()> {
        let aside = self.dir().join(format!("{file}.new"));
        let target = self.dir().join("manifests").join(file);
        std::fs::write(&aside, text)?;
        std::fs::rename(&aside, &target).with_context(|| format!("write {}", target.display()))
    }

    /// Takes a manifest away.
    pub fn remove_file(&self, file: &str) -> Result<()> {
        let target = self.dir().join("manifests").join(file);
        if let Some(api) = self.api.get() {
            api.delete(&serde_yaml_ng::from_str(&std::fs::read_to_string(&target)?)?)?;
        }
        std::fs::remove_file(&target).with_context(|| format!("remove {}", target.display()))
    }

    pub fn namespace(&self, name: &str, enrolled: bool) -> Result<()> {
        let mode = if enrolled { "ambient" } else { "none" };
        self.write(&Manifest {
            file: format!("namespace-{name}.yaml"),
            object: json!({
                "apiVersion": "v1", "kind": "Namespace",
                "metadata": { "name": name, "labels": { "istio.io/dataplane-mode": mode } },
            }),
        })
    }

    /// Sets the mode at a level. A later call for the same level replaces an earlier one.
    pub fn peer_authentication(&self, level: Level<'_>, mode: Mode) -> Result<()> {
        let spec = json!({ "mtls": { "mode": mode.name() } });
        let (namespace, name, spec) = match level {
            Level::Mesh => ("istio-system", "mesh".into(), spec),
            Level::Namespace(namespace) => (namespace, "namespace".into(), spec),
            Level::Workload(pod) => (
                pod.namespace(),
                pod.name().to_owned(),
                json!({ "selector": selector(pod), "mtls": { "mode": mode.name() } }),
            ),
            Level::Ports(pod, ports) => {
                let of_port = |(port, mode): &(u16, Mode)| (port.to_string(), json!({ "mode": mode.name() }));
                let ports: serde_json::Map<_, _> = ports.iter().map(of_port).collect();
                (
                    pod.namespace(),
                    pod.name().to_owned(),
                    json!({ "selector": selector(pod), "mtls": { "mode": mode.name() }, "portLevelMtls": ports }),
                )
            }
        };
        self.write(&Manifest {
            file: format!("peerauthentication-{namespace}-{name}.yaml"),
            object: json!({
                "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
                "metadata": { "name": name, "namespace": namespace }, "spec": spec,
            }),
        })
    }

    /// An AuthorizationPolicy for one pod. `spec` is what stands beside the selector.
    pub fn authorization_policy(&self, pod: &Pod, name: &str, spec: &Value) -> Result<()> {
        let namespace = pod.namespace();
        let mut spec = spec.clone();
        spec["selector"] = selector(pod);
        self.write(&Manifest {
            file: format!("authorizationpolicy-{namespace}-{name}.yaml"),
            object: json!({
                "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
                "metadata": { "name": name, "namespace": namespace }, "spec": spec,
            }),
        })
    }

    /// A Service in front of pods, with its EndpointSlice, and its address. `target` is a port number or name.
    pub fn service(&self, name: &str, pods: &[&Pod], port: u16, target: &Value) -> Result<SocketAddr> {
        let vip = plan::service(self.services.fetch_add(1, Ordering::Relaxed));
        self.write_service(name, pods, port, target, Some(vip))?;
        Ok(SocketAddr::new(vip, port))
    }

    /// A Service without an address of its own.
    pub fn headless_service(&self, name: &str, pods: &[&Pod], port: u16, target: &Value) -> Result<()> {
        self.write_service(name, pods, port, target, None)
    }

    fn write_service(
        &self,
        name: &str,
        pods: &[&Pod],
        port: u16,
        target: &Value,
        vip: Option<IpAddr>,
    ) -> Result<()> {
        let namespace = pods.first().map_or("shop", |pod| pod.namespace());
        let ip = vip.map_or("None".into(), |vip| vip.to_string());
        self.write(&Manifest {
            file: format!("service-{namespace}-{name}.yaml"),
            object: json!({
                "apiVersion": "v1", "kind": "Service",
                "metadata": { "name": name, "namespace": namespace },
                "spec": {
                    "clusterIP": ip, "clusterIPs": [ip],
                    "ports": [{ "name": "main", "port": port, "targetPort": target, "protocol": "TCP" }],
                },
            }),
        })?;
        self.endpoints(name, pods, target)
    }

    /// Replaces the endpoints of a Service.
    pub fn endpoints(&self, service: &str, pods: &[&Pod], target: &Value) -> Result<()> {
        let namespace = pods.first().map_or("shop", |pod| pod.namespace());
        // As the endpoint controller does: a named port becomes the number that the pods declare under that name.
        let number = match target {
            Value::String(name) => pods
                .iter()
                .flat_map(|pod| pod.ports())
                .find(|port| port.name == *name)
                .map(|port| json!(port.port))
                .unwrap_or(Value::Null),
            number => number.clone(),
        };
        let endpoints: Vec<Value> = pods
            .iter()
            .map(|pod| {
                json!({
                    "addresses": [pod.ip()], "conditions": { "ready": true }, "nodeName": pod.node().name(),
                    "targetRef": { "kind": "Pod", "name": pod.name(), "namespace": pod.namespace() },
                })
            })
            .collect();
        self.write(&Manifest {
            file: format!("endpointslice-{namespace}-{service}.yaml"),
            object: json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
                "metadata": {
                    "name": format!("{service}-1"), "namespace": namespace,
                    "labels": { "kubernetes.io/service-name": service },
                },
                "addressType": "IPv4",
                "ports": [{ "name": "main", "port": number, "protocol": "TCP" }],
                "endpoints": endpoints,
            }),
        })
    }

    /// Takes a pod out of the mesh, as its deletion would.
    pub fn forget(&self, pod: &Pod) -> Result<()> {
        self.remove_file(&pod_file(pod))
    }
}

fn selector(pod: &Pod) -> Value {
    json!({ "matchLabels": { "app": pod.name() } })
}

fn pod_file(pod: &Pod) -> String {
    format!("pod-{}-{}.yaml", pod.namespace(), pod.name())
}

pub(crate) fn pod(pod: &Pod) -> Manifest {
    let mut labels = json!({ "app": pod.name() });
    if let Some(mode) = pod.dataplane_mode() {
        labels["istio.io/dataplane-mode"] = mode.into();
    }
    let ports: Vec<Value> =
        pod.ports().iter().map(|port| json!({ "name": port.name, "containerPort": port.port })).collect();
    Manifest {
        file: pod_file(pod),
        object: json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": pod.name(), "namespace": pod.namespace(), "labels": labels,
                "annotations": { "mtls.dev/netns": pod.netns().path(), "mtls.dev/cgroup": pod.cgroup() },
            },
            "spec": {
                "nodeName": pod.node().name(), "serviceAccountName": pod.service_account(),
                "containers": [{ "name": "main", "ports": ports }],
            },
            "status": { "phase": "Running", "podIP": pod.ip(), "podIPs": [{ "ip": pod.ip() }, { "ip": pod.ip6() }] },
        }),
    }
}
