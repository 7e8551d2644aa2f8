//! Direct connections as the kernel half keeps them: grants and the lease in; records of open connections, and the ends
//! of others, out. It decides nothing: see [`crate::direct`].

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use aya::maps::{MapData, RingBuf};
use mtls_common::{CHOICES_MAX, Choice, Direct, Ended, Flow, Grant, GrantKey, Lease, map};
use tokio::io::unix::AsyncFd;

use super::address::{endpoint, socket_addr, words};
use super::error::Error;
use super::kernel::DirectMaps;
use super::node::{Capture, gone, on};
use super::pod::LocalPod;
use super::sys;

/// TCP states, by number, in which a socket whose connection ended well is closed.
const CLOSED_WELL: [u32; 4] = [5, 6, 9, 11];
const SYN_SENT: u32 = 2;

/// What names a direct connection: both ends' own addresses.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct DirectFlow {
    pub client: SocketAddr,
    pub server: SocketAddr,
}

/// A direct connection as the kernel half recorded it when it was dialled.
#[derive(Clone, Copy, Debug)]
pub struct DirectRecord {
    pub flow: DirectFlow,
    /// Netns cookies of the two pods.
    pub client: u64,
    pub server: u64,
    /// What the application dialled.
    pub dialled: SocketAddr,
    pub age: Duration,
    /// It was refused, because its grant was gone.
    pub refused: bool,
    /// The handshake is over.
    pub accepted: bool,
    /// One of the sockets is closed already.
    pub half_closed: bool,
}

/// A direct connection that is over.
#[derive(Clone, Copy, Debug)]
pub struct Ending {
    pub record: DirectRecord,
    /// How long it was open.
    pub duration: Duration,
    pub sent: u64,
    pub received: u64,
    pub how: How,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum How {
    /// The client's kernel got no connection.
    NeverOpened,
    Clean,
    ResetByClient,
    ResetByServer,
}

impl Capture {
    /// Lets the client's sockets dial `to`, an address of the server's, past the agent, as long as this agent's lease
    /// lasts.
    pub fn grant(&self, client: &LocalPod, to: SocketAddr, server: &LocalPod) -> Result<(), Error> {
        let grant = Grant { epoch: self.epoch, server: server.netns_cookie() };
        let key = grant_key(client.netns_cookie(), to);
        self.direct_maps().grants.insert(key, grant, 0).map_err(on(map::GRANTS, "writing"))
    }

    /// As many endpoints of a Service can be chosen from without the agent.
    pub const MOST_ENDPOINTS: usize = CHOICES_MAX;

    /// Lets the kernel half choose, for the client's connections to `service`, one of these endpoints, which are all
    /// there are; what it chooses needs a grant.
    pub fn let_choose(
        &self,
        client: &LocalPod,
        service: SocketAddr,
        among: &[SocketAddr],
    ) -> Result<(), Error> {
        let mut choice = Choice { epoch: self.epoch, ..Choice::default() };
        for (to, from) in choice.endpoints.iter_mut().zip(among) {
            *to = endpoint(*from);
            choice.count += 1;
        }
        let key = grant_key(client.netns_cookie(), service);
        self.direct_maps().choices.insert(key, choice, 0).map_err(on(map::CHOICES, "writing"))
    }

    pub fn withdraw_choice(&self, client_netns_cookie: u64, service: SocketAddr) -> Result<(), Error> {
        let key = grant_key(client_netns_cookie, service);
        gone(self.direct_maps().choices.remove(&key)).map_err(on(map::CHOICES, "writing"))
    }

    pub fn withdraw(&self, client_netns_cookie: u64, to: SocketAddr) -> Result<(), Error> {
        let key = grant_key(client_netns_cookie, to);
        gone(self.direct_maps().grants.remove(&key)).map_err(on(map::GRANTS, "writing"))
    }

    /// Drops whatever earlier agents granted; without their lease it was void already.
    pub fn withdraw_all(&self) -> Result<(), Error> {
        let DirectMaps { grants, choices, .. } = &mut *self.direct_maps();
        let keys = grants.keys().collect::<Result<Vec<_>, _>>().map_err(on(map::GRANTS, "reading"))?;
        keys.iter().try_for_each(|key| gone(grants.remove(key))).map_err(on(map::GRANTS, "writing"))?;
        let keys = choices.keys().collect::<Result<Vec<_>, _>>().map_err(on(map::CHOICES, "reading"))?;
        keys.iter().try_for_each(|key| gone(choices.remove(key))).map_err(on(map::CHOICES, "writing"))
    }

    /// Puts this agent's grants in force for so long. False: a later agent has taken over.
    pub fn hold_lease(&self, time: Duration) -> Result<bool, Error> {
        let lease = &mut self.direct_maps().lease;
        if lease.get(&0, 0).map_err(on(map::LEASE, "reading"))?.epoch > self.epoch {
            return Ok(false);
        }
        let until = (sys::monotonic() + time).as_nanos();
        let held = Lease { epoch: self.epoch, until_ns: u64::try_from(until).unwrap_or(u64::MAX) };
        lease.set(0, held, 0).map_err(on(map::LEASE, "writing"))?;
        Ok(true)
    }

    /// Every direct connection that is being dialled or open.
    pub fn direct_connections(&self) -> Result<Vec<DirectRecord>, Error> {
        let now = sys::monotonic();
        let maps = self.direct_maps();
        let records =
            maps.records.iter().map(|entry| entry.map(|(flow, direct)| record(&flow, &direct, now)));
        records.collect::<Result<_, _>>().map_err(on(map::DIRECT, "reading"))
    }

    /// Makes the destination's pod refuse a connection that is still being dialled.
    pub fn refuse(&self, flow: DirectFlow) -> Result<(), Error> {
        let records = &mut self.direct_maps().records;
        let key = key(flow);
        let Ok(record) = records.get(&key, 0) else { return Ok(()) };
        records.insert(key, Direct { refused: 1, ..record }, 0).map_err(on(map::DIRECT, "writing"))
    }

    /// Drops the record of a connection whose sockets are gone.
    pub fn forget(&self, flow: DirectFlow) -> Result<(), Error> {
        gone(self.direct_maps().records.remove(&key(flow))).map_err(on(map::DIRECT, "writing"))
    }

    /// The reader of ended direct connections; only the first call gets it.
    pub fn endings(&self) -> Option<Endings> {
        self.endings.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn direct_maps(&self) -> MutexGuard<'_, DirectMaps> {
        // Every write is one system call: a panic in between leaves nothing half done.
        self.direct.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads ended direct connections. Dropped, they are lost.
pub struct Endings {
    ring: RingBuf<MapData>,
    /// Made when first awaited: it needs the context of a tokio runtime.
    readiness: Option<AsyncFd<OwnedFd>>,
}

impl Endings {
    pub(super) fn new(ring: RingBuf<MapData>) -> Self {
        Self { ring, readiness: None }
    }

    /// The next one. Cancel safe.
    pub async fn next(&mut self) -> io::Result<Ending> {
        let readiness = match &mut self.readiness {
            Some(readiness) => readiness,
            none => none.insert(sys::readable(self.ring.as_fd().try_clone_to_owned()?)?),
        };
        loop {
            // Read first: readiness says that something came, not that something is left.
            if let Some(ending) = self.ring.next().map(|bytes| sys::record::<Ended>(&bytes)) {
                match ending {
                    Some(ended) => return Ok(Ending::new(&ended)),
                    None => continue,
                }
            }
            readiness.readable().await?.clear_ready();
        }
    }
}

impl Ending {
    fn new(ended: &Ended) -> Self {
        let Ended { time_ns, flow, direct, client_last, .. } = ended;
        let is_well = |state: u32| CLOSED_WELL.contains(&state) || state == mtls_common::UNSEEN_END;
        let how = match (direct.accepted, direct.client_end) {
            (0, 0 | SYN_SENT) => How::NeverOpened,
            (_, client) if is_well(client) && is_well(direct.server_end) => How::Clean,
            // Who resets a connection is rid of it first.
            _ if *client_last == 0 => How::ResetByClient,
            _ => How::ResetByServer,
        };
        Self {
            record: record(flow, direct, sys::monotonic()),
            duration: Duration::from_nanos(time_ns.saturating_sub(direct.since_ns)),
            sent: direct.sent,
            received: direct.received,
            how,
        }
    }
}

fn record(flow: &Flow, direct: &Direct, now: Duration) -> DirectRecord {
    let end = |addr_be, port| socket_addr(mtls_common::Endpoint { addr_be, port, pad: 0 });
    DirectRecord {
        flow: DirectFlow {
            client: end(flow.client_addr_be, flow.client_port),
            server: end(flow.server_addr_be, flow.server_port),
        },
        client: direct.client,
        server: direct.server,
        dialled: socket_addr(direct.dialled),
        age: now.saturating_sub(Duration::from_nanos(direct.since_ns)),
        refused: direct.refused != 0,
        accepted: direct.accepted != 0,
        half_closed: direct.client_end != 0 || direct.server_end != 0,
    }
}

fn grant_key(netns: u64, to: SocketAddr) -> GrantKey {
    GrantKey { netns, to: endpoint(to), pad: 0 }
}

fn key(DirectFlow { client, server }: DirectFlow) -> Flow {
    Flow {
        netns: 0,
        client_addr_be: words(client.ip()),
        server_addr_be: words(server.ip()),
        client_port: client.port(),
        server_port: server.port(),
        pad: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ESTABLISHED: u32 = 1;
    const FIN_WAIT2: u32 = 5;
    const LAST_ACK: u32 = 9;

    fn how(accepted: u32, client_end: u32, server_end: u32, client_last: u32) -> How {
        let direct = Direct { accepted, client_end, server_end, ..Direct::default() };
        Ending::new(&Ended { direct, client_last, ..Ended::default() }).how
    }

    #[test]
    fn the_end_is_told_from_the_states_in_which_sockets_were_closed() {
        assert_eq!(how(1, FIN_WAIT2, LAST_ACK, 0), How::Clean);
        assert_eq!(how(1, LAST_ACK, FIN_WAIT2, 1), How::Clean);
        assert_eq!(how(1, ESTABLISHED, ESTABLISHED, 0), How::ResetByClient);
        assert_eq!(how(1, ESTABLISHED, ESTABLISHED, 1), How::ResetByServer);
        assert_eq!(how(0, SYN_SENT, 0, 1), How::NeverOpened);
        assert_eq!(how(1, FIN_WAIT2, mtls_common::UNSEEN_END, 1), How::Clean);
    }

    #[test]
    fn a_flow_survives_the_way_to_the_kernel_and_back() {
        let flow =
            DirectFlow { client: "[fd00::1]:4000".parse().unwrap(), server: "10.0.0.1:80".parse().unwrap() };
        let direct = Direct { since_ns: 5_000, ..Direct::default() };
        let back = record(&key(flow), &direct, Duration::from_nanos(7_000));
        assert_eq!((back.flow, back.age), (flow, Duration::from_nanos(2_000)));
    }
}
