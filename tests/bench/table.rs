//! The table at the end: records in, text out.

use crate::progress::number;
use crate::record::Record;

/// A line per workload and metric, a column per path: median, and the ratio to plain TCP.
pub fn table(records: &[Record]) -> String {
    let mut paths: Vec<&str> = Vec::new();
    let mut rows: Vec<(&str, &str, &str)> = Vec::new();
    for record in records {
        if !paths.contains(&record.path.as_str()) {
            paths.push(&record.path);
        }
        let row = (record.workload.as_str(), record.metric, record.unit);
        if !rows.contains(&row) {
            rows.push(row);
        }
    }
    let mut lines: Vec<Vec<String>> = vec![
        ["workload", "metric", "unit"].into_iter().chain(paths.iter().copied()).map(str::to_owned).collect(),
    ];
    let mut last = "";
    for (workload, metric, unit) in rows {
        let first = if workload == last { "" } else { workload };
        last = workload;
        let mut line = vec![first.to_owned(), metric.to_owned(), unit.to_owned()];
        line.extend(paths.iter().map(|path| {
            let found = records
                .iter()
                .find(|r| r.path == *path && r.workload == workload && r.metric == metric && r.unit == unit);
            found.map_or_else(|| "–".into(), cell)
        }));
        lines.push(line);
    }
    render(&lines)
}

fn cell(record: &Record) -> String {
    match record.ratio {
        Some(ratio) => format!("{} ({ratio:.2})", number(record.median)),
        None => number(record.median),
    }
}

fn render(lines: &[Vec<String>]) -> String {
    let columns = lines.first().map_or(0, Vec::len);
    let width = |column: usize| {
        lines.iter().filter_map(|line| line.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for (position, line) in lines.iter().enumerate() {
        for (column, (cell, width)) in line.iter().zip(&widths).enumerate() {
            // Names to the left, numbers to the right.
            text += &if column < 3 { format!("{cell:width$}  ") } else { format!("{cell:>width$}  ") };
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
    use crate::metric::THROUGHPUT;
    use crate::record::{Compared, Environment, Results};

    #[test]
    fn every_path_has_a_column_and_what_was_not_measured_a_dash() {
        let mut results = Results::default();
        let plain = Compared { path: "plain".into(), baseline: None };
        let ours = Compared { path: "mtls".into(), baseline: Some("plain".into()) };
        results.add(&plain, "bulk", &vec![(THROUGHPUT, 20.0)], 0.0);
        results.add(&ours, "bulk", &vec![(THROUGHPUT, 10.0)], 0.0);
        results.add(&plain, "other", &vec![(THROUGHPUT, 1.0)], 0.0);
        let text = table(&results.records(&Environment::default()));
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 4, "{text}");
        assert!(lines[2].contains("20.0") && lines[2].ends_with("10.0 (0.50)"), "{text}");
        assert!(lines[3].ends_with('–'), "{text}");
    }
}
