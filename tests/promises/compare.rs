//! `mtls lab compare` measures every path this kernel has in a lab of its own, says why it left the others out, and leaves
//! nothing behind. Nothing here judges a time.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mtls_tests::{eventually, mtls};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::needs;

/// Those that every kernel of ours carries.
const PATHS: [&str; 7] = [
    "plain TCP",
    "relay, plaintext, copy",
    "relay, plaintext, splice",
    "relay, TLS, library",
    "relay, TLS, ours",
    "agent, connect hook, between nodes",
    "agent, connect hook, same node, relay",
];

/// A directory for results, removed with its content.
struct Out(PathBuf);

impl Out {
    fn new(name: &str) -> Self {
        Self(std::env::temp_dir().join(format!("mtls-compare-test-{name}-{}", std::process::id())))
    }

    fn read(&self, file: &str) -> Result<String> {
        std::fs::read_to_string(self.0.join(file)).with_context(|| format!("no {file}"))
    }
}

impl Drop for Out {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn compare(out: &Out, more: &[&str]) -> Result<Command> {
    let mut command = Command::new(mtls()?);
    command.args(["lab", "compare", "--quick", "--out"]).arg(&out.0).args(more);
    Ok(command)
}

/// What a lab of the process `pid` would leave.
fn leftovers(pid: u32) -> Result<Vec<PathBuf>> {
    let name = format!("mtls-compare-{pid}");
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    let cgroups = mounts.lines().filter(|line| line.contains(" - cgroup2 "));
    let cgroups = cgroups.filter_map(|line| line.split(' ').nth(4)).map(|root| Path::new(root).join(&name));
    let mut places: Vec<PathBuf> = cgroups.collect();
    places.push(std::env::temp_dir().join(&name));
    places.retain(|place| place.exists());
    Ok(places)
}

#[test]
fn a_short_run_measures_every_path_and_leaves_nothing_behind() -> Result<()> {
    needs!();
    let out = Out::new("run");
    let child = compare(&out, &[])?.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let pid = child.id();
    let ended = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&ended.stdout).into_owned();
    ensure!(ended.status.success(), "{said}\n{}", String::from_utf8_lossy(&ended.stderr));
    assert_eq!(leftovers(pid)?, Vec::<PathBuf>::new());

    let results: Value = serde_json::from_str(&out.read("compare.json")?)?;
    let records = results["records"].as_array().context("no records")?;
    let page = out.read("compare.html")?;
    for path in PATHS {
        let of_path: Vec<&Value> = records.iter().filter(|record| record["path"] == path).collect();
        let workloads: BTreeSet<&str> = of_path.iter().filter_map(|r| r["workload"].as_str()).collect();
        let plain = path == "plain TCP";
        // Seven loads, and the memory of idle connections where something carries them.
        assert_eq!(workloads.len(), 7 + usize::from(!plain), "{path}: {workloads:?} {}", results["missing"]);
        for record in &of_path {
            let number = |key: &str| record[key].as_f64().with_context(|| format!("no {key}: {record}"));
            let (least, median, most) = (number("min")?, number("median")?, number("max")?);
            assert!(least <= median && median <= most && least >= 0.0, "{record}");
        }
        let throughput = |r: &&&Value| r["metric"] == "throughput" && r["ratio"].is_number() != plain;
        assert_eq!(of_path.iter().filter(throughput).count(), 4, "{path}");
        assert!(page.contains(&format!("<td>{path}<td>")) && said.contains(path), "{path} is not shown");
    }
    // Whatever was left out has a reason.
    let missing = results["missing"].as_array().context("no list of what is missing")?;
    for left_out in missing {
        let why = left_out["why"].as_str().unwrap_or_default();
        assert!(why.len() > 10 && said.contains(why) && left_out["path"].is_string(), "{left_out}");
    }
    for depends in ["relay, TLS, ours, kernel", "relay, plaintext, sockmap (unsafe)"] {
        let told = |value: &Value| value["path"].as_str().is_some_and(|path| path.starts_with(depends));
        assert!(records.iter().any(told) || missing.iter().any(told), "nothing about {depends}");
    }
    for outside in ["http://", "https://", "src=", "@import", "<script", "url("] {
        assert!(!page.contains(outside), "the page needs {outside}");
    }

    let file = out.0.join("compare.json");
    let same = Command::new(mtls()?).args(["lab", "diff"]).args([&file, &file]).output()?;
    let same = String::from_utf8_lossy(&same.stdout).into_owned();
    assert!(same.contains("1.00") && same.contains("same") && !same.contains("WORSE"), "{same}");
    Ok(())
}

#[test]
fn a_run_that_is_interrupted_leaves_nothing_behind() -> Result<()> {
    needs!();
    let out = Out::new("stop");
    let mut child = compare(&out, &["--path", "plain TCP;between nodes", "--seconds", "60"])?
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let there = eventually(Duration::from_secs(10), || leftovers(child.id()).ok().filter(|l| l.len() > 1));
    let began = there.context("no lab was made");
    std::thread::sleep(Duration::from_millis(300));
    kill(Pid::from_raw(child.id() as i32), Signal::SIGINT)?;
    let ended = eventually(Duration::from_secs(10), || child.try_wait().ok().flatten());
    if ended.is_none() {
        child.kill()?;
    }
    began?;
    ensure!(!ended.context("it does not stop")?.success(), "an interrupted run is no success");
    assert_eq!(leftovers(child.id())?, Vec::<PathBuf>::new());
    Ok(())
}

#[test]
fn what_cannot_be_measured_is_said_before_anything_is() -> Result<()> {
    let out = Out::new("wrong");
    for (args, expected) in [
        (["--path", "nobody's"], "no path's name contains"),
        (["--repetitions", "0"], "--repetitions must be"),
        (["--seconds", "0"], "--seconds must be"),
    ] {
        let ended = compare(&out, &args)?.output()?;
        let said = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert!(!ended.status.success() && said.contains(expected), "{args:?}: {said}");
    }
    Ok(())
}
