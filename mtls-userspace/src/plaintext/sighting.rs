//! What is seen and what is kept of it: plain values.

use std::net::IpAddr;
use std::sync::Arc;

use jiff::Timestamp;

/// Who came, as well as the mesh could tell from the address at that time. Not proven.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Source {
    /// `namespace/name`.
    Workload(Arc<str>),
    Address(IpAddr),
}

/// A source, and why it came in plaintext.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Peer {
    pub source: Source,
    /// An enrolled client that chose plaintext because the port's mode was DISABLE.
    pub by_disable: bool,
}

impl Peer {
    pub(super) fn is_address(&self) -> bool {
        matches!(self.source, Source::Address(_))
    }
}

/// One plaintext connection to a pod, or the attempt.
#[derive(Clone, Debug)]
pub struct Sighting {
    pub port: u16,
    pub peer: Peer,
    pub address: IpAddr,
    pub at: Timestamp,
    /// By a STRICT port.
    pub refused: bool,
}

/// What is known of one peer at one port.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Row {
    /// The last one it came from.
    pub address: IpAddr,
    /// Connections that were accepted; those that were open before the observation began count as one each.
    pub connections: u64,
    /// Attempts that a STRICT port refused.
    pub refused: u64,
    /// Open at the last look.
    pub open: u64,
    pub first: Timestamp,
    pub last: Timestamp,
}

impl Row {
    pub(super) fn merge(&mut self, other: &Self) {
        self.connections += other.connections;
        self.refused += other.refused;
        self.open += other.open;
        self.first = self.first.min(other.first);
        self.last = self.last.max(other.last);
    }
}

/// A count of what is not kept one by one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Tally {
    pub count: u64,
    pub last: Option<Timestamp>,
}

impl Tally {
    pub fn add(&mut self, count: u64, at: Timestamp) {
        self.count += count;
        self.last = self.last.max(Some(at));
    }
}
