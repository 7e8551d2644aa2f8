//! Services: the agent resolves their addresses, so that no other load balancer is needed between enrolled pods.

use std::collections::HashSet;
use std::time::Duration;

use anyhow::Result;
use mtls_tests::{Lab, MARKER, Mesh, PodSpec, eventually};
use serde_json::json;

use crate::{Scene, address, assert_echoed, assert_refused, needs};

#[test]
fn a_cluster_ip_leads_to_all_its_endpoints() -> Result<()> {
    needs!();
    let lab = Lab::two_nodes()?;
    let client = lab.pod("node-a", "client")?;
    let near = lab.add(PodSpec::new("node-a", "near").port("web", 7000))?;
    let far = lab.add(PodSpec::new("node-b", "far").port("web", 7000))?;
    let by_number = lab.service("by-number", &[&near, &far], 80, &json!(7000))?;
    let by_name = lab.service("by-name", &[&far], 81, &json!("web"))?;
    let mut mesh = Mesh::start(&lab)?;
    let servers =
        [near.serve(&["echo", "--listen", "[::]:7000"])?, far.serve(&["echo", "--listen", "[::]:7000"])?];
    let wire = lab.watch_wire()?;
    for _ in 0..24 {
        let answer = client.app(&["dial", "echo", &by_number.to_string(), "--message", MARKER])?;
        assert_echoed(&answer);
        assert_eq!(address(&answer["peer"])?, by_number, "the client sees what it dialled: {answer}");
    }
    let count = || servers.each_ref().map(|server| server.all_json_with("accepted").len());
    let all = eventually(Duration::from_secs(5), || {
        Some(count()).filter(|counts| counts.iter().sum::<usize>() == 24)
    });
    let counts = all.unwrap_or_else(count);
    assert!(counts.iter().all(|count| *count >= 2) && counts.iter().sum::<usize>() == 24, "{counts:?}");
    assert_echoed(&client.app(&["dial", "echo", &by_name.to_string()])?);
    servers[1].json_after("accepted", counts[1])?;
    let clients: HashSet<_> = servers
        .iter()
        .flat_map(|server| server.all_json_with("accepted"))
        .map(|line| address(&line["accepted"]).map(|address| address.ip()))
        .collect::<Result<_>>()?;
    assert_eq!(clients, HashSet::from([client.ip()]));
    wire.finish()?.encrypted(&client, &far)?;
    let line = mesh.agent("node-a").access_log_line("service", |line| line["service"] == "shop/by-name")?;
    assert_eq!(line["original_destination"], by_name.to_string(), "{line}");
    Ok(())
}

#[test]
fn endpoints_come_and_go_and_none_is_a_refusal() -> Result<()> {
    needs!();
    let scene = Scene::new()?;
    let echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let service = scene.lab.service("shop-front", &[&scene.server], 80, &json!(7000))?;
    let to = service.to_string();
    let reached = || {
        let answer = scene.far.app(&["dial", "echo", &to]).ok()?;
        (answer["ended"] == "eof").then_some(())
    };
    assert!(eventually(Duration::from_secs(5), reached).is_some(), "a new Service does not work");
    // A port it does not have.
    let wrong = std::net::SocketAddr::new(service.ip(), 81).to_string();
    assert_refused(&scene.far.app(&["dial", "echo", &wrong])?);
    scene.lab.endpoints("shop-front", &[], &json!(7000))?;
    let refused = eventually(Duration::from_secs(5), || {
        let answer = scene.far.app(&["dial", "echo", &to]).ok()?;
        (answer["ended"] == "refused" || answer["ended"] == "reset").then_some(())
    });
    assert!(refused.is_some(), "a Service without endpoints leads somewhere");
    let before = echo.all_json_with("accepted").len();
    scene.lab.endpoints("shop-front", &[&scene.server], &json!(7000))?;
    assert!(eventually(Duration::from_secs(5), reached).is_some(), "its endpoint came back in vain");
    echo.json_after("accepted", before)?;
    Ok(())
}

#[test]
fn headless_services_and_pod_addresses_need_nothing() -> Result<()> {
    needs!();
    let scene = Scene::new()?;
    scene.lab.headless_service("direct", &[&scene.server], 7000, &json!(7000))?;
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let wire = scene.lab.watch_wire()?;
    assert_echoed(&scene.far.app(&[
        "dial",
        "echo",
        &scene.server.addr(7000).to_string(),
        "--message",
        MARKER,
    ])?);
    wire.finish()?.encrypted(&scene.far, &scene.server)?;
    Ok(())
}

#[test]
fn pods_that_arrive_later_are_enrolled() -> Result<()> {
    needs!();
    let scene = Scene::new()?;
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let late = scene.lab.pod("node-a", "late")?;
    let to = scene.server.addr(7000).to_string();
    let encrypted = eventually(Duration::from_secs(10), || {
        let wire = scene.lab.watch_wire().ok()?;
        let answer = late.app(&["dial", "echo", &to, "--message", MARKER]).ok()?;
        let seen = wire.finish().ok()?;
        (answer["ended"] == "eof" && seen.encrypted(&late, &scene.server).is_ok()).then_some(())
    });
    assert!(encrypted.is_some(), "a pod added later stays in the clear");
    // One that opts out of an enrolled namespace is let be.
    let free = scene.lab.add(PodSpec::new("node-a", "free").dataplane_mode("none"))?;
    let wire = scene.lab.watch_wire()?;
    assert_echoed(&free.app(&["dial", "echo", &to, "--message", MARKER])?);
    assert_eq!(wire.finish()?.markers(), 2);
    Ok(())
}
