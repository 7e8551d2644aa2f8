//! Fair sharing: what one pod's latency becomes when another pod of the same node is greedy.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result};
use mtls::results::Workload;
use mtls_tests::{Running, mtls};

use crate::args::{Args, Kind};
use crate::measure::{self, Measured};
use crate::workloads::WORKLOADS;
use crate::world::Way;

/// The load whose latency is looked at.
pub fn workload() -> &'static Workload {
    let paced = WORKLOADS.iter().find(|(kind, _)| *kind == Kind::Paced);
    &paced.unwrap_or(&WORKLOADS[0]).1
}

/// What the neighbour does meanwhile.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Neighbour {
    Greedy,
    GreedyAmongIdle,
}

pub const NEIGHBOURS: [Neighbour; 2] = [Neighbour::Greedy, Neighbour::GreedyAmongIdle];

impl Neighbour {
    pub fn workload(self, idle: usize) -> String {
        match self {
            Self::Greedy => "1000 requests/s beside another pod's bulk stream".into(),
            Self::GreedyAmongIdle => {
                format!("1000 requests/s beside another pod's bulk stream and {idle} idle connections")
            }
        }
    }
}

/// Measures `way` while the pods of `greedy`, on the same nodes, are at work.
pub fn beside(way: &Way, greedy: &Way, neighbour: Neighbour, idle: usize, args: &Args) -> Result<Measured> {
    let holder = match neighbour {
        Neighbour::Greedy => None,
        Neighbour::GreedyAmongIdle => Some(measure::hold(greedy, idle)?),
    };
    let mut command = greedy.client.command(mtls()?);
    let seconds = args.seconds() * args.attempts() as f64 + 5.0;
    command.args(["bench", "client", "--workload", "upload", "--to", &greedy.address.to_string()]);
    command.args(["--seconds", &seconds.to_string()]).stdin(Stdio::null());
    let mut bulk = Running::start(command)?;
    std::thread::sleep(Duration::from_millis(300));
    let mut measured = measure::load(way, workload(), args)?;
    // The agents work for the neighbour too: what that costs isn't this load's.
    measured.figures.retain(|(metric, _)| !metric.unit.starts_with("s/"));
    anyhow::ensure!(bulk.alive(), "the greedy stream ended too early");
    drop(bulk);
    if let Some(holder) = holder {
        holder.finish()?.success().context("idle connections were lost")?;
    }
    Ok(measured)
}
