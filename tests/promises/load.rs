//! Much of everything: bytes, connections, and a reader that does not read.

use std::time::Duration;

use anyhow::Result;
use mtls_tests::Pod;
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

#[test]
fn connections_that_say_little_share_tunnels_and_a_fast_one_gets_its_own() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let _sum = scene.server.serve(&["sum", "--listen", "[::]:7001"])?;
    let wire = scene.lab.watch_wire()?;
    let [talk, bulk] = [7000, 7001].map(|port| scene.server.addr(port).to_string());
    let mut holder = scene.far.start_app(&["dial", "hold", &talk, "--connections", "200"])?;
    let open = holder.json_with("open")?;
    assert_eq!(open["echoed"], 1000, "{open}");
    let lanes = |scene: &mut Scene, node: &str, what: &str| -> Result<f64> {
        Ok(scene.mesh.agent(node).metrics()?.sum(&format!("mtls_lanes_{what}_total"), &[]))
    };
    for node in ["node-a", "node-b"] {
        let opened = lanes(&mut scene, node, "opened")?;
        assert!(opened > 150.0, "{node} says {opened}");
        assert_eq!(lanes(&mut scene, node, "left")?, 0.0);
    }
    // Beside those that are open there is one for each of these, which leave the lane they begin on.
    for _ in 0..8 {
        let sent = scene.far.app(&["dial", "upload", &bulk, "--bytes", "40000000"])?;
        assert!(sent["match"] == true && sent["ended"] == "eof", "{sent}");
    }
    for node in ["node-a", "node-b"] {
        let left = lanes(&mut scene, node, "left")?;
        assert!(left >= 1.0, "{node} says {left}");
    }
    holder.say("again")?;
    let answer = holder.finish()?.success()?.json()?;
    assert_eq!(answer["again"], 1000, "{answer}");
    let [out, into] = [("node-a", "outbound"), ("node-b", "inbound")].map(|(node, direction)| {
        let metrics = scene.mesh.agent(node).metrics();
        metrics.map(|metrics| metrics.sum("mtls_tunnels_opened_total", &[("direction", direction)]))
    });
    assert_eq!(out?, into?, "each tunnel is counted once at either end");
    let tunnels = wire.finish()?.encrypted(&scene.far, &scene.server)?.connections;
    assert!(tunnels < 30, "208 connections took {tunnels} tunnels");
    Ok(())
}

#[test]
fn what_moves_much_goes_on_in_nobodys_way_and_its_tunnel_comes_back() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let _sum = scene.server.serve(&["sum", "--listen", "[::]:7001"])?;
    let [talk, sum] = [7000, 7001].map(|port| scene.server.addr(port).to_string());
    let became_bulk = |scene: &mut Scene, node: &str, direction: &str| -> Result<f64> {
        let metrics = scene.mesh.agent(node).metrics()?;
        Ok(metrics.sum("mtls_bulk_connections_total", &[("direction", direction)]))
    };
    let upload = |scene: &mut Scene, from: &Pod, bytes: &str| -> Result<()> {
        let sent = from.app(&["dial", "upload", &sum, "--bytes", bytes])?;
        assert!(sent["match"] == true && sent["ended"] == "eof", "{sent}");
        // A short one between two, which must not count.
        assert_echoed(&scene.far.app(&["dial", "echo", &talk])?);
        Ok(())
    };
    let far = scene.far.clone();
    for _ in 0..3 {
        upload(&mut scene, &far, "3000000")?;
    }
    for (node, direction) in [("node-a", "outbound"), ("node-b", "inbound")] {
        assert_eq!(became_bulk(&mut scene, node, direction)?, 0.0, "{node}");
    }
    for _ in 0..6 {
        upload(&mut scene, &far, "150000000")?;
    }
    for (node, direction) in [("node-a", "outbound"), ("node-b", "inbound")] {
        assert_eq!(became_bulk(&mut scene, node, direction)?, 6.0, "{node}");
    }
    // Each of two data threads keeps a few, whichever thread they were on meanwhile.
    let opened = scene.mesh.agent("node-a").metrics()?;
    let opened = opened.sum("mtls_tunnels_opened_total", &[("direction", "outbound")]);
    assert!(opened <= 9.0, "18 connections one after the other took {opened} tunnels");
    // Between pods of one node there is no tunnel.
    let near = scene.near.clone();
    upload(&mut scene, &near, "150000000")?;
    assert_eq!(became_bulk(&mut scene, "node-b", "outbound")?, 1.0);
    Ok(())
}

#[test]
fn a_tunnel_has_room_for_what_a_fast_stream_sends_in_a_round_trip() -> Result<()> {
    needs!();
    const LEAST: u64 = 1 << 20;
    let scene = Scene::new()?;
    let _sum = scene.server.serve(&["sum", "--listen", "[::]:7001"])?;
    let to = scene.server.addr(7001).to_string();
    let upload = ["dial", "upload", &to, "--bytes", "150000000"];
    let uploads: Vec<_> = (0..4).map(|_| scene.far.start_app(&upload)).collect::<Result<_>>()?;
    for upload in uploads {
        let sent = upload.finish()?.success()?.json()?;
        assert!(sent["match"] == true, "{sent}");
    }
    // The tunnels stay open, idle.
    let sockets = scene.far.run("ss", &["-tinH", "state", "established", "dport = :15008"])?.stdout;
    let value = |line: &str, name: &str| -> Option<u64> {
        line.split_whitespace().find_map(|word| word.strip_prefix(name)?.parse().ok())
    };
    let busy = |line: &&str| value(line, "bytes_sent:").is_some_and(|sent| sent > 50_000_000);
    let windows: Vec<_> = sockets.lines().filter(busy).map(|line| value(line, "snd_wnd:")).collect();
    assert!(!windows.is_empty(), "{sockets}");
    assert!(windows.iter().all(|window| *window >= Some(LEAST)), "{windows:?}\n{sockets}");
    Ok(())
}

#[test]
fn nothing_is_shared_where_that_is_turned_off() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    for node in ["node-a", "node-b"] {
        let agent = scene.mesh.agent(node);
        agent.kill();
        agent.args().push("--share-tunnels=off".into());
        agent.start()?;
        agent.await_ready()?;
    }
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let to = scene.server.addr(7000).to_string();
    let mut holder = scene.far.start_app(&["dial", "hold", &to, "--connections", "50"])?;
    let open = holder.json_with("open")?;
    assert_eq!(open["echoed"], 250, "{open}");
    let metrics = scene.mesh.agent("node-a").metrics()?;
    assert_eq!(metrics.sum("mtls_lanes_opened_total", &[]), 0.0);
    assert!(metrics.sum("mtls_tunnels_opened_total", &[("direction", "outbound")]) >= 50.0);
    holder.say("again")?;
    holder.finish()?.success()?;
    Ok(())
}

fn resident(scene: &mut Scene, node: &str) -> Result<u64> {
    scene.mesh.agent(node).resident_bytes()
}
