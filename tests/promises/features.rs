//! What a kernel can do is found by doing it; the agent acts on it, and says so.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use mtls_tests::{Finished, Lab, Mesh, Running};
use serde_json::Value;

use crate::{Scene, assert_echoed, needs};

#[test]
fn everything_the_agent_needs_is_seen_to_work_where_an_agent_works() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let to = scene.server.addr(7000).to_string();
    let finished = examine(&scene.lab, &mut scene.mesh, &[])?;
    assert!(finished.status.success(), "{}\n{}", finished.stdout, finished.stderr);
    let report: Value = serde_json::from_str(&finished.stdout)?;
    assert_eq!(report["can_run"], true);
    for finding in findings(&report)?.iter().filter(|finding| finding["required"] == true) {
        assert_eq!(finding["works"], true, "{finding}");
        for told in ["needed_for", "since", "instead", "seen"] {
            assert!(finding[told].as_str().is_some_and(|text| !text.is_empty()), "no {told}: {finding}");
        }
    }
    assert!(finding(&report, "sk-lookup")?["seen"].as_str().is_some_and(|seen| seen.contains("refused")));
    // The agent's own programs are others' to whoever asks.
    let hooks = report["machine"]["hooks"].as_array().context("no hooks")?;
    for hook in ["connect4", "connect6", "getpeername4", "getpeername6", "mtls_sock_ops"] {
        assert!(hooks.iter().any(|occupant| occupant["hook"] == hook), "{hook} is not listed: {hooks:?}");
    }
    // Nothing of it stayed, and nobody was disturbed.
    let left = std::fs::read_dir(scene.lab.node("node-a")?.cgroup())?.flatten();
    let left = left.filter(|entry| entry.file_name().to_string_lossy().contains("probe"));
    assert_eq!(left.count(), 0);
    let again: Value = serde_json::from_str(&examine(&scene.lab, &mut scene.mesh, &[])?.stdout)?;
    assert_eq!(again["machine"]["hooks"], report["machine"]["hooks"]);
    assert_echoed(&scene.far.app(&["dial", "echo", &to])?);
    Ok(())
}

#[test]
fn the_table_says_the_same_to_people() -> Result<()> {
    needs!();
    let lab = Lab::two_nodes()?;
    let pins = lab.dir().join("bpf/features");
    let finished = run(&lab, &["--bpffs", &pins.to_string_lossy(), "--output", "table"])?;
    assert!(finished.status.success(), "{}\n{}", finished.stdout, finished.stderr);
    for said in ["FEATURE", "NEEDED FOR", "SINCE", "WITHOUT IT", "connect4", "ktls-aes-128-gcm"] {
        assert!(finished.stdout.contains(said), "no {said}:\n{}", finished.stdout);
    }
    for said in ["cgroup2 root", "lockdown", "capabilities", "tls: ", "gcm: ", "The agent can run here."] {
        assert!(finished.stdout.contains(said), "no {said}:\n{}", finished.stdout);
    }
    Ok(())
}

#[test]
fn what_is_missing_is_named_and_the_rest_is_tried_all_the_same() -> Result<()> {
    needs!(["setpriv"]);
    let lab = Lab::two_nodes()?;
    let pins = lab.dir().join("bpf/features").to_string_lossy().into_owned();
    let plain = lab.dir().join("plain").to_string_lossy().into_owned();
    std::fs::create_dir_all(&plain)?;

    let report = refused(&run(&lab, &["--bpffs", &plain])?)?;
    let bpffs = finding(&report, "bpffs")?;
    assert_eq!(bpffs["works"], false);
    assert!(bpffs["seen"].as_str().is_some_and(|seen| seen.contains(&plain)), "{bpffs}");
    assert_eq!(finding(&report, "connect4")?["works"], true);

    let report = refused(&run(&lab, &["--bpffs", &pins, "--cgroup-root", &plain])?)?;
    let cgroup = finding(&report, "cgroup2")?;
    assert_eq!(cgroup["works"], false);
    assert!(cgroup["seen"].as_str().is_some_and(|seen| seen.contains(&plain)), "{cgroup}");
    assert_eq!(finding(&report, "connect4")?["works"], Value::Null, "it needs a cgroup");

    // As systemd mounts it beside version 1.
    symlink(lab.node("node-a")?.cgroup(), Path::new(&plain).join("unified"))?;
    let finished = run(&lab, &["--bpffs", &pins, "--cgroup-root", &plain])?;
    assert!(finished.status.success(), "{}\n{}", finished.stdout, finished.stderr);
    let report: Value = serde_json::from_str(&finished.stdout)?;
    assert_eq!(
        report["machine"]["cgroup_root"]["path"],
        lab.node("node-a")?.cgroup().to_string_lossy().as_ref()
    );

    let node = lab.node("node-a")?;
    let mut command = node.command_in("agent", "setpriv");
    command.args(["--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin"]).arg(mtls_tests::mtls()?);
    let finished = finish(command, &lab, &["--bpffs", &pins])?;
    let report = refused(&finished)?;
    let capabilities = finding(&report, "capabilities")?;
    assert_eq!(capabilities["works"], false);
    assert!(
        capabilities["seen"].as_str().is_some_and(|seen| seen.contains("CAP_SYS_ADMIN")),
        "{capabilities}"
    );
    Ok(())
}

#[test]
fn the_agent_uses_what_works_and_a_path_that_is_forced_and_cannot_work_is_an_error() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let report: Value = serde_json::from_str(&examine(&scene.lab, &mut scene.mesh, &[])?.stdout)?;
    let metrics = scene.mesh.agent("node-a").metrics()?;
    let choices =
        ["ktls-aes-128-gcm", "ktls-aes-256-gcm", "ktls-rekey", "splice", "tcp-rto-max", "socket-destroy"];
    for name in choices {
        let works = finding(&report, name)?["works"] == true;
        let used = metrics.sum("mtls_capability", &[("feature", name)]);
        assert!(metrics.has("mtls_capability"), "no such metric");
        assert_eq!(used, f64::from(u8::from(works)), "{name}");
    }

    let agent = scene.mesh.agent("node-a");
    agent.kill();
    agent.args().extend(["--feature".into(), "splice=off".into()]);
    agent.start()?;
    assert_eq!(agent.metrics()?.sum("mtls_capability", &[("feature", "splice")]), 0.0);
    assert!(agent.log().contains("does without splice: switched off"), "{}", agent.log());

    agent.kill();
    for (word, named) in [("splice=perhaps", "splice=perhaps"), ("teleport=on", "teleport")] {
        let log = fails_with(agent, &["--feature", word])?;
        assert!(log.contains(named), "{log}");
    }
    // Whatever this kernel can't do; there is none that can do all of it yet.
    let mut cannot = choices
        .into_iter()
        .filter(|name| finding(&report, name).is_ok_and(|finding| finding["works"] == false));
    if let Some(name) = cannot.next() {
        let log = fails_with(agent, &["--feature", &format!("{name}=on")])?;
        assert!(log.contains(name) && log.contains("does not work here"), "{log}");
    }
    Ok(())
}

#[test]
fn kernel_tls_that_is_asked_for_carries_records_or_is_an_error_that_says_why_not() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let report: Value = serde_json::from_str(&examine(&scene.lab, &mut scene.mesh, &[])?.stdout)?;
    let works = finding(&report, "ktls-aes-128-gcm")?["works"] == true;
    let agent = scene.mesh.agent("node-a");
    assert!(agent.log().contains("records of long streams"), "{}", agent.log());
    agent.kill();
    // Without splice nothing could move what the kernel seals.
    let splice = ["--kernel-tls", "on", "--feature", "splice=off"];
    let log = fails_with(agent, &splice)?;
    assert!(log.contains("--kernel-tls on") && log.contains("does without splice: switched off"), "{log}");
    if works {
        agent.args().extend(["--kernel-tls", "on"].map(str::to_owned));
        agent.start()?;
        assert!(agent.log().contains("carrier=\"kernel\""), "{}", agent.log());
    } else {
        let log = fails_with(agent, &["--kernel-tls", "on"])?;
        let named = log.contains("--kernel-tls on") && log.contains("does without ktls-aes-128-gcm");
        assert!(named && log.contains("CONFIG_TLS"), "{log}");
        // What it says it does instead, it does.
        agent.args().extend(["--kernel-tls", "auto"].map(str::to_owned));
        agent.start()?;
        assert!(agent.log().contains("the kernel carries none"), "{}", agent.log());
    }
    Ok(())
}

/// Starts the agent with more settings, waits for its end, and returns what it said.
fn fails_with(agent: &mut mtls_tests::Agent, settings: &[&str]) -> Result<String> {
    let mut command = agent.command()?;
    command.args(agent.args().clone()).args(settings);
    let finished = Running::start(command)?.finish_within(Duration::from_secs(20))?;
    assert!(!finished.status.success(), "{settings:?} was accepted");
    Ok(finished.stderr)
}

/// Beside the agent of the first node.
fn examine(lab: &Lab, mesh: &mut Mesh, flags: &[&str]) -> Result<Finished> {
    let command = mesh.agent("node-a").command()?;
    let pins = lab.dir().join("bpf/features").to_string_lossy().into_owned();
    finish(command, lab, &[&["--bpffs", &pins], flags].concat())
}

/// On the first node.
fn run(lab: &Lab, flags: &[&str]) -> Result<Finished> {
    finish(lab.node("node-a")?.command_in("agent", mtls_tests::mtls()?), lab, flags)
}

fn finish(mut command: Command, lab: &Lab, flags: &[&str]) -> Result<Finished> {
    command.args(["lab", "features"]);
    if !flags.contains(&"--cgroup-root") {
        command.arg("--cgroup-root").arg(lab.node("node-a")?.cgroup());
    }
    if !flags.contains(&"--output") {
        command.args(["--output", "json"]);
    }
    command.args(flags);
    Running::start(command)?.finish_within(Duration::from_secs(30))
}

/// A report that says that the agent can't run, by exit code and in words.
fn refused(finished: &Finished) -> Result<Value> {
    assert_eq!(finished.status.code(), Some(1), "{}\n{}", finished.stdout, finished.stderr);
    let report: Value = serde_json::from_str(&finished.stdout).context("no JSON")?;
    assert_eq!(report["can_run"], false);
    Ok(report)
}

fn findings(report: &Value) -> Result<&Vec<Value>> {
    report["features"].as_array().context("no features in the report")
}

fn finding<'a>(report: &'a Value, name: &str) -> Result<&'a Value> {
    findings(report)?
        .iter()
        .find(|finding| finding["name"] == name)
        .with_context(|| format!("no feature {name}"))
}
