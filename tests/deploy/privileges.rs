//! Least privilege: with exactly what the DaemonSet gives it the agent does all of its work, and without any part of
//! that it says what is missing.

use std::time::Duration;

use anyhow::{Context, Result};
use mtls_tests::{Lab, Level, MARKER, Mesh, Mode, PodSpec, eventually, skip};

use crate::container::{API_TOKEN, Container, NEEDS};

/// Puts the agents of both nodes into containers, in place of those that run.
pub fn in_containers(lab: &Lab, mesh: &mut Mesh) -> Result<Vec<Container>> {
    let moved = ["node-a", "node-b"].into_iter().map(|node| {
        mesh.agent(node).kill();
        let container = Container::agent(lab, node)?;
        container.launch(lab, mesh, node)?;
        mesh.agent(node).await_ready()?;
        Ok(container)
    });
    moved.collect()
}

#[test]
fn with_exactly_its_privileges_an_agent_does_all_of_its_work() -> Result<()> {
    if skip(&NEEDS) {
        return Ok(());
    }
    let lab = Lab::two_nodes()?;
    let far = lab.pod("node-a", "far")?;
    let near = lab.pod("node-b", "near")?;
    let server = lab.add(PodSpec::new("node-b", "server").port("main", 7000))?;
    let intruder = lab.outsider("node-a", "intruder")?;
    let mut mesh = Mesh::start(&lab)?;
    let containers = in_containers(&lab, &mut mesh)?;
    let status = std::fs::read_to_string(format!("/proc/{}/status", containers[0].pid()?))?;
    let line =
        |key| status.lines().find_map(|line| line.strip_prefix(key)).map(str::trim).context("no such line");
    // CAP_NET_ADMIN, CAP_SYS_PTRACE, CAP_SYS_ADMIN.
    let held = (1u64 << 12) | (1 << 19) | (1 << 21);
    for set in ["CapEff:", "CapPrm:", "CapBnd:"] {
        assert_eq!(u64::from_str_radix(line(set)?, 16)?, held, "{set}");
    }
    assert_eq!((line("NoNewPrivs:")?, line("Seccomp:")?), ("1", "2"));

    let chained = eventually(Duration::from_secs(5), || {
        let network =
            std::fs::read_to_string(containers[0].on_node("cni-conf").join("10-lab.conflist")).ok()?;
        network.contains("mtls-cni").then_some(())
    });
    assert!(chained.is_some(), "its plugin is not in the node's network configuration");
    assert!(containers[0].on_node("cni-bin").join("mtls-cni").is_file());

    let _echo = server.serve(&["echo", "--listen", "[::]:7000"])?;
    let to = server.addr(7000).to_string();
    // A plaintext connection that is open when STRICT comes is reset.
    let open = intruder.start_app(&["dial", "wait", &to])?;
    open.json_with("established")?;
    lab.peer_authentication(Level::Mesh, Mode::Strict)?;
    assert_eq!(open.json_with("ended")?["ended"], "reset");
    let refused = eventually(Duration::from_secs(5), || {
        let answer = intruder.app(&["dial", "echo", &to]).ok()?;
        (answer["ended"] == "refused").then_some(())
    });
    assert!(refused.is_some(), "plaintext is not refused");
    let wire = lab.watch_wire()?;
    for client in [&far, &near] {
        let answer = client.app(&["dial", "echo", &to, "--message", MARKER])?;
        assert_eq!((&answer["echoed"], &answer["ended"]), (&MARKER.len().into(), &"eof".into()), "{answer}");
    }
    let seen = wire.finish()?;
    assert_eq!(seen.markers(), 0);
    seen.encrypted(&far, &server)?;
    // The kubelet's probe gets through.
    let probe = lab.node("node-b")?.app(&["dial", "echo", &to])?;
    assert_eq!(probe["ended"], "eof", "{probe}");
    Ok(())
}

#[test]
fn agents_in_containers_succeed_each_other_and_no_connection_is_refused() -> Result<()> {
    if skip(&NEEDS) {
        return Ok(());
    }
    let lab = Lab::two_nodes()?;
    let client = lab.pod("node-a", "client")?;
    let server = lab.add(PodSpec::new("node-b", "server").port("main", 7000))?;
    let intruder = lab.outsider("node-a", "intruder")?;
    let mut mesh = Mesh::start(&lab)?;
    lab.peer_authentication(Level::Mesh, Mode::Strict)?;
    let first = in_containers(&lab, &mut mesh)?;
    let _echo = server.serve(&["echo", "--listen", "[::]:7000"])?;
    let to = server.addr(7000).to_string();
    let mut stream = client.start_app(&["dial", "stream", &to, "--pause-ms", "10"])?;
    stream.json_with("established")?;
    let mut again = client.start_app(&["dial", "again", &to, "--limit-ms", "5000"])?;

    let (mut next, mut retired) = (Vec::new(), Vec::new());
    for (node, first) in ["node-a", "node-b"].into_iter().zip(&first) {
        let container = first.beside(&lab, node)?;
        retired.push(container.succeed(&lab, &mut mesh, node)?);
        assert_ne!(container.pid()?, first.pid()?);
        // The one that drains is another container's process, found by its own id.
        let drains = eventually(Duration::from_secs(10), || {
            let metrics = mesh.agent(node).metrics().ok()?;
            (metrics.sum("mtls_predecessor_connections_open", &[]) == 1.0).then_some(())
        });
        drains.with_context(|| format!("{node}: {}", mesh.agent(node).log()))?;
        next.push(container);
    }
    let refused = intruder.app(&["dial", "echo", &to])?;
    assert_eq!(refused["ended"], "refused", "{refused}");
    again.say("stop")?;
    let answer = again.finish()?.success()?.json()?;
    assert!(answer["conversations"].as_u64() > Some(50), "{answer}");
    assert_eq!(answer["failures"], serde_json::json!({}), "{answer}");
    stream.say("stop")?;
    let answer = stream.finish()?.success()?.json()?;
    assert!(answer["ended"] == "eof" && answer["turns"].as_u64() > Some(50), "{answer}");
    // As kubelet ends the old pods, once the new ones are ready.
    for old in retired {
        old.terminate()?;
        old.finish_within(Duration::from_secs(10))?.success()?;
    }
    let answer = client.app(&["dial", "echo", &to])?;
    assert_eq!(answer["ended"], "eof", "{answer}");
    Ok(())
}

/// Starts an agent that lacks something, and waits until it says so: as its last words, or as why it is not ready.
fn says(lab: &Lab, mesh: &mut Mesh, container: &Container, expected: &str) -> Result<()> {
    let earlier = mesh.agent("node-a").log().len();
    container.launch(lab, mesh, "node-a")?;
    let agent = mesh.agent("node-a");
    let mut said = String::new();
    let named = eventually(Duration::from_secs(15), || {
        let is_over = !agent.alive();
        let unready = agent.get("/healthz/ready").ok().filter(|answer| answer.status != 200);
        let unready = unready.map(|answer| format!("not ready: {}", answer.body));
        said = agent.log().split_off(earlier) + &unready.unwrap_or_default();
        let is_trouble =
            |line: &str| ["WARN", "ERROR", "mtls:", "not ready:"].iter().any(|word| line.contains(word));
        let is_named = said.lines().any(|line| line.contains(expected) && is_trouble(line));
        (is_named || is_over).then_some(is_named)
    });
    agent.kill();
    anyhow::ensure!(named == Some(true), "it does not say {expected:?}, but: {said}");
    Ok(())
}

#[test]
fn without_one_of_them_it_names_what_is_missing() -> Result<()> {
    if skip(&NEEDS) {
        return Ok(());
    }
    let lab = Lab::two_nodes()?;
    lab.pod("node-a", "client")?;
    let mut mesh = Mesh::start(&lab)?;
    mesh.agent("node-a").kill();
    for capability in ["NET_ADMIN", "SYS_ADMIN", "SYS_PTRACE"] {
        let container = Container::agent(&lab, "node-a")?.without_capability(capability)?;
        says(&lab, &mut mesh, &container, &format!("capability CAP_{capability} is missing"))?;
    }
    let cgroup = lab.node("node-a")?.cgroup().to_string_lossy().into_owned();
    for (place, named) in [
        ("/etc/mtls", "cannot read configuration file /etc/mtls/node.config"),
        ("/sys/fs/bpf", "/sys/fs/bpf/node-a is not in a mounted BPF file system"),
        (&cgroup, "is not a cgroup2 directory"),
        ("/run/mtls", "/run/mtls"),
        ("/host/cni/bin", "/host/cni/bin"),
        ("/host/cni/conf", "/host/cni/conf"),
        ("/var/run/secrets/mtls/token", "/var/run/secrets/mtls/token/token"),
        ("/var/run/secrets/mtls/roots", "/var/run/secrets/mtls/roots/root-cert.pem"),
    ] {
        let container = Container::agent(&lab, "node-a")?.without_mount(place)?;
        says(&lab, &mut mesh, &container, named).context(place.to_owned())?;
    }
    // The same of what stands in for the cluster here: with its token an agent reads the mesh.
    let in_cluster = || Container::agent(&lab, "node-a")?.in_cluster(&lab);
    let container = in_cluster()?;
    let earlier = mesh.agent("node-a").log().len();
    container.launch(&lab, &mut mesh, "node-a")?;
    let agent = mesh.agent("node-a");
    let has_mesh = eventually(Duration::from_secs(15), || {
        agent.log().split_off(earlier).contains("the API server's objects are there").then_some(())
    });
    has_mesh.with_context(|| agent.log().split_off(earlier))?;
    agent.kill();
    drop(container);
    let container = in_cluster()?.without_mount(API_TOKEN)?;
    says(&lab, &mut mesh, &container, "no way to the Kubernetes API")?;
    // Nothing of this was for want of something else.
    let container = Container::agent(&lab, "node-a")?;
    container.launch(&lab, &mut mesh, "node-a")?;
    mesh.agent("node-a").await_ready()
}

/// Why SYS_PTRACE is among them: processes of pods have privileges that the agent has not.
#[test]
fn a_pods_namespace_shows_only_to_who_may_look_at_others() -> Result<()> {
    if skip(&["ip", "setpriv", "stat"]) {
        return Ok(());
    }
    let lab = Lab::two_nodes()?;
    let pod = lab.pod("node-a", "pod")?;
    let server = pod.serve(&["echo", "--listen", "[::]:7000"])?;
    let place = format!("/proc/{}/ns/net", server.pid());
    let look = |capabilities: &str| -> Result<bool> {
        let only = format!("--bounding-set=-all,{capabilities}");
        let node = lab.node("node-a")?;
        let looked = node.run("setpriv", &["--inh-caps=-all", &only, "stat", "--dereference", &place])?;
        Ok(looked.status.success())
    };
    assert!(look("+net_admin,+sys_admin,+sys_ptrace")?);
    assert!(!look("+net_admin,+sys_admin")?);
    Ok(())
}
