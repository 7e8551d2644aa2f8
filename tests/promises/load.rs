//! Much of everything: bytes, connections, and a reader that does not read.

use std::time::Duration;

use anyhow::Result;
use mtls_tests::apps::Files;

use crate::{Scene, assert_echoed, needs};

/// What an agent may take beyond what it has before, however much is sent to a reader that does not read.
const BOUND: u64 = 48 << 20;

#[test]
fn a_slow_reader_holds_the_writer_and_little_memory() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    for client in [scene.far.clone(), scene.near.clone()] {
        let mut server = scene.server.serve(&["sum", "--listen", "[::]:7000", "--patient"])?;
        let before = [resident(&mut scene, "node-a")?, resident(&mut scene, "node-b")?];
        let to = scene.server.addr(7000).to_string();
        let writer = client.start_app(&["dial", "upload", &to, "--bytes", "300000000"])?;
        let stalled = writer.json_with("stalled")?["stalled"].as_u64();
        assert!(stalled < Some(150_000_000), "{stalled:?} bytes went somewhere");
        for (node, before) in ["node-a", "node-b"].into_iter().zip(before) {
            let now = resident(&mut scene, node)?;
            assert!(now < before + BOUND, "the agent of {node} grew from {before} to {now} bytes");
        }
        server.say("read")?;
        let answer = writer.finish()?.success()?.json()?;
        assert!(answer["match"] == true && answer["ended"] == "eof", "{answer}");
    }
    Ok(())
}

#[test]
fn ten_gigabytes_arrive_unchanged_over_one_connection() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let files = Files::start(&scene.server)?;
    let session = files.send(&scene.far, 10_000_000_000)?;
    assert_eq!(session.client_seen, scene.far.ip());
    println!("{session:?}");
    let line = scene.mesh.agent("node-b").access_log_line("transfer", |line| line["path"] == "tunnel")?;
    let bytes =
        [&line["bytes_sent"], &line["bytes_received"]].map(|count| count.as_u64().unwrap_or_default());
    assert_eq!(bytes.iter().max(), Some(&10_000_000_000), "{line}");
    let resident = resident(&mut scene, "node-b")?;
    assert!(resident < 200 << 20, "{resident} bytes");
    Ok(())
}

#[test]
fn two_thousand_connections_at_once() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let to = scene.server.addr(7000).to_string();
    for client in [scene.far.clone(), scene.near.clone()] {
        let mut holder = client.start_app(&["dial", "hold", &to, "--connections", "2000"])?;
        let open = holder.json_with("open")?;
        assert_eq!((&open["open"], &open["echoed"]), (&2000.into(), &10_000.into()), "{open}");
        let held = scene.mesh.agent("node-b").metrics()?.sum("mtls_connections_open", &[]);
        assert!(held >= 2000.0, "the agent knows {held}");
        holder.say("again")?;
        let answer = holder.finish()?.success()?.json()?;
        assert_eq!(answer["again"], 10_000, "{answer}");
    }
    let gone = mtls_tests::eventually(Duration::from_secs(10), || {
        let open = scene.mesh.agent("node-b").metrics().ok()?.sum("mtls_connections_open", &[]);
        (open == 0.0).then_some(())
    });
    assert!(gone.is_some(), "connections stay open in the books");
    Ok(())
}

#[test]
fn ended_connections_leave_a_tunnel_for_the_next() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let wire = scene.lab.watch_wire()?;
    let to = scene.server.addr(7000).to_string();
    for _ in 0..20 {
        assert_echoed(&scene.far.app(&["dial", "echo", &to])?);
    }
    let tunnels = wire.finish()?.encrypted(&scene.far, &scene.server)?.connections;
    assert!(tunnels < 10, "twenty connections took {tunnels} tunnels");
    let reused = scene.mesh.agent("node-a").metrics()?.sum("mtls_tunnels_reused_total", &[]);
    assert!(reused > 10.0, "{reused}");
    Ok(())
}

fn resident(scene: &mut Scene, node: &str) -> Result<u64> {
    scene.mesh.agent(node).resident_bytes()
}
