//! Kernels: a name in, an image and its modules out, taken from Debian's packages without installing them.

use std::env;
use std::fmt;
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::packages::{Archive, only};
use crate::setup;

#[derive(clap::ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kernel {
    /// Debian 12's cloud kernel.
    #[value(name = "6.1")]
    Debian12,
    /// Debian 13's cloud kernel, as Debian 12 offers it.
    #[value(name = "6.12")]
    Debian13,
    /// The newest that Debian 13 offers. Left out of the whole matrix where the mirror has none.
    Backports,
    /// A kernel that is a process.
    Uml,
    /// The one this machine runs.
    Running,
}

/// The metapackage of a Debian's newest kernel for virtual machines.
const CLOUD: &str = "linux-image-cloud-amd64";
const BACKPORTS: &str = "trixie-backports";

/// What a machine is started from.
pub struct Image {
    /// A program that is the kernel, rather than an image of one.
    pub is_program: bool,
    pub path: PathBuf,
    /// `lib/modules/<release>`.
    pub modules: PathBuf,
}

impl Kernel {
    pub const ALL: [Self; 5] = [Self::Debian12, Self::Debian13, Self::Backports, Self::Uml, Self::Running];

    /// Fetches what is missing. None: it runs already.
    pub fn image(self) -> Result<Option<Image>> {
        Ok(Some(match self {
            Self::Running => return Ok(None),
            Self::Uml => {
                let root = Archive::of_this_machine().unpack("user-mode-linux", "user-mode-linux")?;
                let modules = only(&root.join("usr/lib/uml/modules"), "")?;
                Image { is_program: true, path: root.join("usr/bin/linux.uml"), modules }
            }
            Self::Debian12 => debian(&Archive::of_this_machine(), CLOUD, CLOUD)?,
            Self::Debian13 => {
                let package = "linux-image-6.12-cloud-amd64";
                debian(&Archive::of_this_machine(), package, package)?
            }
            Self::Backports => debian(&Archive::suite(BACKPORTS)?, CLOUD, BACKPORTS)?,
        }))
    }
}

impl Kernel {
    /// Whether it changes with the mirror, and may be missing there.
    pub fn is_optional(self) -> bool {
        self == Self::Backports
    }

    /// Where it comes from, for a table.
    pub fn origin(self) -> &'static str {
        match self {
            Self::Debian12 => "Debian 12 cloud",
            Self::Debian13 => "Debian 13 cloud",
            Self::Backports => "Debian 13 backports cloud",
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
            Self::Backports => "backports",
            Self::Uml => "uml",
            Self::Running => "running",
        })
    }
}

/// The kernel that a package stands for, with its modules.
fn debian(archive: &Archive, package: &str, name: &str) -> Result<Image> {
    setup::packages(&[("qemu-system-x86_64", "qemu-system-x86"), ("xz", "xz-utils")])?;
    let root = archive.unpack(package, name)?;
    // Where everything is below /usr, /lib is a link that no package brings.
    let lib = [root.join("usr/lib/modules"), root.join("lib/modules")].into_iter().find(|lib| lib.is_dir());
    let modules = only(&lib.with_context(|| format!("{package} brings no modules"))?, "")?;
    let path = only(&root.join("boot"), "vmlinuz-").or_else(|_| only(&modules, "vmlinuz"))?;
    Ok(Image { is_program: false, path, modules })
}
