//! Ways from a client to a server. To add one: a file here, and its name in the list below.

use std::net::SocketAddr;

use anyhow::Result;

use super::cost;
use super::place::{Lab, Pair, Process};

/// A way from a client to a server, capture included.
pub(super) trait Path {
    fn name(&self) -> String;

    /// One line for people.
    fn about(&self) -> String;

    /// Sets it up: the places, the processes, whatever is attached. An error is the reason why this machine can't carry
    /// it, and goes into the results.
    fn start(&self, lab: &Lab) -> Result<Carrier>;
}

/// A path that is set up. Dropped, it is gone.
pub(super) struct Carrier {
    /// Whose CPU and memory is its cost. Ended before the places they run in.
    pub processes: Vec<Process>,
    /// Needed, but no cost of a connection.
    pub _silent: Vec<Process>,
    pub pair: Pair,
    /// What the load client dials.
    pub dial: SocketAddr,
    /// Whether bytes pass through the processes, which then must be seen to work.
    pub by_processes: bool,
}

impl Carrier {
    /// CPU seconds that its processes have used.
    pub fn cpu(&self) -> Result<f64> {
        self.processes.iter().map(|process| cost::cpu(process.pid())).sum()
    }
}

macro_rules! paths {
    ($($name:ident),*) => {
        $(mod $name;)*

        /// Every path there is.
        pub(super) fn all() -> Vec<Box<dyn Path>> {
            let mut all = Vec::new();
            $(all.extend($name::paths());)*
            all
        }
    };
}

paths!(plain, relayed, agents);
