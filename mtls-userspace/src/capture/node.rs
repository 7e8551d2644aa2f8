//! The face of the room: start, what holds for the whole node, and the end.

use std::collections::HashSet;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use aya::maps::MapError;
use ipnet::IpNet;
use mtls_common::counter::Counter;
use mtls_common::{Settings, counter, map};

use super::address::{key4, key6, net4, net6, normal};
use super::direct::Endings;
use super::enrol::State;
use super::error::Error;
use super::events::Events;
use super::kernel::{self, Control, DirectMaps, Flows, Loaded};
use super::pin::Pins;
use super::{Config, netns, preflight, sys};

/// The kernel half, loaded and attached. Dropping it leaves everything in force.
pub struct Capture {
    pub(super) pins: Pins,
    pub(super) workers: usize,
    pub(super) destroy: bool,
    pub(super) host_netns: u64,
    /// Without symbolic links in it.
    pub(super) cgroup_root: PathBuf,
    pub(super) flows: Arc<Flows>,
    state: Mutex<State>,
    events: Mutex<Option<Events>>,
    pub(super) direct: Mutex<DirectMaps>,
    pub(super) endings: Mutex<Option<Endings>>,
    /// When this agent started, on the monotonic clock: later agents have later ones.
    pub(super) epoch: u64,
    /// As the kernel knows it, whatever pid namespace we are in.
    process: u32,
}

impl Capture {
    /// Checks what the machine offers, loads the kernel half, attaches it or replaces an earlier agent's programs, and
    /// makes this process known as an agent. The calling thread's network namespace is the node's own.
    pub fn start(config: Config) -> Result<Self, Error> {
        preflight::capabilities()?;
        let cgroup = preflight::Cgroup::open(config.cgroup_root.as_deref())?;
        preflight::bpffs(&config.bpffs)?;
        preflight::features()?;
        let congestion = preflight::congestion(config.congestion.as_deref())?;
        let host_netns = netns::cookie().map_err(|source| Error::Netns {
            pod: "(node)".into(),
            path: "/proc/thread-self/ns/net".into(),
            what: "reading its cookie (SO_NETNS_COOKIE, Linux 5.14)",
            source,
        })?;
        let pins = Pins::create(&config.bpffs)?;
        let _starting = pins.lock()?;
        let Loaded { mut control, flows, direct, events, endings } = kernel::load(&pins)?;
        control
            .settings
            .set(0, settings(host_netns, &congestion), 0)
            .map_err(on(map::SETTINGS, "writing"))?;
        kernel::attach(&control, &pins, &cgroup)?;
        let process = hello(&mut control, &cgroup.path)?;
        forget_dead_agents(&mut control, process)?;
        Ok(Self {
            pins,
            workers: config.workers.max(1),
            destroy: config.destroy,
            host_netns,
            cgroup_root: cgroup.path,
            flows: Arc::new(flows),
            state: Mutex::new(State::adopt(control)?),
            events: Mutex::new(Some(events)),
            direct: Mutex::new(direct),
            endings: Mutex::new(Some(Endings::new(endings))),
            epoch: u64::try_from(sys::monotonic().as_nanos()).unwrap_or(u64::MAX),
            process,
        })
    }

    /// Replaces the destination prefixes whose connections are captured. Cheap when nothing changed.
    pub fn set_captured(&self, prefixes: &[IpNet]) -> Result<(), Error> {
        let wanted: HashSet<IpNet> = prefixes.iter().copied().map(normal).collect();
        let mut state = self.state();
        let State { control, captured, .. } = &mut *state;
        if *captured == wanted {
            return Ok(());
        }
        // More first: a prefix that only changes its length is captured all the time.
        let added: Vec<IpNet> = wanted.difference(captured).copied().collect();
        for net in added {
            match net {
                IpNet::V4(v4) => {
                    control.captured4.insert(&key4(v4), 1, 0).map_err(on(map::CAPTURED4, "writing"))?
                }
                IpNet::V6(v6) => {
                    control.captured6.insert(&key6(v6), 1, 0).map_err(on(map::CAPTURED6, "writing"))?
                }
            }
            captured.insert(net);
        }
        for net in captured.difference(&wanted).copied().collect::<Vec<_>>() {
            match net {
                IpNet::V4(v4) => {
                    gone(control.captured4.remove(&key4(v4))).map_err(on(map::CAPTURED4, "writing"))?
                }
                IpNet::V6(v6) => {
                    gone(control.captured6.remove(&key6(v6))).map_err(on(map::CAPTURED6, "writing"))?
                }
            }
            captured.remove(&net);
        }
        Ok(())
    }

    /// Replaces the cgroups of the node's pods, enrolled or not: flows that their processes start from the node's
    /// namespace are not the node's own. A cgroup that is not there is an error, after the others were set.
    pub fn set_untrusted_cgroups(&self, cgroups: &[PathBuf]) -> Result<(), Error> {
        let mut missing = Ok(());
        let mut ids = HashSet::new();
        for path in cgroups {
            match preflight::cgroup_id(path) {
                Ok(id) => drop(ids.insert(id)),
                Err(error) => missing = missing.and(Err(error)),
            }
        }
        self.state().set_untrusted(ids)?;
        missing
    }

    /// Drops pinned state of pods that are not among those wanted, and of other versions' layouts. Returns how many
    /// pods were dropped.
    pub fn retain(&self, wanted_netns_cookies: &HashSet<u64>) -> Result<usize, Error> {
        let mut state = self.state();
        let mut known: HashSet<u64> = self.pins.pods()?.into_iter().collect();
        known.extend(state.pods()?);
        let unwanted: Vec<u64> = known.difference(wanted_netns_cookies).copied().collect();
        for &cookie in &unwanted {
            state.release(cookie, &self.pins)?;
        }
        self.pins.drop_other_layouts()?;
        Ok(unwanted.len())
    }

    /// The cgroup2 directory that the hooks are attached to, without symbolic links in it.
    pub fn cgroup_root(&self) -> &Path {
        &self.cgroup_root
    }

    /// The kernel half's counters, summed over CPUs. They outlive agents.
    pub fn counters(&self) -> Result<Vec<(&'static str, u64)>, Error> {
        let slots = (0u32..).zip(counter::NAMES);
        slots
            .map(|(slot, name)| {
                let values = self.flows.counters.get(&slot, 0).map_err(on(map::COUNTERS, "reading"))?;
                Ok((name, values.iter().sum()))
            })
            .collect()
    }

    /// Events that found the ring buffer full. Outlives agents, as every counter does.
    pub fn lost_events(&self) -> Result<u64, Error> {
        let values = self.flows.counters.get(&(Counter::LostEvents as u32), 0);
        Ok(values.map_err(on(map::COUNTERS, "reading"))?.iter().sum())
    }

    /// The reader of the kernel half's events; only the first call gets it.
    pub fn events(&self) -> Option<Events> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Makes this process an ordinary one again. Everything else stays in force.
    pub fn shutdown_unregister(&self) {
        let _ = self.state().control.agents.remove(&self.process);
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        // What a panicking thread left half done is what the maps say; every operation here may be repeated.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn settings(host_netns: u64, congestion: &str) -> Settings {
    let mut settings = Settings { host_netns, ..Settings::default() };
    for (to, from) in settings.congestion.iter_mut().zip(congestion.bytes()) {
        *to = from;
    }
    settings
}

/// Dials a nonce at an address that leads nowhere. The kernel half refuses exactly that connect, and takes whoever made
/// it for an agent; if it doesn't, its hooks don't reach this process, and would not tell our sockets from a pod's.
fn hello(control: &mut Control, cgroup_root: &Path) -> Result<u32, Error> {
    let address =
        SocketAddrV4::new(Ipv4Addr::from(0xf000_0000 | rand::random::<u32>()), rand::random::<u16>() | 1);
    let nonce = u64::from(u32::from(*address.ip())) << 16 | u64::from(address.port());
    // Connecting a UDP socket sends nothing, even where no hook stops it.
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).map_err(Error::Hello)?;
    control.hello.insert(nonce, 0, 0).map_err(on(map::HELLO, "writing"))?;
    let _ = socket.connect(address);
    let process = control.hello.get(&nonce, 0).map_err(on(map::HELLO, "reading"));
    gone(control.hello.remove(&nonce)).map_err(on(map::HELLO, "writing"))?;
    match process? {
        0 => Err(Error::NotSeen { cgroup_root: cgroup_root.into() }),
        process => Ok(process),
    }
}

/// Removes agents that died without a word. Harmless as they are (a process that reuses the id would have to be in the
/// same cgroup), they must not fill the map. In another pid namespace than the first ids mean nothing to us; there the
/// newest few stay, since no more than two agents ever run.
fn forget_dead_agents(control: &mut Control, own: u32) -> Result<(), Error> {
    const KEPT: usize = 4;
    const INITIAL_PID_NAMESPACE: &str = "pid:[4026531836]";
    let knows_ids =
        std::fs::read_link("/proc/self/ns/pid").is_ok_and(|ns| ns.as_os_str() == INITIAL_PID_NAMESPACE);
    let mut agents = control.agents.iter().filter_map(Result::ok).collect::<Vec<_>>();
    agents.sort_by_key(|(process, agent)| (*process != own, u64::MAX - agent.since_ns));
    for (rank, (process, _)) in agents.into_iter().enumerate() {
        let is_dead = knows_ids && !Path::new(&format!("/proc/{process}")).exists();
        if process != own && (is_dead || rank >= KEPT) {
            gone(control.agents.remove(&process)).map_err(on(map::AGENTS, "writing"))?;
        }
    }
    Ok(())
}

/// Whatever an earlier agent captured.
pub(super) fn captured(control: &Control) -> HashSet<IpNet> {
    let v4 = control.captured4.keys().filter_map(Result::ok).filter_map(|key| net4(&key));
    let v6 = control.captured6.keys().filter_map(Result::ok).filter_map(|key| net6(&key));
    v4.chain(v6).collect()
}

pub(super) fn on(map: &'static str, what: &'static str) -> impl Fn(MapError) -> Error {
    move |source| Error::Map { map, what, source }
}

/// Removing what is not there is success.
pub(super) fn gone(outcome: Result<(), MapError>) -> Result<(), MapError> {
    match outcome {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        outcome => outcome,
    }
}
