//! Builds the BPF object, then the `mtls` binary with the object inside.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail, ensure};

use crate::toolchain;

#[derive(clap::Args, Clone, Copy)]
pub struct Build {
    /// Optimise as for a release.
    #[arg(long)]
    pub release: bool,
}

impl Build {
    /// Returns the path of the `mtls` binary.
    pub fn run(self) -> anyhow::Result<PathBuf> {
        object()?;
        let mut command = Command::new(env::var_os("CARGO").unwrap_or("cargo".into()));
        // All of the workspace decides on the dependencies' features, so that the tests build none of them again.
        command.current_dir(workspace()).args(["build", "--workspace", "--bin", "mtls"]);
        command.arg("--message-format=json-render-diagnostics");
        if self.release {
            command.arg("--release");
        }
        let output = command.stderr(Stdio::inherit()).output().context("running cargo")?;
        ensure!(output.status.success(), "building mtls failed");
        let messages = String::from_utf8(output.stdout).context("cargo's messages")?;
        executable(&messages).context("cargo named no executable")
    }
}

/// Builds the kernel half. `target/bpf/mtls-ebpf.o`, which this returns, is where the build of `mtls` finds it.
pub fn object() -> anyhow::Result<PathBuf> {
    let missing = toolchain::missing();
    let Some(compiler) = toolchain::compiler().filter(|_| missing.is_empty()) else {
        let missing: Vec<String> = missing.iter().map(|missing| format!("  {missing}")).collect();
        bail!(
            "the kernel half can't be built; `cargo xtask setup` installs what is missing:\n{}",
            missing.join("\n")
        );
    };
    let directory = workspace().join("target/bpf");
    let status = compiler
        .build()
        .current_dir(workspace().join("mtls-ebpf"))
        .arg("--locked")
        .arg("--target-dir")
        .arg(&directory)
        .status()
        .context("running cargo for the kernel half")?;
    ensure!(status.success(), "building the kernel half failed");
    let built = directory.join("bpfel-unknown-none/release/mtls-ebpf");
    let object = directory.join("mtls-ebpf.o");
    let bytes = fs::read(&built).with_context(|| built.display().to_string())?;
    // Written only if it changed, so that what embeds it is not built again for nothing.
    if fs::read(&object).ok().as_ref() != Some(&bytes) {
        fs::write(&object, bytes).with_context(|| object.display().to_string())?;
    }
    Ok(object)
}

/// The last executable that cargo says it made.
pub fn executable(messages: &str) -> Option<PathBuf> {
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    messages.filter_map(|message| message["executable"].as_str().map(PathBuf::from)).next_back()
}

pub fn workspace() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}
