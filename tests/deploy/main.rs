//! What is installed in a cluster: manifests and chart say the same, Kubernetes takes them, nothing in them is idle, and
//! the agent needs exactly what they give it.
//!
//! Rendered by kubectl and helm as they are released, judged by Kubernetes' own schemas. No API server: what only one
//! could say is not said here.

mod check;
mod container;
mod image;
mod kinds;
mod names;
mod permissions;
mod privileges;
mod rendered;
mod same;
mod schemas;
mod scripts;
mod stated;
mod uninstall;
mod values;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

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

/// Of `deploy`: the directory that is applied, with the file of values that asks the chart for the same.
const VARIANTS: [(&str, Option<&str>); 5] = [
    ("", None),
    ("kind", Some("kind/values.yaml")),
    ("minikube", Some("minikube/values.yaml")),
    ("production", Some("production/values.yaml")),
    ("signer", Some("signer/values.yaml")),
];

/// A file or directory of `deploy`.
fn deployed(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy")).join(name)
}

fn read(name: &str) -> Result<String> {
    let path = deployed(name);
    std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
}

/// Runs a program to its end, whatever that is.
fn run(program: impl AsRef<Path>, args: &[&str]) -> Result<Finished> {
    let program = program.as_ref();
    let found = mtls_tests::find(&program.to_string_lossy());
    let mut command = Command::new(found.unwrap_or_else(|| program.into()));
    command.args(args);
    Running::start(command)?.finish()
}

/// A directory that is gone when the test ends.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Result<Self> {
        static COUNTER: AtomicU32 = AtomicU32::new(1);
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("mtls-{name}-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).with_context(|| format!("make {}", path.display()))?;
        Ok(Self(path))
    }

    fn write(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.0.join(name);
        std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        Ok(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            eprintln!("{}: {error}", self.0.display());
        }
    }
}
