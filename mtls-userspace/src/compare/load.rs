//! One measurement: a carrier and a load in, figures out.

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::cost;
use super::path::Carrier;
use super::place::Process;
use crate::results::{Figures, Metric, Workload};

pub(super) type Measured = Figures;

const MEMORY: Metric = Metric { name: "memory", unit: "bytes per idle connection", higher_is_better: false };

pub(super) fn run(carrier: &Carrier, workload: &Workload, seconds: f64) -> Result<Measured> {
    let clock = || Ok::<_, anyhow::Error>((carrier.cpu()?, cost::machine()?));
    let before = clock()?;
    let report = client(carrier, workload.flags, seconds)?;
    let after = clock()?;
    let mut figures = workload.figures(&report)?;
    let amount = workload.amount(&report)?;
    if !carrier.processes.is_empty() {
        figures.push((workload.per.agents(), (after.0 - before.0) / amount));
    }
    figures.push((workload.per.machine(), (after.1 - before.1) / amount));
    Ok(figures)
}

fn client(carrier: &Carrier, flags: &[&str], seconds: f64) -> Result<Value> {
    let (to, seconds_text) = (carrier.dial.to_string(), seconds.to_string());
    let common = ["bench", "client", "--to", &to, "--seconds", &seconds_text, "--workload"];
    let command = carrier.pair.client.mtls(&[&common, flags].concat())?;
    let mut process = Process::start_with(command, Stdio::piped())?;
    let stdout = process.child().stdout.take().context("no output")?;
    process.finish(Duration::from_secs_f64(seconds + 30.0)).context("the load client").map_err(|error| {
        let said = carrier.processes.iter().map(Process::last_words).find(|said| !said.is_empty());
        match said {
            Some(said) => error.context(said),
            None => error,
        }
    })?;
    Ok(serde_json::from_reader(stdout)?)
}

/// Makes sure that a carrier carries what passes it unchanged, and warms everybody up.
pub(super) fn prove(carrier: &Carrier) -> Result<()> {
    let before = carrier.cpu()?;
    client(carrier, &["request"], 0.1)?;
    client(carrier, &["verify", "--connections", "4"], 0.1).context("what passes it")?;
    let used = carrier.cpu()? - before;
    ensure!(
        !carrier.by_processes || used > 0.002,
        "its processes used {used:.4} s of CPU: connections don't pass through them"
    );
    Ok(())
}

/// Growth of the processes' memory per idle connection.
pub(super) fn idle(carrier: &Carrier, count: usize) -> Result<Measured> {
    let resident =
        || carrier.processes.iter().map(|process| cost::memory(process.pid())).sum::<Result<u64>>();
    let before = resident()?;
    let (to, connections) = (carrier.dial.to_string(), count.to_string());
    let flags = ["bench", "client", "--to", &to, "--workload", "idle", "--connections", &connections];
    let mut command = carrier.pair.client.mtls(&flags)?;
    command.stdin(Stdio::piped());
    let mut holder = Process::start_with(command, Stdio::piped())?;
    let mut said = String::new();
    // Kept to the end: it still has a report to write.
    let mut lines = BufReader::new(holder.child().stdout.take().context("no output")?);
    lines.read_line(&mut said)?;
    if !said.contains("open") {
        holder.finish(Duration::from_secs(5)).context("idle connections don't open")?;
    }
    std::thread::sleep(Duration::from_millis(200));
    let grown = resident()?.saturating_sub(before);
    // Each has to answer once more.
    drop(holder.child().stdin.take());
    holder.finish(Duration::from_secs(30)).context("idle connections were lost")?;
    Ok(vec![(MEMORY, grown as f64 / count.max(1) as f64)])
}
