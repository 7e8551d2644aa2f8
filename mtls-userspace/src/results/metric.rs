//! What is measured: workloads, their client's flags, and the figures that a client's report becomes.

use anyhow::{Context, Result};
use serde_json::Value;

/// A figure's name, unit, and which way is better.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Metric {
    pub name: &'static str,
    pub unit: &'static str,
    pub higher_is_better: bool,
}

const fn metric(name: &'static str, unit: &'static str, higher_is_better: bool) -> Metric {
    Metric { name, unit, higher_is_better }
}

pub const THROUGHPUT: Metric = metric("throughput", "Gbit/s", true);
pub const REQUESTS: Metric = metric("requests", "1/s", true);
pub const CONNECTIONS: Metric = metric("connections", "1/s", true);
pub const TRANSACTIONS: Metric = metric("transactions", "1/s", true);
pub const FIRST_BYTE: Metric = metric("first byte", "µs", false);
pub const QUANTILES: [Metric; 4] = [
    metric("p50", "µs", false),
    metric("p90", "µs", false),
    metric("p99", "µs", false),
    metric("p99.9", "µs", false),
];

/// What CPU is divided by.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Per {
    Gigabyte,
    Requests,
    Connections,
}

impl Per {
    pub fn agents(self) -> Metric {
        metric("agents' CPU", self.unit(), false)
    }

    pub fn machine(self) -> Metric {
        metric("machine's CPU", self.unit(), false)
    }

    fn unit(self) -> &'static str {
        match self {
            Self::Gigabyte => "s/GB",
            Self::Requests => "s/10k requests",
            Self::Connections => "s/10k connections",
        }
    }
}

/// One load.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    pub name: &'static str,
    /// Flags of `mtls bench client`.
    pub flags: &'static [&'static str],
    pub per: Per,
}

pub const fn workload(name: &'static str, per: Per, flags: &'static [&'static str]) -> Workload {
    Workload { name, flags, per }
}

/// Figures of one measurement.
pub type Figures = Vec<(Metric, f64)>;

impl Workload {
    /// What a client's report says.
    pub fn figures(&self, report: &Value) -> Result<Figures> {
        let number = |key: &str| report[key].as_f64().with_context(|| format!("no {key} in {report}"));
        let seconds = number("seconds")?;
        if self.per == Per::Gigabyte {
            return Ok(vec![(THROUGHPUT, number("bytes")? * 8e-9 / seconds)]);
        }
        let rate = if self.per == Per::Connections { CONNECTIONS } else { REQUESTS };
        let mut figures = vec![(rate, number("exchanges")? / seconds)];
        for (metric, key) in QUANTILES.into_iter().zip(["p50", "p90", "p99", "p999"]) {
            let value = report["latency_us"][key].as_f64();
            figures.push((metric, value.with_context(|| format!("no {key} in {report}"))?));
        }
        Ok(figures)
    }

    /// By what CPU seconds are divided for the unit in [`Per`].
    pub fn amount(&self, report: &Value) -> Result<f64> {
        let (key, unit) = match self.per {
            Per::Gigabyte => ("bytes", 1e9),
            Per::Requests | Per::Connections => ("all_exchanges", 1e4),
        };
        let amount = report[key].as_f64().filter(|amount| *amount > 0.0);
        Ok(amount.with_context(|| format!("nothing was done: {report}"))? / unit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const BULK: Workload = workload("bulk", Per::Gigabyte, &["upload"]);
    const REQUEST: Workload = workload("requests", Per::Requests, &["request"]);

    #[test]
    fn a_bulk_report_becomes_throughput_and_its_cpu_is_told_per_gigabyte() {
        let report = json!({ "seconds": 2.0, "bytes": 5_000_000_000u64, "exchanges": 0, "all_exchanges": 0 });
        assert_eq!(BULK.figures(&report).unwrap(), [(THROUGHPUT, 20.0)]);
        assert_eq!(BULK.amount(&report).unwrap(), 5.0);
    }

    #[test]
    fn cpu_of_requests_counts_those_that_were_not_timed() {
        let report = json!({
            "seconds": 2.0, "bytes": 1, "exchanges": 20_000, "all_exchanges": 30_000,
            "latency_us": { "p50": 1.0, "p90": 2.0, "p99": 3.0, "p999": 4.0, "max": 5.0 },
        });
        let figures = REQUEST.figures(&report).unwrap();
        assert_eq!(figures[0], (REQUESTS, 10_000.0));
        assert_eq!(figures[4].1, 4.0);
        assert_eq!(REQUEST.amount(&report).unwrap(), 3.0);
    }

    #[test]
    fn a_report_of_nothing_is_an_error() {
        let report = json!({ "seconds": 2.0, "bytes": 0, "exchanges": 0, "all_exchanges": 0 });
        assert!(BULK.amount(&report).is_err());
        assert!(REQUEST.figures(&report).is_err(), "no latency");
    }
}
