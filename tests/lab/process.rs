//! Processes in a place (network namespace and cgroup): a command in, its lines, status and end out.
//!
//! Nothing outlives its [`Running`], and nothing is waited for without a limit.

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::fcntl::{OFlag, open};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, write};
use serde_json::Value;

/// How long anything in the lab may take unless it says otherwise.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A child of an ended process may hold its pipes open: when nothing has come through them for this many spells, what
/// has arrived has to do. Counted, not timed: on a machine that stood still meanwhile the reader has not had its turn.
const QUIET_SPELLS: u32 = 10;
const SPELL: Duration = Duration::from_millis(50);

/// A command that will run in a network namespace and a cgroup.
///
/// Not by `ip netns exec`, which mounts a new `/sys` and so hides cgroups and bpffs.
pub fn command(program: impl AsRef<OsStr>, netns: Arc<OwnedFd>, cgroup: &Path) -> Command {
    let procs = cgroup.join("cgroup.procs");
    let procs = CString::new(procs.as_os_str().as_bytes()).expect("a cgroup path has no NUL byte");
    let mut command = Command::new(program);
    // SAFETY: runs between fork and exec; it only makes system calls on memory prepared before the fork.
    unsafe {
        command.pre_exec(move || {
            let file = open(procs.as_c_str(), OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty())?;
            write(file.as_fd(), b"0")?;
            setns(netns.as_fd(), CloneFlags::CLONE_NEWNET)?;
            Ok(())
        });
    }
    command.stdin(Stdio::null());
    command
}

/// A started process. Stopped and reaped on drop.
#[derive(Debug)]
pub struct Running {
    name: String,
    child: Child,
    output: Arc<Output>,
    /// Asked for on drop; SIGKILL follows if that doesn't help.
    farewell: Signal,
}

#[derive(Debug, Default)]
struct Output {
    state: Mutex<Lines>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Lines {
    lines: Vec<String>,
    errors: String,
    closed: u8,
}

impl Lines {
    fn arrived(&self) -> (usize, usize, u8) {
        (self.lines.len(), self.errors.len(), self.closed)
    }
}

/// A process that has ended.
#[derive(Debug)]
pub struct Finished {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Finished {
    /// An error carrying the output unless the process succeeded.
    pub fn success(self) -> Result<Self> {
        if !self.status.success() {
            bail!("{}:\n{}\n{}", self.status, self.stdout.trim(), self.stderr.trim());
        }
        Ok(self)
    }

    /// The last line of the output, as JSON.
    pub fn json(&self) -> Result<Value> {
        let line =
            self.stdout.lines().last().with_context(|| format!("no output; stderr: {}", self.stderr))?;
        serde_json::from_str(line).with_context(|| format!("not JSON: {line}"))
    }
}

impl Running {
    /// Starts a command, collecting what it prints.
    pub fn start(mut command: Command) -> Result<Self> {
        let name =
            Path::new(command.get_program()).file_name().unwrap_or_default().to_string_lossy().into_owned();
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {:?}", command.get_program()))?;
        let output = Arc::new(Output::default());
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let (lines, errors) = (Arc::clone(&output), Arc::clone(&output));
        std::thread::spawn(move || lines.collect_lines(stdout));
        std::thread::spawn(move || errors.collect_errors(stderr));
        Ok(Self { name, child, output, farewell: Signal::SIGKILL })
    }

    /// Starts a command that writes its output into files, which its reader finds by name.
    pub fn start_logged(mut command: Command, stdout: &Path, stderr: &Path) -> Result<Self> {
        let name =
            Path::new(command.get_program()).file_name().unwrap_or_default().to_string_lossy().into_owned();
        let append = |path: &Path| File::options().create(true).append(true).open(path);
        let child = command
            .stdout(append(stdout)?)
            .stderr(append(stderr)?)
            .spawn()
            .with_context(|| format!("start {:?}", command.get_program()))?;
        let output = Arc::new(Output::default());
        output.lock().closed = 2;
        Ok(Self { name, child, output, farewell: Signal::SIGKILL })
    }

    /// Stops it by `signal` on drop: for servers that leave something behind when they are killed.
    pub fn stopped_by(mut self, signal: Signal) -> Self {
        self.farewell = signal;
        self
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(Pid::from_raw(self.pid() as i32), signal).with_context(|| format!("{signal} to {}", self.name))
    }

    /// Asks it to end, and returns at once.
    pub fn terminate(&self) -> Result<()> {
        self.signal(Signal::SIGTERM)
    }

    /// Writes a line to the process's standard input, which must have been piped.
    pub fn say(&mut self, line: &str) -> Result<()> {
        let stdin = self.child.stdin.as_mut().context("its standard input is closed")?;
        writeln!(stdin, "{line}").with_context(|| format!("speak to {}", self.name))
    }

    /// Waits for a line that `wanted` accepts, and returns what it made of it. Looks at lines already printed too.
    pub fn line<T>(&self, what: &str, wanted: impl FnMut(&str) -> Option<T>) -> Result<T> {
        self.line_within(what, PATIENCE, wanted)
    }

    pub fn line_within<T>(
        &self,
        what: &str,
        limit: Duration,
        mut wanted: impl FnMut(&str) -> Option<T>,
    ) -> Result<T> {
        let deadline = Instant::now() + limit;
        let mut seen = 0;
        let mut state = self.output.lock();
        loop {
            while let Some(line) = state.lines.get(seen) {
                seen += 1;
                if let Some(found) = wanted(line) {
                    return Ok(found);
                }
            }
            if state.closed == 2 {
                bail!(
                    "{} ended without {what}; it said:\n{}\n{}",
                    self.name,
                    state.lines.join("\n"),
                    state.errors
                );
            }
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                bail!(
                    "no {what} from {} in {limit:?}; it said:\n{}\n{}",
                    self.name,
                    state.lines.join("\n"),
                    state.errors
                );
            };
            state = self.output.changed.wait_timeout(state, left).unwrap_or_else(|e| e.into_inner()).0;
        }
    }

    /// Waits for a JSON line that has the given key.
    pub fn json_with(&self, key: &str) -> Result<Value> {
        self.line(&format!("line with {key:?}"), |line| {
            serde_json::from_str::<Value>(line).ok().filter(|value| value.get(key).is_some())
        })
    }

    /// Waits for one more JSON line with the given key than there were earlier.
    pub fn json_after(&self, key: &str, earlier: usize) -> Result<Value> {
        let mut count = 0;
        self.line(&format!("line {} with {key:?}", earlier + 1), |line| {
            let value = serde_json::from_str::<Value>(line).ok().filter(|value| value.get(key).is_some())?;
            count += 1;
            (count > earlier).then_some(value)
        })
    }

    /// Every JSON line printed so far that has the given key.
    pub fn all_json_with(&self, key: &str) -> Vec<Value> {
        let state = self.output.lock();
        let parsed = state.lines.iter().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        parsed.filter(|value| value.get(key).is_some()).collect()
    }

    /// Whether it still runs.
    pub fn alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits for the end.
    pub fn finish(self) -> Result<Finished> {
        self.finish_within(PATIENCE)
    }

    pub fn finish_within(mut self, limit: Duration) -> Result<Finished> {
        drop(self.child.stdin.take());
        let deadline = Instant::now() + limit;
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            if Instant::now() > deadline {
                let state = self.output.lock();
                bail!(
                    "{} runs after {limit:?}; it said:\n{}\n{}",
                    self.name,
                    state.lines.join("\n"),
                    state.errors
                );
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        let mut state = self.output.lock();
        let mut quiet = 0;
        while state.closed < 2 && quiet < QUIET_SPELLS {
            let before = state.arrived();
            state = self.output.changed.wait_timeout(state, SPELL).unwrap_or_else(|e| e.into_inner()).0;
            quiet = if state.arrived() == before { quiet + 1 } else { 0 };
        }
        Ok(Finished { status, stdout: state.lines.join("\n"), stderr: std::mem::take(&mut state.errors) })
    }
}

impl Output {
    fn lock(&self) -> MutexGuard<'_, Lines> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn collect_lines(&self, stdout: Option<impl Read>) {
        if let Some(stdout) = stdout {
            for line in BufReader::new(stdout).split(b'\n').map_while(|line| line.ok()) {
                self.lock().lines.push(String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned());
                self.changed.notify_all();
            }
        }
        self.close();
    }

    fn collect_errors(&self, stderr: Option<impl Read>) {
        if let Some(mut stderr) = stderr {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = stderr.read(&mut buffer) {
                self.lock().errors.push_str(&String::from_utf8_lossy(&buffer[..n]));
            }
        }
        self.close();
    }

    fn close(&self) {
        self.lock().closed += 1;
        self.changed.notify_all();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.farewell != Signal::SIGKILL && self.alive() && self.signal(self.farewell).is_ok() {
            let deadline = Instant::now() + Duration::from_secs(10);
            while self.alive() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
