//! When things die: connections end as failures, nothing falls open, and what comes back works again.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use anyhow::Result;
use mtls_tests::{Level, MARKER, Mode, Options, eventually};

use crate::{Scene, assert_echoed, assert_refused, needs};

#[test]
fn a_killed_agent_leaves_strict_in_force_until_the_next_takes_over() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    scene.lab.peer_authentication(Level::Mesh, Mode::Strict)?;
    let intruder = scene.lab.outsider("node-a", "intruder")?;
    let echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let to = scene.server.addr(7000).to_string();
    await_refusal(&intruder, &to);
    let earlier = echo.all_json_with("accepted").len();
    let wire = scene.lab.watch_wire()?;
    let (done, tries) = (AtomicBool::new(false), AtomicU32::new(0));
    let attacked = std::thread::scope(|scope| -> Result<()> {
        let attacker = scope.spawn(|| {
            while !done.load(Ordering::Acquire) {
                let answer = intruder.app(&["dial", "echo", &to, "--limit-ms", "500"])?;
                anyhow::ensure!(answer["echoed"].is_null(), "the intruder was served: {answer}");
                tries.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        });
        let result = die_and_return(&mut scene, &to);
        done.store(true, Ordering::Release);
        attacker.join().map_err(|_| anyhow::anyhow!("the attacker panicked"))??;
        result
    });
    attacked?;
    assert!(tries.load(Ordering::Relaxed) > 20, "only {tries:?} attempts");
    let seen = wire.finish()?;
    assert_eq!(seen.markers(), 0);
    seen.encrypted(&scene.far, &scene.server)?;
    for accepted in &echo.all_json_with("accepted")[earlier..] {
        let ip = crate::address(&accepted["accepted"])?.ip();
        assert!([scene.far.ip(), scene.near.ip()].contains(&ip), "{accepted}");
    }
    Ok(())
}

fn die_and_return(scene: &mut Scene, to: &str) -> Result<()> {
    let say = ["dial", "echo", to, "--message", MARKER, "--limit-ms", "3000"];
    for client in scene.clients() {
        assert_echoed(&client.app(&say)?);
    }
    scene.mesh.agent("node-b").kill();
    // Neither a far client, whose peer is gone, nor a near one, whose own agent is gone, gets through in any way.
    for client in scene.clients() {
        let answer = client.app(&say)?;
        assert!(answer["echoed"].is_null() && answer["ended"] != "eof", "{answer}");
        assert!(answer["ms"].as_f64() < Some(3500.0), "{answer}");
    }
    std::thread::sleep(Duration::from_millis(300));
    scene.mesh.agent("node-b").start()?;
    for client in scene.clients() {
        assert_echoed(&client.app(&say)?);
    }
    // The client's side: its agent gone, nothing leaves the pod in the clear.
    scene.mesh.agent("node-a").kill();
    assert_refused(&scene.far.app(&say)?);
    scene.mesh.agent("node-a").start()?;
    assert_echoed(&scene.far.app(&say)?);
    Ok(())
}

#[test]
fn an_agent_killed_again_and_again_comes_back() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let to = scene.server.addr(7000).to_string();
    for _ in 0..4 {
        for node in ["node-a", "node-b"] {
            scene.mesh.agent(node).kill();
            scene.mesh.agent(node).start()?;
            // The first connection after each return works, whatever tunnels the peer still had.
            for client in scene.clients() {
                assert_echoed(&client.app(&["dial", "echo", &to])?);
            }
        }
    }
    Ok(())
}

#[test]
fn streams_through_a_killed_agent_end_as_failures() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let to = scene.server.addr(7000).to_string();
    let mut waiting = Vec::new();
    for client in scene.clients() {
        let stream = client.start_app(&["dial", "wait", &to])?;
        stream.json_with("established")?;
        waiting.push(stream);
    }
    scene.mesh.agent("node-b").kill();
    for stream in waiting {
        let answer = stream.json_with("ended")?;
        assert_eq!(answer["ended"], "reset", "{answer}");
    }
    let ended =
        eventually(Duration::from_secs(5), || Some(echo.all_json_with("ended")).filter(|all| all.len() == 2));
    for ended in ended.expect("the server keeps connections of a dead agent") {
        assert_eq!(ended["ended"], "reset", "{ended}");
    }
    Ok(())
}

#[test]
fn sigterm_lets_open_streams_finish_and_takes_no_new_ones() -> Result<()> {
    needs!();
    let mut scene = Scene::with(&Options { drain_seconds: 20, ..Options::default() })?;
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let to = scene.server.addr(7000).to_string();
    let mut stream = scene.far.start_app(&["dial", "stream", &to, "--pause-ms", "10"])?;
    stream.json_with("established")?;
    scene.mesh.agent("node-a").terminate()?;
    let refused = eventually(Duration::from_secs(5), || {
        let answer = scene.far.app(&["dial", "echo", &to, "--limit-ms", "1000"]).ok()?;
        answer["echoed"].is_null().then_some(answer)
    });
    let refused = refused.expect("a draining agent takes new connections");
    assert_ne!(refused["ended"], "eof", "{refused}");
    std::thread::sleep(Duration::from_millis(500));
    assert!(scene.mesh.agent("node-a").alive(), "the agent did not wait for its stream");
    stream.say("stop")?;
    let answer = stream.finish()?.success()?.json()?;
    assert!(answer["ended"] == "eof" && answer["turns"].as_u64() > Some(20), "{answer}");
    scene.mesh.agent("node-a").await_end(Duration::from_secs(10))
}

#[test]
fn sigterm_ends_streams_that_outlast_the_drain() -> Result<()> {
    needs!();
    let mut scene = Scene::with(&Options { drain_seconds: 1, ..Options::default() })?;
    scene.lab.peer_authentication(Level::Mesh, Mode::Strict)?;
    let intruder = scene.lab.outsider("node-a", "intruder")?;
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let to = scene.server.addr(7000).to_string();
    await_refusal(&intruder, &to);
    let stream = scene.far.start_app(&["dial", "wait", &to])?;
    stream.json_with("established")?;
    scene.mesh.agent("node-b").terminate()?;
    scene.mesh.agent("node-b").await_end(Duration::from_secs(8))?;
    let answer = stream.json_with("ended")?;
    assert_eq!(answer["ended"], "reset", "{answer}");
    // An agent that was stopped properly leaves STRICT in force as well.
    assert_refused(&intruder.app(&["dial", "echo", &to])?);
    scene.mesh.agent("node-b").start()?;
    assert_echoed(&scene.far.app(&["dial", "echo", &to])?);
    assert_refused(&intruder.app(&["dial", "echo", &to])?);
    Ok(())
}

#[test]
fn a_destination_pod_that_vanishes_ends_its_streams() -> Result<()> {
    needs!();
    let scene = Scene::new()?;
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let to = scene.server.addr(7000).to_string();
    let mut streams = Vec::new();
    for client in scene.clients() {
        let stream = client.start_app(&["dial", "wait", &to])?;
        stream.json_with("established")?;
        streams.push(stream);
    }
    scene.server.cut()?;
    scene.lab.forget(&scene.server)?;
    for stream in streams {
        let ended = stream.line_within("an end", Duration::from_secs(10), |line| {
            serde_json::from_str::<serde_json::Value>(line).ok().filter(|value| value.get("ended").is_some())
        })?;
        assert_eq!(ended["ended"], "reset", "{ended}");
    }
    Ok(())
}

#[test]
fn a_server_that_dies_ends_its_streams() -> Result<()> {
    needs!();
    let scene = Scene::new()?;
    let to = scene.server.addr(7000).to_string();
    for client in scene.clients() {
        let mut server = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
        let stream = client.start_app(&["dial", "wait", &to])?;
        stream.json_with("established")?;
        assert!(server.alive());
        drop(server);
        // The kernel ends a dead process's connections cleanly, on plain TCP too.
        let ended = stream.json_with("ended")?;
        assert_eq!(ended["ended"], "eof", "{ended}");
        assert_refused(&client.app(&["dial", "echo", &to])?);
    }
    Ok(())
}

/// Waits until STRICT, just written, is in force.
fn await_refusal(intruder: &mtls_tests::Pod, to: &str) {
    let refused = eventually(Duration::from_secs(5), || {
        let answer = intruder.app(&["dial", "echo", to]).ok()?;
        (answer["ended"] == "refused").then_some(())
    });
    assert!(refused.is_some(), "STRICT does not come into force");
}
