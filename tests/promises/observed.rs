//! What an operator sees: Istio's metrics, one access-log line a connection, and `mtls status`.

use anyhow::{Context, Result};
use mtls_tests::eventually;
use serde_json::Value;
use std::time::Duration;

use crate::{Scene, assert_echoed, needs};

#[test]
fn connections_are_counted_under_istios_names() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let to = scene.server.addr(7000).to_string();
    for _ in 0..3 {
        assert_echoed(&scene.far.app(&["dial", "echo", &to])?);
    }
    for (node, reporter) in [("node-a", "source"), ("node-b", "destination")] {
        let source = format!("spiffe://{}", scene.far.principal());
        let destination = format!("spiffe://{}", scene.server.principal());
        let labels = [
            ("reporter", reporter),
            ("source_workload", "far"),
            ("source_workload_namespace", "shop"),
            ("source_principal", &source),
            ("destination_workload", "server"),
            ("destination_principal", &destination),
            ("connection_security_policy", "mutual_tls"),
        ];
        let counted = eventually(Duration::from_secs(5), || {
            let metrics = scene.mesh.agent(node).metrics().ok()?;
            let count = |name| metrics.sum(name, &labels);
            (count("istio_tcp_connections_opened_total") == 3.0
                && count("istio_tcp_connections_closed_total") == 3.0
                && count("istio_tcp_sent_bytes_total") == 15.0
                && count("istio_tcp_received_bytes_total") == 15.0)
                .then_some(())
        });
        assert!(counted.is_some(), "{node}:\n{}", scene.mesh.agent(node).get("/metrics")?.body);
        let metrics = scene.mesh.agent(node).metrics()?;
        for name in
            ["mtls_handshakes_total", "mtls_certificate_expiry_timestamp_seconds", "mtls_kernel_events_total"]
        {
            assert!(metrics.has(name), "{node} has no {name}: {:?}", metrics.names());
        }
    }
    Ok(())
}

#[test]
fn each_connection_leaves_one_line() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let to = scene.server.addr(7000).to_string();
    for _ in 0..5 {
        assert_echoed(&scene.far.app(&["dial", "echo", &to])?);
    }
    for node in ["node-a", "node-b"] {
        let lines = eventually(Duration::from_secs(5), || {
            Some(scene.mesh.agent(node).access_log()).filter(|lines| lines.len() >= 5)
        });
        let lines = lines.with_context(|| format!("{:?}", scene.mesh.agent(node).access_log()))?;
        assert_eq!(lines.len(), 5, "{lines:?}");
        for line in lines {
            assert_eq!((&line["bytes_sent"], &line["bytes_received"]), (&5.into(), &5.into()), "{line}");
            assert_eq!(
                (&line["ending"], &line["destination_address"]),
                (&"clean".into(), &to.clone().into()),
                "{line}"
            );
        }
    }
    Ok(())
}

#[test]
fn status_shows_agent_pods_certificates_and_connections() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let stream = scene.far.start_app(&["dial", "wait", &scene.server.addr(7000).to_string()])?;
    stream.json_with("established")?;
    let text = scene.mesh.agent("node-b").status(&[])?;
    for expected in ["node-b", "cluster.local", "shop/server", "shop/near", "shop/far", "10.30.1.10"] {
        assert!(text.contains(expected), "no {expected} in\n{text}");
    }
    let json: Value = serde_json::from_str(&scene.mesh.agent("node-b").status(&["--output", "json"])?)?;
    assert_eq!(json["agent"]["ready"], true, "{json}");
    assert_eq!(json["pods"].as_array().map(Vec::len), Some(2), "{json}");
    assert_eq!(json["pods"][1]["identity"], format!("spiffe://{}", scene.server.principal()), "{json}");
    let ends = json["certificates"][0]["not_after"].as_str();
    assert!(ends.is_some_and(|ends| ends.starts_with("20")), "{json}");
    // Without an agent it is an error that names the socket.
    scene.mesh.agent("node-b").kill();
    let error = scene.mesh.agent("node-b").status(&[]).expect_err("a dead agent has a status");
    assert!(format!("{error:#}").contains("node-b.sock"), "{error:#}");
    Ok(())
}

#[test]
fn who_dials_the_agents_listener_itself_is_reset_and_counted() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let refused = |scene: &mut Scene| -> Result<f64> {
        let labels = [("direction", "outbound"), ("reason", "no_original_destination")];
        Ok(scene.mesh.agent("node-a").metrics()?.sum("mtls_connections_refused_total", &labels))
    };
    assert_eq!(refused(&mut scene)?, 0.0);
    let listener = scene.far.addr(15001).to_string();
    crate::assert_refused(&scene.far.app(&["dial", "echo", &listener])?);
    let counted = eventually(Duration::from_secs(5), || (refused(&mut scene).ok()? == 1.0).then_some(()));
    assert!(counted.is_some(), "{:?}", scene.mesh.agent("node-a").get("/metrics"));
    let line = scene.mesh.agent("node-a").access_log_line("refusal", |line| line["ending"] == "refused")?;
    assert_eq!(
        (&line["destination_address"], &line["source_workload"]),
        (&listener.into(), &"shop/far".into())
    );
    Ok(())
}
