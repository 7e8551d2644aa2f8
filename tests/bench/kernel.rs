//! What the kernel half costs: the agents' processes and a load in, time in its programs per connection out.
//!
//! The kernel counts runs and time of every program while `kernel.bpf_stats_enabled` is set, which itself costs each run
//! some twenty nanoseconds: such a load is measured for nothing else.

use std::collections::HashMap;
use std::fs;

use anyhow::{Context, Result};
use mtls::results::{Figures, Metric};

const SWITCH: &str = "/proc/sys/kernel/bpf_stats_enabled";

/// Kinds of our programs, by the kernel's number for their type.
const KINDS: [(u32, Metric); 3] =
    [(18, metric("connect and getpeername hooks")), (13, metric("sock_ops")), (30, metric("sk_lookup"))];
const TOGETHER: Metric = metric("kernel half");

const fn metric(name: &'static str) -> Metric {
    Metric { name, unit: "ns/connection", higher_is_better: false }
}

/// Counts while it lives.
struct Counting {
    before: String,
}

impl Counting {
    fn start() -> Result<Self> {
        let before = fs::read_to_string(SWITCH).context("this kernel does not count programs' runs")?;
        fs::write(SWITCH, "1").with_context(|| format!("write {SWITCH}"))?;
        Ok(Self { before })
    }
}

impl Drop for Counting {
    fn drop(&mut self) {
        let _ = fs::write(SWITCH, self.before.trim());
    }
}

/// Nanoseconds in the programs that these processes have loaded, for each of the connections that `load` makes.
pub fn cost(agents: &[u32], load: impl FnOnce() -> Result<f64>) -> Result<Figures> {
    let counting = Counting::start()?;
    let before = time(agents)?;
    let connections = load()?;
    let after = time(agents)?;
    drop(counting);
    let spent = |kind| after.get(kind).unwrap_or(&0).saturating_sub(*before.get(kind).unwrap_or(&0));
    let mut figures: Figures = Vec::new();
    for (kind, metric) in &KINDS {
        figures.push((*metric, spent(kind) as f64 / connections));
    }
    figures.push((TOGETHER, figures.iter().map(|(_, value)| value).sum()));
    Ok(figures)
}

/// Nanoseconds so far, by type of program.
fn time(processes: &[u32]) -> Result<HashMap<u32, u64>> {
    let mut seen = Vec::new();
    let mut time: HashMap<u32, u64> = HashMap::new();
    for pid in processes {
        for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))?.flatten() {
            // A descriptor may have been closed meanwhile.
            let Some(program) = fs::read_to_string(entry.path()).ok().and_then(|text| program(&text)) else {
                continue;
            };
            if !seen.contains(&program.id) {
                seen.push(program.id);
                *time.entry(program.kind).or_default() += program.ns;
            }
        }
    }
    Ok(time)
}

struct Program {
    kind: u32,
    id: u32,
    ns: u64,
}

/// None for descriptors of anything else.
fn program(fdinfo: &str) -> Option<Program> {
    let field =
        |name: &str| fdinfo.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok());
    Some(Program {
        kind: field("prog_type:")?.try_into().ok()?,
        id: field("prog_id:")?.try_into().ok()?,
        ns: field("run_time_ns:")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_told_from_other_descriptors() {
        let text = "pos:\t0\nflags:\t02000002\nprog_type:\t13\nprog_jited:\t1\nprog_id:\t7\nrun_time_ns:\t420\nrun_cnt:\t3\n";
        let found = program(text).unwrap();
        assert_eq!((found.kind, found.id, found.ns), (13, 7, 420));
        assert!(program("pos:\t0\nmap_type:\t1\nmap_id:\t9\n").is_none());
    }
}
