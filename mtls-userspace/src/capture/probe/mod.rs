//! The kernel half tried out: a cgroup root and a bpffs in, what each part of it did there out.
//!
//! Makes a place of its own (a cgroup below the root, a network namespace, a BPF file system), loads and attaches each
//! program, and takes connections through all of them: captured, delivered, refused, let in, ended. What is attached to
//! the root for that moment lets every other process's connections pass, because the maps name only the place's
//! namespace. Nothing stays: the place ends with the process, and its cgroup with the next attempt at the latest.

mod place;
mod trial;

use std::io::{self, Read};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mtls_common::{map, program};

use super::diag::{Diag, Tcp};
use super::error::Error;
use super::pin::Pins;
use super::sys::{self, AttachType};
use super::{kernel, netns, preflight};
use place::Scratch;

/// What was seen to work, or why not.
pub type Outcome = Result<String, Obstacle>;

/// Why something does not work, in the kernel's words where it has any.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Obstacle {
    pub reason: String,
    /// The system call's error number, if one failed.
    pub errno: Option<i32>,
    /// Whether it was tried at all, and not left out because something before it failed.
    pub tried: bool,
}

/// One part of what the agent needs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    Object,
    Capabilities,
    Cgroup,
    Bpffs,
    NetnsCookie,
    LpmTrie,
    LruHash,
    RingBuffer,
    SkStorage,
    SockHash,
    Connect4,
    Connect6,
    Getpeername4,
    Getpeername6,
    SockOps,
    SkLookup,
    CgroupReach,
    Adoption,
    LoopbackCongestion,
    SocketDestroy,
}

/// Parts that need the object and its maps, in the order in which they are tried.
const PROGRAMS: [(Part, &str, AttachType); 6] = [
    (Part::Connect4, program::CONNECT4, AttachType::Connect4),
    (Part::Connect6, program::CONNECT6, AttachType::Connect6),
    (Part::Getpeername4, program::GETPEERNAME4, AttachType::Getpeername4),
    (Part::Getpeername6, program::GETPEERNAME6, AttachType::Getpeername6),
    (Part::SockOps, program::SOCK_OPS, AttachType::SockOps),
    (Part::SkLookup, program::SK_LOOKUP, AttachType::SkLookup),
];

/// Maps of the kinds that not every kernel has, by the part that stands for the kind.
const MAPS: [(Part, &str); 5] = [
    (Part::LpmTrie, map::CAPTURED4),
    (Part::LruHash, map::ORIGINAL),
    (Part::RingBuffer, map::EVENTS),
    (Part::SkStorage, map::NOTES),
    (Part::SockHash, map::LISTENERS),
];

/// Somebody else's program at the hooks that ours are attached to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Occupant {
    /// The hook.
    pub hook: &'static str,
    pub id: u32,
    /// As its owner called it; the kernel keeps 15 characters.
    pub program: String,
}

pub struct Findings {
    /// The cgroup2 directory that hooks are attached to, if there is one.
    pub cgroup_root: Option<PathBuf>,
    /// Each part once.
    pub parts: Vec<(Part, Outcome)>,
    pub occupants: Vec<Occupant>,
}

/// Tries everything. The calling thread's network namespace stays the node's; the process visits cgroups that are made
/// for this, so that it must not do anything else meanwhile.
pub fn probe(cgroup_root: Option<&Path>, bpffs: &Path) -> Findings {
    let mut report = Report::default();
    let capabilities = preflight::capabilities().map(|()| "CAP_SYS_ADMIN, CAP_NET_ADMIN".to_owned());
    report.put(Part::Capabilities, capabilities);
    let cgroup = preflight::Cgroup::open(cgroup_root);
    let occupants = cgroup.as_ref().map(occupants).unwrap_or_default();
    let root = cgroup.as_ref().ok().map(|cgroup| cgroup.path.clone());
    report.put(Part::Cgroup, cgroup.map(|cgroup| cgroup.path.display().to_string()));
    let cookie = netns::cookie().map(|cookie| format!("{cookie:#x}"));
    report.put(Part::NetnsCookie, cookie.map_err(Obstacle::of));
    if let Some(root) = report.passed().then_some(root.as_deref()).flatten() {
        match Scratch::make(root, bpffs) {
            Ok(scratch) => {
                kernel_half(&scratch, &mut report);
                if report.passed() {
                    trial::run(&scratch, &mut report);
                }
            }
            Err(error) => report.put(Part::CgroupReach, Err::<String, _>(error)),
        }
    }
    // Last: what is tried elsewhere does without.
    report.put(Part::Bpffs, place::pins(bpffs));
    Findings { cgroup_root: root, parts: report.complete(), occupants }
}

/// Loads and attaches each program by itself, so that one that is refused does not hide another.
fn kernel_half(scratch: &Scratch, report: &mut Report) {
    let pins = match Pins::create(&scratch.bpffs.join("each")) {
        Ok(pins) => pins,
        Err(error) => return report.put(Part::Bpffs, Err::<String, _>(error)),
    };
    let mut object = match kernel::open(&pins) {
        Ok(object) => object,
        Err(error @ (Error::NoObject | Error::StaleObject { .. })) => {
            return report.put(Part::Object, Err::<String, _>(error));
        }
        Err(error) => {
            // Which kind of map it was, if it was one.
            let kind = MAPS.into_iter().find(|(_, name)| kernel::is_about_map(&error, name));
            return report.put(kind.map_or(Part::LpmTrie, |(part, _)| part), Err::<String, _>(error));
        }
    };
    for (part, name, at) in PROGRAMS {
        let loaded = kernel::load_program(&mut object, name);
        let attached = loaded.map_err(Obstacle::of).and_then(|program| {
            let link = match at {
                AttachType::SkLookup => sys::attach(program.as_fd(), &scratch.netns, at),
                _ => sys::attach(program.as_fd(), &scratch.root, at),
            };
            link.map(drop).map_err(|error| Obstacle::of(error).during("loaded, but not attached"))
        });
        if let Err(obstacle) = attached {
            report.put(part, Err::<String, _>(obstacle));
        }
    }
    if !report.passed() {
        report.put(Part::Object, Ok::<_, Obstacle>("opened"));
    }
}

/// Whether a connection of this process can be ended from outside, as those of pods are when a port becomes STRICT.
pub fn socket_destroy() -> Outcome {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let mut client = TcpStream::connect(listener.local_addr()?)?;
    client.set_read_timeout(Some(Duration::from_secs(1)))?;
    let (SocketAddr::V4(own), SocketAddr::V4(peer)) = (client.local_addr()?, client.peer_addr()?) else {
        return Err(Obstacle::said("IPv4 sockets have IPv6 addresses"));
    };
    if !Diag::open()?.destroy(&Tcp::between(peer, own))? {
        return Err(Obstacle::said("the kernel does not find a connection by its addresses"));
    }
    match client.read(&mut [0]) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok("a connection was reset".into()),
        other => Err(Obstacle::said(format!("an ended connection is not reset: {other:?}"))),
    }
}

/// Whether every socket that must not go directly is known: one of Multipath TCP outlives the reset of its subflow.
pub fn same_node_direct() -> Outcome {
    match (preflight::has_mptcp(), preflight::tells_mptcp()) {
        (false, _) => Ok("there is no Multipath TCP".into()),
        (true, true) => Ok("Multipath TCP is told from TCP".into()),
        (true, false) => Err(Obstacle::said(
            "sockets of Multipath TCP look like those of TCP: connect hooks lack bpf_skc_to_mptcp_sock",
        )),
    }
}

fn occupants(cgroup: &preflight::Cgroup) -> Vec<Occupant> {
    let names = kernel::program_names();
    let mut found = Vec::new();
    for (hook, at) in kernel::HOOKS {
        for id in sys::effective_programs(&cgroup.file, at).unwrap_or_default() {
            let program = names.get(&id).cloned().unwrap_or_default();
            found.push(Occupant { hook, id, program });
        }
    }
    found
}

/// What was found so far.
#[derive(Default)]
struct Report(Vec<(Part, Outcome)>);

impl Report {
    /// Keeps the first word on each part.
    fn put<T: Into<String>, E: Into<Obstacle>>(&mut self, part: Part, outcome: Result<T, E>) {
        if !self.0.iter().any(|(known, _)| *known == part) {
            self.0.push((part, outcome.map(Into::into).map_err(Into::into)));
        }
    }

    /// Nothing that was tried has failed.
    fn passed(&self) -> bool {
        self.0.iter().all(|(_, outcome)| !outcome.as_ref().is_err_and(|obstacle| obstacle.tried))
    }

    /// Parts that nothing was said about were not reached, because of what failed first.
    fn complete(mut self) -> Vec<(Part, Outcome)> {
        let first = self.0.iter().find_map(|(part, outcome)| outcome.is_err().then_some(*part));
        let reason = first.map_or_else(|| "not reached".to_owned(), |part| format!("needs {}", part.name()));
        for part in Part::ALL {
            self.put(part, Err::<String, _>(Obstacle { reason: reason.clone(), errno: None, tried: false }));
        }
        self.0.sort_by_key(|(part, _)| *part as u8);
        self.0
    }
}

impl Part {
    pub const ALL: [Self; 20] = [
        Self::Object,
        Self::Capabilities,
        Self::Cgroup,
        Self::Bpffs,
        Self::NetnsCookie,
        Self::LpmTrie,
        Self::LruHash,
        Self::RingBuffer,
        Self::SkStorage,
        Self::SockHash,
        Self::Connect4,
        Self::Connect6,
        Self::Getpeername4,
        Self::Getpeername6,
        Self::SockOps,
        Self::SkLookup,
        Self::CgroupReach,
        Self::Adoption,
        Self::LoopbackCongestion,
        Self::SocketDestroy,
    ];

    /// The name by which people know it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Object => "bpf-object",
            Self::Capabilities => "capabilities",
            Self::Cgroup => "cgroup2",
            Self::Bpffs => "bpffs",
            Self::NetnsCookie => "netns-cookie",
            Self::LpmTrie => "map-lpm-trie",
            Self::LruHash => "map-lru-hash",
            Self::RingBuffer => "map-ring-buffer",
            Self::SkStorage => "map-sk-storage",
            Self::SockHash => "map-sockhash",
            Self::Connect4 => "connect4",
            Self::Connect6 => "connect6",
            Self::Getpeername4 => "getpeername4",
            Self::Getpeername6 => "getpeername6",
            Self::SockOps => "sock-ops",
            Self::SkLookup => "sk-lookup",
            Self::CgroupReach => "cgroup-reach",
            Self::Adoption => "adoption",
            Self::LoopbackCongestion => "loopback-congestion",
            Self::SocketDestroy => "socket-destroy",
        }
    }
}

impl Obstacle {
    /// An error and what caused it, with the error number of the system call at the bottom.
    pub fn of(error: impl std::error::Error + 'static) -> Self {
        let mut errno = None;
        let mut words = vec![kernel::verifier_line(&error).unwrap_or_else(|| error.to_string())];
        let mut next: Option<&(dyn std::error::Error + 'static)> = Some(&error);
        while let Some(error) = next {
            errno = errno.or_else(|| error.downcast_ref::<io::Error>()?.raw_os_error());
            next = error.source();
            if let Some(cause) = next {
                words.push(kernel::verifier_line(cause).unwrap_or_else(|| cause.to_string()));
            }
        }
        words.dedup();
        Self { reason: words.join(": "), errno, tried: true }
    }

    fn said(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), errno: None, tried: true }
    }

    pub fn during(self, what: &str) -> Self {
        Self { reason: format!("{what}: {}", self.reason), ..self }
    }
}

impl From<Error> for Obstacle {
    fn from(error: Error) -> Self {
        Self::of(error)
    }
}

impl From<io::Error> for Obstacle {
    fn from(error: io::Error) -> Self {
        Self::of(error)
    }
}
