//! What a Kubernetes cluster costs an agent: generated objects behind an API server in; start-up, memory, CPU at a steady
//! rate of changes and the delay of one out.
//!
//! One node of the lab is real; the others, their pods and Services are objects, as large as a cluster's are. The agent
//! gets no mesh prefix, so that the kernel half, too, has to know every address.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use mtls::results::{Compared, Environment, Figures, Metric, Progress, Results};
use mtls_tests::kubernetes::ApiServer;
use mtls_tests::{Agent, Lab, Mesh, Options, Pod};
use serde_json::{Value, json};

use crate::scale::{map_bytes, until, without_prefixes};
use crate::world::PORT;

/// As many pods as a node usually has, and as many as are usually behind a Service.
const PODS_PER_NODE: usize = 20;
const PODS_PER_SERVICE: usize = 5;
const CHANGES_PER_SECOND: usize = 100;
const CHANGING: Duration = Duration::from_secs(30);
const PATIENCE: Duration = Duration::from_secs(300);
/// Of `/proc/<pid>/stat`, on every Linux there is (`USER_HZ`).
const TICKS: f64 = 100.0;

const fn metric(name: &'static str, unit: &'static str) -> Metric {
    Metric { name, unit, higher_is_better: false }
}

/// Measures one cluster after the other.
pub fn run(sizes: &[usize], results: &mut Results) -> Result<Environment> {
    let mut environment = Environment::default();
    let mut progress = Progress::new(sizes.len());
    for pods in sizes {
        let lab = Lab::with_nodes(&["node-a"])?;
        let (client, server) = (lab.pod("node-a", "client")?, lab.pod("node-a", "server")?);
        environment = crate::world::environment(&client)?;
        let mut mesh = Mesh::start_with(&lab, &Options { kubernetes: true, ..Options::default() })?;
        mesh.agent("node-a").kill();
        generate(lab.api_server()?, *pods)?;
        let figures = measure(&lab, mesh.agent("node-a"), &client, &server, *pods);
        let (nodes, services) = (pods / PODS_PER_NODE, pods / PODS_PER_SERVICE);
        let path = format!("mtls, {nodes} nodes, {pods} pods, {services} services");
        crate::note(results, &mut progress, &Compared { path, baseline: None }, "a cluster", figures, 0.0);
    }
    Ok(environment)
}

fn measure(lab: &Lab, agent: &mut Agent, client: &Pod, server: &Pod, pods: usize) -> Result<Figures> {
    let binary = mtls_tests::mtls()?.to_string_lossy().into_owned();
    let running = server.spawn(&binary, &["bench", "server"])?;
    without_prefixes(agent.args());
    let begun = Instant::now();
    agent.launch()?;
    agent.await_ready_within(PATIENCE)?;
    let pid = agent.pid().context("the agent does not run")?;
    let mut figures = vec![
        (metric("start-up", "s"), begun.elapsed().as_secs_f64()),
        (metric("CPU of the start", "s"), cpu(pid)?),
        (metric("agent's memory", "MB"), agent.resident_bytes()? as f64 / 1e6),
        (metric("at most", "MB"), peak(pid)? as f64 / 1e6),
        (metric("kernel maps", "MB"), map_bytes(pid)? as f64 / 1e6),
    ];
    std::thread::sleep(Duration::from_secs(2));
    let (before, begun) = (cpu(pid)?, Instant::now());
    std::thread::sleep(Duration::from_secs(5));
    figures.push((
        metric("CPU at rest", "% of a core"),
        100.0 * (cpu(pid)? - before) / begun.elapsed().as_secs_f64(),
    ));

    let api = lab.api_server()?;
    let (before, begun) = (cpu(pid)?, Instant::now());
    let mut number = 0;
    while begun.elapsed() < CHANGING {
        change(api, number, pods)?;
        number += 1;
        let due = Duration::from_secs_f64(number as f64 / CHANGES_PER_SECOND as f64);
        std::thread::sleep(due.saturating_sub(begun.elapsed()));
    }
    let seconds = begun.elapsed().as_secs_f64();
    figures.push((metric("changes", "/s"), number as f64 / seconds));
    figures.push((metric("CPU under them", "% of a core"), 100.0 * (cpu(pid)? - before) / seconds));
    figures.push((metric("agent's memory afterwards", "MB"), agent.resident_bytes()? as f64 / 1e6));

    let address = server.addr(PORT).to_string();
    let deny = json!({ "action": "DENY", "rules": [{}] });
    let begun = Instant::now();
    lab.authorization_policy(server, "nobody", &deny)?;
    until(client, &address, false)?;
    figures.push((metric("policy written to refusal", "s"), begun.elapsed().as_secs_f64()));
    drop(running);
    Ok(figures)
}

/// CPU seconds of a process so far.
pub fn cpu(pid: u32) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field is the name, in parentheses, and may contain spaces.
    let fields: Vec<&str> = stat.rsplit_once(')').context("no stat")?.1.split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<f64>().ok());
    Ok((ticks(11).context("no utime")? + ticks(12).context("no stime")?) / TICKS)
}

/// The most memory a process had, in bytes.
pub fn peak(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").trim().parse::<u64>()? * 1024)
}

fn generate(api: &ApiServer, pods: usize) -> Result<()> {
    let namespaces: Vec<Value> = (0..100)
        .map(|team| {
            let labels = json!({ "istio.io/dataplane-mode": "ambient", "team": format!("team-{team}") });
            json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": namespace(team),
            "labels": labels } })
        })
        .collect();
    api.apply_all(&namespaces)?;
    api.apply_all(&(0..pods / PODS_PER_NODE).map(|number| node(number, 0)).collect::<Vec<_>>())?;
    api.apply_all(&(0..pods).map(|number| pod(number, 0)).collect::<Vec<_>>())?;
    let services = 0..pods / PODS_PER_SERVICE;
    api.apply_all(&services.clone().map(service).collect::<Vec<_>>())?;
    api.apply_all(&services.map(|number| slice(number, true)).collect::<Vec<_>>())
}

/// What happens in a busy cluster: mostly status, often endpoints, sometimes a pod in another's place.
fn change(api: &ApiServer, number: usize, pods: usize) -> Result<()> {
    // Spread over the cluster, and never the same object twice in a row.
    let at = number * 7919 % pods;
    match number % 10 {
        0..=3 => api.apply(&pod(at, number)).map(drop),
        4..=6 => api.apply(&slice(at / PODS_PER_SERVICE, !number.is_multiple_of(2))).map(drop),
        7 => api.apply(&node(at / PODS_PER_NODE, number)).map(drop),
        8 => api.delete(&pod(at, 0)),
        // The pod that went with the last change, on another node.
        _ => {
            let mut anew = pod((number - 1) * 7919 % pods, number);
            anew["spec"]["nodeName"] = format!("far-{}", at / PODS_PER_NODE).into();
            api.apply(&anew).map(drop)
        }
    }
}

fn namespace(number: usize) -> String {
    format!("team-{}", number % 100)
}

fn ip(number: usize) -> String {
    format!("10.{}.{}.{}", 128 + number / 65536, number / 256 % 256, number % 256)
}

fn node(number: usize, revision: usize) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {
            "name": format!("far-{number}"),
            "labels": {
                "kubernetes.io/hostname": format!("far-{number}"), "kubernetes.io/os": "linux",
                "topology.kubernetes.io/region": "r1", "topology.kubernetes.io/zone": format!("z{}", number % 3),
            },
        },
        "spec": { "podCIDR": format!("10.{}.{}.0/24", 64 + number / 256, number % 256) },
        "status": {
            "addresses": [{ "type": "InternalIP", "address": format!("192.168.{}.{}", number / 250,
            number % 250 + 1) }],
            "capacity": { "cpu": "16", "memory": "64Gi", "pods": "110" },
            "conditions": [{ "type": "Ready", "status": "True", "lastHeartbeatTime": heartbeat(revision) }],
            "images": (0..50).map(|image| json!({
                "names": [format!("registry.example/team/image-{image}@sha256:{image:064}")],
                "sizeBytes": 100_000_000,
            })).collect::<Vec<_>>(),
        },
    })
}

fn heartbeat(revision: usize) -> String {
    format!("2026-01-01T{:02}:{:02}:{:02}Z", revision / 3600 % 24, revision / 60 % 60, revision % 60)
}

/// With all that a Deployment, kubelet and the API server write into one: six kilobytes.
fn pod(number: usize, revision: usize) -> Value {
    let app = format!("app-{}", number / PODS_PER_SERVICE);
    let hash = format!("{:010x}", number / PODS_PER_SERVICE * 7919);
    let owned = json!({ "f:metadata": { "f:generateName": {}, "f:labels": { ".": {}, "f:app": {},
    "f:pod-template-hash": {} },
        "f:ownerReferences": { ".": {}, "k:{\"uid\":\"00000000-0000-0000-0000-000000000000\"}": {} } },
        "f:spec": { "f:containers": { "k:{\"name\":\"main\"}": { ".": {}, "f:env": { ".": {},
        "k:{\"name\":\"A\"}": { ".": {}, "f:name": {}, "f:value": {} } },
        "f:image": {}, "f:imagePullPolicy": {}, "f:livenessProbe": { ".": {}, "f:failureThreshold": {},
        "f:httpGet": { ".": {}, "f:path": {}, "f:port": {}, "f:scheme": {} } },
        "f:name": {}, "f:ports": { ".": {}, "k:{\"containerPort\":8080,\"protocol\":\"TCP\"}": { ".": {},
        "f:containerPort": {}, "f:name": {}, "f:protocol": {} } },
        "f:resources": { ".": {}, "f:limits": { ".": {}, "f:cpu": {}, "f:memory": {} } } } }, "f:dnsPolicy": {},
        "f:enableServiceLinks": {} } });
    let env: Vec<Value> = (0..12)
        .map(|at| json!({ "name": format!("SETTING_{at}"), "value": format!("value of setting {at} of {app}") }))
        .collect();
    let probe = json!({ "httpGet": { "path": "/healthz", "port": "http", "scheme": "HTTP" }, "timeoutSeconds": 1,
        "periodSeconds": 10, "successThreshold": 1, "failureThreshold": 3 });
    let condition = |kind: &str| {
        json!({ "type": kind, "status": "True", "lastProbeTime": heartbeat(revision),
    "lastTransitionTime": heartbeat(0) })
    };
    let conditions = ["PodScheduled", "Initialized", "ContainersReady", "Ready"].map(condition);
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": format!("{app}-{hash}-{number}"), "generateName": format!("{app}-{hash}-"),
            "namespace": namespace(number / PODS_PER_SERVICE),
            "labels": { "app": app, "pod-template-hash": hash, "version": "v1",
            "team": namespace(number / PODS_PER_SERVICE), "app.kubernetes.io/managed-by": "Helm" },
            "annotations": { "prometheus.io/scrape": "true", "checksum/config": format!("{number:064}") },
            "ownerReferences": [{ "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": format!("{app}-{hash}"),
            "uid": "00000000-0000-0000-0000-000000000000", "controller": true, "blockOwnerDeletion": true }],
            "managedFields": [
                { "manager": "kube-controller-manager", "operation": "Update", "apiVersion": "v1",
                "time": heartbeat(0), "fieldsType": "FieldsV1", "fieldsV1": owned },
                { "manager": "kubelet", "operation": "Update", "apiVersion": "v1", "time": heartbeat(revision),
                "fieldsType": "FieldsV1", "subresource": "status", "fieldsV1": owned },
            ],
        },
        "spec": {
            "nodeName": format!("far-{}", number / PODS_PER_NODE), "serviceAccountName": format!("account-{}",
            number / PODS_PER_SERVICE),
            "restartPolicy": "Always", "dnsPolicy": "ClusterFirst", "schedulerName": "default-scheduler",
            "priority": 0,
            "tolerations": [{ "key": "node.kubernetes.io/not-ready", "operator": "Exists", "effect": "NoExecute",
            "tolerationSeconds": 300 }],
            "volumes": [{ "name": "token", "projected": { "defaultMode": 420,
            "sources": [{ "serviceAccountToken": { "path": "token", "expirationSeconds": 3607 } },
            { "configMap": { "name": "kube-root-ca.crt" } }] } }],
            "containers": [{
                "name": "main", "image": format!("registry.example/{app}:1.2.3"), "imagePullPolicy": "IfNotPresent",
                "env": env,
                "ports": [{ "name": "http", "containerPort": 8080, "protocol": "TCP" }, { "name": "metrics",
                "containerPort": 9090, "protocol": "TCP" }],
                "resources": { "limits": { "cpu": "1", "memory": "512Mi" }, "requests": { "cpu": "100m",
                "memory": "128Mi" } },
                "livenessProbe": probe, "readinessProbe": probe,
                "volumeMounts": [{ "name": "token", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount",
                "readOnly": true }],
            }],
        },
        "status": {
            "phase": "Running", "podIP": ip(number), "podIPs": [{ "ip": ip(number) }], "hostIP": "192.168.0.1",
            "qosClass": "Burstable", "startTime": heartbeat(0),
            "conditions": conditions,
            "containerStatuses": [{ "name": "main", "ready": true, "restartCount": 0,
            "image": format!("registry.example/{app}:1.2.3"),
            "imageID": format!("registry.example/{app}@sha256:{number:064}"),
            "containerID": format!("containerd://{number:064}"),
            "state": { "running": { "startedAt": heartbeat(0) } } }],
        },
    })
}

fn service(number: usize) -> Value {
    let vip = format!("10.112.{}.{}", number / 256, number % 256);
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": { "name": format!("app-{number}"), "namespace": namespace(number) },
        "spec": {
            "type": "ClusterIP", "clusterIP": vip, "clusterIPs": [vip],
            "selector": { "app": format!("app-{number}") },
            "ports": [
                { "name": "http", "port": 80, "targetPort": "http", "protocol": "TCP" },
                { "name": "metrics", "port": 9090, "targetPort": "metrics", "protocol": "TCP" },
            ],
        },
    })
}

fn slice(number: usize, first_is_ready: bool) -> Value {
    let endpoint = |at: usize| {
        let pod = number * PODS_PER_SERVICE + at;
        let ready = at > 0 || first_is_ready;
        json!({
            "addresses": [ip(pod)], "conditions": { "ready": ready, "serving": ready, "terminating": false },
            "nodeName": format!("far-{}", pod / PODS_PER_NODE), "zone": format!("z{}", pod / PODS_PER_NODE % 3),
            "targetRef": { "kind": "Pod", "name": format!("app-{number}-{pod}"), "namespace": namespace(number) },
        })
    };
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": { "name": format!("app-{number}-1"), "namespace": namespace(number),
        "labels": { "kubernetes.io/service-name": format!("app-{number}") } },
        "addressType": "IPv4",
        "ports": [{ "name": "http", "port": 8080, "protocol": "TCP" }, { "name": "metrics", "port": 9090,
        "protocol": "TCP" }],
        "endpoints": (0..PODS_PER_SERVICE).map(endpoint).collect::<Vec<_>>(),
    })
}
