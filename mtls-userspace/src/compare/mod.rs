//! `mtls lab compare`: paths, loads and a number of repetitions in; records of what each cost here, and why the others
//! could not be measured, out.
//!
//! Everything runs in a lab made for it: a pair of network namespaces per path, joined by a veth pair, with a load client
//! in one and a load server in the other. The lab has no names anywhere but below one cgroup, and ends with this process.
//! A way to carry bytes between two relays is a [`technique`]; a whole way from client to server, capture included, is a
//! [`path`]. Nothing of this is used by the agent.

mod cost;
mod load;
mod path;
mod place;
mod stop;
mod technique;

use anyhow::{Context, Result, ensure};

pub use cost::{busy, resident};
pub use stop::listen_for_stop;
pub use technique::{Relays, carry};

use crate::results::{Compared, Environment, Key, Missing, Per, Progress, Results, Workload, workload};
use load::Measured;
use path::{Carrier, Path};
use place::Lab;

/// What to do.
#[derive(Debug)]
pub struct Plan {
    /// Only paths whose name contains one of these; all if there are none.
    pub paths: Vec<String>,
    pub repetitions: usize,
    /// Of one measurement.
    pub seconds: f64,
    /// Connections whose memory is weighed.
    pub idle: usize,
}

/// What was found.
pub struct Found {
    pub results: Results,
    pub environment: Environment,
}

pub const WORKLOADS: [Workload; 7] = [
    workload("bulk up, 1 stream", Per::Gigabyte, &["upload"]),
    workload("bulk down, 1 stream", Per::Gigabyte, &["download"]),
    workload("bulk up, 8 streams", Per::Gigabyte, &["upload", "--connections", "8"]),
    workload("bulk down, 8 streams", Per::Gigabyte, &["download", "--connections", "8"]),
    workload("requests, 1 connection", Per::Requests, &["request"]),
    workload("requests, 64 connections", Per::Requests, &["request", "--connections", "64"]),
    workload("new connections, 16 at a time", Per::Connections, &["connect", "--connections", "16"]),
];

/// Beside the loads: what a connection costs that carries none.
const IDLE: &str = "idle connections";

/// Who has which colour on the page.
pub const KEYS: [Key; 4] = [
    Key { class: "plain", name: "plain TCP", is: |path| path == PLAIN },
    Key { class: "near", name: "relays without TLS", is: |path| path.starts_with("relay, plaintext") },
    Key { class: "peer", name: "relays with TLS", is: |path| path.starts_with("relay") },
    Key { class: "ours", name: "the agent", is: |_| true },
];

const PLAIN: &str = "plain TCP";

/// Every path there is, with what it is.
pub fn paths() -> Vec<(String, String)> {
    path::all().iter().map(|path| (path.name(), path.about())).collect()
}

/// Runs the comparison to its end, or until it is stopped.
///
/// # Errors
///
/// When the lab can't be made, no path is wanted, or somebody stops it. A path that fails is a [`Missing`].
pub fn run(plan: &Plan) -> Result<Found> {
    let wanted = |path: &dyn Path| {
        let name = path.name();
        plan.paths.is_empty() || plan.paths.iter().any(|part| name.contains(part.as_str()))
    };
    let paths: Vec<Box<dyn Path>> = path::all().into_iter().filter(|path| wanted(&**path)).collect();
    ensure!(!paths.is_empty(), "no path's name contains {:?}", plan.paths);
    let lab = Lab::make().context("making the lab")?;
    let mut results = Results::default();
    let carriers = start(&lab, &paths, &mut results)?;
    measure(plan, &carriers, &mut results)?;
    Ok(Found { results, environment: lab.environment() })
}

/// A path that is set up.
struct Way {
    name: Compared,
    carrier: Carrier,
}

impl Way {
    /// Whether processes carry it, whose memory can be weighed.
    fn weighs(&self) -> bool {
        !self.carrier.processes.is_empty()
    }
}

/// Sets all paths up, one after the other on this thread, with which their processes end; each has to show that it carries.
fn start(lab: &Lab, paths: &[Box<dyn Path>], results: &mut Results) -> Result<Vec<Way>> {
    let mut ways = Vec::new();
    for path in paths {
        let name = path.name();
        let started = path.start(lab).and_then(|carrier| load::prove(&carrier).map(|()| carrier));
        stop::check()?;
        match started {
            Ok(carrier) => {
                let baseline = (name != PLAIN).then(|| PLAIN.to_owned());
                ways.push(Way { name: Compared { path: name, baseline }, carrier });
            }
            Err(error) => results.missing.push(Missing { path: name, why: format!("{error:#}") }),
        }
    }
    Ok(ways)
}

fn measure(plan: &Plan, ways: &[Way], results: &mut Results) -> Result<()> {
    let weighed = ways.iter().filter(|way| way.weighs()).count();
    let mut progress = Progress::new(ways.len() * WORKLOADS.len() * plan.repetitions + weighed);
    // First: what loads have left behind in a process would be used again, and look like nothing.
    let mut weights = Vec::new();
    for way in ways.iter().filter(|way| way.weighs()) {
        progress.begin(&way.name.path, IDLE);
        let measured = load::idle(&way.carrier, plan.idle);
        stop::check()?;
        progress.step(&way.name.path, IDLE, measured.as_ref());
        weights.push((way, measured));
    }
    for _ in 0..plan.repetitions {
        for workload in &WORKLOADS {
            // In turns, so that whatever else the machine does hits everybody.
            for way in ways {
                progress.begin(&way.name.path, workload.name);
                let measured = load::run(&way.carrier, workload, plan.seconds);
                stop::check()?;
                progress.step(&way.name.path, workload.name, measured.as_ref());
                note(results, way, workload.name, measured);
            }
        }
    }
    progress.end();
    weights.into_iter().for_each(|(way, measured)| note(results, way, IDLE, measured));
    Ok(())
}

/// Keeps figures, or the reason why there are none.
fn note(results: &mut Results, way: &Way, workload: &str, measured: Result<Measured>) {
    match measured {
        Ok(figures) => results.add(&way.name, workload, &figures, 0.0),
        Err(error) => {
            let path = format!("{}, {workload}", way.name.path);
            results.missing.push(Missing { path, why: format!("{error:#}") });
        }
    }
}
