//! PeerAuthentication: who gets in without an identity, at which level, and how soon a change counts.

use std::time::Duration;

use anyhow::Result;
use mtls_tests::{Level, MARKER, Mode, eventually};

use crate::{Scene, assert_echoed, assert_refused, needs};

#[test]
fn strict_refuses_a_stranger_at_once_and_permissive_serves_and_counts_him() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let intruders =
        [scene.lab.outsider("node-a", "far-intruder")?, scene.lab.outsider("node-b", "near-intruder")?];
    let echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let addresses = [scene.server.addr(7000).to_string(), scene.server.addr6(7000).to_string()];
    for intruder in &intruders {
        for to in &addresses {
            assert_echoed(&intruder.app(&["dial", "echo", to])?);
        }
    }
    let counted = eventually(Duration::from_secs(5), || {
        let metrics = scene.mesh.agent("node-b").metrics().ok()?;
        let labels =
            [("destination_workload", "server"), ("destination_port", "7000"), ("outcome", "accepted")];
        (metrics.sum("mtls_plaintext_connections_total", &labels) == 4.0).then_some(())
    });
    assert!(counted.is_some(), "{:?}", scene.mesh.agent("node-b").get("/metrics"));

    scene.lab.peer_authentication(Level::Mesh, Mode::Strict)?;
    refused_soon(&scene, &intruders[0], &addresses[0])?;
    // What was served while it was permissive.
    let before = echo.all_json_with("accepted").len();
    for intruder in &intruders {
        for to in &addresses {
            let answer = intruder.app(&["dial", "echo", to])?;
            assert_eq!(answer["ended"], "refused", "{answer}");
            assert!(answer["ms"].as_f64() < Some(300.0), "not an RST but a silence: {answer}");
        }
    }
    let counted = eventually(Duration::from_secs(5), || {
        let metrics = scene.mesh.agent("node-b").metrics().ok()?;
        let labels =
            [("destination_workload", "server"), ("destination_port", "7000"), ("outcome", "refused")];
        (metrics.sum("mtls_plaintext_connections_total", &labels) >= 4.0).then_some(())
    });
    assert!(counted.is_some(), "{:?}", scene.mesh.agent("node-b").get("/metrics"));
    let mut members = Vec::new();
    for client in scene.clients() {
        for to in &addresses {
            let answer = client.app(&["dial", "echo", to])?;
            assert_echoed(&answer);
            members.push(crate::address(&answer["local"])?);
        }
    }
    // The application has seen its members, each once, and no intruder between them.
    for (position, member) in members.iter().enumerate() {
        let accepted = echo.json_after("accepted", before + position)?;
        assert_eq!(crate::address(&accepted["accepted"])?, *member);
    }
    Ok(())
}

#[test]
fn the_narrower_level_wins() -> Result<()> {
    needs!();
    let scene = Scene::new()?;
    let intruder = scene.lab.outsider("node-a", "intruder")?;
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let _other = scene.server.serve(&["echo", "--listen", "[::]:7001"])?;
    let (main, other) = (scene.server.addr(7000).to_string(), scene.server.addr(7001).to_string());

    scene.lab.peer_authentication(Level::Mesh, Mode::Strict)?;
    refused_soon(&scene, &intruder, &main)?;
    scene.lab.peer_authentication(Level::Namespace("shop"), Mode::Permissive)?;
    served_soon(&intruder, &main)?;
    scene.lab.peer_authentication(Level::Workload(&scene.server), Mode::Strict)?;
    refused_soon(&scene, &intruder, &main)?;
    scene.lab.peer_authentication(Level::Ports(&scene.server, &[(7001, Mode::Permissive)]), Mode::Strict)?;
    served_soon(&intruder, &other)?;
    assert_refused(&intruder.app(&["dial", "echo", &main])?);
    scene.lab.peer_authentication(Level::Ports(&scene.server, &[(7001, Mode::Strict)]), Mode::Permissive)?;
    refused_soon(&scene, &intruder, &other)?;
    served_soon(&intruder, &main)?;
    // Whatever the mode, workloads of the mesh get through.
    for client in scene.clients() {
        assert_echoed(&client.app(&["dial", "echo", &main])?);
        assert_echoed(&client.app(&["dial", "echo", &other])?);
    }
    Ok(())
}

#[test]
fn disable_is_honoured_by_clients_too() -> Result<()> {
    needs!();
    let scene = Scene::new()?;
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let to = scene.server.addr(7000).to_string();
    let plain = || -> Result<u64> {
        let wire = scene.lab.watch_wire()?;
        assert_echoed(&scene.far.app(&["dial", "echo", &to, "--message", MARKER])?);
        Ok(wire.finish()?.markers())
    };
    assert_eq!(plain()?, 0);
    scene.lab.peer_authentication(Level::Workload(&scene.server), Mode::Disable)?;
    let in_the_clear = eventually(Duration::from_secs(5), || plain().ok().filter(|markers| *markers > 0));
    assert_eq!(in_the_clear, Some(2));
    Ok(())
}

#[test]
fn a_change_to_strict_resets_open_plaintext_and_nothing_else() -> Result<()> {
    needs!();
    let scene = Scene::new()?;
    let intruder = scene.lab.outsider("node-a", "intruder")?;
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let to = scene.server.addr(7000).to_string();
    let stream = ["dial", "stream", &to, "--pause-ms", "20"];
    let plain = intruder.start_app(&stream)?;
    plain.json_with("established")?;
    let mut members = Vec::new();
    for client in scene.clients() {
        let member = client.start_app(&stream)?;
        member.json_with("established")?;
        members.push(member);
    }
    scene.lab.peer_authentication(Level::Mesh, Mode::Strict)?;
    let ended = plain.json_with("ended")?;
    assert_eq!(ended["ended"], "reset", "{ended}");
    for mut member in members {
        assert!(member.alive());
        member.say("stop")?;
        let answer = member.finish()?.success()?.json()?;
        assert_eq!(answer["ended"], "eof", "{answer}");
    }
    Ok(())
}

#[test]
fn the_kubelet_may_probe_a_strict_pod_and_nobody_else() -> Result<()> {
    needs!();
    let scene = Scene::new()?;
    scene.lab.peer_authentication(Level::Mesh, Mode::Strict)?;
    let intruder = scene.lab.outsider("node-b", "intruder")?;
    let echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let own = scene.lab.node("node-b")?;
    let pods = own.cgroup().join("pods/host-network");
    std::fs::create_dir_all(&pods)?;
    let pods = pods.to_string_lossy();
    scene.lab.write_text(
        "pod-outside-host-network.yaml",
        &format!(
            "apiVersion: v1\nkind: Pod\n\
             metadata: {{name: host-network, namespace: outside, annotations: {{mtls.dev/cgroup: {pods}}}}}\n\
             spec: {{nodeName: node-b, hostNetwork: true, serviceAccountName: any}}\n\
             status: {{phase: Running, podIP: {}}}\n",
            own.ip()
        ),
    )?;
    for (to, from) in [(scene.server.addr(7000), "10.30.2.1"), (scene.server.addr6(7000), "fd00:30:2::1")] {
        let to = to.to_string();
        refused_soon(&scene, &intruder, &to)?;
        let before = echo.all_json_with("accepted").len();
        assert_echoed(&own.app(&["dial", "echo", &to])?);
        let probe = echo.json_after("accepted", before)?;
        assert_eq!(
            crate::address(&probe["accepted"])?.ip().to_string(),
            from,
            "the probe's own source address"
        );
        // The other node's kubelet has no business here, nor has a neighbour.
        assert_refused(&scene.lab.node("node-a")?.app(&["dial", "echo", &to])?);
        assert_refused(&intruder.app(&["dial", "echo", &to])?);
        // A pod on the host's network shares its address but not its trust.
        assert_refused(&own.app(&["dial", "echo", &to, "--cgroup", &pods])?);
    }
    Ok(())
}

/// Waits until a policy just written refuses an intruder.
fn refused_soon(scene: &Scene, intruder: &mtls_tests::Pod, to: &str) -> Result<()> {
    let refused = eventually(Duration::from_secs(5), || {
        let answer = intruder.app(&["dial", "echo", to]).ok()?;
        (answer["ended"] == "refused").then_some(())
    });
    assert!(refused.is_some(), "{to} still serves {} in {}", intruder.name(), scene.lab.id());
    Ok(())
}

fn served_soon(intruder: &mtls_tests::Pod, to: &str) -> Result<()> {
    let served = eventually(Duration::from_secs(5), || {
        let answer = intruder.app(&["dial", "echo", to]).ok()?;
        (answer["ended"] == "eof").then_some(())
    });
    assert!(served.is_some(), "{to} does not serve {}", intruder.name());
    Ok(())
}
