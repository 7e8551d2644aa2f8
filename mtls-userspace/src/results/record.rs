//! The results: figures of every repetition in, records with medians and ratios out.

use std::fs;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::metric::{Figures, Metric};
use super::table::distinct;

/// One figure of one path.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    pub path: String,
    pub workload: String,
    pub metric: String,
    pub unit: String,
    pub higher_is_better: bool,
    pub median: f64,
    pub min: f64,
    pub max: f64,
    /// Of every repetition, in order.
    pub values: Vec<f64>,
    /// The path that `ratio` is to.
    pub baseline: Option<String>,
    pub ratio: Option<f64>,
    /// CPUs that processes which aren't ours used meanwhile, at worst.
    pub disturbance: f64,
    #[serde(flatten)]
    pub environment: Environment,
}

/// Where and when.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Environment {
    pub machine: String,
    pub kernel: String,
    pub congestion_control: String,
    pub date: String,
    pub version: String,
}

impl Environment {
    /// This machine, now. Whoever measures knows the congestion control of the place and the version of what it measures.
    pub fn here(congestion_control: String, version: String) -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let processors = read("/proc/cpuinfo");
        let models: Vec<&str> = processors
            .lines()
            .filter_map(|line| line.strip_prefix("model name")?.split_once(": ").map(|(_, model)| model))
            .collect();
        let memory = read("/proc/meminfo");
        let kilobytes = memory
            .lines()
            .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix("kB")?.trim().parse().ok())
            .unwrap_or(0u64);
        Self {
            machine: format!(
                "{} × {}, {} GiB, {}",
                models.len(),
                models.first().unwrap_or(&"unknown processor"),
                (kilobytes as f64 / f64::from(1 << 20)).round(),
                std::env::consts::ARCH,
            ),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            congestion_control,
            date: format!("{:.0}", Timestamp::now()),
            version,
        }
    }
}

/// A path that was not measured, and why.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Missing {
    pub path: String,
    pub why: String,
}

/// A file of results: what `mtls lab compare` writes, or the array of records that the benchmark does.
#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Recorded {
    Compared { records: Vec<Record>, missing: Vec<Missing> },
    Records(Vec<Record>),
}

impl Recorded {
    pub fn records(&self) -> &[Record] {
        match self {
            Self::Compared { records, .. } | Self::Records(records) => records,
        }
    }

    pub fn missing(&self) -> &[Missing] {
        match self {
            Self::Compared { missing, .. } => missing,
            Self::Records(_) => &[],
        }
    }
}

/// A path's name and the one it is compared with.
#[derive(Clone, Debug)]
pub struct Compared {
    pub path: String,
    pub baseline: Option<String>,
}

struct Series {
    path: Compared,
    workload: String,
    metric: Metric,
    values: Vec<f64>,
    disturbance: f64,
}

/// Figures as they come in.
#[derive(Default)]
pub struct Results {
    series: Vec<Series>,
    /// What couldn't be measured.
    pub missing: Vec<Missing>,
}

impl Results {
    pub fn add(&mut self, path: &Compared, workload: &str, figures: &Figures, disturbance: f64) {
        for (metric, value) in figures {
            let known = self.series.iter_mut().find(|series| {
                series.path.path == path.path && series.workload == workload && series.metric == *metric
            });
            match known {
                Some(series) => {
                    series.values.push(*value);
                    series.disturbance = series.disturbance.max(disturbance);
                }
                None => self.series.push(Series {
                    path: path.clone(),
                    workload: workload.to_owned(),
                    metric: *metric,
                    values: vec![*value],
                    disturbance,
                }),
            }
        }
    }

    /// Grouped by workload and metric in the order in which they were first seen, so that a table reads across paths.
    pub fn records(&self, environment: &Environment) -> Vec<Record> {
        let groups = distinct(self.series.iter().map(|series| (series.workload.as_str(), series.metric)));
        let mut ordered = Vec::new();
        for (workload, metric) in groups {
            let group = self.series.iter().filter(|s| s.workload == workload && s.metric == metric);
            ordered.extend(group.map(|series| self.record(series, environment)));
        }
        ordered
    }

    fn record(&self, series: &Series, environment: &Environment) -> Record {
        let base = series.path.baseline.as_ref().and_then(|baseline| {
            self.series.iter().find(|other| {
                other.path.path == *baseline
                    && other.workload == series.workload
                    && other.metric == series.metric
            })
        });
        let median = median(&series.values);
        let base_median = base.map(|base| self::median(&base.values)).filter(|median| *median > 0.0);
        Record {
            path: series.path.path.clone(),
            workload: series.workload.clone(),
            metric: series.metric.name.to_owned(),
            unit: series.metric.unit.to_owned(),
            higher_is_better: series.metric.higher_is_better,
            median,
            min: series.values.iter().copied().fold(f64::INFINITY, f64::min),
            max: series.values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
            values: series.values.clone(),
            baseline: series.path.baseline.clone().filter(|_| base_median.is_some()),
            ratio: base_median.map(|base| median / base),
            disturbance: series.disturbance,
            environment: environment.clone(),
        }
    }
}

/// The middle one, or the mean of the two in the middle; 0 of nothing.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted[..] {
        [] => 0.0,
        _ if sorted.len() % 2 == 1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::{REQUESTS, THROUGHPUT};

    fn path(name: &str, baseline: Option<&str>) -> Compared {
        Compared { path: name.into(), baseline: baseline.map(str::to_owned) }
    }

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&[]), 0.0);
    }

    #[test]
    fn a_ratio_is_of_medians_and_to_the_paths_own_baseline() {
        let mut results = Results::default();
        let (plain, near) = (path("plain", None), path("plain same-node", None));
        let ours = path("mtls", Some("plain"));
        for value in [10.0, 30.0, 20.0] {
            results.add(&plain, "bulk", &vec![(THROUGHPUT, value)], 0.0);
            results.add(&near, "bulk", &vec![(THROUGHPUT, 1.0)], 0.0);
            results.add(&ours, "bulk", &vec![(THROUGHPUT, value / 4.0), (REQUESTS, 1.0)], value / 100.0);
        }
        let records = results.records(&Environment::default());
        assert_eq!(
            records.iter().map(|r| (r.path.as_str(), r.metric.as_str())).collect::<Vec<_>>(),
            [
                ("plain", "throughput"),
                ("plain same-node", "throughput"),
                ("mtls", "throughput"),
                ("mtls", "requests")
            ]
        );
        let ours = &records[2];
        assert_eq!((ours.median, ours.min, ours.max, ours.ratio), (5.0, 2.5, 7.5, Some(0.25)));
        assert_eq!((ours.disturbance, ours.values.len()), (0.3, 3));
        assert_eq!(records[0].ratio, None);
        assert_eq!(
            (records[3].ratio, &records[3].baseline),
            (None, &None),
            "the baseline has no such figure"
        );
    }

    #[test]
    fn a_record_names_where_it_was_measured() {
        let mut results = Results::default();
        results.add(&path("plain", None), "bulk", &vec![(THROUGHPUT, 1.0)], 0.0);
        let environment = Environment { kernel: "6.18".into(), ..Environment::default() };
        let json = serde_json::to_value(results.records(&environment)).unwrap();
        assert_eq!(json[0]["kernel"], "6.18");
        assert_eq!(json[0]["ratio"], serde_json::Value::Null);
        for key in ["path", "workload", "metric", "unit", "median", "min", "max", "date", "version"] {
            assert!(json[0].get(key).is_some(), "{key}");
        }
    }
}
