//! Builds the BPF object, then the `mtls` binary with the object inside.

use std::path::PathBuf;

#[derive(clap::Args, Clone, Copy)]
pub struct Build {
    /// Optimise as for a release.
    #[arg(long)]
    pub release: bool,
}

impl Build {
    /// Returns the path of the `mtls` binary.
    pub fn run(self) -> anyhow::Result<PathBuf> {
        anyhow::bail!("not yet")
    }
}
