//! Kernel TLS, on kernels that have it and on those that have not: what is reported, what the agent makes of it, and the
//! tunnel's own tests with their records in the kernel.

use std::os::fd::AsRawFd;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use mtls_tests::{Running, eventually};
use serde_json::Value;

use crate::cases::Scene;

/// The tunnel's tests of raw streams, as `cargo xtask vm` links them.
const TUNNEL: &str = "tunnel";
/// An emulated processor takes its time.
const LIMIT: Duration = Duration::from_secs(300);
/// Bytes after which the agents hand a stream to the kernel, and those of a stream that is long.
const AFTER: u64 = 1 << 20;
const LONG: &str = "16000001";

/// What the product says about the kernel's TLS is what a socket of ours sees, and what the agent acts on.
pub fn reported(scene: &mut Scene) -> Result<String> {
    let has_tls = takes_tls()?;
    let report = scene.examine()?;
    let findings = report["features"].as_array().context("no features in the report")?;
    let finding = findings.iter().find(|finding| finding["name"] == "ktls-aes-128-gcm");
    let finding = finding.context("no finding on kernel TLS")?;
    ensure!(finding["works"] == has_tls, "a socket says {has_tls}: {finding}");
    let metrics = scene.mesh.agent("node-a").metrics()?;
    let used = metrics.sum("mtls_capability", &[("feature", "ktls-aes-128-gcm")]);
    ensure!(
        metrics.has("mtls_capability") && used == f64::from(u8::from(has_tls)),
        "the agent says {used}:\n{}",
        scene.mesh.agent("node-a").log()
    );
    let said = match has_tls {
        true => finding["seen"].as_str(),
        false => {
            let instead = finding["instead"].as_str().context("no fallback is named")?;
            let log = scene.mesh.agent("node-a").log();
            ensure!(log.contains("does without ktls-aes-128-gcm"), "the agent does not say so:\n{log}");
            Some(instead)
        }
    };
    Ok(format!("{}{}", if has_tls { "" } else { "none: " }, said.unwrap_or_default()))
}

/// Where the kernel has TLS, tests that fall back to userspace fail.
pub fn tunnel_suite(_: &mut Scene) -> Result<String> {
    let has_tls = takes_tls()?;
    let program = std::env::current_exe()?.with_file_name(TUNNEL);
    let mut command = Command::new(&program);
    command.args(["raw", "--test-threads", "2"]);
    if has_tls {
        command.env("MTLS_KERNEL_TLS", "required");
    }
    let finished = Running::start(command)?.finish_within(LIMIT)?;
    let summary = finished.stdout.lines().find_map(|line| line.strip_prefix("test result: "));
    let summary = summary.map(str::to_owned);
    let finished = finished.success()?;
    let summary = summary.with_context(|| format!("no result: {}", finished.stdout))?;
    let passed = summary.strip_prefix("ok. ").and_then(|rest| rest.split(' ').next()?.parse().ok());
    ensure!(passed > Some(0), "no test ran: {summary}");
    let carrier = if has_tls { "the kernel" } else { "userspace, as reported" };
    Ok(format!("{} passed, records in {carrier}", passed.unwrap_or(0)))
}

/// Agents that are told to use the kernel's TLS do, or say at their start why they can't.
pub fn told_to(scene: &mut Scene) -> Result<String> {
    let has_tls = takes_tls()?;
    let nodes = ["node-a", "node-b"];
    let flags = ["--kernel-tls", "on", "--kernel-tls-after", &AFTER.to_string()].map(str::to_owned);
    if !has_tls {
        return refuse_to_start(scene, &flags);
    }
    for node in nodes {
        let agent = scene.mesh.agent(node);
        agent.kill();
        agent.args().extend(flags.iter().cloned());
        agent.start()?;
    }
    let turns = converse(scene)?;
    let to = scene.server.addr(7001).to_string();
    let answer = scene.far.app(&["dial", "upload", &to, "--bytes", LONG])?;
    ensure!(answer["match"] == true && answer["ended"] == "eof", "{answer}");
    for node in nodes {
        let counted = eventually(Duration::from_secs(10), || {
            let metrics = scene.mesh.agent(node).metrics().ok()?;
            let kernel = metrics.sum("mtls_tunnel_connections_total", &[("records", "kernel")]);
            (kernel >= 2.0).then_some(kernel)
        });
        counted.with_context(|| format!("{node} counts no two connections with records in the kernel"))?;
    }
    Ok(format!("{LONG} bytes one way and {turns} turns of 64000 both ways arrived"))
}

/// A long conversation, until both agents show the kernel as its carrier, and to its clean end. Returns its turns.
fn converse(scene: &mut Scene) -> Result<u64> {
    let message = "0123456789abcdef".repeat(4000);
    let before = scene.echo.all_json_with("ended").len();
    let to = scene.server.addr(7000).to_string();
    let mut stream =
        scene.far.start_app(&["dial", "stream", &to, "--message", &message, "--pause-ms", "5"])?;
    stream.json_with("established")?;
    for node in ["node-a", "node-b"] {
        let mut shown = Value::Null;
        let seen = eventually(Duration::from_secs(60), || {
            let said =
                scene.mesh.agent(node).ask(&["connections", "--output", "json"]).ok()?.success().ok()?;
            let rows: Value = serde_json::from_str(&said.stdout).ok()?;
            shown = rows["newest"][0].clone();
            (shown["records"] == "kernel").then_some(())
        });
        seen.with_context(|| format!("{node} does not show the kernel as the carrier: {shown}"))?;
    }
    stream.say("")?;
    let answer = stream.json_with("turns")?;
    ensure!(answer["ended"] == "eof", "{answer}");
    let turns = answer["turns"].as_u64().context("no turns")?;
    let ended = scene.echo.json_after("ended", before)?;
    ensure!(
        ended["bytes"] == turns * message.len() as u64 && ended["ended"] == "eof",
        "{ended}, {turns} turns"
    );
    Ok(turns)
}

fn refuse_to_start(scene: &mut Scene, flags: &[String]) -> Result<String> {
    let agent = scene.mesh.agent("node-a");
    let mut command = agent.command()?;
    command.args(agent.args().clone()).args(flags);
    let finished = Running::start(command)?.finish_within(Duration::from_secs(60))?;
    if finished.status.success() {
        bail!("an agent with --kernel-tls on started on a kernel without TLS");
    }
    let reason = finished.stderr.lines().find(|line| line.contains("--kernel-tls on"));
    let reason = reason.with_context(|| format!("the setting is not named: {}", finished.stderr))?;
    Ok(format!("refused at the start: {reason}"))
}

/// Whether a connected socket can be given to the kernel's TLS.
fn takes_tls() -> Result<bool> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let socket = std::net::TcpStream::connect(listener.local_addr()?)?;
    // SAFETY: the kernel reads three bytes.
    let outcome = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_ULP, c"tls".as_ptr().cast(), 3)
    };
    Ok(outcome == 0)
}
