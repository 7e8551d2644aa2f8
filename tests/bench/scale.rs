//! What a mesh costs as it grows: generated meshes in; start-up, memory, delay of a change and cost of a connection out.
//!
//! One node with two real pods; every other workload is a manifest. The agent gets no mesh prefix, so that the kernel
//! half, too, has to know every address.

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use mtls::results::{Compared, Environment, Figures, Metric, Progress, Results};
use mtls_tests::{Agent, Lab, Mesh, Options, Pod, Running, mtls};
use serde_json::{Value, json};

use crate::cluster::{cpu, peak};
use crate::kernel;
use crate::world::PORT;

const POLICIES: usize = 5000;
const SERVICES: usize = 10_000;
/// Objects in one file.
const FILE: usize = 1000;
/// A hundred thousand workloads are read from YAML, on a machine that may be busy.
const PATIENCE: Duration = Duration::from_secs(600);
/// Three times as long as the longest time between two looks at the directory.
const AT_REST: Duration = Duration::from_secs(15);

const fn metric(name: &'static str, unit: &'static str) -> Metric {
    Metric { name, unit, higher_is_better: false }
}

/// Measures one mesh after the other.
pub fn run(sizes: &[usize], results: &mut Results) -> Result<Environment> {
    let mut environment = Environment::default();
    let mut progress = Progress::new(sizes.len());
    for size in sizes {
        let lab = Lab::with_nodes(&["node-a"])?;
        let (client, server) = (lab.pod("node-a", "client")?, lab.pod("node-a", "server")?);
        let vip = lab.service("server", &[&server], PORT, &json!(PORT))?;
        environment = crate::world::environment(&client)?;
        let mut mesh = Mesh::start_with(&lab, &Options::default())?;
        generate(&lab, *size)?;
        let figures = measure(&lab, &mut mesh, (&client, &server), &vip.to_string(), *size);
        let path = format!("mtls, {size} workloads, {} services", services(*size));
        let path = Compared { path, baseline: None };
        crate::note(results, &mut progress, &path, "a growing mesh", figures, 0.0);
    }
    Ok(environment)
}

fn services(workloads: usize) -> usize {
    workloads.min(SERVICES)
}

fn measure(
    lab: &Lab,
    mesh: &mut Mesh,
    (client, server): (&Pod, &Arc<Pod>),
    vip: &str,
    size: usize,
) -> Result<Figures> {
    let binary = mtls()?.to_string_lossy().into_owned();
    let _server = server.spawn(&binary, &["bench", "server"])?;
    let agent = mesh.agent("node-a");
    agent.kill();
    without_prefixes(agent.args());
    let begun = Instant::now();
    agent.launch()?;
    agent.await_ready_within(PATIENCE)?;
    let mut figures = vec![(metric("start-up", "s"), begun.elapsed().as_secs_f64())];
    figures.push((metric("agent's memory", "MB"), agent.resident_bytes()? as f64 / 1e6));
    let pid = agent.pid().context("the agent does not run")?;
    figures.push((metric("kernel maps", "MB"), map_bytes(pid)? as f64 / 1e6));
    let address = server.addr(PORT).to_string();
    for (name, to) in [("new connection, p50", address.as_str()), ("through a Service, p50", vip)] {
        let args = ["bench", "client", "--workload", "connect", "--seconds", "2", "--to", to];
        let report = client.run(&binary, &args)?.success().context(name)?.json()?;
        let p50 = report["latency_us"]["p50"].as_f64().context("no latency")?;
        figures.push((metric(name, "µs"), p50));
    }
    figures.extend(kernel::cost(&[pid], || {
        let args = ["bench", "client", "--workload", "connect", "--seconds", "1", "--to", &address];
        let report = client.run(&binary, &args)?.success()?.json()?;
        report["all_exchanges"].as_f64().context("no exchanges")
    })?);
    for (name, to) in [("choosing an endpoint, one of one", vip), ("choosing an endpoint, of many", MANY)] {
        let manifests = lab.dir().join("manifests").to_string_lossy().into_owned();
        let from = client.ip().to_string();
        let mut args = vec!["bench", "decide", "--manifests", &manifests, "--node", "node-a"];
        args.extend(["--from", &from, "--to", to]);
        let report = client.run_within(&binary, &args, PATIENCE)?.success().context(name)?.json()?;
        figures.push((metric(name, "ns"), report["resolve_ns"].as_f64().context("no time")?));
        if to == vip {
            let authorize = report["authorize_ns"].as_f64().context("nobody is authorized")?;
            figures.push((metric("judging by policy", "ns"), authorize));
        }
    }
    let deny = json!({ "action": "DENY", "rules": [{}] });
    let begun = Instant::now();
    lab.authorization_policy(server, "nobody", &deny)?;
    until(client, &address, false)?;
    figures.push((metric("policy written to refusal", "s"), begun.elapsed().as_secs_f64()));
    let begun = Instant::now();
    lab.remove_file("authorizationpolicy-shop-nobody.yaml")?;
    until(client, &address, true)?;
    figures.push((metric("policy removed to passage", "s"), begun.elapsed().as_secs_f64()));
    let begun = Instant::now();
    lab.endpoints("server", &[], &json!(PORT))?;
    until(client, vip, false)?;
    figures.push((metric("endpoint gone to refusal", "s"), begun.elapsed().as_secs_f64()));
    figures.push((metric("1000 pods changed, in force", "s"), pods_changed(lab, agent, size)?));
    figures.push((metric("agent's memory afterwards", "MB"), agent.resident_bytes()? as f64 / 1e6));
    figures.push((metric("at most", "MB"), peak(pid)? as f64 / 1e6));
    let (before, begun) = (cpu(pid)?, Instant::now());
    std::thread::sleep(AT_REST);
    figures.push((
        metric("CPU at rest", "% of a core"),
        100.0 * (cpu(pid)? - before) / begun.elapsed().as_secs_f64(),
    ));
    Ok(figures)
}

/// Writes one file of pods anew, with another label, and waits until that is the mesh.
fn pods_changed(lab: &Lab, agent: &Agent, size: usize) -> Result<f64> {
    let generation = || agent.metrics().map(|metrics| metrics.sum("mtls_mesh_generation", &[]));
    let before = generation()?;
    let changed = (0..size.min(FILE)).map(|number| {
        let mut pod = pod(number);
        pod["metadata"]["labels"]["version"] = "v2".into();
        pod.to_string()
    });
    let text = changed.collect::<Vec<_>>().join("\n---\n");
    let begun = Instant::now();
    lab.write_text("generated-pods-0.yaml", &text)?;
    while generation()? <= before {
        ensure!(begun.elapsed() < PATIENCE, "changed pods are not in force after {PATIENCE:?}");
    }
    Ok(begun.elapsed().as_secs_f64())
}

pub fn without_prefixes(args: &mut Vec<String>) {
    while let Some(at) = args.iter().position(|arg| arg == "--mesh-prefix") {
        args.drain(at..at + 2);
    }
}

/// Waits until connections pass, or don't.
pub fn until(client: &Pod, address: &str, pass: bool) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        let mut command = client.command(mtls()?);
        command.args(["bench", "client", "--workload", "first", "--to", address]);
        if Running::start(command)?.finish()?.status.success() == pass {
            return Ok(());
        }
    }
    bail!("a change is not in force after {PATIENCE:?}")
}

/// Kernel memory of the maps that a process holds.
pub fn map_bytes(pid: u32) -> Result<u64> {
    let mut seen = Vec::new();
    let mut total = 0;
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))?.flatten() {
        // A descriptor may have been closed meanwhile.
        let Ok(text) = fs::read_to_string(entry.path()) else { continue };
        let field =
            |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok());
        if let (Some(_), Some(bytes), Some(id)) = (field("map_type:"), field("memlock:"), field("map_id:"))
            && !seen.contains(&id)
        {
            seen.push(id);
            total += bytes;
        }
    }
    Ok(total)
}

/// Writes the manifests of everything that is only heard of.
fn generate(lab: &Lab, workloads: usize) -> Result<()> {
    for team in 0..100 {
        lab.namespace(&format!("team-{team}"), true)?;
    }
    write(lab, "generated-pods", workloads, pod)?;
    write(lab, "generated-services", services(workloads), service)?;
    write(lab, "generated-slices", services(workloads), slice)?;
    write(lab, "generated-policies", POLICIES, policy)?;
    many(lab, workloads.min(SERVICES))
}

/// A Service with as many endpoints as there are services.
const MANY: &str = "10.113.0.1:80";

fn many(lab: &Lab, endpoints: usize) -> Result<()> {
    let service = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": { "name": "many", "namespace": "team-0" },
        "spec": {
            "clusterIP": "10.113.0.1", "clusterIPs": ["10.113.0.1"],
            "ports": [{ "name": "http", "port": 80, "targetPort": 8080, "protocol": "TCP" }],
        },
    });
    let slice = |first: usize| {
        let endpoint = |number| json!({ "addresses": [ip(number)], "conditions": { "ready": true } });
        let endpoints: Vec<Value> = (first..endpoints.min(first + FILE)).map(endpoint).collect();
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {
                "name": format!("many-{first}"), "namespace": "team-0",
                "labels": { "kubernetes.io/service-name": "many" },
            },
            "addressType": "IPv4", "ports": [{ "name": "http", "port": 8080, "protocol": "TCP" }],
            "endpoints": endpoints,
        })
    };
    let slices = (0..endpoints).step_by(FILE).map(slice);
    let documents: Vec<String> = std::iter::once(service).chain(slices).map(|it| it.to_string()).collect();
    lab.write_text("generated-many.yaml", &documents.join("\n---\n"))
}

fn write(lab: &Lab, name: &str, count: usize, object: fn(usize) -> Value) -> Result<()> {
    for (part, first) in (0..count).step_by(FILE).enumerate() {
        let documents: Vec<String> =
            (first..count.min(first + FILE)).map(|number| object(number).to_string()).collect();
        lab.write_text(&format!("{name}-{part}.yaml"), &documents.join("\n---\n"))?;
    }
    Ok(())
}

fn ip(number: usize) -> String {
    format!("10.{}.{}.{}", 128 + number / 65536, number / 256 % 256, number % 256)
}

fn pod(number: usize) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": format!("pod-{number}"), "namespace": format!("team-{}", number % 100),
            "labels": { "app": format!("app-{}", number / 100), "version": "v1" },
        },
        "spec": {
            "nodeName": format!("far-{}", number / 100), "serviceAccountName": format!("account-{}", number / 100),
            "containers": [{ "name": "main", "ports": [{ "name": "http", "containerPort": 8080 }] }],
        },
        "status": { "phase": "Running", "podIP": ip(number), "podIPs": [{ "ip": ip(number) }] },
    })
}

fn service(number: usize) -> Value {
    let vip = format!("10.112.{}.{}", number / 256, number % 256);
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": { "name": format!("service-{number}"), "namespace": format!("team-{}", number % 100) },
        "spec": {
            "clusterIP": vip, "clusterIPs": [vip],
            "ports": [{ "name": "http", "port": 80, "targetPort": 8080, "protocol": "TCP" }],
        },
    })
}

fn slice(number: usize) -> Value {
    let namespace = format!("team-{}", number % 100);
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": format!("service-{number}-1"), "namespace": namespace,
            "labels": { "kubernetes.io/service-name": format!("service-{number}") },
        },
        "addressType": "IPv4", "ports": [{ "name": "http", "port": 8080, "protocol": "TCP" }],
        "endpoints": [{
            "addresses": [ip(number)], "conditions": { "ready": true },
            "targetRef": { "kind": "Pod", "name": format!("pod-{number}"), "namespace": namespace },
        }],
    })
}

fn policy(number: usize) -> Value {
    let principal = format!("cluster.local/ns/team-{}/sa/account-{}", number % 7, number % 1000);
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": { "name": format!("policy-{number}"), "namespace": format!("team-{}", number % 100) },
        "spec": {
            "selector": { "matchLabels": { "app": format!("app-{}", number / 100) } },
            "action": if number.is_multiple_of(3) { "DENY" } else { "ALLOW" },
            "rules": [{
                "from": [{ "source": { "principals": [principal] } }],
                "to": [{ "operation": { "ports": ["8080"] } }],
            }],
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn generated_addresses_are_distinct_and_valid() {
        let addresses: HashSet<std::net::Ipv4Addr> = (0..100_000).map(|n| ip(n).parse().unwrap()).collect();
        assert_eq!(addresses.len(), 100_000);
    }

    #[test]
    fn prefixes_are_taken_away_with_their_values() {
        let mut args: Vec<String> =
            ["node", "--mesh-prefix", "a", "--x", "--mesh-prefix", "b"].map(str::to_owned).into();
        without_prefixes(&mut args);
        assert_eq!(args, ["node", "--x"]);
    }
}
