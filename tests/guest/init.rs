//! Process 1: a bare kernel in, file systems mounted, the command run, and the machine off.
//!
//! Says `guest: exit N` at the end, N being the command's exit status: the verdict that whoever watches the console
//! waits for. A machine that stops without saying so has crashed.

use std::fs::{self, File};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};
use nix::sys::wait::{WaitStatus, wait};
use nix::unistd::Pid;

use crate::modules;

/// Where `cargo xtask vm` puts what to run, its words separated by NUL.
const COMMAND: &str = "/guest/command";

const MOUNTS: [(&str, &str); 7] = [
    ("/proc", "proc"),
    ("/sys", "sysfs"),
    ("/dev", "devtmpfs"),
    ("/run", "tmpfs"),
    ("/tmp", "tmpfs"),
    ("/sys/fs/cgroup", "cgroup2"),
    ("/sys/fs/bpf", "bpf"),
];

pub fn run() -> Result<()> {
    let status = prepare().and_then(|()| command());
    let status = status.unwrap_or_else(|error| {
        println!("guest: {error:#}");
        255
    });
    println!("guest: exit {status}");
    // SAFETY: a number only. Returns only if it fails; a process 1 that ends makes the kernel panic, which ends the
    // machine as well.
    unsafe { libc::reboot(libc::RB_POWER_OFF) };
    Err(std::io::Error::last_os_error()).context("power off")
}

fn prepare() -> Result<()> {
    for (path, kind) in MOUNTS {
        fs::create_dir_all(path).with_context(|| format!("make {path}"))?;
        mount(Some(kind), path, Some(kind), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("mount {kind} on {path}"))?;
    }
    // A distribution's kernel has it from the start; where it is a module, nothing asks for it.
    modules::probe(["ipv6".to_owned()].into_iter())?;
    let up = Command::new("ip").args(["link", "set", "lo", "up"]).status().context("run ip")?;
    if !up.success() {
        bail!("no loopback interface");
    }
    Ok(())
}

/// Runs the command to its end, and reaps whatever else ends meanwhile, as process 1 must.
fn command() -> Result<i32> {
    let words = fs::read_to_string(COMMAND).with_context(|| format!("read {COMMAND}"))?;
    let mut words = words.split('\0');
    let program = words.next().filter(|program| !program.is_empty()).context("no command was given")?;
    let console = File::options().write(true).open("/dev/console").context("open the console")?;
    let child = Command::new(program)
        .args(words)
        .stdin(Stdio::null())
        .stdout(console.try_clone()?)
        .stderr(console)
        .spawn()
        .with_context(|| format!("start {program}"))?;
    let child = Pid::from_raw(child.id() as i32);
    loop {
        match wait().context("wait for the command")? {
            WaitStatus::Exited(pid, status) if pid == child => return Ok(status),
            WaitStatus::Signaled(pid, signal, _) if pid == child => {
                println!("guest: {program} was ended by {signal}");
                return Ok(128 + signal as i32);
            }
            _ => {}
        }
    }
}
