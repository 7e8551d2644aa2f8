//! A cluster: agents and authority live from the API server alone, as they do in Kubernetes.

use std::time::Duration;

use anyhow::{Result, ensure};
use mtls_tests::{Lab, Level, MARKER, Mesh, Mode, Options, PodSpec, eventually};
use serde_json::json;

use crate::{Scene, assert_echoed, needs};

#[test]
fn a_label_encrypts_strict_refuses_and_taking_the_label_away_releases() -> Result<()> {
    needs!();
    let lab = Lab::two_nodes()?;
    lab.namespace("shop", false)?;
    let far = lab.pod("node-a", "far")?;
    let near = lab.pod("node-b", "near")?;
    let server = lab.add(PodSpec::new("node-b", "server").port("main", 7000).port("other", 7001))?;
    let intruder = lab.outsider("node-a", "intruder")?;
    let mesh = Mesh::start_with(&lab, &Options { kubernetes: true, ..Options::default() })?;
    let mut scene = Scene { mesh, far, near, server, lab };
    // Nothing but the API server tells them anything.
    std::fs::rename(scene.lab.dir().join("manifests"), scene.lab.dir().join("moved"))?;
    std::fs::create_dir(scene.lab.dir().join("manifests"))?;
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let to = scene.server.addr(7000).to_string();
    let markers = |scene: &Scene| -> Result<u64> {
        let wire = scene.lab.watch_wire()?;
        let answer = scene.far.app(&["dial", "echo", &to, "--message", MARKER])?;
        ensure!(answer["ended"] == "eof", "not served: {answer}");
        Ok(wire.finish()?.markers())
    };
    assert_eq!(markers(&scene)?, 2, "not enrolled: there and back in the clear");
    let mut long = scene.far.start_app(&["dial", "stream", &to, "--pause-ms", "20"])?;
    long.json_with("established")?;

    let api = scene.lab.api_server()?;
    scene.lab.namespace("shop", true)?;
    let encrypted = eventually(Duration::from_secs(15), || markers(&scene).ok().filter(|count| *count == 0));
    assert!(encrypted.is_some(), "the label enrols: {}", scene.mesh.agent("node-b").log());
    assert!(long.alive(), "open connections are left alone");
    long.say("stop")?;
    let answer = long.finish()?.success()?.json()?;
    assert_eq!(answer["ended"], "eof", "{answer}");
    for client in scene.clients() {
        assert_echoed(&client.app(&["dial", "echo", &to])?);
    }
    assert_echoed(&intruder.app(&["dial", "echo", &to])?);

    // What an API server calls, a webhook for example, it calls from its node.
    assert_echoed(&scene.lab.node("node-a")?.app(&["dial", "echo", &to])?);
    let named = eventually(Duration::from_secs(10), || {
        let said = scene.mesh.agent("node-b").readiness(&["shop", "--window", "10m"]).ok()?;
        said.stdout.contains("node node-a: API server or host").then_some(())
    });
    assert!(named.is_some(), "{}", scene.mesh.agent("node-b").readiness(&["shop"])?.stdout);

    scene.lab.peer_authentication(Level::Mesh, Mode::Strict)?;
    let refused = eventually(Duration::from_secs(10), || {
        let answer = intruder.app(&["dial", "echo", &to]).ok()?;
        (answer["ended"] == "refused").then_some(())
    });
    assert!(refused.is_some(), "STRICT refuses the intruder");
    for client in scene.clients() {
        assert_echoed(&client.app(&["dial", "echo", &to])?);
    }
    assert_eq!(markers(&scene)?, 0);

    // The API server's absence changes nothing for those who are enrolled, and is told.
    api.go_away();
    let told = eventually(Duration::from_secs(10), || {
        let status = scene.mesh.agent("node-b").status(&[]).ok()?;
        status.contains("stays in force").then_some(())
    });
    assert!(told.is_some(), "{}", scene.mesh.agent("node-b").status(&[])?);
    assert_eq!(markers(&scene)?, 0);
    api.come_back();

    scene.lab.namespace("shop", false)?;
    let released = eventually(Duration::from_secs(30), || markers(&scene).ok().filter(|count| *count == 2));
    assert!(
        released.is_some(),
        "without the label everything is as before: {}",
        scene.mesh.agent("node-a").log()
    );
    assert_echoed(&intruder.app(&["dial", "echo", &to])?);
    let rows = api.list("configmaps");
    assert!(rows.iter().any(|map| map["metadata"]["name"] == json!("mtls-ca-root")), "{rows:?}");
    Ok(())
}
