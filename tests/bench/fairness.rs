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
    Nothing,
    /// So many bulk streams.
    Greedy(usize),
    GreedyAmongIdle,
}

pub const NEIGHBOURS: [Neighbour; 4] =
    [Neighbour::Nothing, Neighbour::Greedy(1), Neighbour::Greedy(8), Neighbour::GreedyAmongIdle];

impl Neighbour {
    pub fn workload(self, idle: usize) -> String {
        match self {
            Self::Nothing => "1000 requests/s alone".into(),
            Self::Greedy(1) => "1000 requests/s beside another pod's bulk stream".into(),
            Self::Greedy(streams) => format!("1000 requests/s beside another pod's {streams} bulk streams"),
            Self::GreedyAmongIdle => {
                format!("1000 requests/s beside another pod's bulk stream and {idle} idle connections")
            }
        }
    }

    fn streams(self) -> usize {
        match self {
            Self::Nothing => 0,
            Self::Greedy(streams) => streams,
            Self::GreedyAmongIdle => 1,
        }
    }
}

/// Measures `way` while the pods of `greedy`, on the same nodes, are at work.
pub fn beside(way: &Way, greedy: &Way, neighbour: Neighbour, idle: usize, args: &Args) -> Result<Measured> {
    let holder = match neighbour {
        Neighbour::GreedyAmongIdle => Some(measure::hold(greedy, idle)?),
        Neighbour::Nothing | Neighbour::Greedy(_) => None,
    };
    let mut bulk = match neighbour.streams() {
        0 => None,
        streams => Some(start(greedy, streams, args)?),
    };
    std::thread::sleep(Duration::from_millis(300));
    let mut measured = measure::load(way, workload(), args)?;
    // The agents work for the neighbour too: what that costs isn't this load's.
    measured.figures.retain(|(metric, _)| !metric.unit.starts_with("s/"));
    anyhow::ensure!(bulk.as_mut().is_none_or(Running::alive), "the greedy streams ended too early");
    drop(bulk);
    if let Some(holder) = holder {
        holder.finish()?.success().context("idle connections were lost")?;
    }
    Ok(measured)
}

/// Streams that outlast every attempt at a measurement.
fn start(greedy: &Way, streams: usize, args: &Args) -> Result<Running> {
    let mut command = greedy.client.command(mtls()?);
    let seconds = args.seconds() * args.attempts() as f64 + 5.0;
    command.args(["bench", "client", "--workload", "upload", "--to", &greedy.address.to_string()]);
    command.args(["--connections", &streams.to_string()]);
    command.args(["--seconds", &seconds.to_string()]).stdin(Stdio::null());
    Running::start(command)
}
