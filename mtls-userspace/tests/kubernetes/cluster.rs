//! A cluster with an API server and a mesh that follows it; and objects as a cluster has them.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mtls::kubernetes::Cluster;
use mtls::mesh::{Mesh, Scope, Settings, Source};
use mtls_tests::kubernetes::{ApiServer, Rule, User, agent_rules};
use serde_json::{Value, json};
use tempfile::TempDir;

pub fn settings() -> Settings {
    Settings { trust_domain: "cluster.local".parse().unwrap(), root_namespace: "istio-system".into() }
}

pub struct World {
    pub api: ApiServer,
    pub dir: TempDir,
}

impl World {
    pub fn new() -> Self {
        Self { api: ApiServer::on_loopback().unwrap(), dir: TempDir::new().unwrap() }
    }

    /// Access with an agent's rights.
    pub async fn agent(&self) -> Cluster {
        self.access("system:serviceaccount:mtls-system:agent", agent_rules()).await
    }

    pub async fn access(&self, name: &str, rules: Vec<Rule>) -> Cluster {
        let token = self.api.user(User { name: name.into(), rules, ..User::default() });
        let path = self.dir.path().join(format!("{token}.kubeconfig"));
        open(&self.api.kubeconfig(&path, &token).unwrap()).await
    }

    /// A mesh that follows the server as an agent does.
    pub async fn follow(&self) -> Source {
        Source::kubernetes(self.agent().await, settings(), Scope::Traffic { annotations: false }).await
    }
}

async fn open(kubeconfig: &Path) -> Cluster {
    Cluster::open(Some(kubeconfig)).await.unwrap()
}

/// Waits, and says what it waited for if it never comes.
pub async fn soon(what: &str, holds: impl FnMut() -> bool) {
    within(Duration::from_secs(10), what, holds).await;
}

pub async fn within(limit: Duration, what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + limit;
    while !holds() {
        assert!(Instant::now() < deadline, "not within {limit:?}: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub fn names(mesh: &Mesh) -> Vec<String> {
    let mut names: Vec<String> = mesh.workloads.iter().map(|workload| workload.key()).collect();
    names.sort();
    names
}

/// The pod that has an address, and whether it is enrolled.
pub fn owner(source: &Source, address: &str) -> Option<(String, bool)> {
    let mesh: Arc<Mesh> = source.current();
    mesh.workload(address.parse().unwrap()).map(|workload| (workload.key(), workload.enrolled))
}

pub fn namespace(name: &str, enrolled: bool) -> Value {
    let labels = if enrolled { json!({ "istio.io/dataplane-mode": "ambient" }) } else { json!({}) };
    json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": name, "labels": labels } })
}

/// A running pod of namespace `shop` on `node-a`.
pub fn pod(name: &str, address: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": name, "namespace": "shop", "labels": { "app": name } },
        "spec": {
            "nodeName": "node-a", "serviceAccountName": "web",
            "containers": [{ "name": "main", "image": "main", "ports": [{ "name": "http", "containerPort": 8080 }] }],
        },
        "status": { "phase": "Running", "podIP": address, "podIPs": [{ "ip": address }] },
    })
}

/// The same object with a field set.
pub fn with(mut object: Value, pointer: &str, value: Value) -> Value {
    let (parent, field) = pointer.rsplit_once('/').unwrap();
    object.pointer_mut(parent).unwrap()[field.replace("~1", "/")] = value;
    object
}

pub fn service(name: &str, spec: Value) -> Value {
    json!({ "apiVersion": "v1", "kind": "Service", "metadata": { "name": name, "namespace": "shop" }, "spec": spec })
}

/// Endpoints that are ready pods, on `node-a`.
pub fn slice(name: &str, service: &str, port: u16, pods: &[(&str, &str)]) -> Value {
    let endpoints: Vec<Value> = pods
        .iter()
        .map(|(pod, address)| {
            json!({
                "addresses": [address], "conditions": { "ready": true, "serving": true, "terminating": false },
                "nodeName": "node-a", "targetRef": { "kind": "Pod", "name": pod, "namespace": "shop" },
            })
        })
        .collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": { "name": name, "namespace": "shop", "labels": { "kubernetes.io/service-name": service } },
        "addressType": "IPv4", "ports": [{ "name": "", "port": port, "protocol": "TCP" }], "endpoints": endpoints,
    })
}

pub fn policy(kind: &str, namespace: &str, name: &str, spec: Value) -> Value {
    json!({
        "apiVersion": "security.istio.io/v1", "kind": kind,
        "metadata": { "name": name, "namespace": namespace }, "spec": spec,
    })
}
