//! Direct connections that are open: the kernel half's records in; reports to the observer, and resets, out.
//!
//! The kernel's records are the truth. What is here follows them: when somebody asks, when policy changes, and when the
//! kernel half tells of an end.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Direct;
use crate::addr::{OriginalDst, OriginalSrc};
use crate::capture::{self, DirectFlow, DirectRecord, Ending, Endings, How};
use crate::mesh::Mesh;
use crate::observe::{self, Connection, Flow, Party, Path, Refusal};
use crate::policy::{Peer, Request};
use crate::worker::Pod;

/// The end of a connection whose record is gone is on the way for so long at most; then it was lost.
const LATE: Duration = Duration::from_secs(10);
/// A handshake that takes longer has failed, whatever became of its sockets.
const HANDSHAKE: Duration = Duration::from_secs(150);

#[derive(Default)]
pub(super) struct Open {
    connections: HashMap<DirectFlow, Known>,
    /// Whether what earlier agents left is known.
    adopted: bool,
}

struct Known {
    connection: Connection,
    /// The kernel has no record of it any more since then: its end is on the way, or was lost.
    missing: Option<Instant>,
}

impl Direct {
    /// Reports what ends until the kernel's events can no longer be read.
    pub async fn follow(self: Arc<Self>, mut endings: Endings) {
        loop {
            match endings.next().await {
                Ok(ending) => self.ended(&ending),
                Err(error) => {
                    return tracing::error!(%error, "ends of direct connections can no longer be read");
                }
            }
        }
    }

    /// Brings the observer up to date with the kernel, for somebody who asks.
    pub fn refresh(&self) {
        let mut open = self.open();
        // Until this node's pods are known, nobody can say whose connections they are.
        if open.adopted
            && let Err(error) = self.look(&mut open)
        {
            tracing::warn!(%error, "direct connections are not up to date");
        }
    }

    /// Brings the observer up to date with the kernel: which connections are open, and their bytes so far. To be called
    /// with this node's pods known, and before open connections are judged; what it returns is for [`Self::enforce`].
    pub fn follow_up(&self) -> Vec<DirectRecord> {
        self.look(&mut self.open()).unwrap_or_else(|error| {
            tracing::error!(%error, "open direct connections cannot be judged");
            Vec::new()
        })
    }

    fn look(&self, open: &mut Open) -> Result<Vec<DirectRecord>, capture::Error> {
        let records = self.capture.direct_connections()?;
        if records.is_empty() && open.connections.is_empty() {
            open.adopted = true;
            return Ok(records);
        }
        let dialling: HashSet<u64> = records.iter().map(|record| record.client).collect();
        let mut bytes = HashMap::new();
        for pod in self.local.all().iter().filter(|pod| dialling.contains(&pod.socket.netns_cookie())) {
            bytes.insert(pod.socket.netns_cookie(), pod.socket.dialled_bytes()?);
        }
        let now = Instant::now();
        for known in open.connections.values_mut() {
            known.missing.get_or_insert(now);
        }
        for record in &records {
            let counted = bytes.get(&record.client).and_then(|pod| pod.get(&record.flow)).copied();
            if !record.accepted {
                if record.age > HANDSHAKE && counted.is_none() {
                    self.capture.forget(record.flow)?;
                }
                continue;
            }
            let adopted = open.adopted;
            let known = open.connections.entry(record.flow).or_insert_with(|| {
                let since = Instant::now().checked_sub(record.age).unwrap_or_else(Instant::now);
                let connection = self.observer.open_since(self.flow(record), since);
                if let (false, Some((sent, received))) = (adopted, counted) {
                    // An earlier agent's metrics have these already.
                    connection.adopt(sent, received);
                }
                Known { connection, missing: None }
            });
            known.missing = None;
            if let Some((sent, received)) = counted {
                known.connection.progress().reach(sent, received);
            }
        }
        open.adopted = true;
        open.connections.retain(|_, known| known.missing.is_none_or(|since| now - since < LATE));
        Ok(records)
    }

    fn ended(&self, ending: &Ending) {
        let record = &ending.record;
        let known = self.open().connections.remove(&record.flow);
        if ending.how == How::NeverOpened {
            return self.observer.refused(self.flow(record), self.refusal(ending));
        }
        let connection = known.map(|known| known.connection).unwrap_or_else(|| {
            let since = Instant::now().checked_sub(ending.duration).unwrap_or_else(Instant::now);
            self.observer.open_since(self.flow(record), since)
        });
        connection.progress().reach(ending.sent, ending.received);
        let end = match (connection.stop_reason(), ending.how) {
            (Some(reason), _) => observe::Ending::Revoked(reason),
            (None, How::ResetByClient) => observe::Ending::ResetBySource,
            (None, How::ResetByServer) => observe::Ending::ResetByDestination,
            (None, How::Clean | How::NeverOpened) => observe::Ending::Clean,
        };
        connection.close(end);
    }

    /// Why a connection was never opened.
    fn refusal(&self, ending: &Ending) -> Refusal {
        const PATIENCE: Duration = Duration::from_secs(1);
        match self.judge(&self.mesh.current(), &self.flow(&ending.record)) {
            Err(refusal) => refusal,
            Ok(()) if ending.record.refused => Refusal::Stale,
            Ok(()) if ending.duration > PATIENCE => Refusal::ConnectTimeout,
            Ok(()) => Refusal::ConnectRefused,
        }
    }

    fn judge(&self, mesh: &Mesh, flow: &Flow) -> Result<(), Refusal> {
        let known = |party: &Party| party.workload.clone().zip(party.identity.clone());
        let (Some((_, identity)), Some((destination, _))) = (known(&flow.source), known(&flow.destination))
        else {
            return Err(Refusal::Stale);
        };
        let destination = mesh.workload(flow.address.ip()).filter(|now| now.key() == destination.key());
        let Some(destination) = destination else { return Err(Refusal::Stale) };
        let request = Request {
            destination,
            address: flow.address,
            source_ip: flow.original_src.ip(),
            peer: Peer::Verified(&identity),
        };
        mesh.policies.authorize(&request).map(drop).map_err(Refusal::Denied)
    }

    /// Resets every connection that the observer was asked to stop, and refuses those of them that are still being
    /// dialled. What the kernel has recorded since had a grant under the mesh in force.
    pub fn enforce(&self, mesh: &Mesh, records: &[DirectRecord]) {
        for record in records {
            let is_stopped = match self.open().connections.get(&record.flow) {
                Some(known) => known.connection.stop_reason().is_some(),
                None => !self.wanted || self.judge(mesh, &self.flow(record)).is_err(),
            };
            if is_stopped {
                self.reset(record);
            }
        }
    }

    /// Why an open connection may not stay, besides what policy says.
    pub fn unwanted(&self, flow: &Flow) -> Option<Arc<str>> {
        if flow.path != Path::Direct {
            None
        } else if !self.wanted {
            Some("same-node connections are no longer direct".into())
        } else if flow.source.identity.is_none() || flow.destination.identity.is_none() {
            Some("one of the two pods is not enrolled any more".into())
        } else {
            None
        }
    }

    fn reset(&self, record: &DirectRecord) {
        if !record.accepted
            && let Err(error) = self.capture.refuse(record.flow)
        {
            tracing::error!(%error, "a direct connection that is being dialled cannot be refused");
        }
        let DirectFlow { client, server } = record.flow;
        // The end that is closed here learns of an abort, its peer of a reset.
        for pod in [self.pod(server, record.server), self.pod(client, record.client)].into_iter().flatten() {
            match pod.socket.reset(record.flow) {
                Ok(true) => return,
                // Gone already, or only at this end.
                Ok(false) => {}
                Err(error) => {
                    tracing::error!(pod = pod.socket.name(), %client, %server, %error, "a direct connection stays open");
                }
            }
        }
    }

    /// Ends this agent's part: the connections stay, and the next agent reports their ends.
    pub fn hand_over(&self) {
        let connections = std::mem::take(&mut self.open().connections);
        connections.into_values().for_each(|known| known.connection.hand_over());
    }

    /// Who speaks to whom, by the kernel's record of which pods the two sockets belong to.
    fn flow(&self, record: &DirectRecord) -> Flow {
        let DirectFlow { client, server } = record.flow;
        let party = |pod: Option<Arc<Pod>>| {
            let workload = pod.map(|pod| pod.workload.load_full());
            Party { identity: workload.as_ref().map(|workload| workload.identity.clone()), workload }
        };
        let service =
            (record.dialled != server).then(|| self.mesh.current().service(record.dialled.ip()).cloned());
        Flow {
            direction: observe::Direction::Outbound,
            path: Path::Direct,
            source: party(self.pod(client, record.client)),
            destination: party(self.pod(server, record.server)),
            original_dst: Some(OriginalDst::new(record.dialled)),
            address: server,
            original_src: OriginalSrc::new(client),
            service: service.flatten(),
            cipher: None,
        }
    }

    /// The pod with this namespace, which has had this address.
    fn pod(&self, at: SocketAddr, netns_cookie: u64) -> Option<Arc<Pod>> {
        let is_it = |pod: &Arc<Pod>| pod.socket.netns_cookie() == netns_cookie;
        self.local.at(at.ip()).filter(is_it).or_else(|| self.local.all().into_iter().find(is_it))
    }
}
