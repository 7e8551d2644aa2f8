//! Writing families of samples at scrape time, and the two text formats that Prometheus reads.
//!
//! Takes numbers that live elsewhere; it never counts anything itself.

use std::borrow::Borrow;
use std::fmt::{self, Write};

use prometheus_client::encoding::{DescriptorEncoder, EncodeGaugeValue, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

pub(super) type LabelPairs = Vec<(&'static str, String)>;

pub(super) struct Exposition<'a>(DescriptorEncoder<'a>);

impl<'a> Exposition<'a> {
    pub fn new(encoder: DescriptorEncoder<'a>) -> Self {
        Self(encoder)
    }

    /// `name` is without `_total`. A family without samples is left out.
    pub fn counters<L: Borrow<LabelPairs>>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (L, u64)>,
    ) -> fmt::Result {
        let samples = samples.into_iter().map(|(labels, value)| (labels, ConstCounter::new(value)));
        self.family(name, help, MetricType::Counter, samples)
    }

    pub fn gauges<L: Borrow<LabelPairs>, N: EncodeGaugeValue>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (L, N)>,
    ) -> fmt::Result
    where
        ConstGauge<N>: EncodeMetric,
    {
        let samples = samples.into_iter().map(|(labels, value)| (labels, ConstGauge::new(value)));
        self.family(name, help, MetricType::Gauge, samples)
    }

    pub fn counter(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        self.counters(name, help, [(Vec::new(), value)])
    }

    pub fn gauge<N: EncodeGaugeValue>(&mut self, name: &str, help: &str, value: N) -> fmt::Result
    where
        ConstGauge<N>: EncodeMetric,
    {
        self.gauges(name, help, [(Vec::new(), value)])
    }

    fn family<L: Borrow<LabelPairs>, M: EncodeMetric>(
        &mut self,
        name: &str,
        help: &str,
        kind: MetricType,
        samples: impl Iterator<Item = (L, M)>,
    ) -> fmt::Result {
        let mut samples = samples.peekable();
        if samples.peek().is_none() {
            return Ok(());
        }
        let mut family = self.0.encode_descriptor(name, help, None, kind)?;
        for (labels, metric) in samples {
            let labels = labels.borrow();
            if labels.is_empty() {
                // An empty label set would be written as `{}`.
                return metric.encode(family);
            }
            metric.encode(family.encode_family(&labels.as_slice())?)?;
        }
        Ok(())
    }
}

/// What a scraper asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Format {
    OpenMetrics,
    /// The text format of Prometheus, version 0.0.4.
    Text,
}

impl Format {
    pub fn accepted(accept: Option<&str>) -> Self {
        match accept {
            Some(accept) if accept.contains("application/openmetrics-text") => Self::OpenMetrics,
            _ => Self::Text,
        }
    }

    pub fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

/// Rewrites OpenMetrics as the older text format, where a counter's family carries its `_total` and nothing marks
/// the end.
pub(super) fn as_prometheus_text(open_metrics: &str) -> String {
    let mut text = String::with_capacity(open_metrics.len() + 1024);
    let mut help: Option<(&str, &str)> = None;
    for line in open_metrics.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            help = rest.split_once(' ');
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' '))
        {
            let suffix = if kind == "counter" { "_total" } else { "" };
            if let Some((_, help)) = help.take().filter(|(helped, _)| *helped == name) {
                let _ = writeln!(text, "# HELP {name}{suffix} {help}");
            }
            let _ = writeln!(text, "# TYPE {name}{suffix} {kind}");
        } else if !line.starts_with("# ") {
            text.push_str(line);
            text.push('\n');
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_family_carries_its_suffix_in_the_text_format() {
        let open_metrics = "# HELP a_b Things.\n# TYPE a_b counter\na_b_total{x=\"# HELP\"} 1\n\
                            # HELP g Now.\n# TYPE g gauge\ng 2\n# EOF\n";
        let text = "# HELP a_b_total Things.\n# TYPE a_b_total counter\na_b_total{x=\"# HELP\"} 1\n\
                    # HELP g Now.\n# TYPE g gauge\ng 2\n";
        assert_eq!(as_prometheus_text(open_metrics), text);
    }

    #[test]
    fn open_metrics_is_given_only_to_who_asks() {
        assert_eq!(Format::accepted(None), Format::Text);
        assert_eq!(Format::accepted(Some("*/*")), Format::Text);
        let prometheus = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3";
        assert_eq!(Format::accepted(Some(prometheus)), Format::OpenMetrics);
    }
}
