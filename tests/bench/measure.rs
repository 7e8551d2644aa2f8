//! One measurement: a way and a load in, figures out.

use std::process::Stdio;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mtls::results::{FIRST_BYTE, Figures, Metric, Workload};
use mtls_tests::{Running, mtls};
use serde_json::Value;

use crate::args::Args;
use crate::cost::{Agent, Clock};
use crate::kernel;
use crate::world::{Carrier, Way};

/// Figures, and how many CPUs others used meanwhile.
pub struct Measured {
    pub figures: Figures,
    pub disturbance: f64,
}

/// Puts a load on a way; again if the machine was busy with something else.
pub fn load(way: &Way, workload: &Workload, args: &Args) -> Result<Measured> {
    let mut best: Option<Measured> = None;
    for _ in 0..args.attempts() {
        let measured = once(way, workload, args.seconds())?;
        let disturbance = measured.disturbance;
        if best.as_ref().is_none_or(|best| disturbance < best.disturbance) {
            best = Some(measured);
        }
        if disturbance <= args.max_disturbance {
            break;
        }
    }
    best.context("measured nothing")
}

fn once(way: &Way, workload: &Workload, seconds: f64) -> Result<Measured> {
    let before = Clock::now(&way.agents)?;
    let begun = std::time::Instant::now();
    let report = client(way, workload.flags, seconds)?;
    let wall = begun.elapsed().as_secs_f64();
    let after = Clock::now(&way.agents)?;
    let mut figures = workload.figures(&report)?;
    let amount = workload.amount(&report)?;
    if !way.agents.is_empty() {
        figures.push((workload.per.agents(), (after.agents - before.agents) / amount));
    }
    let others = after.others_since(&before);
    let machine = (after.machine - before.machine - others).max(0.0);
    figures.push((workload.per.machine(), machine / amount));
    Ok(Measured { figures, disturbance: others / wall })
}

fn client(way: &Way, flags: &[&str], seconds: f64) -> Result<Value> {
    let mut command = way.client.command(mtls()?);
    command.args(["bench", "client", "--to", &way.address.to_string(), "--seconds", &seconds.to_string()]);
    command.arg("--workload").args(flags);
    let limit = Duration::from_secs_f64(seconds + 30.0);
    Running::start(command)?.finish_within(limit)?.success()?.json()
}

/// Makes sure that a way's agents carry what passes it, or don't, and warms everybody up.
pub fn prove(way: &Way) -> Result<()> {
    if way.carrier == Carrier::Direct {
        client(way, &["first"], 1.0)?;
    }
    let used = |agent: &Agent| Ok::<_, anyhow::Error>((agent.name, agent.cpu()?));
    let before: Vec<_> = way.agents.iter().map(used).collect::<Result<_>>()?;
    client(way, &["request"], 0.3)?;
    for (agent, (name, before)) in way.agents.iter().zip(before) {
        let used = agent.cpu()? - before;
        match way.carrier {
            Carrier::Direct => {
                ensure!(used < 0.1, "the {name} used {used:.4} s of CPU: it carries connections")
            }
            _ => {
                ensure!(used > 0.005, "the {name} used {used:.4} s of CPU: connections don't pass through it")
            }
        }
    }
    client(way, &["upload"], 0.2).map(drop)
}

/// What each of a way's connections costs in the programs of these processes.
pub fn kernel(way: &Way, agents: &[u32], args: &Args) -> Result<Figures> {
    kernel::cost(agents, || {
        let report = client(way, &["connect"], args.seconds().min(1.0))?;
        let made = report["all_exchanges"].as_f64().filter(|made| *made > 0.0);
        made.with_context(|| format!("no connection was made: {report}"))
    })
}

/// The first connection between two pods since the agents started.
pub fn first_byte(way: &Way) -> Result<Figures> {
    let report = client(way, &["first"], 1.0)?;
    let took = report["latency_us"]["p50"].as_f64().with_context(|| format!("no latency in {report}"))?;
    Ok(vec![(FIRST_BYTE, took)])
}

/// Growth of each agent's memory per idle connection, for growing numbers of them. Its agents have just been started.
pub fn memory(way: &Way, counts: &[usize]) -> Result<Vec<(usize, Figures)>> {
    client(way, &["request", "--connections", "16"], 0.2)?;
    thread::sleep(Duration::from_millis(300));
    let resident = |agent: &Agent| agent.resident();
    let before: Vec<u64> = way.agents.iter().map(resident).collect::<Result<_>>()?;
    let mut results = Vec::new();
    for count in counts {
        let holder = hold(way, *count)?;
        thread::sleep(Duration::from_millis(700));
        let mut figures = Vec::new();
        for (agent, before) in way.agents.iter().zip(&before) {
            let grown = agent.resident()?.saturating_sub(*before);
            figures.push((memory_of(agent), grown as f64 / *count as f64));
        }
        // Each has to answer once more.
        holder.finish()?.success().context("idle connections were lost")?;
        results.push((*count, figures));
    }
    Ok(results)
}

fn memory_of(agent: &Agent) -> Metric {
    let name = match agent.name {
        "client's agent" => "memory, client's agent",
        "server's agent" => "memory, server's agent",
        _ => "memory, agent",
    };
    Metric { name, unit: "bytes per idle connection", higher_is_better: false }
}

/// Opens idle connections; they are held until its standard input ends.
pub fn hold(way: &Way, count: usize) -> Result<Running> {
    let mut command = way.client.command(mtls()?);
    command.args(["bench", "client", "--workload", "idle", "--to", &way.address.to_string()]);
    command.args(["--connections", &count.to_string()]).stdin(Stdio::piped());
    let holder = Running::start(command)?;
    holder.json_with("open").with_context(|| format!("{count} connections don't open"))?;
    Ok(holder)
}
