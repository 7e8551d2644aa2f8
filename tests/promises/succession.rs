//! One agent takes another's place on its node: no connection is refused, and what is open goes on.

use std::time::Duration;

use anyhow::{Context, Result};
use mtls_tests::{Level, Mode, Options, eventually};

use crate::{Scene, assert_echoed, assert_refused, needs};

#[test]
fn no_new_connection_is_refused_while_agents_are_replaced_and_old_ones_go_on() -> Result<()> {
    needs!();
    let mut scene = Scene::with(&Options { drain_seconds: 20, ..Options::default() })?;
    scene.lab.peer_authentication(Level::Mesh, Mode::Strict)?;
    let intruder = scene.lab.outsider("node-a", "intruder")?;
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let to = scene.server.addr(7000).to_string();
    let refused = eventually(Duration::from_secs(5), || {
        (intruder.app(&["dial", "echo", &to]).ok()?["ended"] == "refused").then_some(())
    });
    refused.context("STRICT does not come into force")?;
    let (mut again, mut streams) = (Vec::new(), Vec::new());
    for client in scene.clients() {
        let stream = client.start_app(&["dial", "stream", &to, "--pause-ms", "10"])?;
        stream.json_with("established")?;
        streams.push(stream);
        again.push(client.start_app(&["dial", "again", &to, "--limit-ms", "5000"])?);
    }
    std::thread::sleep(Duration::from_millis(500));
    let mut retired = Vec::new();
    for node in ["node-b", "node-a"] {
        let before = scene.mesh.agent(node).pid();
        retired.push((node, scene.mesh.agent(node).replace()?));
        assert_ne!(scene.mesh.agent(node).pid(), before);
        std::thread::sleep(Duration::from_millis(500));
    }
    // What the old agents still carry can be seen at the new ones: a stream of each client, twice on the shared node.
    for (node, open) in [("node-a", 1.0), ("node-b", 2.0)] {
        let agent = scene.mesh.agent(node);
        let seen = eventually(Duration::from_secs(10), || {
            let metrics = agent.metrics().ok()?;
            (metrics.sum("mtls_predecessor_connections_open", &[]) == open).then_some(())
        });
        let status = agent.status(&[])?;
        assert!(seen.is_some() && status.contains("which drains"), "{node}:\n{status}");
    }
    assert_refused(&intruder.app(&["dial", "echo", &to])?);

    // As kubelet does when the new one is ready: the old ones drain, and still nothing is refused.
    for (_, old) in &retired {
        old.terminate()?;
    }
    std::thread::sleep(Duration::from_secs(1));
    for (node, old) in &mut retired {
        assert!(old.alive(), "the retired agent of {node} did not wait for its streams");
    }
    for mut again in again {
        again.say("stop")?;
        let answer = again.finish()?.success()?.json()?;
        assert!(answer["conversations"].as_u64() > Some(100), "{answer}");
        assert_eq!(answer["failures"], serde_json::json!({}), "{answer}");
    }
    for mut stream in streams {
        stream.say("stop")?;
        let answer = stream.finish()?.success()?.json()?;
        assert!(answer["ended"] == "eof" && answer["turns"].as_u64() > Some(100), "{answer}");
    }
    for (node, old) in retired {
        old.finish_within(Duration::from_secs(10))?.success().with_context(|| node.to_owned())?;
        let agent = scene.mesh.agent(node);
        let gone = eventually(Duration::from_secs(5), || {
            (!agent.status(&[]).ok()?.contains("which drains")).then_some(())
        });
        assert!(gone.is_some(), "{:?}", agent.status(&[]));
    }
    Ok(())
}

#[test]
fn an_agent_whose_successor_fails_goes_on() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let to = scene.server.addr(7000).to_string();
    scene.mesh.stop_ca();
    // Without an authority the new one never has the certificates that the old one has.
    let agent = scene.mesh.agent("node-b");
    let newcomer = agent.start_another()?;
    let waiting = eventually(Duration::from_secs(10), || {
        let answer = agent.get("/healthz/ready").ok()?;
        (answer.status == 503 && answer.body.contains("the agent that runs here has a certificate"))
            .then_some(())
    });
    waiting.with_context(|| format!("{:?}\n{}", agent.get("/healthz/ready"), agent.log()))?;
    for client in scene.clients() {
        assert_echoed(&client.app(&["dial", "echo", &to])?);
    }
    drop(newcomer);
    let agent = scene.mesh.agent("node-b");
    agent.await_ready_within(Duration::from_secs(10))?;
    for client in scene.clients() {
        assert_echoed(&client.app(&["dial", "echo", &to])?);
    }
    Ok(())
}

/// kubelet ends the old pod once the new one is ready, whoever of the two answers its probe.
#[test]
fn while_a_successor_waits_for_the_api_server_nobody_is_taken_for_it() -> Result<()> {
    needs!();
    let mut scene = Scene::with(&Options { kubernetes: true, ..Options::default() })?;
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let to = scene.server.addr(7000).to_string();
    let mut again = scene.far.start_app(&["dial", "again", &to, "--limit-ms", "5000"])?;
    scene.lab.api_server()?.go_away();
    let agent = scene.mesh.agent("node-b");
    let newcomer = agent.start_another()?;
    let waits = |answer: &mtls_tests::Response| answer.status == 503 && answer.body.contains("mesh");
    let waiting = eventually(Duration::from_secs(10), || agent.get("/healthz/ready").ok().filter(waits));
    waiting.with_context(|| format!("{:?}\n{}", agent.get("/healthz/ready"), agent.log()))?;
    assert_eq!(agent.get("/healthz/live")?.status, 200, "it waits, and is not to be started anew");
    assert_echoed(&scene.near.app(&["dial", "echo", &to])?);

    // It is given up: the old one answers for itself again.
    drop(newcomer);
    scene.mesh.agent("node-b").await_ready_within(Duration::from_secs(10))?;
    // The next has more luck.
    scene.lab.api_server()?.come_back();
    let retired = scene.mesh.agent("node-b").replace()?;
    retired.terminate()?;
    assert_echoed(&scene.near.app(&["dial", "echo", &to])?);
    again.say("stop")?;
    let answer = again.finish()?.success()?.json()?;
    assert!(answer["conversations"].as_u64() > Some(50), "{answer}");
    assert_eq!(answer["failures"], serde_json::json!({}), "{answer}");
    Ok(())
}

#[test]
fn a_retired_agent_without_a_successor_ends_so_that_it_can_start_anew() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let to = scene.server.addr(7000).to_string();
    let retired = scene.mesh.agent("node-b").replace()?;
    scene.mesh.agent("node-b").kill();
    let ended = retired.finish_within(Duration::from_secs(20))?;
    assert!(!ended.status.success(), "{ended:?}");
    for client in scene.clients() {
        assert!(client.app(&["dial", "echo", &to, "--limit-ms", "2000"])?["echoed"].is_null());
    }
    scene.mesh.agent("node-b").start()?;
    for client in scene.clients() {
        assert_echoed(&client.app(&["dial", "echo", &to])?);
    }
    Ok(())
}
