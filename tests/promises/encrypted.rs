//! No plaintext on the wire between two enrolled workloads; and nobody else is touched.

use std::sync::Arc;

use anyhow::Result;
use mtls_tests::{MARKER, Options};

use crate::{Scene, address, assert_echoed, needs};

#[test]
fn no_plaintext_on_the_wire() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let wire = scene.lab.watch_wire()?;
    for to in [scene.server.addr(7000), scene.server.addr6(7000)] {
        assert_echoed(&scene.far.app(&[
            "dial",
            "echo",
            &to.to_string(),
            "--message",
            MARKER,
            "--times",
            "20",
        ])?);
    }
    let encrypted = wire.finish()?.encrypted(&scene.far, &scene.server)?;
    assert!(encrypted.bytes > 2 * 2 * 20 * MARKER.len() as u64, "{encrypted:?}");
    assert_eq!(encrypted.group, "X25519MLKEM768");
    assert_ne!(encrypted.cipher, "unknown");
    for node in ["node-a", "node-b"] {
        let line = scene.mesh.agent(node).access_log_line("tunnel", |line| line["path"] == "tunnel")?;
        assert_eq!(line["source_identity"], format!("spiffe://{}", scene.far.principal()), "{line}");
        assert_eq!(line["destination_identity"], format!("spiffe://{}", scene.server.principal()), "{line}");
    }
    Ok(())
}

#[test]
fn bytes_of_one_node_never_reach_its_network() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let outsider = scene.lab.outsider("node-b", "outsider")?;
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let _plain = outsider.serve(&["echo", "--listen", "[::]:7000"])?;
    let network = scene.lab.watch_pod(&scene.near)?;
    let to = scene.server.addr(7000).to_string();
    assert_echoed(&scene.near.app(&["dial", "echo", &to, "--message", MARKER])?);
    // The capture would see it: this one goes to a pod that isn't enrolled.
    assert_echoed(&scene.near.app(&[
        "dial",
        "echo",
        &outsider.addr(7000).to_string(),
        "--message",
        MARKER,
    ])?);
    let seen = network.finish()?;
    assert_eq!(seen.between(&scene.near, &scene.server).count(), 0, "{seen:?}");
    assert_eq!(seen.between(&scene.near, &outsider).map(|flow| flow.markers).sum::<u64>(), 2);
    let line = scene.mesh.agent("node-b").access_log_line("same node", |line| line["path"] == "same_node")?;
    assert_eq!(line["source_identity"], format!("spiffe://{}", scene.near.principal()), "{line}");
    Ok(())
}

#[test]
fn one_node_can_be_told_to_encrypt_too() -> Result<()> {
    needs!();
    let scene = Scene::with(&Options { same_node: "encrypt", ..Options::default() })?;
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let network = scene.lab.watch_pod(&scene.server)?;
    let to = scene.server.addr(7000).to_string();
    assert_echoed(&scene.near.app(&["dial", "echo", &to, "--message", MARKER])?);
    network.finish()?.encrypted(&scene.near, &scene.server)?;
    Ok(())
}

#[test]
fn tunnels_have_the_hosts_congestion_control_unless_told_otherwise() -> Result<()> {
    needs!();
    let usual = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control")?;
    for (flags, expected) in [(&[][..], usual.trim()), (&["--tunnel-congestion", "reno"], "reno")] {
        let node_flags = flags.iter().map(|&flag| flag.to_owned()).collect();
        let scene = Scene::with(&Options { node_flags, ..Options::default() })?;
        let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
        assert_echoed(&scene.far.app(&["dial", "echo", &scene.server.addr(7000).to_string()])?);
        // The tunnel stays open, idle, at both ends.
        for (pod, filter) in [(&scene.far, "dport = :15008"), (&scene.server, "sport = :15008")] {
            let sockets = pod.run("ss", &["-tinH", "state", "established", filter])?.stdout;
            let words: Vec<_> = sockets.split_whitespace().collect();
            assert!(words.contains(&expected), "{expected}:\n{sockets}");
            assert!(expected == "reno" || !words.contains(&"reno"), "{expected}:\n{sockets}");
        }
    }
    Ok(())
}

#[test]
fn traffic_of_and_to_others_is_left_alone() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let outsider = scene.lab.outsider("node-b", "outsider")?;
    let stranger = scene.lab.outsider("node-a", "stranger")?;
    let plain = outsider.serve(&["echo", "--listen", "[::]:7000"])?;
    let to = outsider.addr(7000);
    for client in [&scene.far, &stranger] {
        let wire = scene.lab.watch_wire()?;
        let before = plain.all_json_with("accepted").len();
        let answer = client.app(&["dial", "echo", &to.to_string(), "--message", MARKER])?;
        assert_echoed(&answer);
        let seen = wire.finish()?;
        assert_eq!(seen.between(client, &outsider).map(|flow| flow.markers).sum::<u64>(), 2, "{seen:?}");
        let accepted = address(&plain.json_after("accepted", before)?["accepted"])?;
        assert_eq!(accepted.ip(), client.ip());
        // Nobody stands between two pods that are not enrolled.
        if !Arc::ptr_eq(client, &scene.far) {
            assert_eq!(accepted, address(&answer["local"])?);
        }
        assert_eq!(address(&answer["peer"])?, to);
    }
    // Its own node's address is outside the mesh: the kernel's ordinary path, which the agent never sees.
    let node = scene.lab.node("node-b")?;
    let mut probe = node.command(mtls_tests::lab_app()?);
    probe.args(["serve", "echo", "--listen", "0.0.0.0:7100"]);
    let kubelet = mtls_tests::Running::start(probe)?;
    kubelet.json_with("listening")?;
    let lines = scene.mesh.agent("node-a").access_log().len();
    assert_echoed(&scene.far.app(&["dial", "echo", &format!("{}:7100", node.ip())])?);
    std::thread::sleep(std::time::Duration::from_millis(200));
    assert_eq!(scene.mesh.agent("node-a").access_log().len(), lines);
    Ok(())
}
