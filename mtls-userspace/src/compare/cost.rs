//! What things cost: processes in, CPU seconds and resident bytes out, as `/proc` tells them.

use std::fs;

use anyhow::{Context, Result};

/// Ticks of `/proc/stat` in a second, on every Linux there is (`USER_HZ`).
const TICKS: f64 = 100.0;

/// CPU seconds that a process's threads have used, to the nanosecond.
pub(super) fn cpu(pid: u32) -> Result<f64> {
    let dir = format!("/proc/{pid}/task");
    let tasks = fs::read_dir(&dir).with_context(|| format!("read {dir}"))?;
    let mut total = 0.0;
    for task in tasks.flatten() {
        // A thread that ended meanwhile takes its share with it.
        let Ok(text) = fs::read_to_string(task.path().join("schedstat")) else { continue };
        total += text.split_whitespace().next().and_then(|n| n.parse::<f64>().ok()).unwrap_or(0.0) / 1e9;
    }
    Ok(total)
}

/// Busy CPU seconds of this machine.
pub(super) fn machine() -> Result<f64> {
    busy(&fs::read_to_string("/proc/stat")?).context("/proc/stat has no line for all CPUs")
}

/// Resident bytes of a process.
pub(super) fn memory(pid: u32) -> Result<u64> {
    let file = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&file).with_context(|| format!("read {file}"))?;
    resident(&status).with_context(|| format!("no VmRSS in {file}"))
}

/// Of `/proc/stat`: busy seconds of all CPUs: everything but idle, waiting for disks, and stolen by the hypervisor.
pub fn busy(stat: &str) -> Option<f64> {
    let fields: Vec<f64> = stat
        .lines()
        .next()?
        .strip_prefix("cpu ")?
        .split_whitespace()
        .filter_map(|n| n.parse().ok())
        .collect();
    let [user, nice, system, _idle, _iowait, irq, softirq, ..] = fields[..] else { return None };
    Some((user + nice + system + irq + softirq) / TICKS)
}

/// Of `/proc/PID/status`: resident bytes.
pub fn resident(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn busy_leaves_out_idle_waiting_and_stolen_time() {
        assert_eq!(busy("cpu  100 200 300 9999 8888 50 150 7777 0 0\ncpu0 1\n"), Some(8.0));
        assert_eq!(busy("cpu0 1 2 3\n"), None);
    }

    #[test]
    fn resident_memory_is_read_in_bytes() {
        assert_eq!(resident("Name:\tx\nVmRSS:\t   12 kB\n"), Some(12 * 1024));
        assert_eq!(resident("VmRSS: 12 MB"), None);
    }

    #[test]
    fn this_process_has_used_some_cpu_and_memory() {
        let pid = std::process::id();
        assert!(cpu(pid).unwrap() > 0.0 && memory(pid).unwrap() > 0 && machine().unwrap() > 0.0);
    }
}
