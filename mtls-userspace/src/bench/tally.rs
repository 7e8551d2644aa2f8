//! Adding up: times of exchanges in, a [`Report`] out.

use std::io;
use std::time::Duration;

use hdrhistogram::Histogram;

use super::{Latency, Report};

/// Longer than this is counted as this.
const LONGEST: Duration = Duration::from_secs(120);

pub(super) struct Tally {
    /// Nanoseconds, to three digits.
    latency: Histogram<u64>,
    pub untimed: u64,
}

impl Tally {
    pub fn new() -> io::Result<Self> {
        let latency = Histogram::new_with_max(LONGEST.as_nanos() as u64, 3).map_err(io::Error::other)?;
        Ok(Self { latency, untimed: 0 })
    }

    pub fn record(&mut self, took: Duration) {
        self.latency.saturating_record(took.as_nanos() as u64);
    }

    pub fn report(&self, elapsed: Duration, size: usize) -> Report {
        let at = |quantile| self.latency.value_at_quantile(quantile) as f64 / 1e3;
        let latency_us = (!self.latency.is_empty()).then(|| Latency {
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p999: at(0.999),
            max: self.latency.max() as f64 / 1e3,
        });
        Report {
            seconds: elapsed.as_secs_f64(),
            bytes: self.latency.len() * size as u64,
            exchanges: self.latency.len(),
            all_exchanges: self.latency.len() + self.untimed,
            latency_us,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_those_of_what_was_recorded() {
        let mut tally = Tally::new().unwrap();
        for microseconds in 1..=1000 {
            tally.record(Duration::from_micros(microseconds));
        }
        tally.untimed = 7;
        let report = tally.report(Duration::from_secs(2), 128);
        assert_eq!((report.exchanges, report.all_exchanges, report.bytes), (1000, 1007, 128_000));
        let latency = report.latency_us.unwrap();
        for (value, expected) in
            [(latency.p50, 500.0), (latency.p90, 900.0), (latency.p99, 990.0), (latency.p999, 999.0)]
        {
            assert!((value - expected).abs() <= expected * 2e-3, "{value} is not about {expected}");
        }
    }

    #[test]
    fn nothing_recorded_has_no_latency_and_the_unthinkable_is_capped() {
        let mut tally = Tally::new().unwrap();
        assert_eq!(tally.report(Duration::from_secs(1), 1).latency_us, None);
        tally.record(Duration::from_secs(10_000));
        let latency = tally.report(Duration::from_secs(1), 1).latency_us.unwrap();
        assert!((latency.max / 1e6 - 120.0).abs() < 0.5, "{latency:?}");
    }
}
