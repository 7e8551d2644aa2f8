//! What is shown to those who run it: alert rules, a dashboard, and the agent's own page.
//!
//! Queries are held against what running agents really expose; the page is looked at by a real browser.

mod browser;
mod dashboard;
mod page;
mod promql;
mod rules;
mod scene;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use mtls_tests::{Finished, Running};

/// Leaves a test that lacks a program, unless `CI=true`, where lacking is failing.
macro_rules! needs {
    ($($programs:expr),* $(,)?) => {
        if mtls_tests::skip(&[$($programs),*]) {
            return Ok(());
        }
    };
}
pub(crate) use needs;

/// A file of `deploy/monitoring`.
fn deployed(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/monitoring")).join(name)
}

fn read(name: &str) -> Result<String> {
    let path = deployed(name);
    std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
}

/// Runs promtool to its end, whatever that is.
fn promtool(args: &[&str], file: &Path) -> Result<Finished> {
    let mut command = std::process::Command::new(mtls_tests::find("promtool").context("no promtool")?);
    Running::start({
        command.args(args).arg(file);
        command
    })?
    .finish()
}
