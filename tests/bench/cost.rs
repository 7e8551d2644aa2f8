//! What things cost: cgroups and `/proc` in, CPU seconds and bytes out.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use mtls::compare::{busy, resident};

/// Ticks of `/proc/stat` in a second, on every Linux there is (`USER_HZ`).
const TICKS: f64 = 100.0;
/// Open files that a process may need.
const FILES: u64 = 100_000;

/// An agent, or another proxy, on a path. What runs in its cgroup is its cost.
#[derive(Clone, Debug)]
pub struct Agent {
    /// `client's agent`, `server's agent` or, where there is one, `agent`.
    pub name: &'static str,
    pub cgroup: PathBuf,
}

impl Agent {
    pub fn new(name: &'static str, cgroup: impl Into<PathBuf>) -> Self {
        Self { name, cgroup: cgroup.into() }
    }

    /// CPU seconds used so far.
    pub fn cpu(&self) -> Result<f64> {
        let file = self.cgroup.join("cpu.stat");
        let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        usage(&text).with_context(|| format!("no usage_usec in {}", file.display()))
    }

    /// Resident bytes of every process in it.
    pub fn resident(&self) -> Result<u64> {
        let pids = fs::read_to_string(self.cgroup.join("cgroup.procs"))?;
        let mut total = 0;
        for pid in pids.lines() {
            let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
            total += resident(&status).with_context(|| format!("no VmRSS of process {pid}"))?;
        }
        Ok(total)
    }
}

/// CPU seconds at one moment; what lies between two is a cost.
pub struct Clock {
    pub agents: f64,
    pub machine: f64,
    /// Of live processes that aren't ours, by pid.
    others: HashMap<u32, f64>,
}

impl Clock {
    pub fn now(agents: &[Agent]) -> Result<Self> {
        let stat = fs::read_to_string("/proc/stat")?;
        Ok(Self {
            agents: agents.iter().map(Agent::cpu).sum::<Result<f64>>()?,
            machine: busy(&stat).context("/proc/stat has no line for all CPUs")?,
            others: others(),
        })
    }

    /// CPU seconds that others used since. Those that came and went meanwhile are missed.
    pub fn others_since(&self, earlier: &Self) -> f64 {
        let used = |(pid, now): (&u32, &f64)| now - earlier.others.get(pid).unwrap_or(&0.0);
        self.others.iter().map(used).sum::<f64>().max(0.0)
    }
}

/// CPU of all processes outside this one's session, kernel threads aside: they work for whoever causes work.
fn others() -> HashMap<u32, f64> {
    let own = fs::read_to_string("/proc/self/stat").ok().and_then(|text| stat(&text)).map(|own| own.session);
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter_map(|pid| {
        let stat = stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)?;
        let other = Some(stat.session) != own && stat.parent != 2 && pid != 2;
        other.then_some((pid, stat.cpu))
    })
    .collect()
}

struct Stat {
    parent: u32,
    session: u32,
    cpu: f64,
}

/// Of `/proc/PID/stat`, whose second field may contain anything, spaces and parentheses too.
fn stat(text: &str) -> Option<Stat> {
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    let number = |index: usize| fields.get(index)?.parse::<u64>().ok();
    Some(Stat {
        parent: number(1)? as u32,
        session: number(3)? as u32,
        cpu: (number(11)? + number(12)?) as f64 / TICKS,
    })
}

fn usage(cpu_stat: &str) -> Option<f64> {
    let line = cpu_stat.lines().find_map(|line| line.strip_prefix("usage_usec "))?;
    Some(line.trim().parse::<f64>().ok()? / 1e6)
}

/// Lets everything that is started from here open as many files as the machine permits: how many.
pub fn raise_limits() -> Result<u64> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    // More than the hard limit is for the mighty only.
    let files = [most.max(FILES), most]
        .into_iter()
        .find(|files| setrlimit(Resource::RLIMIT_NOFILE, *files, *files).is_ok());
    files.context("raise the limit of open files")
}

/// Connections that a process can carry which may open so many files and needs some for each.
pub fn connections(files: u64, each: u64) -> usize {
    (files.saturating_sub(1000) / each) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_fields() {
        let text = "7 (a) b (c)) S 2 7 9 0 -1 4194304 1 2 3 4 150 50 0 0 20 0";
        let stat = stat(text).unwrap();
        assert_eq!((stat.parent, stat.session, stat.cpu), (2, 9, 2.0));
    }

    #[test]
    fn connections_leave_some_files_for_everything_else() {
        assert_eq!((connections(20_000, 2), connections(20_000, 4), connections(500, 2)), (9500, 4750, 0));
    }

    #[test]
    fn costs_are_read_in_seconds() {
        assert_eq!(usage("usage_usec 2500000\nuser_usec 1\n"), Some(2.5));
        assert_eq!(usage(""), None);
    }
}
