//! AuthorizationPolicy decides by the identity of the handshake, for every way a connection can come.

use std::time::Duration;

use anyhow::Result;
use mtls_tests::{Pod, eventually};
use serde_json::json;

use crate::{Scene, assert_echoed, needs};

#[test]
fn a_denied_identity_is_reset_and_the_policy_is_named() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let to = scene.server.addr(7000).to_string();
    let open = scene.far.start_app(&["dial", "stream", &to, "--pause-ms", "20"])?;
    open.json_with("established")?;
    let far = json!([{ "from": [{ "source": { "principals": [scene.far.principal()] } }] }]);
    scene.lab.authorization_policy(&scene.server, "not-far", &json!({ "action": "DENY", "rules": far }))?;
    let ended = open.json_with("ended")?;
    assert_eq!(ended["ended"], "reset", "{ended}");
    refused_soon(&scene.far, &to);
    // The policy names one identity; the other goes on.
    assert_echoed(&scene.near.app(&["dial", "echo", &to])?);
    for (node, reason) in [("node-b", "revoked"), ("node-b", "refused"), ("node-a", "rejected")] {
        let line = scene.mesh.agent(node).access_log_line(reason, |line| line["ending"] == reason)?;
        assert!(line["reason"].as_str().is_some_and(|text| text.contains("shop/not-far")), "{line}");
    }
    Ok(())
}

#[test]
fn an_allow_policy_shuts_out_everybody_else_on_one_node_too() -> Result<()> {
    needs!();
    let scene = Scene::new()?;
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let _other = scene.server.serve(&["echo", "--listen", "[::]:7001"])?;
    let (to, other) = (scene.server.addr(7000).to_string(), scene.server.addr(7001).to_string());
    assert_echoed(&scene.near.app(&["dial", "echo", &to])?);
    let rules = json!([{
        "from": [{ "source": { "principals": [scene.far.principal()] } }],
        "to": [{ "operation": { "ports": ["7000"] } }],
    }]);
    scene.lab.authorization_policy(
        &scene.server,
        "far-only",
        &json!({ "action": "ALLOW", "rules": rules }),
    )?;
    refused_soon(&scene.near, &to);
    refused_soon(&scene.far, &other);
    assert_echoed(&scene.far.app(&["dial", "echo", &to])?);
    Ok(())
}

#[test]
fn plaintext_to_a_permissive_port_is_judged_too() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let intruder = scene.lab.outsider("node-a", "intruder")?;
    let guest = scene.lab.outsider("node-a", "guest")?;
    let echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let to = scene.server.addr(7000).to_string();
    // Let in before anybody had a say; such a connection must come back through the judge.
    let unjudged = guest.start_app(&["dial", "stream", &to, "--pause-ms", "20"])?;
    unjudged.json_with("established")?;
    let rules = json!([{ "from": [{ "source": { "ipBlocks": [guest.ip().to_string()] } }] }]);
    scene.lab.authorization_policy(
        &scene.server,
        "guest-only",
        &json!({ "action": "ALLOW", "rules": rules }),
    )?;
    assert_eq!(unjudged.json_with("ended")?["ended"], "reset");
    refused_soon(&intruder, &to);
    let answer = guest.app(&["dial", "echo", &to])?;
    assert_echoed(&answer);
    // Through the agent, and the server still sees who it was.
    let seen = echo.all_json_with("accepted");
    let last = seen.last().map(|line| crate::address(&line["accepted"])).transpose()?;
    assert_eq!(last.map(|address| address.ip()), Some(guest.ip()), "{seen:?}");
    let log = scene.mesh.agent("node-b").access_log_line("plaintext", |line| line["path"] == "plaintext")?;
    assert!(log["source_identity"].is_null(), "{log}");
    Ok(())
}

fn refused_soon(client: &Pod, to: &str) {
    let refused = eventually(Duration::from_secs(5), || {
        let answer = client.app(&["dial", "echo", to]).ok()?;
        answer["echoed"].is_null().then_some(())
    });
    assert!(refused.is_some(), "{to} still serves {}", client.name());
}
