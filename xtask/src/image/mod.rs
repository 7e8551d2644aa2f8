//! The container image, without Docker: one static binary in, an OCI layout and a loadable archive out.
//!
//! What is in it is all that a container needs: no shell, no libraries, no package manager. The same sources give the same
//! digest on the same toolchain.

mod link;
mod oci;
mod rootfs;
mod sbom;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;

use crate::{build, call, step};

pub use link::beside_the_dynamic_one;

#[derive(clap::Args)]
pub struct Image {
    /// Processors it is for.
    #[arg(long, value_enum, default_value_t = Arch::Amd64)]
    arch: Arch,
    /// Build as tests do: quickly, large and slow.
    #[arg(long)]
    dev: bool,
    /// Its name, with a tag.
    #[arg(long, default_value_t = default_name())]
    name: String,
    /// Where to put it.
    #[arg(long, default_value = "target/image")]
    out: PathBuf,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Arch {
    Amd64,
    Arm64,
}

/// What was made.
pub struct Made {
    pub archive: PathBuf,
    pub digest: String,
    pub bytes: u64,
}

impl Image {
    pub fn run(self) -> Result<()> {
        build::object()?;
        let binary = match (self.dev, self.arch) {
            (true, arch) if arch.is_native() => link::beside_the_dynamic_one()?,
            (true, _) => anyhow::bail!("--dev is for this machine's own kind of processor"),
            (false, arch) => link::release(arch)?,
        };
        let made = self.pack(&binary)?;
        println!("{}: {} MB, {}", made.archive.display(), made.bytes.div_ceil(1_000_000), made.digest);
        Ok(())
    }

    /// Packs a static binary, the way `cargo xtask test` does for the tests.
    pub fn pack_dev(binary: &Path) -> Result<Made> {
        let out = PathBuf::from("target/image/dev");
        Self { arch: Arch::Amd64, dev: true, name: default_name(), out }.pack(binary)
    }

    fn pack(&self, binary: &Path) -> Result<Made> {
        step("packing the image");
        let out = build::workspace().join(&self.out);
        let stage = out.join("stage");
        if stage.exists() {
            fs::remove_dir_all(&stage).with_context(|| format!("remove {}", stage.display()))?;
        }
        let described = sbom::describe(self.arch)?;
        rootfs::lay(&stage, binary, self.arch, &described)?;
        let layout = out.join(format!("oci-{}", self.arch.name()));
        let subject = oci::Subject {
            name: &self.name,
            arch: self.arch,
            created: commit("%ct").and_then(|seconds| seconds.parse().ok()).unwrap_or(0),
            revision: commit("%H").unwrap_or_default(),
        };
        let digest = oci::lay_out(&layout, &stage, &subject, &described)?;
        let (_, tag) = self.name.rsplit_once(':').context("--name has no tag")?;
        let archive = out.join(format!("mtls-{tag}-{}.tar", self.arch.name()));
        oci::archive(&layout, &archive)?;
        fs::remove_dir_all(&stage)?;
        let bytes = fs::metadata(&archive)?.len();
        ensure!(
            bytes < LARGEST,
            "{} has {bytes} bytes, more than the {LARGEST} it may have",
            archive.display()
        );
        Ok(Made { archive, digest, bytes })
    }
}

/// An image that takes long to pull delays every node that joins.
const LARGEST: u64 = 40_000_000;

impl Arch {
    /// As images call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }

    /// As Rust calls it.
    pub fn target(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64-unknown-linux-gnu",
            Self::Arm64 => "aarch64-unknown-linux-gnu",
        }
    }

    /// As the C compiler's tools call it.
    fn triple(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64-linux-gnu",
            Self::Arm64 => "aarch64-linux-gnu",
        }
    }

    /// Whether this machine's is of that kind.
    fn is_native(self) -> bool {
        cfg!(target_arch = "aarch64") == (self == Self::Arm64)
    }
}

fn default_name() -> String {
    format!("mtls:{}", env!("CARGO_PKG_VERSION"))
}

/// Something about the commit that is checked out; nothing outside a repository.
fn commit(format: &str) -> Option<String> {
    let output = Command::new("git")
        .args(["log", "-1", &format!("--format={format}")])
        .current_dir(build::workspace())
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?.trim().to_owned();
    (output.status.success() && !text.is_empty()).then_some(text)
}

/// A tar archive of a directory that depends on nothing but names, modes and contents.
fn tar(directory: &Path, to: &Path, created: u64) -> Result<()> {
    call(
        Command::new("tar")
            .args(["--create", "--format=ustar", "--sort=name", "--owner=0", "--group=0", "--numeric-owner"])
            .arg(format!("--mtime=@{created}"))
            .arg("--file")
            .arg(to)
            .arg("--directory")
            .arg(directory)
            .arg("."),
    )
}
