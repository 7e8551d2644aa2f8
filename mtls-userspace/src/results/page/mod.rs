//! The page: records in, one HTML file out that needs nothing but itself.

mod chart;

use std::fmt::Write;

use super::metric::QUANTILES;
use super::progress::number;
use super::record::{Environment, Missing, Record};
use super::table::distinct;
use chart::{Bar, Spread};

const STYLE: &str = include_str!("style.css");

/// What a colour stands for.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// A colour of the style sheet: `plain`, `ours`, `near` or `peer`.
    pub class: &'static str,
    pub name: &'static str,
    /// Whether a path has this colour.
    pub is: fn(&str) -> bool,
}

/// Everything on a page. The first key that fits a path colours it.
#[derive(Debug)]
pub struct Page<'a> {
    pub title: &'a str,
    /// How to read it.
    pub note: &'a str,
    pub keys: &'a [Key],
    pub records: &'a [Record],
    pub missing: &'a [Missing],
    pub environment: &'a Environment,
}

impl Page<'_> {
    pub fn html(&self) -> String {
        let Environment { machine, kernel, congestion_control, date, version } = self.environment;
        let mut cards = String::new();
        for workload in distinct(self.records.iter().map(|record| record.workload.as_str())) {
            let of_workload: Vec<&Record> =
                self.records.iter().filter(|record| record.workload == workload).collect();
            cards += &self.card(workload, &of_workload);
        }
        let missing: String = self.missing.iter().fold(String::new(), |list, Missing { path, why }| {
            list + &format!("<p class=quiet>Not measured: {}: {}</p>", escape(path), escape(why))
        });
        let facts = [machine, &format!("Linux {kernel}"), congestion_control, version, date];
        let facts: Vec<String> = facts.iter().map(|fact| escape(fact)).collect();
        let keys: String = self.keys.iter().fold(String::new(), |list, Key { class, name, .. }| {
            list + &format!("<span class=\"key {class}\"></span>{}", escape(name))
        });
        let title = escape(self.title);
        format!(
            "<!doctype html>\n<html lang=en><meta charset=utf-8>\n\
             <meta name=viewport content=\"width=device-width,initial-scale=1\">\n<title>{title}</title>\n\
             <style>\n{STYLE}</style>\n<main>\n<h1>{title}</h1>\n<p class=quiet>{}</p>\n\
             <p>{}</p>\n<p class=key-line>{keys}</p>\n{missing}\
             <div class=grid style=\"margin-top:1.5rem\">\n{cards}</div>\n\
             <h2>All figures</h2>\n<div class=\"card scroll\">{}</div>\n</main></html>\n",
            facts.join(" · "),
            escape(self.note),
            table(self.records)
        )
    }

    /// Every figure of one workload: bars, except that latencies share one chart.
    fn card(&self, workload: &str, records: &[&Record]) -> String {
        let mut figures = String::new();
        let is_latency = |record: &Record| QUANTILES.iter().any(|quantile| quantile.name == record.metric);
        let mut latencies_drawn = false;
        for metric in distinct(records.iter().map(|record| record.metric.as_str())) {
            let of_metric: Vec<&Record> =
                records.iter().copied().filter(|record| record.metric == metric).collect();
            let Some(first) = of_metric.first() else { continue };
            if is_latency(first) {
                if !latencies_drawn {
                    latencies_drawn = true;
                    let spreads = chart::spreads(&self.spreads(records));
                    figures += &figure("latency", "µs, p50 · p90 · p99 · p99.9", &spreads);
                }
                continue;
            }
            let bars: Vec<Bar<'_>> = of_metric.iter().map(|record| self.bar(record)).collect();
            figures += &figure(metric, &first.unit, &chart::bars(&bars));
        }
        format!("<section class=card><h3>{}</h3>\n{figures}</section>\n", escape(workload))
    }

    fn bar<'r>(&self, record: &'r Record) -> Bar<'r> {
        Bar {
            name: &record.path,
            class: self.class(&record.path),
            value: record.median,
            least: record.min,
            most: record.max,
            ratio: record.ratio,
        }
    }

    fn spreads<'r>(&self, records: &[&'r Record]) -> Vec<Spread<'r>> {
        distinct(records.iter().map(|record| record.path.as_str()))
            .into_iter()
            .map(|path| {
                let of = |metric: &str| records.iter().find(|r| r.path == path && r.metric == metric);
                let points =
                    QUANTILES.iter().filter_map(|quantile| Some((quantile.name, of(quantile.name)?.median)));
                Spread { name: path, class: self.class(path), points: points.collect() }
            })
            .filter(|spread: &Spread<'_>| !spread.points.is_empty())
            .collect()
    }

    /// Colours say who, not which.
    fn class(&self, path: &str) -> &'static str {
        self.keys.iter().find(|key| (key.is)(path)).map_or("peer", |key| key.class)
    }
}

fn figure(title: &str, unit: &str, svg: &str) -> String {
    format!("<figure><figcaption>{}, {}</figcaption>{svg}</figure>\n", escape(title), escape(unit))
}

fn table(records: &[Record]) -> String {
    let mut rows = String::from(
        "<table><tr><th>workload<th>path<th>metric<th>unit<th>median<th>least<th>most<th>ratio to plain</tr>\n",
    );
    for record in records {
        let ratio = record.ratio.map_or_else(|| "–".to_owned(), |ratio| format!("{ratio:.2}"));
        let [workload, path, metric, unit] =
            [&record.workload, &record.path, &record.metric, &record.unit].map(|text| escape(text));
        let [median, least, most] = [record.median, record.min, record.max].map(number);
        let _ = writeln!(
            rows,
            "<tr><td>{workload}<td>{path}<td>{metric}<td>{unit}<td>{median}<td>{least}<td>{most}<td>{ratio}</tr>"
        );
    }
    rows + "</table>"
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::{Compared, Results, THROUGHPUT};

    fn page(missing: &[Missing]) -> String {
        let keys = [
            Key { class: "plain", name: "plain TCP", is: |path| path == "plain" },
            Key { class: "ours", name: "mtls", is: |_| true },
        ];
        let environment = Environment::default();
        Page { title: "t", note: "n", keys: &keys, records: &records(), missing, environment: &environment }
            .html()
    }

    fn records() -> Vec<Record> {
        let mut results = Results::default();
        let plain = Compared { path: "plain".into(), baseline: None };
        let ours = Compared { path: "mtls".into(), baseline: Some("plain".into()) };
        results.add(&plain, "bulk <1>", &vec![(THROUGHPUT, 20.0)], 0.0);
        results.add(
            &ours,
            "bulk <1>",
            &vec![(THROUGHPUT, 10.0), (QUANTILES[0], 5.0), (QUANTILES[1], 50.0)],
            0.0,
        );
        results.records(&Environment::default())
    }

    #[test]
    fn the_page_needs_nothing_but_itself_and_shows_every_path() {
        let page = page(&[Missing { path: "mtls, x".into(), why: "<lost>".into() }]);
        for outside in ["http://", "https://", "src=", "@import", "<script", "url("] {
            assert!(!page.contains(outside), "{outside}");
        }
        assert!(page.contains("bulk &lt;1&gt;") && page.contains("&lt;lost&gt;"), "{page}");
        assert_eq!(page.matches("<svg").count(), 2, "bars and latencies: {page}");
        assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
        assert!(page.contains("0.50") && page.contains("prefers-color-scheme: dark"));
    }

    #[test]
    fn nothing_that_is_drawn_is_not_a_number() {
        let page = page(&[]);
        assert!(!page.contains("NaN") && !page.contains("inf\""), "{page}");
    }
}
