//! Readiness for STRICT: `mtls readiness` names everybody who would be cut off, and nobody else.

use std::time::Duration;

use anyhow::{Context, Result};
use mtls_tests::{Agent, Lab, Level, Mesh, Mode, Options, Pod, PodSpec, Running, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::{Scene, assert_echoed, assert_refused, needs};

/// What `mtls readiness` said, with its exit code.
struct Said {
    code: Option<i32>,
    json: Value,
}

impl Said {
    fn port(&self, pod: &str, port: u16) -> Value {
        let named = |list: &Value, key: &str, wanted: Value| {
            let rows = list.as_array().cloned().unwrap_or_default();
            rows.into_iter().find(|row| row[key] == wanted).unwrap_or_default()
        };
        let workload = named(&self.json["workloads"], "name", pod.into());
        named(&workload["ports"], "port", port.into())
    }

    /// (workload, connections, open) of those who would be cut off from the server.
    fn cut_off(&self, port: u16) -> Vec<(Value, Value, Value)> {
        let port = self.port("server", port);
        let rows = port["cut_off"].as_array().cloned().unwrap_or_default();
        let mut rows: Vec<_> = rows
            .iter()
            .map(|row| (row["workload"].clone(), row["connections"].clone(), row["open"].clone()))
            .collect();
        rows.sort_by_key(|row| row.0.to_string());
        rows
    }
}

fn ask(agent: &Agent, args: &[&str]) -> Result<Said> {
    let finished = agent.readiness(&[args, &["-o", "json"]].concat())?;
    let json = serde_json::from_str(&finished.stdout).with_context(|| format!("{finished:?}"))?;
    Ok(Said { code: finished.status.code(), json })
}

/// Asks until the answer is as wanted; says what it was last if it never is.
fn asked_until(agent: &Agent, args: &[&str], wanted: impl Fn(&Said) -> bool) -> Result<Said> {
    let mut last = Value::Null;
    let found = eventually(Duration::from_secs(10), || {
        let said = ask(agent, args).ok()?;
        last = said.json.clone();
        wanted(&said).then_some(said)
    });
    found.with_context(|| format!("{last:#}"))
}

fn stranger(name: &str, connections: u64, open: u64) -> (Value, Value, Value) {
    (json!(format!("outside/{name}")), json!(connections), json!(open))
}

#[test]
fn strangers_are_listed_and_neither_members_nor_probes() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let strangers = [scene.lab.outsider("node-a", "cron")?, scene.lab.outsider("node-b", "near-cron")?];
    let (to, to6) = (scene.server.addr(7000).to_string(), scene.server.addr6(7000).to_string());
    for client in scene.clients() {
        assert_echoed(&client.app(&["dial", "echo", &to])?);
        assert_echoed(&client.app(&["dial", "echo", &to6])?);
    }
    assert_echoed(&scene.lab.node("node-b")?.app(&["dial", "echo", &to])?);
    assert_echoed(&scene.lab.node("node-b")?.app(&["dial", "echo", &to6])?);
    let nobody = ask(scene.mesh.agent("node-b"), &["--window", "10m"])?;
    assert_eq!(nobody.cut_off(7000), [], "{:#}", nobody.json);

    for to in [&to, &to6] {
        strangers
            .iter()
            .try_for_each(|it| it.app(&["dial", "echo", to]).map(|answer| assert_echoed(&answer)))?;
    }
    // The other node is no kubelet here, and no pod that the mesh knows.
    assert_echoed(&scene.lab.node("node-a")?.app(&["dial", "echo", &to])?);
    let agent = scene.mesh.agent("node-b");
    let said = asked_until(agent, &["--window", "10m"], |said| said.cut_off(7000).len() == 3)?;
    let nameless = (Value::Null, json!(1), json!(0));
    assert_eq!(
        said.cut_off(7000),
        [stranger("cron", 2, 0), stranger("near-cron", 2, 0), nameless],
        "{:#}",
        said.json
    );
    assert_eq!((said.code, &said.json["ready"]), (Some(1), &json!(false)));
    assert_eq!(said.port("server", 7000)["becomes_mtls"], json!([]));
    let row = said.port("server", 7000)["cut_off"][0].clone();
    assert_eq!((&row["address"], &row["enrolled"]), (&json!("172.30.0.1"), &json!(false)), "{row}");
    let row = said.port("server", 7000)["cut_off"][1].clone();
    let (first, last) = (row["first_seen"].as_str(), row["last_seen"].as_str());
    assert!(first < last && last <= said.json["at"].as_str(), "{row}");
    // Of the clients' own node nobody is concerned, and what people read says the same.
    let other = ask(scene.mesh.agent("node-a"), &["--window", "1s"])?;
    assert!(!other.json.to_string().contains("cron"), "{:#}", other.json);
    let table = scene.mesh.agent("node-b").readiness(&["shop", "--window", "10m"])?;
    assert_eq!(table.status.code(), Some(1));
    for expected in ["NOT READY", "outside/cron", "unknown to the mesh", "172.30.0.1", "shop/server:7000"] {
        assert!(table.stdout.contains(expected), "no {expected} in\n{}", table.stdout);
    }
    let elsewhere = scene.mesh.agent("node-b").readiness(&["elsewhere", "--window", "1s"])?;
    assert!(
        elsewhere.status.success() && elsewhere.stdout.contains("none is enrolled"),
        "{}",
        elsewhere.stdout
    );
    Ok(())
}

#[test]
fn ready_needs_silence_for_the_whole_window() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let cron = scene.lab.outsider("node-a", "cron")?;
    let to = scene.server.addr(7000).to_string();
    let agent = scene.mesh.agent("node-b");
    asked_until(agent, &["--window", "2s"], |said| said.code == Some(0) && said.json["ready"] == true)?;
    let day = agent.readiness(&[])?;
    assert_eq!(day.status.code(), Some(1));
    assert!(day.stdout.contains("of 86400 s"), "{}", day.stdout);
    assert!(!day.stdout.contains("CUT OFF"), "{}", day.stdout);

    assert_echoed(&cron.app(&["dial", "echo", &to])?);
    asked_until(agent, &["--window", "2s"], |said| said.code == Some(1) && said.cut_off(7000).len() == 1)?;
    asked_until(agent, &["--window", "2s"], |said| said.code == Some(0) && said.cut_off(7000).is_empty())?;

    // What a STRICT port refused is somebody who would be cut off, once the port is open again.
    scene.lab.peer_authentication(Level::Mesh, Mode::Strict)?;
    let refused = eventually(Duration::from_secs(5), || {
        (cron.app(&["dial", "echo", &to]).ok()?["ended"] == "refused").then_some(())
    });
    assert!(refused.is_some());
    let strict = ask(agent, &[])?;
    assert_eq!((strict.code, strict.port("server", 7000)), (Some(0), Value::Null), "{:#}", strict.json);
    scene.lab.peer_authentication(Level::Mesh, Mode::Permissive)?;
    let said = asked_until(agent, &["--window", "10m"], |said| said.cut_off(7000).len() == 1)?;
    assert!(said.port("server", 7000)["cut_off"][0]["refused"].as_u64() > Some(0), "{:#}", said.json);

    // Nobody can tell: neither ready nor not.
    agent.kill();
    for args in [&["--window", "1h"][..], &["--window", "yesterday"], &["--window", "99d"], &["no/name"]] {
        assert_eq!(agent.readiness(args)?.status.code(), Some(2), "{args:?}");
    }
    Ok(())
}

#[test]
fn a_connection_older_than_the_agent_is_listed_and_the_pods_own_is_not() -> Result<()> {
    needs!();
    let lab = Lab::two_nodes()?;
    let server = lab.add(PodSpec::new("node-b", "server").port("main", 7000))?;
    let cron = lab.outsider("node-a", "cron")?;
    let _echo = server.serve(&["echo", "--listen", "[::]:7000"])?;
    let _outside = cron.serve(&["echo", "--listen", "[::]:7000"])?;
    let held = cron.start_app(&["dial", "wait", &server.addr(7000).to_string()])?;
    let own = server.start_app(&["dial", "wait", &cron.addr(7000).to_string()])?;
    held.json_with("established")?;
    own.json_with("established")?;

    let mut mesh = Mesh::start(&lab)?;
    let agent = mesh.agent("node-b");
    let before = asked_until(agent, &["--window", "10m"], |said| !said.cut_off(7000).is_empty())?;
    assert_eq!(before.cut_off(7000), [stranger("cron", 1, 1)], "{:#}", before.json);
    assert_eq!(before.json["workloads"][0]["ports"].as_array().map(Vec::len), Some(1), "{:#}", before.json);

    // A new agent observes anew, says so, and finds it again.
    agent.kill();
    agent.start()?;
    let after = asked_until(agent, &["--window", "10m"], |said| !said.cut_off(7000).is_empty())?;
    assert_eq!(after.cut_off(7000), [stranger("cron", 1, 1)], "{:#}", after.json);
    let since = |said: &Said| said.json["workloads"][0]["observed_since"].to_string();
    assert!(since(&before) < since(&after), "{} {}", since(&before), since(&after));
    // Long open and silent, it is still somebody who would be cut off now; a probe that takes its time never is.
    let mut probe = lab.node("node-b")?.command(mtls_tests::lab_app()?);
    probe.args(["dial", "wait", &server.addr(7000).to_string()]);
    let probe = Running::start(probe)?;
    probe.json_with("established")?;
    std::thread::sleep(Duration::from_secs(6));
    assert_eq!(ask(agent, &["--window", "1s"])?.cut_off(7000), [stranger("cron", 1, 1)]);
    drop(held);
    asked_until(agent, &["--window", "1s"], |said| said.code == Some(0))?;
    Ok(())
}

#[test]
fn plaintext_that_policy_judges_is_listed_when_it_was_let_in() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let [good, bad] = [scene.lab.outsider("node-a", "good")?, scene.lab.outsider("node-a", "bad")?];
    let to = scene.server.addr(7000).to_string();
    let rules = json!({ "rules": [{ "from": [{ "source": { "ipBlocks": [good.ip().to_string()] } }] }] });
    scene.lab.authorization_policy(&scene.server, "good-only", &rules)?;
    let denied = eventually(Duration::from_secs(5), || {
        let answer = bad.app(&["dial", "echo", &to]).ok()?;
        (answer["echoed"].is_null()).then_some(())
    });
    assert!(denied.is_some());
    // What was let in before the policy applied.
    asked_until(scene.mesh.agent("node-b"), &["--window", "1s"], |said| said.code == Some(0))?;
    assert_echoed(&good.app(&["dial", "echo", &to])?);
    assert_refused(&bad.app(&["dial", "echo", &to])?);
    let agent = scene.mesh.agent("node-b");
    let said = asked_until(agent, &["--window", "10m"], |said| {
        said.cut_off(7000).iter().any(|row| *row == stranger("good", 1, 0))
    })?;
    let after_policy = said.port("server", 7000)["cut_off"][0]["workload"].clone();
    assert_eq!(after_policy, "outside/good", "the refused one is not the last: {:#}", said.json);
    Ok(())
}

#[test]
fn a_member_that_disable_keeps_in_plaintext_would_not_be_cut_off() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let to = scene.server.addr(7000).to_string();
    scene.lab.peer_authentication(Level::Workload(&scene.server), Mode::Disable)?;
    let cron = scene.lab.outsider("node-a", "cron")?;
    asked_until(scene.mesh.agent("node-b"), &[], |said| said.port("server", 7000)["mode"] == "DISABLE")?;
    let said = eventually(Duration::from_secs(10), || {
        assert_echoed(&scene.far.app(&["dial", "echo", &to]).ok()?);
        let said = ask(scene.mesh.agent("node-b"), &["--window", "10m"]).ok()?;
        (said.port("server", 7000)["becomes_mtls"][0]["workload"] == "shop/far").then_some(said)
    });
    let said = said.context("the member's plaintext is not listed")?;
    assert_eq!(said.cut_off(7000), [], "{:#}", said.json);
    assert_eq!(said.port("server", 7000)["mode"], "DISABLE");
    assert_eq!(said.port("server", 7000)["ready"], true);
    assert_echoed(&cron.app(&["dial", "echo", &to])?);
    asked_until(scene.mesh.agent("node-b"), &["--window", "10m"], |said| {
        said.cut_off(7000) == [stranger("cron", 1, 0)]
    })?;
    Ok(())
}

#[test]
fn a_dry_run_policy_is_reported_and_not_enforced() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let _other = scene.server.serve(&["echo", "--listen", "[::]:7001"])?;
    let cron = scene.lab.outsider("node-a", "cron")?;
    let (main, other) = (scene.server.addr(7000).to_string(), scene.server.addr(7001).to_string());
    let agent = scene.mesh.agent("node-b");
    let none = agent.readiness(&["--dry-run"])?;
    assert!(none.status.success() && none.stdout.contains("no dry-run"), "{}", none.stdout);

    let policy = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
                  metadata: {name: trial, namespace: shop, annotations: {istio.io/dry-run: 'true'}}\n\
                  spec: {selector: {matchLabels: {app: server}}, portLevelMtls: {7000: {mode: STRICT}}}\n";
    scene.lab.write_text("trial.yaml", policy)?;
    let dry = json!({ "mode": "STRICT", "policy": "shop/trial" });
    let ready = asked_until(agent, &["--dry-run", "--window", "1s"], |said| {
        said.code == Some(0) && said.port("server", 7000)["dry_run"] == dry
    })?;
    // Only what the policy would change.
    assert_eq!(ready.json["workloads"].as_array().map(Vec::len), Some(1), "{:#}", ready.json);
    assert_eq!(ready.port("server", 7001), Value::Null);
    assert_echoed(&cron.app(&["dial", "echo", &other])?);
    asked_until(agent, &["--window", "10m"], |said| said.cut_off(7001) == [stranger("cron", 1, 0)])?;
    let ready = ask(agent, &["--dry-run", "--window", "1s"])?;
    assert_eq!(ready.code, Some(0), "a client of a port that the policy leaves alone: {:#}", ready.json);

    assert_echoed(&cron.app(&["dial", "echo", &main])?);
    let said = asked_until(agent, &["--dry-run", "--window", "10m"], |said| !said.cut_off(7000).is_empty())?;
    assert_eq!((said.code, said.cut_off(7000)), (Some(1), vec![stranger("cron", 1, 0)]), "{:#}", said.json);
    let table = agent.readiness(&["--window", "10m"])?.stdout;
    assert!(
        table.contains("WITH THE DRY-RUN POLICIES ENFORCED (1)") && table.contains("shop/trial"),
        "{table}"
    );
    // Not enforced, then enforced.
    assert_echoed(&cron.app(&["dial", "echo", &main])?);
    scene.lab.write_text("trial.yaml", &policy.replace("'true'", "'false'"))?;
    let refused = eventually(Duration::from_secs(5), || {
        (cron.app(&["dial", "echo", &main]).ok()?["ended"] == "refused").then_some(())
    });
    assert!(refused.is_some());
    assert!(agent.readiness(&["--dry-run"])?.status.success());
    Ok(())
}

#[test]
fn a_scan_of_every_port_costs_bounded_memory_and_hides_nobody() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let cron = scene.lab.outsider("node-a", "cron")?;
    let scanner = scene.lab.outsider("node-b", "scanner")?;
    let from = more_addresses(&scene.lab, "node-b", &scanner, 200)?;
    let to = scene.server.addr6(7000).to_string();
    assert_echoed(&cron.app(&["dial", "echo", &to])?);
    let agent = scene.mesh.agent("node-b");
    asked_until(agent, &["--window", "10m"], |said| said.cut_off(7000).len() == 1)?;
    let before = agent.resident_bytes()?;

    let mut args = vec!["scan".to_owned(), scene.server.ip6().to_string()];
    args.extend(from.iter().flat_map(|ip| ["--from".to_owned(), ip.clone()]));
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    for _ in 0..2 {
        let answer = scanner.app(&args)?;
        assert!(answer["refused"].as_u64() > Some(65_000), "{answer}");
    }
    assert_echoed(&cron.app(&["dial", "echo", &to])?);
    let agent = scene.mesh.agent("node-b");
    let server = |said: &Said| said.json["workloads"][1].clone();
    let said = asked_until(agent, &["--window", "10m"], |said| {
        // What the kernel could not hand over is counted too.
        let counted = server(said)["unserved"]["count"].as_u64().zip(said.json["lost"]["count"].as_u64());
        counted.is_some_and(|(unserved, lost)| unserved + lost > 131_000)
            && said.cut_off(7000).contains(&stranger("cron", 2, 0))
    })?;
    // Declared or served; the scanner's other tries are a number.
    assert_eq!(server(&said)["ports"].as_array().map(Vec::len), Some(2), "{:#}", said.json);
    let scanner = (Value::Null, json!(2), json!(0));
    assert_eq!(
        said.cut_off(7000),
        [stranger("cron", 2, 0), scanner],
        "it met the one open port: {:#}",
        said.json
    );
    let grown = agent.resident_bytes()?.saturating_sub(before);
    assert!(grown < 16 << 20, "the agent grew by {grown} bytes");
    Ok(())
}

#[test]
fn what_the_agent_was_too_slow_for_is_said_and_is_not_ready() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let scanner = scene.lab.outsider("node-b", "scanner")?;
    let agent = scene.mesh.agent("node-b");
    let before = asked_until(agent, &["--window", "1s"], |said| said.code == Some(0))?;
    assert_eq!(before.json["lost"]["count"], 0, "{:#}", before.json);
    let pid = Pid::from_raw(agent.pid().context("the agent runs")?.try_into()?);
    kill(pid, Signal::SIGSTOP)?;
    let scanned = scanner.app(&["scan", &scene.server.ip().to_string()]);
    kill(pid, Signal::SIGCONT)?;
    assert!(scanned?["refused"].as_u64() > Some(65_000));
    let agent = scene.mesh.agent("node-b");
    let said =
        asked_until(agent, &["--window", "10m"], |said| said.json["lost"]["count"].as_u64() > Some(10_000))?;
    let reasons = said.json["reasons"].to_string();
    assert!(said.code == Some(1) && reasons.contains("came faster than could be taken in"), "{reasons}");
    assert!(agent.metrics()?.sum("mtls_plaintext_sightings_lost_total", &[]) > 10_000.0);
    // What was lost before the window is nobody's reason any more.
    asked_until(agent, &["--window", "1s"], |said| said.code == Some(0))?;
    Ok(())
}

#[test]
fn what_the_api_server_will_call_is_named_before_it_calls() -> Result<()> {
    needs!();
    let mut scene = Scene::with(&Options { kubernetes: true, ..Options::default() })?;
    let _hook = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let _other = scene.server.serve(&["echo", "--listen", "[::]:7001"])?;
    scene.lab.service("hook", &[&scene.server], 443, &json!(7000))?;
    let api = scene.lab.api_server()?;
    let short = ["--window", "1s"];
    asked_until(scene.mesh.agent("node-b"), &short, |said| said.code == Some(0))?;
    let rules = json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration",
        "metadata": { "name": "rules" },
        "webhooks": [{ "name": "rules.shop.example", "sideEffects": "None", "admissionReviewVersions": ["v1"],
            "clientConfig": { "service": { "namespace": "shop", "name": "hook" }, "caBundle": "AA==" } }],
    });
    api.apply(&rules)?;
    let agent = scene.mesh.agent("node-b");
    let said = asked_until(agent, &short, |said| said.port("server", 7000)["called_by"][0] != Value::Null)?;
    let call = json!({ "by": "ValidatingWebhookConfiguration rules", "service": "shop/hook", "port": 443, "cut_off": true });
    assert_eq!(said.port("server", 7000)["called_by"], json!([call]));
    assert_eq!((said.code, said.cut_off(7000).len()), (Some(1), 0), "nobody has come: {:#}", said.json);
    assert_eq!(said.port("server", 7001)["called_by"], json!([]), "another port of the pod");
    asked_until(scene.mesh.agent("node-a"), &short, |said| said.code == Some(0)).context("another node")?;

    // STRICT at once would have cut it off; with the remedy that was named it is served, and only it.
    let caller = scene.lab.node("node-a")?;
    let [hook, other] = [7000, 7001].map(|port| scene.server.addr(port).to_string());
    scene.lab.peer_authentication(Level::Mesh, Mode::Strict)?;
    let refused = eventually(Duration::from_secs(10), || {
        (caller.app(&["dial", "echo", &hook]).ok()?["ended"] == "refused").then_some(())
    });
    assert!(refused.is_some(), "STRICT lets the API server in");
    scene.lab.peer_authentication(Level::Ports(&scene.server, &[(7000, Mode::Permissive)]), Mode::Strict)?;
    let served = eventually(Duration::from_secs(10), || {
        (caller.app(&["dial", "echo", &hook]).ok()?["ended"] == "eof").then_some(())
    });
    assert!(served.is_some(), "its port is not kept open");
    assert_eq!(caller.app(&["dial", "echo", &other])?["ended"], "refused");
    let agent = scene.mesh.agent("node-b");
    let said = asked_until(agent, &["--window", "10m"], |said| {
        said.port("server", 7000)["kept_open"].as_array().is_some_and(|rows| !rows.is_empty())
    })?;
    assert_eq!(said.port("server", 7000)["called_by"][0]["cut_off"], false, "{:#}", said.json);
    assert_eq!(said.port("server", 7000)["ready"], true, "{:#}", said.json);
    let table = agent.readiness(&short)?;
    for expected in ["kept open by the port's own mode", "KEPT OPEN FOR THE API SERVER", "node node-a"] {
        assert!(table.stdout.contains(expected), "no {expected} in\n{}", table.stdout);
    }
    assert!(table.status.success(), "{}", table.stdout);

    api.delete(&rules)?;
    asked_until(agent, &["--window", "10m"], |said| {
        said.port("server", 7000)["called_by"] == json!([]) && said.cut_off(7000).len() == 1
    })?;
    Ok(())
}

/// Gives a pod more IPv6 addresses, and returns them.
fn more_addresses(lab: &Lab, node: &str, pod: &Pod, count: u16) -> Result<Vec<String>> {
    let own = pod.ip6().to_string();
    let prefix = own.rsplit_once(':').context("an IPv6 address")?.0;
    let addresses: Vec<String> = (0..count).map(|n| format!("{prefix}:5:{n:x}")).collect();
    let batch: String = addresses.iter().map(|ip| format!("addr add {ip}/128 dev eth0 nodad\n")).collect();
    let file = lab.dir().join("addresses");
    std::fs::write(&file, batch)?;
    pod.run("ip", &["-batch", &file.to_string_lossy()])?.success()?;
    let all = format!("{prefix}:5:0/112");
    lab.node(node)?.run("ip", &["-6", "route", "add", &all, "via", &own])?.success()?;
    Ok(addresses)
}
