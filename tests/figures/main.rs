//! First figures: nothing in, a table of speed and memory beside plain TCP, measured in turns in the same lab, out.
//!
//! Client, server and both agents share this machine's cores, so ratios say more than absolute numbers. Nothing here
//! passes or fails.

use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mtls_tests::{Lab, Mesh, Options, Pod, Running, mtls};
use serde_json::Value;

const PORT: u16 = 7000;
const REPETITIONS: usize = 3;
const IDLE: u64 = 5000;

/// A load and the unit its result is told in.
struct Load {
    name: &'static str,
    args: &'static [&'static str],
    unit: &'static str,
    value: fn(&Value) -> f64,
}

const LOADS: [Load; 5] = [
    Load { name: "bulk, one connection", args: &["--workload", "upload"], unit: "Gbit/s", value: gigabits },
    Load { name: "bulk, down", args: &["--workload", "download"], unit: "Gbit/s", value: gigabits },
    Load { name: "requests, one connection", args: &["--workload", "request"], unit: "1/s", value: rate },
    Load {
        name: "requests, 64 connections",
        args: &["--workload", "request", "--connections", "64"],
        unit: "1/s",
        value: rate,
    },
    Load {
        name: "new connections, 16 at a time",
        args: &["--workload", "connect", "--connections", "16"],
        unit: "1/s",
        value: rate,
    },
];

/// One way from a client to a server.
struct Way {
    name: &'static str,
    client: Arc<Pod>,
    server: Arc<Pod>,
}

fn main() -> Result<()> {
    if let Some(reason) = mtls_tests::missing(&["ip"]) {
        anyhow::bail!(reason);
    }
    let lab = Lab::two_nodes()?;
    let ways = [
        Way { name: "plain", client: lab.outsider("node-a", "pc")?, server: lab.outsider("node-b", "ps")? },
        Way { name: "mtls", client: lab.pod("node-a", "mc")?, server: lab.pod("node-b", "ms")? },
        Way {
            name: "plain, same node",
            client: lab.outsider("node-b", "pn")?,
            server: lab.outsider("node-b", "pm")?,
        },
        Way { name: "mtls, same node", client: lab.pod("node-b", "mn")?, server: lab.pod("node-b", "mm")? },
    ];
    let mut mesh = Mesh::start_with(&lab, &Options::default())?;
    let mut servers = Vec::new();
    for way in &ways {
        let binary = mtls()?;
        servers.push(way.server.spawn(&binary.to_string_lossy(), &["bench", "server"])?);
    }
    std::thread::sleep(Duration::from_millis(500));
    println!(
        "{:32}{}",
        "",
        ways.each_ref().map(|way| format!("{:>20}", way.name)).concat() + "     cross-node  same node"
    );
    for load in LOADS.iter().filter(|l| std::env::var("ONLY").map_or(true, |o| l.name.contains(&o))) {
        let mut best = [0.0f64; 4];
        // In turns, so that whatever else the machine does hits everybody.
        for _ in 0..REPETITIONS {
            for (way, best) in ways.iter().zip(&mut best) {
                *best = best.max(measure(way, load)?);
            }
        }
        let columns = best.map(|value| format!("{value:>13.2} {:6}", load.unit)).concat();
        println!("{:32}{columns}{:>14.2}{:>11.2}", load.name, best[1] / best[0], best[3] / best[2]);
    }
    for way in [&ways[1], &ways[3]] {
        let bytes = idle_memory(&mut mesh, way)?;
        println!("{}: {bytes:.0} bytes of both agents' memory for each of {IDLE} idle connections", way.name);
    }
    Ok(())
}

fn measure(way: &Way, load: &Load) -> Result<f64> {
    let to = way.server.addr(PORT).to_string();
    let binary = mtls()?;
    let args = [&["bench", "client", "--to", &to, "--seconds", "3"], load.args].concat();
    let finished = way.client.run(&binary.to_string_lossy(), &args)?.success().context(load.name)?;
    Ok((load.value)(&finished.json()?))
}

/// What the agents grow by, per connection that is open and silent.
fn idle_memory(mesh: &mut Mesh, way: &Way) -> Result<f64> {
    let resident = |mesh: &mut Mesh| -> Result<u64> {
        Ok(mesh.agent("node-a").resident_bytes()? + mesh.agent("node-b").resident_bytes()?)
    };
    let before = resident(mesh)?;
    let to = way.server.addr(PORT).to_string();
    let mut command = way.client.command(mtls()?);
    let count = IDLE.to_string();
    command.args(["bench", "client", "--to", &to, "--workload", "idle", "--connections", &count]);
    command.stdin(Stdio::piped());
    let holder = Running::start(command)?;
    let open = mtls_tests::eventually(Duration::from_secs(30), || {
        let open = mesh.agent("node-b").metrics().ok()?.sum("mtls_connections_open", &[]);
        (open >= IDLE as f64).then_some(())
    });
    ensure!(open.is_some(), "{IDLE} connections do not open");
    std::thread::sleep(Duration::from_secs(1));
    let after = resident(mesh)?;
    holder.finish()?.success()?;
    Ok(after.saturating_sub(before) as f64 / IDLE as f64)
}

fn gigabits(report: &Value) -> f64 {
    report["bytes"].as_f64().unwrap_or(0.0) * 8e-9 / report["seconds"].as_f64().unwrap_or(f64::INFINITY)
}

fn rate(report: &Value) -> f64 {
    report["exchanges"].as_f64().unwrap_or(0.0) / report["seconds"].as_f64().unwrap_or(f64::INFINITY)
}
