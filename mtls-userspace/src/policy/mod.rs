//! Policy: (peer, workload, port) in, [`Authorized`] or a [`Denied`] reason out. Pure: no I/O, no clock.

use std::collections::BTreeMap;

use crate::mesh::Workload;

/// What a port accepts. The effective mode, after mesh, namespace, workload and port level were combined.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Mode {
    Strict,
    #[default]
    Permissive,
    Disable,
}

/// The effective modes of one workload, as the kernel half enforces them.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PortModes {
    /// For every port without an entry of its own.
    pub default: Mode,
    pub ports: BTreeMap<u16, Mode>,
}

impl PortModes {
    pub fn of(&self, port: u16) -> Mode {
        self.ports.get(&port).copied().unwrap_or(self.default)
    }
}

/// Every policy of a snapshot, compiled.
#[derive(Debug, Default)]
pub struct Policies {}

impl Policies {
    /// The effective PeerAuthentication modes of a workload.
    pub fn modes(&self, _workload: &Workload) -> PortModes {
        unimplemented!()
    }
}
