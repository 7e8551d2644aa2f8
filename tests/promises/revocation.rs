//! A revoked certificate: its open connections are reset at once, and no handshake is passed with it.

use std::time::Duration;

use anyhow::{Context, Result};
use mtls_tests::{Agent, Forger, Running, eventually};
use serde_json::Value;

use crate::{Scene, assert_echoed, assert_refused, needs};

/// The serial number of a pod's certificate, as its agent shows it.
fn serial(agent: &Agent, pod: &str) -> Result<String> {
    let listing: Value = serde_json::from_str(&agent.ask(&["certs", pod, "-o", "json"])?.success()?.stdout)?;
    let serial = listing["items"][0]["serial"].as_str();
    Ok(serial.with_context(|| format!("no serial: {listing}"))?.to_owned())
}

fn failures(agent: &Agent, direction: &str) -> Result<f64> {
    let labels = [("reason", "revoked"), ("direction", direction)];
    Ok(agent.metrics()?.sum("mtls_handshake_failures_total", &labels))
}

/// Ends by a reset, soon.
fn assert_reset(stream: Running) -> Result<()> {
    let answer = stream.json_with("ended")?;
    assert_eq!(answer["ended"], "reset", "{answer}");
    Ok(())
}

#[test]
fn a_list_in_the_authoritys_directory_ends_connections_everywhere() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let to = scene.server.addr(7000).to_string();
    let stream = |pod: &mtls_tests::Pod| -> Result<Running> {
        let stream = pod.start_app(&["dial", "stream", &to, "--pause-ms", "20"])?;
        stream.json_with("established")?;
        Ok(stream)
    };
    let (revoked, mut beside) = (stream(&scene.far)?, stream(&scene.near)?);
    // And a tunnel that is idle.
    assert_echoed(&scene.far.app(&["dial", "echo", &to])?);
    let before = serial(scene.mesh.agent("node-a"), "far")?;
    let forger = Forger::with_authority(scene.mesh.ca_dir())?;
    let crl = scene.mesh.ca_dir().join("ca-crl.pem");
    std::fs::write(&crl, forger.revoke(1, &[&before])?)?;

    assert_reset(revoked)?;
    let line = scene
        .mesh
        .agent("node-b")
        .access_log_line("revoked connection", |line| line["ending"] == "revoked")?;
    assert!(line["reason"].as_str().is_some_and(|reason| reason.contains("revoked certificate")), "{line}");
    assert!(scene.mesh.agent("node-b").metrics()?.sum("mtls_connections_revoked_total", &[]) >= 1.0);
    // Others are not disturbed, and the workload has a new certificate before long.
    let renewed = eventually(Duration::from_secs(20), || {
        serial(scene.mesh.agent("node-a"), "far").ok().filter(|serial| *serial != before)
    });
    assert!(renewed.is_some(), "the revoked certificate is not replaced");
    let back = eventually(Duration::from_secs(10), || {
        let answer = scene.far.app(&["dial", "echo", &to, "--limit-ms", "2000"]).ok()?;
        (answer["ended"] == "eof").then_some(())
    });
    assert!(back.is_some(), "no connection with the new certificate");
    beside.say("stop")?;
    assert_eq!(beside.finish()?.success()?.json()?["ended"], "eof");

    // A broken list is named, and the last good one stays.
    std::fs::write(&crl, "broken")?;
    let log = scene.lab.dir().join("ca.log");
    let named = eventually(Duration::from_secs(10), || {
        let log = std::fs::read_to_string(&log).unwrap_or_default();
        (log.contains("ca-crl.pem is unusable") && log.contains("stays in force")).then_some(())
    });
    assert!(named.is_some(), "{}", std::fs::read_to_string(&log)?);
    Ok(())
}

#[test]
fn an_agents_own_list_refuses_the_peer_and_both_ends_say_why() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let to = scene.server.addr(7000).to_string();
    let crl = scene.lab.dir().join("crl.pem");
    let forger = Forger::with_authority(scene.mesh.ca_dir())?;
    std::fs::write(&crl, forger.revoke(1, &["0A"])?)?;
    let agent = scene.mesh.agent("node-a");
    agent.terminate()?;
    agent.await_end(Duration::from_secs(10))?;
    agent.args().extend(["--crl".to_owned(), crl.to_string_lossy().into_owned()]);
    agent.start()?;
    let stream = scene.far.start_app(&["dial", "stream", &to, "--pause-ms", "20"])?;
    stream.json_with("established")?;

    let theirs = serial(scene.mesh.agent("node-b"), "server")?;
    std::fs::write(&crl, forger.revoke(2, &[&theirs])?)?;
    assert_reset(stream)?;
    scene.mesh.agent("node-a").access_log_line("revoked connection", |line| line["ending"] == "revoked")?;
    let refused = scene.far.app(&["dial", "echo", &to])?;
    assert_refused(&refused);
    let line = scene.mesh.agent("node-a").access_log_line("refusal", |line| line["ending"] == "refused")?;
    assert!(line["reason"].as_str().is_some_and(|reason| reason.contains("revoked")), "{line}");
    assert!(failures(scene.mesh.agent("node-a"), "outbound")? >= 1.0);
    assert!(failures(scene.mesh.agent("node-b"), "inbound")? >= 1.0);
    let log = scene.mesh.agent("node-b").log();
    assert!(log.contains("CertificateRevoked"), "{log}");

    let table = scene.mesh.agent("node-a").ask(&["certs"])?.success()?.stdout;
    assert!(table.contains("revocations") && table.contains("1 revoked"), "{table}");
    assert!(scene.mesh.agent("node-a").metrics()?.has("mtls_revocation_list_next_update_timestamp_seconds"));

    // Without the entry the same certificate is good again.
    std::fs::write(&crl, forger.revoke(3, &[])?)?;
    let back = eventually(Duration::from_secs(10), || {
        let answer = scene.far.app(&["dial", "echo", &to, "--limit-ms", "2000"]).ok()?;
        (answer["ended"] == "eof").then_some(())
    });
    assert!(back.is_some(), "a certificate that is released is still refused");
    Ok(())
}
