//! What a person sees while it runs: measurements as they are made in; lines, and on a terminal a bar with the time that
//! is left, out.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use super::metric::Figures;

/// Characters of the bar.
const BAR: usize = 30;

pub struct Progress {
    begun: Instant,
    done: usize,
    total: usize,
    /// A bar is drawn, below the lines.
    bar: bool,
}

impl Progress {
    pub fn new(total: usize) -> Self {
        Self { begun: Instant::now(), done: 0, total, bar: std::io::stderr().is_terminal() }
    }

    /// Says what is being measured now.
    pub fn begin(&self, path: &str, workload: &str) {
        if self.bar {
            let filled = BAR * self.done / self.total.max(1);
            let bar = "█".repeat(filled) + &"░".repeat(BAR.saturating_sub(filled));
            let left = match self.done {
                0 => String::new(),
                done => {
                    let each = self.begun.elapsed().div_f64(done as f64);
                    format!(", {} left", clock(each.mul_f64(self.total.saturating_sub(done) as f64)))
                }
            };
            eprint!("\r\x1b[K{bar} {}/{}{left}: {workload}, {path}", self.done, self.total);
            let _ = std::io::stderr().flush();
        }
    }

    /// Takes the bar away.
    pub fn end(&self) {
        if self.bar {
            eprint!("\r\x1b[K");
        }
    }

    /// One more is done.
    pub fn step(&mut self, path: &str, workload: &str, outcome: Result<&Figures, &anyhow::Error>) {
        self.done += 1;
        let elapsed = self.begun.elapsed();
        let all = elapsed.mul_f64(self.total.max(self.done) as f64 / self.done as f64);
        let said = match outcome {
            Ok(figures) => figures
                .iter()
                .take(2)
                .map(|(metric, value)| format!("{} {}", number(*value), metric.unit))
                .collect::<Vec<_>>()
                .join(", "),
            Err(error) => format!("failed: {}", format!("{error:#}").replace('\n', " ")),
        };
        self.end();
        println!(
            "[{:>3}/{} {} of about {}] {workload:40} {path:26} {said}",
            self.done,
            self.total,
            clock(elapsed),
            clock(all)
        );
    }

    pub fn elapsed(&self) -> Duration {
        self.begun.elapsed()
    }
}

pub fn clock(time: Duration) -> String {
    format!("{}:{:02}", time.as_secs() / 60, time.as_secs() % 60)
}

/// Three digits that matter, thousands apart.
pub fn number(value: f64) -> String {
    let magnitude = value.abs();
    match magnitude {
        _ if magnitude >= 1000.0 => {
            let digits = format!("{:.0}", value);
            let mut grouped = String::new();
            for (index, digit) in digits.chars().enumerate() {
                if index > 0 && (digits.len() - index) % 3 == 0 {
                    grouped.push('\u{2009}');
                }
                grouped.push(digit);
            }
            grouped
        }
        _ if magnitude >= 100.0 => format!("{value:.0}"),
        _ if magnitude >= 10.0 => format!("{value:.1}"),
        _ if magnitude >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits_that_matter() {
        let cases = [(0.1234, "0.123"), (1.234, "1.23"), (12.34, "12.3"), (123.4, "123"), (0.0, "0.000")];
        for (value, expected) in cases {
            assert_eq!(number(value), expected);
        }
        assert_eq!(number(1234567.8), "1\u{2009}234\u{2009}568");
        assert_eq!(number(1234.5), "1\u{2009}234");
    }

    #[test]
    fn time_is_minutes_and_seconds() {
        assert_eq!(clock(Duration::from_secs(125)), "2:05");
    }
}
