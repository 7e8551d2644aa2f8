//! What can go wrong between userspace and the kernel half, and what to do about it.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("this binary was built without the BPF object; build it with `cargo xtask build`")]
    NoObject,
    #[error(
        "this binary carries a BPF object of another version ({what}); build both again with `cargo xtask build`"
    )]
    StaleObject { what: String },
    #[error("the kernel lacks {feature}, which Linux {since} has{remedy}")]
    MissingFeature { feature: String, since: &'static str, remedy: &'static str },
    #[error("capability {0} is missing; run as root, or grant it to the process")]
    MissingCapability(&'static str),
    #[error(
        "no cgroup2 hierarchy is mounted; `mount -t cgroup2 none /sys/fs/cgroup/unified`, or name one with --cgroup-root"
    )]
    NoCgroup2,
    #[error(
        "{path} is not a cgroup2 directory{}, nor does it hold one in `unified`; name the mount of cgroup2 with \
         --cgroup-root",
        because(source)
    )]
    NotCgroup { path: PathBuf, source: Option<io::Error> },
    #[error("{path} is not a cgroup2 directory")]
    NotPodCgroup { path: PathBuf },
    #[error(
        "{path} is not in a mounted BPF file system{}; `mount -t bpf bpf {path}`, or name one with --bpffs",
        because(source)
    )]
    NotBpffs { path: PathBuf, source: Option<io::Error> },
    #[error("unknown congestion control {name}; see net.ipv4.tcp_available_congestion_control")]
    UnknownCongestion { name: String, source: io::Error },
    #[error("loading the kernel half: {what}")]
    Load { what: String, source: Box<dyn std::error::Error + Send + Sync> },
    #[error(
        "{path} was pinned by an agent that attached elsewhere ({found}, wanted {wanted}); stop that agent, then remove the directory, which releases all its pods"
    )]
    PinnedElsewhere { path: PathBuf, found: String, wanted: String },
    #[error(
        "the pinned map {path} has another shape than this version's; remove the directory that holds it, which releases all pods"
    )]
    PinnedShape { path: PathBuf },
    #[error("{what} {path}")]
    Pin { what: &'static str, path: PathBuf, source: io::Error },
    #[error(
        "the hooks at {cgroup_root} don't see this process; start it in a cgroup below that directory, or give a --cgroup-root above its own"
    )]
    NotSeen { cgroup_root: PathBuf },
    #[error("BPF map {map}: {what}")]
    Map { map: &'static str, what: &'static str, source: aya::maps::MapError },
    #[error("network namespace {path} of pod {pod}: {what}")]
    Netns { pod: String, path: PathBuf, what: &'static str, source: io::Error },
    #[error("cgroup {path}: not found or not readable")]
    Cgroup { path: PathBuf, source: io::Error },
    #[error(
        "cgroup {path} of pod {pod} is outside {root}, so that its connections would not be seen; give a --cgroup-root above it"
    )]
    OutOfSight { pod: String, path: PathBuf, root: PathBuf },
    #[error("pod {pod} is on the node's own network; such pods can't be enrolled")]
    HostNetwork { pod: String },
    #[error("registering the agent with its own hooks")]
    Hello(#[source] io::Error),
    #[error("pod {pod} has no address")]
    NoAddress { pod: String },
    #[error(
        "port {port} in pod {pod} is taken by another process; the agent needs it: move that process to another port"
    )]
    PortTaken { pod: String, port: u16, source: io::Error },
    #[error("listening on port {port} in pod {pod}")]
    Listen { pod: String, port: u16, source: io::Error },
    #[error("attaching to the network namespace of pod {pod}")]
    Attach { pod: String, source: io::Error },
    #[error(
        "no original destination is known for {peer} in pod {pod}: it was not captured, it dialled the listener itself"
    )]
    NotCaptured { pod: String, peer: SocketAddr },
    #[error("announcing an original source in pod {pod}")]
    Announce { pod: String, source: io::Error },
    #[error("a captured socket is gone")]
    Socket(#[from] io::Error),
    #[error(
        "plaintext to port {port} of pod {pod} was open before the port became STRICT and stays open: the feature \
         socket-destroy does not work here or is switched off; end such connections yourself"
    )]
    PlaintextStays { pod: String, port: u16 },
    #[error("sock_diag in pod {pod}: {what}")]
    Diag { pod: String, what: &'static str, source: io::Error },
}

fn because(source: &Option<io::Error>) -> String {
    source.as_ref().map(|error| format!(" ({error})")).unwrap_or_default()
}
