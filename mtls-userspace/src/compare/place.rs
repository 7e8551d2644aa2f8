//! The lab: network namespaces, files, cgroups and processes that end with it.
//!
//! Namespaces have no names, mounts are private, and every process is killed when this one ends, however it ends. A
//! process that was killed leaves empty cgroups and a directory of manifests, which the next lab removes.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;

use super::stop;
use crate::results::Environment;
use crate::{capture, rtnetlink};

const PREFIX: &str = "mtls-compare-";
pub(super) const CLIENT: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 88, 0, 1));
pub(super) const SERVER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 88, 0, 2));
/// Where load servers listen.
pub(super) const PORT: u16 = 7000;
/// Not to be taken by a client's end of a connection.
const LISTENED_ON: &str = "7000,15000-15100";

pub(super) struct Lab {
    dir: PathBuf,
    cgroup: PathBuf,
    sets: AtomicU32,
}

impl Lab {
    pub fn make() -> Result<Self> {
        let name = format!("{PREFIX}{}", std::process::id());
        let root = capture::mounted_cgroup_root().context("finding the cgroup2 mount")?;
        remove_leftovers(&root, remove_cgroups);
        remove_leftovers(&std::env::temp_dir(), |path| drop(fs::remove_dir_all(path)));
        let lab =
            Self { dir: std::env::temp_dir().join(&name), cgroup: root.join(name), sets: AtomicU32::new(0) };
        fs::create_dir_all(lab.bpffs()).context("making a directory for the lab")?;
        unshare(CloneFlags::CLONE_NEWNS).context("making a mount namespace; it needs root")?;
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("private mounts")?;
        mount(Some("bpf"), &lab.bpffs(), Some("bpf"), MsFlags::empty(), none).context("mounting a bpffs")?;
        Ok(lab)
    }

    /// A directory, a cgroup and a directory on a bpffs for one set of processes.
    pub fn set(&self) -> Result<(PathBuf, PathBuf, PathBuf)> {
        let number = self.sets.fetch_add(1, Ordering::Relaxed).to_string();
        let set = (self.dir.join(&number), self.cgroup.join(&number), self.bpffs().join(&number));
        for path in [&set.0, &set.1, &set.2] {
            fs::create_dir_all(path).with_context(|| format!("make {}", path.display()))?;
        }
        Ok(set)
    }

    fn bpffs(&self) -> PathBuf {
        self.dir.join("bpf")
    }

    pub fn environment(&self) -> Environment {
        let control = fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control").unwrap_or_default();
        Environment::here(control.trim().to_owned(), format!("mtls {}", env!("CARGO_PKG_VERSION")))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = umount2(&self.bpffs(), MntFlags::MNT_DETACH);
        let _ = fs::remove_dir_all(&self.dir);
        remove_cgroups(&self.cgroup);
    }
}

/// What labs left whose process is gone.
fn remove_leftovers(dir: &Path, remove: impl Fn(&Path)) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let process = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.parse::<u32>().ok());
        if process.is_some_and(|process| !Path::new("/proc").join(process.to_string()).exists()) {
            remove(&entry.path());
        }
    }
}

fn remove_cgroups(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            remove_cgroups(&entry.path());
        }
    }
    // The kernel may still be about to take the last process out of it.
    for _ in 0..50 {
        match fs::remove_dir(dir) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                std::thread::sleep(Duration::from_millis(10));
            }
            _ => return,
        }
    }
}

/// A network namespace, and the cgroup of what runs there.
pub(super) struct Place {
    netns: File,
    cgroup: Option<PathBuf>,
}

impl Place {
    /// With loopback and nothing else.
    pub fn make(cgroup: Option<PathBuf>) -> Result<Self> {
        if let Some(dir) = &cgroup {
            fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
        }
        let made = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            rtnetlink::loopback_up()?;
            File::open("/proc/thread-self/ns/net")
        });
        let made = made.join().map_err(|_| io::Error::other("the thread that makes a namespace panicked"))?;
        let place = Self { netns: made.context("making a network namespace")?, cgroup };
        place.within(tune)??;
        Ok(place)
    }

    /// The same namespace with another cgroup.
    pub fn beside(other: &Self, cgroup: Option<PathBuf>) -> Result<Self> {
        if let Some(dir) = &cgroup {
            fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
        }
        Ok(Self { netns: other.netns.try_clone()?, cgroup })
    }

    /// Where another process finds the namespace while this one lives.
    pub fn netns(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.netns.as_raw_fd()))
    }

    pub fn cgroup(&self) -> Option<&Path> {
        self.cgroup.as_deref()
    }

    /// Runs `f` in the namespace, on a thread of its own.
    pub fn within<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T> {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(self.netns.as_fd(), CloneFlags::CLONE_NEWNET)?;
                anyhow::Ok(f())
            });
            thread.join().unwrap_or_else(|_| bail!("a thread in a namespace panicked"))
        })
    }

    /// This binary, here; it ends when the thread that starts it ends.
    pub fn mtls(&self, args: &[&str]) -> Result<Command> {
        let mut command = Command::new(std::env::current_exe().context("finding this binary")?);
        command.args(args).stdin(Stdio::null());
        let procs = self.cgroup.as_ref().map(|dir| dir.join("cgroup.procs"));
        let procs = procs.map(|path| CString::new(path.as_os_str().as_bytes())).transpose()?;
        let netns = self.netns.try_clone()?;
        // SAFETY: runs between fork and exec; only system calls, on memory prepared before the fork.
        unsafe {
            command.pre_exec(move || {
                set_pdeathsig(Signal::SIGKILL)?;
                if let Some(procs) = &procs {
                    let file = nix::fcntl::open(
                        procs.as_c_str(),
                        nix::fcntl::OFlag::O_WRONLY | nix::fcntl::OFlag::O_CLOEXEC,
                        nix::sys::stat::Mode::empty(),
                    )?;
                    nix::unistd::write(&file, b"0")?;
                }
                setns(netns.as_fd(), CloneFlags::CLONE_NEWNET)?;
                Ok(())
            });
        }
        Ok(command)
    }
}

/// The same for every path, before anything makes a socket: without reuse of ports in TIME_WAIT a client soon looks for a
/// free port longer than it measures.
fn tune() -> Result<()> {
    for (name, value) in [
        ("ipv4/tcp_tw_reuse", "1"),
        ("ipv4/ip_local_port_range", "1024 65000"),
        ("ipv4/ip_local_reserved_ports", LISTENED_ON),
        ("core/somaxconn", "8192"),
        ("ipv4/tcp_max_syn_backlog", "8192"),
    ] {
        fs::write(format!("/proc/sys/net/{name}"), value).with_context(|| format!("set {name}"))?;
    }
    Ok(())
}

/// A client's and a server's place, joined by a veth pair, and the load server.
pub(super) struct Pair {
    _load: Process,
    pub client: Place,
    pub server: Place,
}

impl Pair {
    pub fn make(client: Option<PathBuf>, server: Option<PathBuf>) -> Result<Self> {
        let (client, server) = (Place::make(client)?, Place::make(server)?);
        client.within(|| rtnetlink::veth("eth0", server.netns.as_fd()))?.context("making a veth pair")?;
        for (place, ip) in [(&client, CLIENT), (&server, SERVER)] {
            let configure = || {
                let interface = rtnetlink::index("eth0")?;
                rtnetlink::add_address(interface, ip, 24)?;
                rtnetlink::up(interface)
            };
            place.within(configure)?.context("setting up a veth")?;
        }
        let listen = SocketAddr::from(([0, 0, 0, 0], PORT)).to_string();
        let load = Process::start(server.mtls(&["bench", "server", "--listen", &listen])?)?;
        let pair = Self { _load: load, client, server };
        until("a load server listens", || {
            let connect = || TcpStream::connect((Ipv4Addr::LOCALHOST, PORT)).is_ok();
            Ok(pair.server.within(connect)?.then_some(()))
        })?;
        Ok(pair)
    }
}

/// A child. Killed and reaped on drop.
pub(super) struct Process {
    child: Child,
    log: File,
}

impl Process {
    /// Starts it with what it says on standard error kept for whoever asks why it ended.
    pub fn start(command: Command) -> Result<Self> {
        Self::start_with(command, Stdio::null())
    }

    pub fn start_with(mut command: Command, stdout: Stdio) -> Result<Self> {
        let log = nix::sys::memfd::memfd_create(c"log", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)?;
        let log = File::from(log);
        command.stdout(stdout).stderr(log.try_clone()?);
        Ok(Self { child: command.spawn().context("starting a process of the lab")?, log })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// An error with its last words if it has ended.
    pub fn alive(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("it ended ({status}): {}", self.last_words()),
        }
    }

    /// Waits for its end, which must be a success.
    pub fn finish(&mut self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            match self.child.try_wait()? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => bail!("{status}: {}", self.last_words()),
                None if Instant::now() > deadline => bail!("no end after {} s", limit.as_secs()),
                None => std::thread::sleep(Duration::from_millis(5)),
            }
            stop::check()?;
        }
    }

    /// The end of what it has said on standard error.
    pub fn last_words(&self) -> String {
        use std::os::unix::fs::FileExt;
        let mut said = [0; 600];
        let length = self.log.metadata().map_or(0, |metadata| metadata.len());
        let from = length.saturating_sub(said.len() as u64);
        // Leaves the place alone where the process writes next, which is shared.
        let n = self.log.read_at(&mut said, from).unwrap_or(0);
        String::from_utf8_lossy(said.get(..n).unwrap_or_default()).trim().replace('\n', " · ")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Tries until something is there.
pub(super) fn until<T>(what: &str, mut attempt: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        if let Some(found) = attempt()? {
            return Ok(found);
        }
        stop::check()?;
        if Instant::now() > deadline {
            bail!("{what}: not within 30 seconds");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Writes a file of the lab that only its processes may read.
pub(super) fn write(path: &Path, text: &str) -> Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = File::options();
    let file = options.create(true).truncate(true).write(true).mode(0o600).open(path);
    file.and_then(|mut file| file.write_all(text.as_bytes()))
        .with_context(|| format!("write {}", path.display()))
}
