//! Machines: an image and an initramfs in, what its console says and the verdict out.
//!
//! The verdict is a line that process 1 of [`Initramfs`](super::initramfs) writes before it turns the machine off.

use std::env;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::dir;
use super::kernel::Image;
use crate::call;

const VERDICT: &str = "guest: exit ";
/// Enough for the programs, which are unpacked into it, and for the agents of `lab compare` at once.
const MEMORY: &str = "1536M";

/// Boots, hands over the console's lines, and returns the exit status of what ran in the machine.
pub fn boot(image: &Image, initramfs: &Path, limit: Duration, see: &mut dyn FnMut(&str)) -> Result<i32> {
    let mut machine =
        Machine::start(if image.is_program { uml(image, initramfs)? } else { qemu(image, initramfs) })?;
    let mut verdict = None;
    machine.lines(limit, |line| match line.strip_prefix(VERDICT) {
        Some(status) => verdict = status.parse().ok(),
        // After that only the kernel speaks, of its own end.
        None if verdict.is_none() => see(line),
        None => {}
    })?;
    verdict.context("the machine stopped without a verdict")
}

/// Runs the command on the kernel that runs already.
pub fn here(
    command: &[String],
    programs: &[PathBuf],
    limit: Duration,
    see: &mut dyn FnMut(&str),
) -> Result<i32> {
    let (program, args) = command.split_first().context("no command")?;
    let name = Path::new(program).file_name();
    let path = programs.iter().find(|path| path.file_name() == name).context("no such program")?;
    let mut command = Command::new(path);
    let mut machine = Machine::start(std::mem::replace(command.args(args), Command::new("")))?;
    machine.lines(limit, see)?;
    Ok(machine.0.wait()?.code().unwrap_or(255))
}

fn qemu(image: &Image, initramfs: &Path) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    // Emulated, although slower: nested virtualisation is there more often than it works.
    command.args(["-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", MEMORY, "-no-reboot"]);
    command.args(["-nodefaults", "-display", "none", "-serial", "stdio"]);
    command.arg("-kernel").arg(&image.path).arg("-initrd").arg(initramfs);
    command.args(["-append", "console=ttyS0 loglevel=1 panic=-1"]);
    command
}

fn uml(image: &Image, initramfs: &Path) -> Result<Command> {
    let registers = dir().join("registers.so");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/uml/registers.rs");
    let mut compiler = Command::new(env::var_os("RUSTC").unwrap_or("rustc".into()));
    compiler.args(["--edition", "2024", "--crate-type", "cdylib", "-O", "-C", "panic=abort", "-o"]);
    call(compiler.arg(&registers).arg(source))?;
    let mut command = Command::new(&image.path);
    command.arg(format!("mem={MEMORY}")).arg(format!("initrd={}", initramfs.display()));
    command.args(["con0=null,fd:1", "con=null", "rdinit=/init", "loglevel=1", "panic=-1"]);
    command.arg(format!("uml_dir={}", dir().join("uml").display()));
    command.env("LD_PRELOAD", registers);
    // Where it keeps its memory: a container's /dev/shm may be too small for that.
    command.env("TMPDIR", dir());
    // What it tells of the host before it has a console.
    command.stderr(File::create(dir().join("uml.log")).context("make uml.log")?);
    Ok(command)
}

/// A process group, ended on drop.
struct Machine(Child);

impl Machine {
    fn start(mut command: Command) -> Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).process_group(0);
        let child = command.spawn().with_context(|| format!("run {:?}", command.get_program()))?;
        Ok(Self(child))
    }

    /// Hands every line to `see`, until the output ends.
    fn lines(&mut self, limit: Duration, mut see: impl FnMut(&str)) -> Result<()> {
        let output = self.0.stdout.take().context("the machine has no console")?;
        let lines = reader(output);
        let deadline = Instant::now() + limit;
        loop {
            match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => see(&line),
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
                Err(RecvTimeoutError::Timeout) => bail!("no end after {limit:?}"),
            }
        }
    }
}

/// Lines as they come, without carriage returns.
fn reader(output: impl std::io::Read + Send + 'static) -> Receiver<String> {
    let (send, lines) = channel();
    thread::spawn(move || {
        for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned();
            if send.send(line).is_err() {
                return;
            }
        }
    });
    lines
}

impl Drop for Machine {
    fn drop(&mut self) {
        // User-mode Linux is a handful of processes.
        let group = format!("-{}", self.0.id());
        if matches!(self.0.try_wait(), Ok(None)) {
            let _ = Command::new("kill").args(["-KILL", "--", &group]).status();
        }
        let _ = self.0.wait();
    }
}
