//! Ends of streams: half-closes, resets and refusals arrive as what they were, never as something milder.

use anyhow::Result;

use crate::{Scene, assert_echoed, needs};

#[test]
fn either_end_may_stop_sending_first() -> Result<()> {
    needs!();
    let scene = Scene::new()?;
    let _sum = scene.server.serve(&["sum", "--listen", "[::]:7000"])?;
    let last = scene.server.serve(&["close-first", "--listen", "[::]:7001"])?;
    for client in scene.clients() {
        let answer =
            client.app(&["dial", "upload", &scene.server.addr(7000).to_string(), "--bytes", "3000001"])?;
        assert!(answer["match"] == true && answer["ended"] == "eof", "{answer}");
        let before = last.all_json_with("ended").len();
        let answer =
            client.app(&["dial", "send-last", &scene.server.addr(7001).to_string(), "--bytes", "3000001"])?;
        assert!(answer["before"] == 8 && answer["sent"] == 3_000_001 && answer["ended"] == "eof", "{answer}");
        let ended = last.json_after("ended", before)?;
        assert!(ended["ended"] == "eof" && ended["sum"] == answer["sum"], "{ended}, {answer}");
    }
    Ok(())
}

#[test]
fn a_reset_by_the_server_is_a_reset_at_the_client() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let _reset = scene.server.serve(&["reset", "--listen", "[::]:7000"])?;
    let source = scene.server.serve(&["source-reset", "--listen", "[::]:7001", "--bytes", "1000000"])?;
    for client in scene.clients() {
        let answer = client.app(&["dial", "wait", &scene.server.addr(7000).to_string()])?;
        assert_eq!(answer["ended"], "reset", "from {}: {answer}", client.name());
        // An aborted download must never look complete.
        let answer = client.app(&["dial", "download", &scene.server.addr(7001).to_string()])?;
        assert_eq!(answer["ended"], "reset", "from {}: {answer}", client.name());
    }
    drop(source);
    let line = scene
        .mesh
        .agent("node-a")
        .access_log_line("reset", |line| line["ending"] == "reset_by_destination")?;
    assert_eq!(line["direction"], "outbound", "{line}");
    Ok(())
}

#[test]
fn a_reset_by_the_client_is_a_reset_at_the_server() -> Result<()> {
    needs!();
    let scene = Scene::new()?;
    let echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    for client in scene.clients() {
        let before = echo.all_json_with("ended").len();
        client.app(&["dial", "abort", &scene.server.addr(7000).to_string()])?;
        let ended = echo.json_after("ended", before)?;
        assert_eq!(ended["ended"], "reset", "from {}: {ended}", client.name());
        // And a clean end is still a clean end.
        assert_echoed(&client.app(&["dial", "echo", &scene.server.addr(7000).to_string()])?);
        let ended = echo.json_after("ended", before + 1)?;
        assert_eq!(ended["ended"], "eof", "from {}: {ended}", client.name());
    }
    Ok(())
}

#[test]
fn a_closed_port_resets_the_client_at_once() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    for client in scene.clients() {
        let answer = client.app(&["dial", "echo", &scene.server.addr(7999).to_string()])?;
        crate::assert_refused(&answer);
        assert!(answer["ms"].as_f64() < Some(1000.0), "{answer}");
    }
    let refused = scene.mesh.agent("node-a").access_log_line("refusal", |line| {
        line["reason"].as_str().is_some_and(|reason| reason.contains("refused the connection"))
    })?;
    assert_eq!(refused["destination_workload"], "shop/server", "{refused}");
    Ok(())
}

#[test]
fn the_server_may_speak_first() -> Result<()> {
    needs!();
    let scene = Scene::new()?;
    let _greet = scene.server.serve(&["greet", "--listen", "[::]:7000"])?;
    for client in scene.clients() {
        let answer = client.app(&["dial", "echo", &scene.server.addr(7000).to_string(), "--greeted"])?;
        assert_eq!(answer["greeting"], "welcome", "{answer}");
        assert_echoed(&answer);
    }
    Ok(())
}

#[test]
fn a_long_silence_ends_nothing() -> Result<()> {
    needs!();
    let scene = Scene::new()?;
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    for client in scene.clients() {
        let to = scene.server.addr(7000).to_string();
        let answer = client.app(&["dial", "echo", &to, "--times", "2", "--pause-ms", "4000"])?;
        assert_echoed(&answer);
        assert_eq!(answer["echoed"], 10, "{answer}");
    }
    Ok(())
}
