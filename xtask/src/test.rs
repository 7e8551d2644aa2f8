//! Every check there is: set-up, linters, unit tests, and the lab's tests with the real binary.

use std::env;
use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::{build, call, cargo, image, lint, setup, step, vm};

#[derive(clap::Args)]
pub struct Test {
    /// Only tests whose name contains this.
    filter: Option<String>,
    /// Leave the linters out.
    #[arg(long)]
    no_lint: bool,
    /// Tests at a time. Many wait for something, so more than there are cores is fine.
    #[arg(long, default_value_t = 3)]
    threads: usize,
}

/// What cargo's test runs added up to.
#[derive(Default)]
struct Summary {
    passed: u64,
    failed: u64,
    skipped: u64,
}

impl Test {
    pub fn run(self) -> Result<()> {
        let begun = Instant::now();
        setup::run()?;
        step("building the kernel half");
        build::object()?;
        if !self.no_lint {
            lint::run()?;
        }
        step("building");
        // All members at once, as below: cargo would build shared dependencies again for another choice of features.
        call(cargo().args(["build", "--quiet", "--workspace", "--bins"]))?;
        let binary = image::beside_the_dynamic_one()?;
        image::Image::pack_dev(&binary)?;
        // Not a test of cargo's, because it links programs its own way.
        let other_kernel = if self.filter.is_none() { vm::check() } else { Ok(None) };
        step("testing");
        let (mut summary, success) = self.cargo_test()?;
        // Told last, where it is read, and not in the way of everything else that may be wrong.
        let obstacle = other_kernel.unwrap_or_else(|error| {
            println!("FAILED on another kernel: {error:#}");
            summary.failed += 1;
            None
        });
        if let Some(obstacle) = obstacle {
            ensure!(env::var("CI").as_deref() != Ok("true"), "a requirement is missing: {obstacle}");
            println!("skipped: the tests on another kernel: {obstacle}");
            summary.skipped += 1;
        }
        let seconds = begun.elapsed().as_secs();
        println!(
            "── {} passed, {} failed, {} skipped for want of a requirement, in {} min {} s",
            summary.passed,
            summary.failed,
            summary.skipped,
            seconds / 60,
            seconds % 60
        );
        ensure!(success && summary.failed == 0, "not all tests pass");
        ensure!(summary.passed > 0, "no test ran");
        Ok(())
    }

    fn cargo_test(&self) -> Result<(Summary, bool)> {
        let mut command = cargo();
        command.args(["test", "--workspace", "--no-fail-fast"]);
        command.env("RUST_TEST_THREADS", self.threads.to_string());
        command.args(&self.filter);
        let mut child = command.stdout(Stdio::piped()).spawn().context("run cargo test")?;
        let output = child.stdout.take().context("cargo test has no output")?;
        let mut summary = Summary::default();
        for line in BufReader::new(output).lines() {
            let line = line?;
            println!("{line}");
            summary.note(&line);
        }
        Ok((summary, child.wait()?.success()))
    }
}

impl Summary {
    /// Takes a line such as `test result: ok. 12 passed; 0 failed; 0 ignored; …`.
    fn note(&mut self, line: &str) {
        if line.starts_with("skipped: ") {
            self.skipped += 1;
        }
        let Some(counts) = line.strip_prefix("test result: ").and_then(|rest| rest.split_once(". ")) else {
            return;
        };
        for count in counts.1.split("; ") {
            let Some((number, what)) = count.split_once(' ') else { continue };
            let number = number.parse().unwrap_or(0);
            match what {
                "passed" => self.passed += number,
                "failed" => self.failed += number,
                "ignored" => self.skipped += number,
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_add_up() {
        let mut summary = Summary::default();
        summary.note(
            "test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 1.0s",
        );
        summary.note("test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out");
        summary.note("test a ... ok");
        assert_eq!((summary.passed, summary.failed, summary.skipped), (15, 2, 1));
    }
}
