//! Real kernels: their names in, each booted with the kernel-facing tests inside, their verdicts out.
//!
//! A virtual machine has no disk, no network and no distribution: an initramfs made here holds the kernel's modules, the
//! programs under test, linked statically, `ip` and `openssl`. Nothing of it is installed on this machine.

mod initramfs;
mod kernel;
mod machine;
mod modules;
mod packages;
mod program;
mod table;
mod verdict;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::step;
use initramfs::Initramfs;
use kernel::Kernel;
use verdict::Seen;

#[derive(clap::Args)]
pub struct Vm {
    /// `6.1`, `6.12`, `backports` (Debian's cloud kernels, in QEMU), `uml` (User-mode Linux) or `running`; all of them if
    /// none is named.
    #[arg(value_name = "KERNEL")]
    kernels: Vec<Kernel>,
    /// Run this program instead of the tests. Linked statically, or it finds no libraries there.
    #[arg(long, value_name = "FILE")]
    run: Option<PathBuf>,
    /// Put this file beside it, in `/bin`. May be repeated.
    #[arg(long, value_name = "FILE", requires = "run")]
    add: Vec<PathBuf>,
    /// Seconds until a machine that has said nothing final is taken for hung.
    #[arg(long, default_value_t = 600)]
    limit: u64,
    /// Write what was seen into the README's table of kernels.
    #[arg(long, conflicts_with = "run")]
    table: bool,
    /// Arguments of `--run`.
    #[arg(last = true, requires = "run")]
    args: Vec<String>,
}

impl Vm {
    pub fn run(self) -> Result<()> {
        let kernels = if self.kernels.is_empty() { Kernel::ALL.to_vec() } else { self.kernels.clone() };
        let (command, files) = match &self.run {
            Some(program) => {
                let name = program.file_name().context("--run names no file")?.to_string_lossy();
                let command = [&[format!("/bin/{name}")], &self.args[..]].concat();
                (command, std::iter::once(program).chain(&self.add).cloned().collect())
            }
            None => (vec!["/bin/lab-guest".into(), "test".into()], Vec::new()),
        };
        let mut programs = program::build()?;
        programs.extend(files);
        let (mut failed, mut table) = (Vec::new(), Vec::new());
        for kernel in kernels {
            step(&format!("kernel {kernel}"));
            if self.kernels.is_empty()
                && kernel.is_optional()
                && let Err(error) = kernel.image()
            {
                println!("   left out: {error:#}");
                continue;
            }
            let mut seen = Seen::default();
            let limit = Duration::from_secs(self.limit);
            match run(kernel, &command, &programs, limit, &mut |line| println!("   {}", seen.note(line))) {
                Ok(0) => {}
                Ok(status) => failed.push(format!("{kernel}: exit status {status}")),
                Err(error) => failed.push(format!("{kernel}: {error:#}")),
            }
            table.push((kernel, seen));
        }
        ensure!(failed.is_empty(), "{}", failed.join("\n"));
        if self.table { table::write(&table) } else { Ok(()) }
    }
}

/// The kernel of the matrix that every check runs on, for it boots in two seconds. Returns why not, where it can't be had.
pub fn check() -> Result<Option<String>> {
    let obstacle = Kernel::Uml.obstacle();
    if obstacle.is_none() {
        let (kernels, run, add, args) = (vec![Kernel::Uml], None, Vec::new(), Vec::new());
        Vm { kernels, run, add, args, limit: 600, table: false }.run()?;
    }
    Ok(obstacle)
}

/// Runs a command on a kernel and returns its exit status; what it prints is handed over.
fn run(
    kernel: Kernel,
    command: &[String],
    programs: &[PathBuf],
    limit: Duration,
    see: &mut dyn FnMut(&str),
) -> Result<i32> {
    let Some(image) = kernel.image()? else { return machine::here(command, programs, limit, see) };
    let mut initramfs = Initramfs::default();
    for program in programs {
        initramfs.program(program)?;
    }
    for program in ["ip", "openssl"] {
        initramfs.shared_program(program)?;
    }
    initramfs.link("/init", "/bin/lab-guest");
    initramfs.link("/sbin/modprobe", "/bin/lab-guest");
    initramfs.file("/guest/command", command.join("\0").into_bytes(), 0o644);
    let modules = modules::wanted(&image.modules)?;
    initramfs.file("/guest/modules", modules::index(&modules).into_bytes(), 0o644);
    for module in modules {
        initramfs.file(&format!("/guest/modules.d/{}.ko", module.name), module.bytes, 0o644);
    }
    let path = dir().join(format!("{kernel}.cpio"));
    initramfs.write(&path)?;
    machine::boot(&image, &path, limit, see)
}

/// Where everything of this command is kept.
fn dir() -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join("target/vm")
}
