//! Connections through the whole kernel half, in a place of their own: each part is judged by what an application would
//! notice of it.

use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use socket2::{Domain, SockRef, Socket, Type};

use super::place::Scratch;
use super::{Error, Obstacle, Part, Report};
use crate::addr::OriginalSrc;
use crate::capture::{Capture, Config, Enrolled, Enrolment, EventKind, LocalPod};
use crate::policy::{Mode, PortModes};
use crate::rtnetlink;

/// The pod's addresses, those of somebody else in its namespace, and destinations nobody has: all from ranges that are
/// for documentation.
const POD: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1))];
const STRANGER: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2));
const CAPTURED: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(198, 51, 100, 1)), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1))];
const DIALLED_PORT: u16 = 80;
const SERVED_PORT: u16 = 8080;

/// No step of a trial takes longer where it works.
const PATIENCE: Duration = Duration::from_secs(5);

struct Trial<'a> {
    scratch: &'a Scratch,
    capture: Capture,
    enrolled: Enrolled,
    /// Nobody's default, so that it shows where it was set.
    congestion: &'static str,
    usual_congestion: Vec<u8>,
}

pub(super) fn run(scratch: &Scratch, report: &mut Report) {
    let congestion = match congestion(scratch) {
        Ok(congestion) => congestion,
        Err(obstacle) => return report.put(Part::CgroupReach, Err::<String, _>(obstacle)),
    };
    let capture = match Capture::start(config(scratch, congestion.1)) {
        Ok(capture) => capture,
        // Nobody else has pinned anything here.
        Err(Error::PinnedShape { path }) => {
            let what = format!("its {} has another shape", path.file_name().unwrap_or_default().display());
            return report.put(Part::Object, Err::<String, _>(Error::StaleObject { what }));
        }
        Err(error) => return report.put(Part::CgroupReach, Err::<String, _>(error)),
    };
    report.put(Part::Object, Ok::<_, Obstacle>("this version's"));
    let trial = match Trial::begin(scratch, capture, congestion) {
        Ok(trial) => trial,
        Err(obstacle) => return report.put(Part::CgroupReach, Err::<String, _>(obstacle)),
    };
    report.put(Part::CgroupReach, trial.reach());
    if !report.passed() {
        return;
    }
    let families = [(Part::Connect4, Part::Getpeername4), (Part::Connect6, Part::Getpeername6)];
    for ((connect, peer), (own, to)) in families.into_iter().zip(POD.into_iter().zip(CAPTURED)) {
        if let Err(obstacle) = trial.address(own) {
            // A kernel without IPv6 has no use for these two.
            let none = || Err::<String, _>(Obstacle { tried: false, ..obstacle.clone() });
            report.put(connect, none());
            report.put(peer, none());
            continue;
        }
        let outcome = trial.captured(SocketAddr::new(to, DIALLED_PORT));
        let shown = outcome.as_ref().map(|(_, shown)| shown.clone()).map_err(Clone::clone);
        report.put(connect, outcome.map(|(seen, _)| seen));
        report.put(peer, shown.and_then(|shown| trial.delivered(own).map(|seen| format!("{shown}; {seen}"))));
    }
    let refused = trial.strict();
    report.put(Part::RingBuffer, refused.as_ref().map(|_| "a refusal was reported").map_err(Clone::clone));
    report.put(Part::SkLookup, refused);
    if report.passed() {
        // Each has been used on the way here.
        report.put(Part::LpmTrie, Ok::<_, Obstacle>("a prefix was matched"));
        report.put(Part::LruHash, Ok::<_, Obstacle>("an original destination was kept"));
        report.put(Part::SkStorage, Ok::<_, Obstacle>("a socket kept its note"));
        report.put(Part::SockHash, Ok::<_, Obstacle>("a connection was handed to a listener"));
        report.put(Part::SockOps, Ok::<_, Obstacle>("original addresses were published"));
    }
    // The agent does without these two.
    report.put(Part::LoopbackCongestion, trial.congestion());
    report.put(Part::SocketDestroy, trial.destroy());
    report.put(Part::Adoption, trial.adopt());
}

/// The congestion control of sockets in the place, and another; its loopback is there from here on.
fn congestion(scratch: &Scratch) -> Result<(Vec<u8>, &'static str), Obstacle> {
    let usual = scratch.netns.within(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))??;
    let usual = SockRef::from(&usual).tcp_congestion()?;
    let other = if usual.starts_with(b"reno") { "cubic" } else { "reno" };
    scratch.netns.within(|| rtnetlink::add_to_loopback(POD[0]))??;
    Ok((usual, other))
}

impl<'a> Trial<'a> {
    fn begin(
        scratch: &'a Scratch,
        capture: Capture,
        (usual_congestion, congestion): (Vec<u8>, &'static str),
    ) -> Result<Self, Obstacle> {
        let prefixes: Vec<_> = CAPTURED.into_iter().map(ipnet::IpNet::from).collect();
        capture.set_captured(&prefixes)?;
        let pod = scratch.cgroups.as_ref().map(|cgroups| cgroups.pod()).ok();
        let modes = PortModes { default: Mode::Strict, ..PortModes::default() };
        let enrolled = capture.enrol(&Enrolment {
            name: "probe/pod",
            netns: &scratch.netns_path,
            cgroup: pod.as_deref(),
            addresses: &POD,
            modes: &modes,
        })?;
        // After the pod, so that it isn't taken for one of the pod's own.
        scratch.netns.within(|| rtnetlink::add_to_loopback(STRANGER))??;
        match &scratch.cgroups {
            Ok(cgroups) => cgroups.visit("pod")?,
            Err(_) => capture.shutdown_unregister(),
        }
        Ok(Self { scratch, capture, enrolled, congestion, usual_congestion })
    }

    fn pod(&self) -> &LocalPod {
        &self.enrolled.pod
    }

    fn within<T>(&self, work: impl FnOnce() -> std::io::Result<T>) -> Result<T, Obstacle> {
        Ok(self.scratch.netns.within(work)??)
    }

    /// That the hooks see a process in a cgroup of a pod: by starting, they have seen one in the agent's.
    fn reach(&self) -> Result<String, Obstacle> {
        if let Err(obstacle) = &self.scratch.cgroups {
            return Err(Obstacle { tried: false, ..obstacle.clone() });
        }
        let to = SocketAddr::new(CAPTURED[0], DIALLED_PORT);
        let before = self.counted("captured")?;
        let _socket = self.dial(POD[0], to)?;
        match self.counted("captured")? > before {
            true => Ok(format!("a cgroup below {} was reached", self.scratch.root_path.display())),
            false => Err(Obstacle::said("a process in a cgroup below it is not seen by the hooks")),
        }
    }

    fn counted(&self, name: &str) -> Result<u64, Obstacle> {
        let counters = self.capture.counters()?;
        Ok(counters.iter().find(|(known, _)| *known == name).map_or(0, |(_, count)| *count))
    }

    fn address(&self, ip: IpAddr) -> Result<(), Obstacle> {
        // The first was there before the pod was enrolled.
        if ip == POD[0] { Ok(()) } else { self.within(|| rtnetlink::add_to_loopback(ip)) }
    }

    /// What an application of the pod does.
    fn dial(&self, from: IpAddr, to: SocketAddr) -> Result<TcpStream, Obstacle> {
        self.within(|| {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
            if from == STRANGER {
                socket.bind(&SocketAddr::new(from, 0).into())?;
            }
            socket.connect_timeout(&to.into(), PATIENCE)?;
            let stream = TcpStream::from(socket);
            stream.set_read_timeout(Some(PATIENCE))?;
            Ok(stream)
        })
    }

    /// A connection that is captured: what the agent saw of it, and what the application did.
    fn captured(&self, to: SocketAddr) -> Result<(String, String), Obstacle> {
        let client = self.dial(to.ip(), to).map_err(|obstacle| obstacle.during("dialling to be captured"))?;
        let listeners = self.enrolled.listeners.first().ok_or_else(|| Obstacle::said("no listeners"))?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let (accepted, peer) = match listeners.outbound.accept() {
                Ok(accepted) => accepted,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    if Instant::now() > deadline {
                        return Err(Obstacle::said("the connection did not reach the agent's listener"));
                    }
                    std::thread::sleep(Duration::from_millis(1));
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            // One that was dialled earlier to see whether it would be captured may come first.
            if peer.port() != client.local_addr()?.port() {
                continue;
            }
            let original = self.pod().original_destination(peer, accepted.local_addr()?)?.addr();
            if original != to {
                return Err(Obstacle::said(format!("{to} was dialled, the agent was told {original}")));
            }
            let shown = client.peer_addr()?;
            if shown != to {
                return Err(Obstacle::said(format!("{to} was dialled, the application sees {shown}")));
            }
            return Ok((format!("{to} was captured"), "the client sees what it dialled".into()));
        }
    }

    /// A connection that the agent makes for somebody else: the server sees them.
    fn delivered(&self, own: IpAddr) -> Result<String, Obstacle> {
        let source = match own {
            IpAddr::V4(_) => SocketAddr::new(CAPTURED[0], 4242),
            IpAddr::V6(_) => SocketAddr::new(CAPTURED[1], 4242),
        };
        let at = SocketAddr::new(own, SERVED_PORT);
        let server = self.within(|| TcpListener::bind(at))?;
        let socket = self.pod().socket(at)?;
        self.pod().announce_source(&socket, at, OriginalSrc::new(source))?;
        socket.connect_timeout(&at.into(), PATIENCE)?;
        let (accepted, seen) = server.accept()?;
        if seen != source || accepted.peer_addr()? != source {
            return Err(Obstacle::said(format!("the server sees {seen}, not its client {source}")));
        }
        Ok("the server sees its client".into())
    }

    fn congestion(&self) -> Result<String, Obstacle> {
        let client = self.dial(POD[0], SocketAddr::new(CAPTURED[0], DIALLED_PORT))?;
        let set = SockRef::from(&client).tcp_congestion()?;
        let usual = String::from_utf8_lossy(&self.usual_congestion).trim_end_matches('\0').to_owned();
        match set.starts_with(self.congestion.as_bytes()) {
            true => Ok(format!("{} instead of {usual}", self.congestion)),
            false => Err(Obstacle::said(format!("a captured socket keeps {usual}"))),
        }
    }

    /// A stranger's plaintext to a STRICT port.
    fn strict(&self) -> Result<String, Obstacle> {
        let _server = self.within(|| TcpListener::bind((POD[0], SERVED_PORT)))?;
        let begun = Instant::now();
        match self.dial(STRANGER, SocketAddr::new(POD[0], SERVED_PORT)) {
            Ok(_) => return Err(Obstacle::said("a STRICT port let plaintext in")),
            Err(obstacle) if obstacle.errno == Some(libc::ECONNREFUSED) => {}
            Err(obstacle) => return Err(obstacle.during("plaintext to a STRICT port")),
        }
        let took = begun.elapsed();
        let mut events = self.capture.events().ok_or_else(|| Obstacle::said("events are read elsewhere"))?;
        match events.take() {
            Some(event) if event.kind == EventKind::PlaintextRefused => {
                Ok(format!("plaintext was refused in {:.1} ms", took.as_secs_f64() * 1e3))
            }
            _ => Err(Obstacle::said("a refusal was not reported")),
        }
    }

    /// A stranger's plaintext that was let in, until the port becomes STRICT.
    fn destroy(&self) -> Result<String, Obstacle> {
        let modes = PortModes { default: Mode::Permissive, ..PortModes::default() };
        self.capture.set_modes(self.pod(), &modes)?;
        let _server = self.within(|| TcpListener::bind((POD[0], SERVED_PORT)))?;
        let mut client = self.dial(STRANGER, SocketAddr::new(POD[0], SERVED_PORT))?;
        if self.pod().reset_plaintext(&|port| port == SERVED_PORT)? == 0 {
            return Err(Obstacle::said("the kernel lists no such connection"));
        }
        match client.read(&mut [0]) {
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {
                Ok("an open plaintext connection was reset".into())
            }
            other => Err(Obstacle::said(format!("an ended connection is not reset: {other:?}"))),
        }
    }

    /// A second agent beside the first.
    fn adopt(self) -> Result<String, Obstacle> {
        if let Ok(cgroups) = &self.scratch.cgroups {
            cgroups.visit("agent")?;
        }
        let begun = Instant::now();
        let next = Capture::start(config(self.scratch, self.congestion))?;
        let kept = next.counters()? == self.capture.counters()?;
        match kept {
            true => Ok(format!("pinned state was taken over in {} ms", begun.elapsed().as_millis())),
            false => Err(Obstacle::said("pinned maps were not found again")),
        }
    }
}

fn config(scratch: &Scratch, congestion: &str) -> Config {
    Config {
        cgroup_root: Some(scratch.root_path.clone()),
        bpffs: scratch.bpffs.join("whole"),
        workers: 1,
        congestion: Some(congestion.into()),
        destroy: true,
    }
}
