//! The table at the end: records in, text out.

use super::progress::number;
use super::record::Record;

/// A block per workload: a line per path, a column per metric, each with its median and the ratio to plain TCP.
pub fn table(records: &[Record]) -> String {
    let workloads = distinct(records.iter().map(|record| record.workload.as_str()));
    workloads.into_iter().map(|workload| block(workload, records)).collect::<Vec<_>>().join("\n")
}

fn block(workload: &str, records: &[Record]) -> String {
    let records: Vec<&Record> = records.iter().filter(|record| record.workload == workload).collect();
    let metrics = distinct(records.iter().map(|record| (record.metric.as_str(), record.unit.as_str())));
    let paths = distinct(records.iter().map(|record| record.path.as_str()));
    let mut head = vec![workload.to_owned()];
    head.extend(metrics.iter().map(|(metric, unit)| format!("{metric}, {unit}")));
    let mut lines = vec![head];
    for path in paths {
        let mut line = vec![path.to_owned()];
        line.extend(metrics.iter().map(|metric| {
            let found =
                records.iter().find(|r| r.path == path && (r.metric.as_str(), r.unit.as_str()) == *metric);
            found.map_or_else(|| "–".into(), |record| cell(record))
        }));
        lines.push(line);
    }
    render(&lines)
}

/// Each once, in the order in which they come.
pub fn distinct<T: PartialEq>(items: impl Iterator<Item = T>) -> Vec<T> {
    let mut seen = Vec::new();
    for item in items {
        if !seen.contains(&item) {
            seen.push(item);
        }
    }
    seen
}

/// The median, how far the repetitions lie from it at most, and the ratio.
fn cell(record: &Record) -> String {
    let mut cell = number(record.median);
    let spread = (record.max - record.median).max(record.median - record.min) / record.median;
    if spread.is_finite() && spread > 0.0 {
        cell += &format!(" ±{:.0}%", spread * 100.0);
    }
    if let Some(ratio) = record.ratio {
        cell += &format!(" ({ratio:.2})");
    }
    cell
}

pub(super) fn render(lines: &[Vec<String>]) -> String {
    let columns = lines.first().map_or(0, Vec::len);
    let width = |column: usize| {
        lines.iter().filter_map(|line| line.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for (position, line) in lines.iter().enumerate() {
        for (column, (cell, width)) in line.iter().zip(&widths).enumerate() {
            // The name to the left, numbers to the right.
            text += &if column == 0 { format!("{cell:width$}  ") } else { format!("{cell:>width$}  ") };
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
        if position == 0 {
            let total = widths.iter().sum::<usize>() + 2 * columns.saturating_sub(1);
            text += &"─".repeat(total);
            text.push('\n');
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::{Compared, Environment, REQUESTS, Results, THROUGHPUT};

    #[test]
    fn every_path_has_a_line_and_what_was_not_measured_a_dash() {
        let mut results = Results::default();
        let plain = Compared { path: "plain".into(), baseline: None };
        let ours = Compared { path: "mtls".into(), baseline: Some("plain".into()) };
        results.add(&plain, "bulk", &vec![(THROUGHPUT, 20.0)], 0.0);
        results.add(&ours, "bulk", &vec![(THROUGHPUT, 10.0), (REQUESTS, 5.0)], 0.0);
        for value in [1.0, 1.1, 0.8] {
            results.add(&plain, "other", &vec![(THROUGHPUT, value)], 0.0);
        }
        let text = table(&results.records(&Environment::default()));
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 8, "{text}");
        assert!(
            lines[0].starts_with("bulk ") && lines[0].ends_with("throughput, Gbit/s  requests, 1/s"),
            "{text}"
        );
        assert!(lines[2].starts_with("plain ") && lines[2].ends_with('–'), "{text}");
        assert!(lines[3].contains("10.0 (0.50)"), "{text}");
        assert!(lines[5].starts_with("other") && lines[7].ends_with("1.00 ±20%"), "{text}");
    }
}
