//! A node made of a network namespace with a bridge, pods made of namespaces and cgroups on it, and a minimal agent:
//! what is captured is delivered as it is. Everything is undone on drop.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use mtls::addr::OriginalSrc;
use mtls::capture::{Capture, Config, Enrolled, Enrolment, Error, Listeners, LocalPod, loopback_leg};
use mtls::policy::PortModes;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns};
use serde_json::Value;

/// The agent is this process, and a process is in one cgroup: one lab at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
static LABS: AtomicU32 = AtomicU32::new(0);

pub struct Lab {
    name: String,
    cgroups: PathBuf,
    /// Where this process was before.
    home: PathBuf,
    bpffs: tempfile::TempDir,
    pods: Mutex<u8>,
    _alone: MutexGuard<'static, ()>,
}

/// None, with the reason printed, where a lab can't be made; under `CI=true` that fails the test.
pub fn lab() -> Option<Lab> {
    if nix::unistd::geteuid().is_root() {
        return Some(Lab::new());
    }
    assert_ne!(std::env::var("CI").as_deref(), Ok("true"), "must run as root");
    eprintln!("skipped: needs root");
    None
}

impl Lab {
    fn new() -> Self {
        let alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let name = format!("mc{}-{}", std::process::id(), LABS.fetch_add(1, Ordering::Relaxed));
        let root = cgroup2();
        let own = fs::read_to_string("/proc/self/cgroup").unwrap();
        let own = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap().to_owned();
        let lab = Self {
            cgroups: root.join(&name),
            home: root.join(own),
            bpffs: tempfile::tempdir().unwrap(),
            pods: Mutex::new(0),
            _alone: alone,
            name,
        };
        fs::create_dir(&lab.cgroups).unwrap();
        fs::create_dir(lab.cgroups.join("agent")).unwrap();
        enter_cgroup(&lab.cgroups.join("agent"));
        mount(Some("bpf"), lab.bpffs.path(), Some("bpf"), MsFlags::empty(), None::<&str>).unwrap();
        let node = lab.node();
        run(&format!("ip netns add {node}"));
        lab.in_netns(&node, "ip link set lo up");
        lab.in_netns(&node, "ip link add br0 type bridge");
        lab.in_netns(&node, "ip addr add 10.77.0.1/24 dev br0");
        lab.in_netns(&node, "ip -6 addr add fd77::1/64 dev br0 nodad");
        lab.in_netns(&node, "ip link set br0 up");
        lab
    }

    fn node(&self) -> String {
        format!("{}-node", self.name)
    }

    /// Leaves a pod only so many ports to dial from.
    pub fn limit_ports(&self, pod: &Pod, range: &str) {
        let path = pod.netns.display();
        let setting = format!("net.ipv4.ip_local_port_range={range}");
        let set =
            Command::new("nsenter").arg(format!("--net={path}")).args(["sysctl", "-qw", &setting]).status();
        assert!(set.unwrap().success());
    }

    fn in_netns(&self, netns: &str, command: &str) {
        run(&format!("nsenter --net=/run/netns/{netns} {command}"));
    }

    pub fn config(&self) -> Config {
        Config {
            cgroup_root: Some(self.cgroups.clone()),
            bpffs: self.bpffs.path().into(),
            workers: 2,
            congestion: None,
            destroy: true,
        }
    }

    /// Starts capture as an agent on the node would.
    pub fn start(&self) -> Result<Capture, Error> {
        let config = self.config();
        self.on_node(|| Capture::start(config))
    }

    /// Runs on a thread in the node's namespace.
    pub fn on_node<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        let netns = fs::File::open(self.netns_path(&self.node())).unwrap();
        thread::scope(|scope| {
            let thread = scope.spawn(move || {
                setns(netns, CloneFlags::CLONE_NEWNET).unwrap();
                f()
            });
            thread.join().unwrap()
        })
    }

    fn netns_path(&self, netns: &str) -> PathBuf {
        Path::new("/run/netns").join(netns)
    }

    /// A pod on the bridge.
    pub fn pod(&self, role: &str) -> Pod {
        let mut pods = self.pods.lock().unwrap();
        *pods += 1;
        let (number, netns) = (*pods + 1, format!("{}-{role}", self.name));
        let link = format!("v{number}");
        run(&format!("ip netns add {netns}"));
        self.in_netns(&self.node(), &format!("ip link add {link} type veth peer name eth0 netns {netns}"));
        self.in_netns(&self.node(), &format!("ip link set {link} master br0 up"));
        self.in_netns(&netns, "ip link set lo up");
        self.in_netns(&netns, &format!("ip addr add 10.77.0.{number}/24 dev eth0"));
        self.in_netns(&netns, &format!("ip -6 addr add fd77::{number}/64 dev eth0 nodad"));
        self.in_netns(&netns, "ip link set eth0 up");
        self.in_netns(&netns, "ip route add default via 10.77.0.1");
        // Kernels enable it for clients only; a server accepts data in the SYN when this says so.
        self.in_netns(&netns, "sysctl -qw net.ipv4.tcp_fastopen=1027");
        let cgroup = self.cgroups.join(role);
        fs::create_dir(&cgroup).unwrap();
        Pod {
            name: format!("lab/{role}"),
            netns: self.netns_path(&netns),
            cgroup,
            v4: IpAddr::from([10, 77, 0, number]),
            v6: format!("fd77::{number}").parse().unwrap(),
        }
    }

    /// A place in the node's own namespace, in a cgroup of that name.
    pub fn host(&self, role: &str) -> Pod {
        let cgroup = self.cgroups.join(role);
        fs::create_dir(&cgroup).unwrap();
        Pod {
            name: format!("node/{role}"),
            netns: self.netns_path(&self.node()),
            cgroup,
            v4: "10.77.0.1".parse().unwrap(),
            v6: "fd77::1".parse().unwrap(),
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        enter_cgroup(&self.home);
        let _ = umount2(self.bpffs.path(), MntFlags::MNT_DETACH);
        if let Ok(names) = fs::read_dir("/run/netns") {
            for name in names.filter_map(|entry| entry.ok()?.file_name().into_string().ok()) {
                if name.starts_with(&format!("{}-", self.name)) {
                    let _ = Command::new("ip").args(["netns", "del", &name]).status();
                }
            }
        }
        let below = fs::read_dir(&self.cgroups).into_iter().flatten().filter_map(Result::ok);
        for cgroup in below.filter(|entry| entry.path().is_dir()) {
            remove_cgroup(&cgroup.path());
        }
        remove_cgroup(&self.cgroups);
        assert!(thread::panicking() || !self.cgroups.exists(), "{} is left behind", self.cgroups.display());
    }
}

/// A process that was just killed keeps its cgroup busy for a moment.
fn remove_cgroup(path: &Path) {
    for _ in 0..100 {
        if fs::remove_dir(path).is_ok() || !path.exists() {
            return;
        }
        thread::sleep(Duration::from_millis(20));
    }
}

fn enter_cgroup(cgroup: &Path) {
    fs::write(cgroup.join("cgroup.procs"), "0").unwrap();
}

fn cgroup2() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let mount =
        mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2")).expect("cgroup2 is mounted");
    mount.split(' ').nth(1).unwrap().into()
}

fn run(command: &str) {
    let mut words = command.split(' ');
    let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
}

pub struct Pod {
    pub name: String,
    pub netns: PathBuf,
    pub cgroup: PathBuf,
    pub v4: IpAddr,
    pub v6: IpAddr,
}

impl Pod {
    pub fn enrolment<'a>(&'a self, addresses: &'a [IpAddr], modes: &'a PortModes) -> Enrolment<'a> {
        Enrolment { name: &self.name, netns: &self.netns, cgroup: Some(&self.cgroup), addresses, modes }
    }

    pub fn enrol(&self, capture: &Capture, modes: &PortModes) -> Enrolled {
        capture.enrol(&self.enrolment(&[self.v4, self.v6], modes)).unwrap()
    }

    /// A process in the pod's cgroup and namespace.
    pub fn spawn(&self, source: &str, arguments: &[&str]) -> Application {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net={}", self.netns.display()))
            .args(["python3", "-c", source])
            .args(arguments);
        let procs = self.cgroup.join("cgroup.procs");
        // SAFETY: between fork and exec; a write of one byte to a file, no lock and no allocator state of other threads
        // is needed that exec would not replace.
        unsafe { command.pre_exec(move || fs::write(&procs, "0")) };
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Application { child, output }
    }

    pub fn dial(&self, how: &str, to: impl Into<SocketAddr>) -> Seen {
        self.dial_with(how, to, "")
    }

    pub fn dial_with(&self, how: &str, to: impl Into<SocketAddr>, detail: &str) -> Seen {
        self.client(how, to, detail).seen()
    }

    pub fn client(&self, how: &str, to: impl Into<SocketAddr>, detail: &str) -> Application {
        let to = to.into();
        self.spawn(include_str!("client.py"), &[how, &to.ip().to_string(), &to.port().to_string(), detail])
    }

    pub fn serve(&self, what: &[&str]) -> Application {
        let mut server = self.spawn(include_str!("server.py"), what);
        assert_eq!(server.line(), "ready");
        server
    }
}

pub struct Application {
    child: Child,
    output: BufReader<std::process::ChildStdout>,
}

impl Application {
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    pub fn seen(&mut self) -> Seen {
        let line = self.line();
        Seen(serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}")))
    }
}

impl Drop for Application {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = self.output.read_to_end(&mut Vec::new());
    }
}

/// What a client saw.
#[derive(Debug)]
pub struct Seen(Value);

impl Seen {
    fn addr(&self, value: &Value) -> SocketAddr {
        let ip: IpAddr = value[0].as_str().unwrap_or_else(|| panic!("no address: {self:?}")).parse().unwrap();
        SocketAddr::new(ip.to_canonical(), value[1].as_u64().unwrap() as u16)
    }

    pub fn local(&self) -> SocketAddr {
        self.addr(&self.0["local"])
    }

    pub fn peer(&self) -> SocketAddr {
        self.addr(&self.0["peer"])
    }

    /// What the server saw.
    pub fn server(&self, what: &str) -> SocketAddr {
        self.addr(&self.0["reply"][what])
    }

    /// Congestion control of the client's socket and of the server's.
    pub fn congestion(&self) -> (&str, &str) {
        let (client, server) = (&self.0["congestion"], &self.0["reply"]["congestion"]);
        (client.as_str().unwrap_or(""), server.as_str().unwrap_or(""))
    }

    /// The client got through.
    pub fn is_ok(&self) -> bool {
        self.0.get("error").is_none() && self.0["reply"].is_object()
    }

    pub fn error(&self) -> &str {
        self.0["error"].as_str().unwrap_or("")
    }

    pub fn end(&self) -> &str {
        self.0["end"].as_str().unwrap_or("")
    }

    pub fn seconds(&self) -> f64 {
        self.0["seconds"].as_f64().unwrap()
    }

    /// What an application must see, captured or not.
    #[track_caller]
    pub fn is_transparent(&self, from: IpAddr, to: SocketAddr) {
        assert!(self.is_ok(), "{self:?}");
        assert_eq!(self.peer(), to, "client's getpeername: {self:?}");
        assert_eq!(self.local().ip(), from, "client's getsockname: {self:?}");
        assert_eq!(self.server("accept"), self.local(), "server's accept: {self:?}");
        assert_eq!(self.server("peer"), self.local(), "server's getpeername: {self:?}");
        assert_eq!(self.server("local"), to, "server's getsockname: {self:?}");
    }
}

/// Delivers what is captured in `client` to the pods in `servers`.
pub struct Agent {
    stop: Arc<AtomicBool>,
    delivered: Arc<AtomicU32>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Agent {
    pub fn run(client: Enrolled, servers: &[(&Pod, &Arc<LocalPod>)]) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let delivered = Arc::new(AtomicU32::new(0));
        let routes: Vec<(IpAddr, Arc<LocalPod>)> = servers
            .iter()
            .flat_map(|(pod, local)| [(pod.v4, (*local).clone()), (pod.v6, (*local).clone())])
            .collect();
        let Enrolled { pod, listeners, .. } = client;
        let threads = listeners
            .into_iter()
            .map(|listeners| {
                let (stop, delivered, routes, pod) =
                    (stop.clone(), delivered.clone(), routes.clone(), pod.clone());
                thread::spawn(move || outbound(&listeners, &pod, &routes, &stop, &delivered))
            })
            .collect();
        Self { stop, delivered, threads }
    }

    /// How many connections were captured and delivered.
    pub fn delivered(&self) -> u32 {
        self.delivered.load(Ordering::SeqCst)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn outbound(
    listeners: &Listeners,
    pod: &LocalPod,
    routes: &[(IpAddr, Arc<LocalPod>)],
    stop: &AtomicBool,
    delivered: &AtomicU32,
) {
    while !stop.load(Ordering::SeqCst) {
        let Ok((app, peer)) = listeners.outbound.accept() else {
            thread::sleep(Duration::from_millis(2));
            continue;
        };
        loopback_leg(&app, None);
        let Ok(original) = pod.original_destination(peer, app.local_addr().unwrap()) else {
            continue;
        };
        let Some((_, server)) = routes.iter().find(|(ip, _)| *ip == original.ip()) else {
            continue;
        };
        match deliver(server, original.addr(), OriginalSrc::new(peer)) {
            Ok(far) => {
                delivered.fetch_add(1, Ordering::SeqCst);
                relay(app, far);
            }
            Err(error) => eprintln!("delivery to {original} failed: {error:#}"),
        }
    }
}

pub fn deliver(pod: &LocalPod, to: SocketAddr, source: OriginalSrc) -> std::io::Result<TcpStream> {
    let socket = pod.socket(to)?;
    pod.announce_source(&socket, to, source).map_err(std::io::Error::other)?;
    loopback_leg(&socket, None);
    socket.connect_timeout(&to.into(), Duration::from_secs(5))?;
    Ok(socket.into())
}

/// Copies both ways, with half-close, on threads that end with the connection.
fn relay(app: TcpStream, far: TcpStream) {
    for (mut from, mut to) in [(app.try_clone().unwrap(), far.try_clone().unwrap()), (far, app)] {
        from.set_nonblocking(false).unwrap();
        thread::spawn(move || {
            let _ = std::io::copy(&mut from, &mut to);
            let _ = to.shutdown(Shutdown::Write);
        });
    }
}

/// The same place under the same name.
pub fn clone(pod: &Pod) -> Pod {
    Pod {
        name: pod.name.clone(),
        netns: pod.netns.clone(),
        cgroup: pod.cgroup.clone(),
        v4: pod.v4,
        v6: pod.v6,
    }
}

/// What this process logs from now on. Once per process.
pub fn log() -> Arc<Mutex<Vec<u8>>> {
    #[derive(Clone)]
    struct Sink(Arc<Mutex<Vec<u8>>>);
    impl std::io::Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let sink = Sink(Arc::default());
    let log = sink.0.clone();
    tracing_subscriber::fmt().with_writer(move || sink.clone()).init();
    log
}
