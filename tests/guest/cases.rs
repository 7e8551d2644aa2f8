//! What must hold on every kernel: nothing in, one line of JSON per case out.
//!
//! Goes through the ordinary lab with the ordinary programs, so that what is seen here is what the product does.

use std::io::Write;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mtls_tests::{Lab, Level, MARKER, Mesh, Mode, Pod, PodSpec, Running, eventually};
use serde_json::{Value, json};

use crate::kernel_tls;

/// A case and what holds if it passes, for a person; it returns what it saw.
type Case = (&'static str, fn(&mut Scene) -> Result<String>);

const CASES: [Case; 10] = [
    ("mutual TLS between two nodes", mutual_tls),
    ("original addresses at both ends", original_addresses),
    ("same node, authenticated", same_node),
    ("STRICT refuses plaintext", strict),
    ("a killed agent leaves STRICT in force, the next adopts it", adoption),
    (
        "`--same-node direct`: without the agent once it has let them, or an error at the start",
        same_node_direct,
    ),
    ("what the agent needs works, each part tried", features),
    ("kernel TLS, or the reported fallback", kernel_tls::reported),
    ("the tunnel's tests with records in the kernel, or in userspace as reported", kernel_tls::tunnel_suite),
    ("`--kernel-tls on`: long streams in the kernel, or an error at the start", kernel_tls::told_to),
];

/// A server, an enrolled client far from it and one near, and somebody who is not in the mesh.
pub struct Scene {
    // Fields are dropped in this order: processes before the lab they run in.
    pub echo: Running,
    _sum: Running,
    pub mesh: Mesh,
    pub far: Arc<Pod>,
    near: Arc<Pod>,
    stranger: Arc<Pod>,
    pub server: Arc<Pod>,
    lab: Lab,
}

pub fn run() -> ExitCode {
    println!("{}", json!({ "kernel": kernel() }));
    let begun = Instant::now();
    let mut scene = match Scene::new() {
        Ok(scene) => scene,
        Err(error) => {
            say("the agents start", &Err(error), begun);
            return ExitCode::FAILURE;
        }
    };
    say("the agents start", &Ok("two nodes".into()), begun);
    let mut passed = true;
    for (name, case) in CASES {
        let begun = Instant::now();
        let outcome = case(&mut scene);
        passed &= outcome.is_ok();
        say(name, &outcome, begun);
    }
    if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// One line, which `cargo xtask vm` reads from the console.
fn say(case: &str, outcome: &Result<String>, begun: Instant) {
    let detail = match outcome {
        Ok(seen) => seen.clone(),
        Err(error) => format!("{error:#}"),
    };
    let line = json!({
        "case": case, "passed": outcome.is_ok(), "detail": detail, "ms": begun.elapsed().as_millis() as u64,
    });
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

/// The release, and Debian's version where the release does not tell it.
fn kernel() -> String {
    let Ok(name) = nix::sys::utsname::uname() else { return "unknown".into() };
    let (release, version) = (name.release().to_string_lossy(), name.version().to_string_lossy());
    let debian = version.split_once("Debian ").and_then(|(_, rest)| rest.split(' ').next());
    match debian {
        Some(debian) => format!("{debian} ({release})"),
        None => release.into_owned(),
    }
}

impl Scene {
    fn new() -> Result<Self> {
        let lab = Lab::two_nodes()?;
        let far = lab.pod("node-a", "far")?;
        let near = lab.pod("node-b", "near")?;
        let stranger = lab.outsider("node-a", "stranger")?;
        let server = lab.add(PodSpec::new("node-b", "server").port("main", 7000).port("other", 7001))?;
        let mesh = Mesh::start(&lab)?;
        let echo = server.serve(&["echo", "--listen", "[::]:7000"])?;
        let sum = server.serve(&["sum", "--listen", "[::]:7001"])?;
        Ok(Self { echo, _sum: sum, mesh, far, near, stranger, server, lab })
    }

    /// A message there and back.
    fn echo(&self, from: &Pod, to: SocketAddr) -> Result<Value> {
        let dial = ["dial", "echo", &to.to_string(), "--message", MARKER, "--limit-ms", "10000"];
        from.app(&dial)
    }

    fn echoes(&self, from: &Pod, to: SocketAddr) -> Result<Value> {
        let answer = self.echo(from, to)?;
        ensure!(
            answer["echoed"] == MARKER.len() && answer["ended"] == "eof",
            "{} to {to}: {answer}",
            from.name()
        );
        Ok(answer)
    }

    /// What `mtls lab features` says where the first node's agent runs.
    pub fn examine(&self) -> Result<Value> {
        let node = self.lab.node("node-a")?;
        let mut command = node.command_in("agent", mtls_tests::mtls()?);
        command.args(["lab", "features", "--output", "json", "--cgroup-root"]).arg(node.cgroup());
        command.arg("--bpffs").arg(self.lab.dir().join("bpf/features"));
        let finished = Running::start(command)?.finish()?.success()?;
        serde_json::from_str(&finished.stdout).context("mtls lab features prints no JSON")
    }

    fn refuses(&self, from: &Pod) -> Result<Value> {
        let answer = self.echo(from, self.server.addr(7000))?;
        let refused = answer["ended"] == "refused" || answer["ended"] == "reset";
        ensure!(answer["echoed"].is_null() && refused, "{}: {answer}", from.name());
        Ok(answer)
    }
}

fn mutual_tls(scene: &mut Scene) -> Result<String> {
    let wire = scene.lab.watch_wire()?;
    for to in [scene.server.addr(7000), scene.server.addr6(7000)] {
        scene.echoes(&scene.far, to)?;
    }
    let seen = wire.finish()?.encrypted(&scene.far, &scene.server)?;
    for node in ["node-a", "node-b"] {
        let agent = scene.mesh.agent(node);
        let line = agent.access_log_line("tunnel", |line| line["path"] == "tunnel")?;
        ensure!(line["source_identity"] == format!("spiffe://{}", scene.far.principal()), "{line}");
        ensure!(line["destination_identity"] == format!("spiffe://{}", scene.server.principal()), "{line}");
    }
    Ok(format!("{}, {}, {} bytes on the wire", seen.cipher, seen.group, seen.bytes))
}

fn original_addresses(scene: &mut Scene) -> Result<String> {
    for (client, own) in [(&scene.far, scene.far.ip()), (&scene.near, scene.near.ip())] {
        let to = scene.server.addr(7000);
        let before = scene.echo.all_json_with("accepted").len();
        let answer = scene.echoes(client, to)?;
        let accepted = scene.echo.json_after("accepted", before)?;
        let (local, peer) = (address(&answer["local"])?, address(&answer["peer"])?);
        ensure!(peer == to, "the client's getpeername: {answer}");
        ensure!(local.ip() == own, "the client's getsockname: {answer}");
        ensure!(address(&accepted["accepted"])? == local, "the server's accept: {accepted}, {answer}");
        ensure!(address(&accepted["peer"])? == local, "the server's getpeername: {accepted}, {answer}");
        ensure!(address(&accepted["local"])? == to, "the server's getsockname: {accepted}");
    }
    Ok("accept, getpeername and getsockname".into())
}

fn same_node(scene: &mut Scene) -> Result<String> {
    scene.echoes(&scene.near, scene.server.addr(7000))?;
    let agent = scene.mesh.agent("node-b");
    let line = agent.access_log_line("same node", |line| line["path"] == "same_node")?;
    ensure!(line["source_identity"] == format!("spiffe://{}", scene.near.principal()), "{line}");
    Ok("relayed".into())
}

fn strict(scene: &mut Scene) -> Result<String> {
    scene.echoes(&scene.stranger, scene.server.addr(7000)).context("before STRICT")?;
    scene.lab.peer_authentication(Level::Mesh, Mode::Strict)?;
    let refused = eventually(Duration::from_secs(20), || scene.refuses(&scene.stranger).ok());
    let answer = refused.context("a stranger is still served")?;
    scene.echoes(&scene.far, scene.server.addr(7000))?;
    Ok(format!("{} after {} ms", answer["ended"].as_str().unwrap_or_default(), answer["ms"]))
}

fn adoption(scene: &mut Scene) -> Result<String> {
    scene.mesh.agent("node-b").kill();
    scene.refuses(&scene.stranger).context("while no agent runs")?;
    let answer = scene.echo(&scene.far, scene.server.addr(7000))?;
    ensure!(answer["echoed"].is_null() && answer["ended"] != "eof", "served by nobody: {answer}");
    let begun = Instant::now();
    scene.mesh.agent("node-b").start()?;
    let ready = begun.elapsed().as_millis();
    scene.echoes(&scene.far, scene.server.addr(7000))?;
    scene.refuses(&scene.stranger).context("after the next agent took over")?;
    Ok(format!("ready again in {ready} ms"))
}

/// From here on the second node's agent lets pods of its node speak by themselves.
fn same_node_direct(scene: &mut Scene) -> Result<String> {
    let report = scene.examine()?;
    let findings = report["features"].as_array().context("no features in the report")?;
    let finding = findings.iter().find(|finding| finding["name"] == "same-node-direct");
    let works = finding.context("no finding on direct connections")?["works"] == true;
    let agent = scene.mesh.agent("node-b");
    if !works {
        let mut command = agent.command()?;
        command.args(agent.args().iter().map(|arg| if arg == "relay" { "direct" } else { arg }));
        let finished = Running::start(command)?.finish()?;
        let said =
            finished.stderr.lines().find(|line| line.contains("--same-node direct")).map(str::to_owned);
        ensure!(!finished.status.success(), "an agent started that should have refused");
        return Ok(format!("refused at the start: {}", said.context("without naming the setting")?));
    }
    agent.kill();
    let args = agent.args();
    let place = args.iter().position(|arg| arg == "--same-node").context("no --same-node")?;
    "direct".clone_into(args.get_mut(place + 1).context("no --same-node")?);
    agent.start()?;
    let mut connections = 0;
    let direct = eventually(Duration::from_secs(30), || {
        let accepted = direct_accepted(scene)?;
        scene.echoes(&scene.near, scene.server.addr(7000)).ok()?;
        connections += 1;
        (direct_accepted(scene)? > accepted).then_some(())
    });
    direct.context("every connection goes through the agent")?;
    scene.echoes(&scene.far, scene.server.addr(7000))?;
    scene.refuses(&scene.stranger)?;
    Ok(format!("connection {connections} went directly; a stranger's is refused"))
}

fn direct_accepted(scene: &mut Scene) -> Option<f64> {
    let metrics = scene.mesh.agent("node-b").metrics().ok()?;
    Some(metrics.sum("mtls_kernel_events_total", &[("counter", "direct_accepted")]))
}

/// `mtls lab features` in the agent's place; its findings stand on the console too, for the table of kernels.
fn features(scene: &mut Scene) -> Result<String> {
    let report = scene.examine()?;
    let findings = report["features"].as_array().context("no features in the report")?;
    ensure!(report["can_run"] == true, "the agent runs, but is told that it can't: {report}");
    let required = findings.iter().filter(|finding| finding["required"] == true);
    let mut count = 0;
    for finding in required {
        ensure!(finding["works"] == true, "{finding}");
        count += 1;
    }
    let optional = findings.iter().filter(|finding| finding["required"] == false);
    let optional: serde_json::Map<_, _> = optional
        .filter_map(|finding| Some((finding["name"].as_str()?.to_owned(), finding["works"].clone())))
        .collect();
    println!("{}", json!({ "optional": optional }));
    Ok(format!("{count} parts"))
}

/// An address that an application printed, v4-mapped or not.
fn address(value: &Value) -> Result<SocketAddr> {
    let address: SocketAddr = value.as_str().with_context(|| format!("no address: {value}"))?.parse()?;
    Ok(SocketAddr::new(address.ip().to_canonical(), address.port()))
}
