//! Kernels: a name in, an image and its modules out, taken from Debian's packages without installing them.

use std::env;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::dir;
use crate::{call, setup, step};

#[derive(clap::ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kernel {
    /// Debian 12's cloud kernel.
    #[value(name = "6.1")]
    Debian12,
    /// Debian 13's cloud kernel, as Debian 12 offers it.
    #[value(name = "6.12")]
    Debian13,
    /// A kernel that is a process.
    Uml,
    /// The one this machine runs.
    Running,
}

/// What a machine is started from.
pub struct Image {
    /// A program that is the kernel, rather than an image of one.
    pub is_program: bool,
    pub path: PathBuf,
    /// `lib/modules/<release>`.
    pub modules: PathBuf,
}

impl Kernel {
    pub const ALL: [Self; 4] = [Self::Debian12, Self::Debian13, Self::Uml, Self::Running];

    /// Fetches what is missing. None: it runs already.
    pub fn image(self) -> Result<Option<Image>> {
        Ok(Some(match self {
            Self::Running => return Ok(None),
            Self::Uml => {
                let root = unpacked("user-mode-linux")?;
                let modules = only(&root.join("usr/lib/uml/modules"), "")?;
                Image { is_program: true, path: root.join("usr/bin/linux.uml"), modules }
            }
            Self::Debian12 => debian("linux-image-cloud-amd64")?,
            Self::Debian13 => debian("linux-image-6.12-cloud-amd64")?,
        }))
    }
}

impl Kernel {
    /// Where it comes from, for a table.
    pub fn origin(self) -> &'static str {
        match self {
            Self::Debian12 => "Debian 12 cloud",
            Self::Debian13 => "Debian 13 cloud",
            Self::Uml => "User-mode Linux",
            Self::Running => "a virtual machine's own",
        }
    }

    /// Why it can't be had on this machine, if so.
    pub fn obstacle(self) -> Option<String> {
        match self {
            Self::Running => None,
            _ if env::consts::ARCH != "x86_64" => Some(format!("no {self} for {}", env::consts::ARCH)),
            _ => setup::require_debian(&self.to_string()).err().map(|error| error.to_string()),
        }
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Debian12 => "6.1",
            Self::Debian13 => "6.12",
            Self::Uml => "uml",
            Self::Running => "running",
        })
    }
}

/// The kernel that a package without content of its own depends on.
fn debian(package: &str) -> Result<Image> {
    setup::packages(&[("qemu-system-x86_64", "qemu-system-x86"), ("xz", "xz-utils")])?;
    let root = unpacked(package)?;
    Ok(Image {
        is_program: false,
        path: only(&root.join("boot"), "vmlinuz-")?,
        modules: only(&root.join("lib/modules"), "")?,
    })
}

/// A package's files, below a directory. Kept: the next run needs no network.
fn unpacked(package: &str) -> Result<PathBuf> {
    let root = dir().join("kernels").join(package);
    if root.join("complete").exists() {
        return Ok(root);
    }
    setup::require_debian(package)?;
    step(&format!("fetching {package}"));
    fs::create_dir_all(&root).with_context(|| format!("make {}", root.display()))?;
    let download =
        |name: &str| call(Command::new("apt-get").args(["-qq", "download", name]).current_dir(&root));
    let name = match newest(package) {
        Ok(name) if download(&name).is_ok() => name,
        // Package lists may be missing, or older than what the mirror still has.
        _ => {
            setup::apt(&["update"])?;
            let name = newest(package)?;
            download(&name)?;
            name
        }
    };
    let archive = only(&root, &format!("{name}_"))?;
    call(Command::new("dpkg-deb").arg("-x").arg(&archive).arg(&root))?;
    fs::remove_file(&archive)?;
    fs::write(root.join("complete"), name)?;
    Ok(root)
}

/// The image that a metapackage stands for, or the package itself.
fn newest(package: &str) -> Result<String> {
    let output = Command::new("apt-cache").args(["depends", package]).output().context("run apt-cache")?;
    ensure!(output.status.success(), "there is no package {package} here");
    let text = String::from_utf8_lossy(&output.stdout);
    let mut depends = text.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
    Ok(depends.find(|name| name.starts_with("linux-image-")).unwrap_or(package).to_owned())
}

/// The one entry of a directory whose name starts so.
fn only(directory: &Path, start: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(directory).with_context(|| format!("read {}", directory.display()))?;
    let mut names = entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with(start));
    let entry = names.next().with_context(|| format!("nothing like {start}* in {}", directory.display()))?;
    Ok(entry.path())
}
