//! Direct: two pods of one node speak without the agent once it has let them, and lose that the moment policy, or the
//! agent, is gone.

use std::time::Duration;

use anyhow::{Context, Result};
use mtls_tests::{Level, MARKER, Mode, Options, Pod, Running, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::{Scene, address, assert_echoed, assert_refused, needs};

fn scene() -> Result<Scene> {
    let scene = Scene::with(&Options { same_node: "direct", ..Options::default() })?;
    scene.lab.peer_authentication(Level::Mesh, Mode::Strict)?;
    Ok(scene)
}

/// Speaks until the pair needs no agent any more.
fn pass(scene: &mut Scene, client: &Pod, to: &str) -> Result<()> {
    let spoken = eventually(Duration::from_secs(10), || {
        let before = accepted(scene)?;
        let answer = client.app(&["dial", "echo", to]).ok()?;
        (answer["echoed"].is_u64() && accepted(scene)? > before).then_some(())
    });
    spoken.with_context(|| format!("{} does not come to speak to {to} directly", client.name()))
}

/// Direct connections that the kernel half of `node-b` has let in.
fn accepted(scene: &mut Scene) -> Option<f64> {
    let metrics = scene.mesh.agent("node-b").metrics().ok()?;
    Some(metrics.sum("mtls_kernel_events_total", &[("counter", "direct_accepted")]))
}

/// The open direct connections that `mtls connections` shows.
fn shown(scene: &mut Scene) -> Result<Vec<Value>> {
    let said = scene.mesh.agent("node-b").ask(&["connections", "--output", "json"])?.success()?;
    let rows: Value = serde_json::from_str(&said.stdout)?;
    let newest = rows["newest"].as_array().cloned().unwrap_or_default();
    Ok(newest.into_iter().filter(|row| row["path"] == "direct").collect())
}

fn hold(client: &Pod, to: &str) -> Result<Running> {
    let stream = client.start_app(&["dial", "stream", to, "--pause-ms", "20"])?;
    stream.json_with("established")?;
    Ok(stream)
}

#[test]
fn a_pair_that_was_let_in_speaks_without_the_agent_and_is_reported_all_the_same() -> Result<()> {
    needs!();
    let mut scene = scene()?;
    let echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let sink = scene.server.serve(&["sum", "--listen", "[::]:7001"])?;
    let (near, server) = (scene.near.clone(), scene.server.clone());
    let to = server.addr(7000).to_string();
    for port in [7000, 7001] {
        let address = server.addr(port).to_string();
        let bytes = ["--bytes", "1000"];
        let what = if port == 7000 { "echo" } else { "upload" };
        near.app(&[&["dial", what, &address], &bytes[..]].concat())?;
    }
    pass(&mut scene, &near, &to)?;
    let seen = echo.all_json_with("accepted").len();
    let network = scene.lab.watch_pod(&near)?;
    let answer = near.app(&["dial", "echo", &to, "--message", MARKER])?;
    assert_echoed(&answer);
    // From pod to pod, as the application wrote it.
    let flows = network.finish()?;
    let flow: Vec<_> = flows.between(&near, &server).collect();
    assert_eq!((flow.len(), flow[0].markers), (1, 2), "{flows:?}");
    assert_eq!((flow[0].client, flow[0].server), (address(&answer["local"])?, server.addr(7000)));
    let at_server = echo.json_after("accepted", seen)?;
    assert_eq!(address(&at_server["accepted"])?, address(&answer["local"])?);
    assert_eq!(address(&answer["peer"])?, server.addr(7000));

    let bytes = 64u64 << 20;
    let pid = scene.mesh.agent("node-b").pid().context("no agent")?;
    let before = moved(pid)?;
    let answer =
        near.app(&["dial", "upload", &server.addr(7001).to_string(), "--bytes", &bytes.to_string()])?;
    assert_eq!((&answer["match"], &answer["sent"]), (&true.into(), &bytes.into()), "{answer}");
    let through_agent = moved(pid)? - before;
    assert!(through_agent < 1 << 20, "the agent moved {through_agent} bytes");
    drop(sink);

    let agent = scene.mesh.agent("node-b");
    let line =
        agent.access_log_line("upload", |line| line["bytes_sent"] == bytes && line["path"] == "direct")?;
    let principal = |pod: &Pod| Value::from(format!("spiffe://{}", pod.principal()));
    assert_eq!(line["source_identity"], principal(&near), "{line}");
    assert_eq!(line["destination_identity"], principal(&server), "{line}");
    assert_eq!((&line["ending"], &line["cipher"]), (&"clean".into(), &Value::Null), "{line}");
    // Its sum, and a line feed.
    assert_eq!(
        line["bytes_received"].as_u64(),
        answer["answer"].as_str().map(|sum| sum.len() as u64 + 1),
        "{line}"
    );
    assert_eq!(line["source_address"], answer["local"], "{line}");
    let line = agent.access_log_line("marker", |line| {
        line["path"] == "direct"
            && line["bytes_sent"] == MARKER.len()
            && line["bytes_received"] == MARKER.len()
    })?;
    assert_eq!(line["ending"], "clean", "{line}");
    for reporter in ["source", "destination"] {
        let source = format!("spiffe://{}", near.principal());
        let labels = [
            ("reporter", reporter),
            ("source_principal", source.as_str()),
            ("destination_workload", "server"),
            ("connection_security_policy", "none"),
        ];
        let metrics = agent.metrics()?;
        let received = metrics.sum("istio_tcp_received_bytes_total", &labels);
        assert!(received > bytes as f64, "{reporter}: {received}");
        let count = |name| metrics.sum(name, &labels);
        assert!(count("istio_tcp_connections_opened_total") >= 4.0);
        assert_eq!(count("istio_tcp_connections_opened_total"), count("istio_tcp_connections_closed_total"));
    }
    assert_eq!(agent.metrics()?.sum("mtls_connections_open", &[("path", "direct")]), 0.0);
    Ok(())
}

/// Bytes that a process has read and written, sockets included.
fn moved(pid: u32) -> Result<u64> {
    let io = std::fs::read_to_string(format!("/proc/{pid}/io"))?;
    let counts = io.lines().filter_map(|line| line.strip_prefix("rchar: ").or(line.strip_prefix("wchar: ")));
    counts.map(|count| Ok(count.trim().parse::<u64>()?)).sum()
}

#[test]
fn every_kind_of_socket_sees_the_truth_whichever_way_it_goes() -> Result<()> {
    needs!();
    let mut scene = scene()?;
    let echo = scene.server.serve(&["echo", "--listen", "[::]:7000", "--fast-open"])?;
    let (near, server) = (scene.near.clone(), scene.server.clone());
    let (v4, v6) = (server.addr(7000).to_string(), server.addr6(7000).to_string());
    for to in [&v4, &v6] {
        pass(&mut scene, &near, to)?;
    }
    let bound = format!("{}:40123", near.ip());
    let kinds: [(&str, &[&str], bool); 10] = [
        (&v4, &[], true),
        (&v6, &[], true),
        (&v4, &["--nonblocking"], true),
        (&v4, &["--mapped"], true),
        (&v4, &["--fast-open"], true),
        // The second time with data in its SYN.
        (&v4, &["--fast-open"], true),
        (&v4, &["--io-uring"], true),
        (&v4, &["--mark", "4242", "--bind", &bound], true),
        // Those whose end the agent could not be sure of.
        (&v4, &["--mptcp"], false),
        (&v4, &["--device", "eth0"], false),
    ];
    for (to, kind, goes_direct) in kinds {
        let (seen, direct) = (echo.all_json_with("accepted").len(), accepted(&mut scene));
        let answer = near.app(&[&["dial", "echo", to, "--message", MARKER], kind].concat())?;
        assert_eq!(answer["echoed"], MARKER.len(), "{kind:?}: {answer}");
        let at_server = echo.json_after("accepted", seen)?;
        assert_eq!(address(&answer["peer"])?, to.parse()?, "{kind:?}: {answer}");
        assert_eq!(address(&at_server["accepted"])?, address(&answer["local"])?, "{kind:?}: {at_server}");
        assert_eq!(address(&at_server["local"])?, to.parse()?, "{kind:?}: {at_server}");
        assert!([near.ip(), near.ip6()].contains(&address(&answer["local"])?.ip()), "{kind:?}: {answer}");
        assert_eq!(accepted(&mut scene) > direct, goes_direct, "{kind:?}");
    }
    // Nobody listens: as on plain TCP, connect() itself says so.
    drop(echo);
    let answer = near.app(&["dial", "echo", &v4])?;
    assert_eq!((&answer["connected"], &answer["ended"]), (&false.into(), &"refused".into()), "{answer}");
    let refused = |line: &Value| line["path"] == "direct" && line["ending"] == "refused";
    scene.mesh.agent("node-b").access_log_line("refusal", refused)?;
    Ok(())
}

#[test]
fn nobody_else_gets_in_by_the_same_door() -> Result<()> {
    needs!();
    let mut scene = scene()?;
    let intruder = scene.lab.outsider("node-b", "intruder")?;
    let rogue = scene.lab.pod("node-b", "rogue")?;
    let echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let (near, server) = (scene.near.clone(), scene.server.clone());
    let to = server.addr(7000).to_string();
    let rules = json!([{ "from": [{ "source": { "principals": [near.principal()] } }] }]);
    scene.lab.authorization_policy(&server, "near-only", &json!({ "action": "ALLOW", "rules": rules }))?;
    refused_soon(&rogue, &to);
    pass(&mut scene, &near, &to)?;
    let stream = hold(&near, &to)?;
    // Authenticated, and readable on the node: no proof of protection, and no leak.
    let asked = ["verify", "--from", "shop/near", "--to", "shop/server:7000", "--output", "json"];
    let said = scene.mesh.agent("node-b").ask(&asked)?;
    let verdict: Value = serde_json::from_str(&said.stdout)?;
    assert_eq!((said.status.code(), &verdict["verdict"]), (Some(1), &"direct".into()), "{verdict:#}");
    let rows = shown(&mut scene)?;
    let from =
        rows.first().and_then(|row| row["source"]["address"].as_str()).context("not shown")?.to_owned();
    let served = echo.all_json_with("accepted").len();
    assert_refused(&intruder.app(&["dial", "echo", &to])?);
    // With the address of a pod that may, from its port and from any other.
    for pod in [&intruder, &rogue] {
        pod.run("ip", &["addr", "add", &format!("{}/32", near.ip()), "dev", "lo"])?.success()?;
        for bind in [from.clone(), format!("{}:0", near.ip()), format!("{}:40123", near.ip())] {
            let answer = pod.app(&["dial", "echo", &to, "--bind", &bind, "--limit-ms", "1000"])?;
            assert!(answer["echoed"].is_null(), "{} as {bind}: {answer}", pod.name());
        }
    }
    assert_eq!(echo.all_json_with("accepted").len(), served);
    assert_eq!(shown(&mut scene)?.len(), 1);
    finish(stream)
}

/// The stream was not disturbed.
fn finish(mut stream: Running) -> Result<()> {
    stream.say("stop")?;
    let answer = stream.finish()?.success()?.json()?;
    assert_eq!(answer["ended"], "eof", "{answer}");
    Ok(())
}

fn refused_soon(client: &Pod, to: &str) {
    let refused = eventually(Duration::from_secs(5), || {
        let answer = client.app(&["dial", "echo", to]).ok()?;
        answer["echoed"].is_null().then_some(())
    });
    assert!(refused.is_some(), "{to} still serves {}", client.name());
}

#[test]
fn a_tightened_policy_resets_open_connections_and_lets_no_other_through() -> Result<()> {
    needs!();
    let mut scene = scene()?;
    let echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let (near, server) = (scene.near.clone(), scene.server.clone());
    let to = server.addr(7000).to_string();
    pass(&mut scene, &near, &to)?;
    let stream = hold(&near, &to)?;
    assert_eq!(shown(&mut scene)?.len(), 1);
    let deny = json!([{ "from": [{ "source": { "principals": [near.principal()] } }] }]);
    scene.lab.authorization_policy(&server, "not-near", &json!({ "action": "DENY", "rules": deny }))?;
    let ended = stream.json_with("ended")?;
    assert_eq!(ended["ended"], "reset", "{ended}");
    let at_server = echo.line("an end as a failure", |line| {
        let line = serde_json::from_str::<Value>(line).ok()?;
        (line["ended"].is_string() && line["ended"] != "eof").then_some(())
    });
    at_server?;
    // Once one is reset, none gets in any more.
    for _ in 0..20 {
        assert_refused(&near.app(&["dial", "echo", &to])?);
    }
    let agent = scene.mesh.agent("node-b");
    let line =
        agent.access_log_line("revoked", |line| line["path"] == "direct" && line["ending"] == "revoked")?;
    assert!(line["reason"].as_str().is_some_and(|text| text.contains("shop/not-near")), "{line}");
    assert!(line["bytes_sent"].as_u64() > Some(0), "{line}");
    scene.lab.remove_file("authorizationpolicy-shop-not-near.yaml")?;
    pass(&mut scene, &near, &to)
}

#[test]
fn without_its_agent_nothing_new_goes_direct_and_the_next_agent_takes_over_what_is_open() -> Result<()> {
    needs!();
    let mut scene = scene()?;
    let intruder = scene.lab.outsider("node-b", "intruder")?;
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let (near, server) = (scene.near.clone(), scene.server.clone());
    let to = server.addr(7000).to_string();
    pass(&mut scene, &near, &to)?;
    let (kept, doomed) = (hold(&near, &to)?, hold(&near, &to)?);
    scene.mesh.agent("node-b").kill();
    for client in [&near, &intruder] {
        assert_refused(&client.app(&["dial", "echo", &to])?);
    }
    scene.mesh.agent("node-b").start()?;
    let rows = eventually(Duration::from_secs(5), || shown(&mut scene).ok().filter(|rows| rows.len() == 2));
    for row in rows.context("the next agent does not know the open connections")? {
        assert_eq!(row["source"]["identity"], format!("spiffe://{}", near.principal()), "{row}");
        assert!(row["bytes_sent"].as_u64() > Some(0), "{row}");
    }
    // The older agent's grants are not the next one's.
    let before = accepted(&mut scene);
    assert_echoed(&near.app(&["dial", "echo", &to])?);
    assert_eq!(accepted(&mut scene), before);
    pass(&mut scene, &near, &to)?;
    finish(kept)?;
    let clean =
        |line: &Value| line["path"] == "direct" && line["ending"] == "clean" && line["bytes_sent"] != 5;
    scene.mesh.agent("node-b").access_log_line("end of a stream older than the agent", clean)?;

    // An agent that is told not to let anything go directly ends what does.
    scene.mesh.agent("node-b").terminate()?;
    scene.mesh.agent("node-b").await_end(Duration::from_secs(10))?;
    assert_refused(&near.app(&["dial", "echo", &to])?);
    let args = scene.mesh.agent("node-b").args();
    let mode = args.iter().position(|arg| arg == "--same-node").context("no --same-node")?;
    args[mode + 1] = "relay".into();
    scene.mesh.agent("node-b").start()?;
    assert_eq!(doomed.json_with("ended")?["ended"], "reset");
    let before = accepted(&mut scene);
    for _ in 0..3 {
        assert_echoed(&near.app(&["dial", "echo", &to])?);
    }
    assert_eq!(accepted(&mut scene), before);
    Ok(())
}

#[test]
fn an_agent_that_hangs_loses_its_grants() -> Result<()> {
    needs!();
    let mut scene = scene()?;
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let (near, server) = (scene.near.clone(), scene.server.clone());
    let to = server.addr(7000).to_string();
    pass(&mut scene, &near, &to)?;
    let pid = scene.mesh.agent("node-b").pid().context("no agent")?;
    let agent = Pid::from_raw(pid as i32);
    kill(agent, Signal::SIGSTOP)?;
    std::thread::sleep(Duration::from_millis(4500));
    let answer = near.app(&["dial", "echo", &to, "--limit-ms", "500"]);
    kill(agent, Signal::SIGCONT)?;
    let answer = answer?;
    assert!(answer["echoed"].is_null(), "{answer}");
    pass(&mut scene, &near, &to)
}

#[test]
fn a_service_goes_direct_when_all_of_its_endpoints_are_on_the_node() -> Result<()> {
    needs!();
    let mut scene = scene()?;
    let second = scene.lab.pod("node-b", "second")?;
    let distant = scene.lab.pod("node-a", "distant")?;
    let (near, server) = (scene.near.clone(), scene.server.clone());
    let servers = [
        server.serve(&["echo", "--listen", "[::]:7000"])?,
        second.serve(&["echo", "--listen", "[::]:7000"])?,
        distant.serve(&["echo", "--listen", "[::]:7000"])?,
    ];
    let served =
        |servers: &[Running]| servers.iter().map(|s| s.all_json_with("accepted").len()).collect::<Vec<_>>();
    let local = scene.lab.service("local", &[&server, &second], 80, &json!(7000))?;
    let mixed = scene.lab.service("mixed", &[&server, &distant], 80, &json!(7000))?;
    let (local, mixed) = (local.to_string(), mixed.to_string());
    pass(&mut scene, &near, &local)?;
    let (before, direct) = (served(&servers), accepted(&mut scene).context("no metrics")?);
    for kind in [&[][..], &["--mapped"]].into_iter().cycle().take(24) {
        let answer = near.app(&[&["dial", "echo", &local], kind].concat())?;
        assert_echoed(&answer);
        assert_eq!(address(&answer["peer"])?, local.parse()?, "{answer}");
    }
    assert_eq!(accepted(&mut scene), Some(direct + 24.0));
    let after = served(&servers);
    assert_eq!(after.iter().sum::<usize>(), before.iter().sum::<usize>() + 24);
    assert!(after[0] > before[0] && after[1] > before[1], "{before:?} {after:?}");
    let line = |line: &Value| line["path"] == "direct" && line["service"] == "shop/local";
    let line = scene.mesh.agent("node-b").access_log_line("service", line)?;
    assert_eq!(line["original_destination"], local.as_str(), "{line}");

    let direct = accepted(&mut scene);
    for _ in 0..12 {
        assert_echoed(&near.app(&["dial", "echo", &mixed])?);
    }
    // Who chose by himself would choose the near one too often.
    assert_eq!(accepted(&mut scene), direct);
    assert!(served(&servers)[2] > 0);

    // One endpoint fewer: nothing goes there any more.
    scene.lab.forget(&server)?;
    let moved = eventually(Duration::from_secs(5), || {
        let before = served(&servers);
        for _ in 0..8 {
            assert_echoed(&near.app(&["dial", "echo", &local]).ok()?);
        }
        (served(&servers)[0] == before[0]).then_some(())
    });
    moved.context("a removed endpoint is still chosen")
}
