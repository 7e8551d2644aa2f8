//! What the product promises, one module per promise; and, first, that the lab itself would notice.
//!
//! Every test asserts from outside: what applications get, what crosses the wire, metrics, logs and exit codes.

mod applications;
mod authorization;
mod bench;
mod compare;
mod configuration;
mod direct;
mod encrypted;
mod endings;
mod failures;
mod features;
mod identity;
mod impostors;
mod inspection;
mod kubernetes;
mod lab_itself;
mod load;
mod observed;
mod pods;
mod readiness;
mod revocation;
mod services;
mod spiffe;
mod strict;
mod succession;
mod transparent;
mod verify;

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context, Result};
use mtls_tests::{Lab, Mesh, Options, Pod, PodSpec};
use serde_json::Value;

/// Leaves a test that lacks a program, unless `CI=true`, where lacking is failing.
macro_rules! needs {
    ($($programs:expr),* $(,)?) => {
        if mtls_tests::skip(&[&mtls_tests::Lab::NEEDS[..] $(, &$programs[..])*].concat()) {
            return Ok(());
        }
    };
}
pub(crate) use needs;

/// The usual scene: a server on `node-b`, an enrolled client far from it and one near, and agents.
struct Scene {
    // Fields are dropped in this order: processes before the lab they run in.
    mesh: Mesh,
    far: Arc<Pod>,
    near: Arc<Pod>,
    server: Arc<Pod>,
    lab: Lab,
}

impl Scene {
    fn new() -> Result<Self> {
        Self::with(&Options::default())
    }

    fn with(options: &Options) -> Result<Self> {
        let lab = Lab::two_nodes()?;
        let far = lab.pod("node-a", "far")?;
        let near = lab.pod("node-b", "near")?;
        let server = lab.add(PodSpec::new("node-b", "server").port("main", 7000).port("other", 7001))?;
        let mesh = Mesh::start_with(&lab, options)?;
        Ok(Self { mesh, far, near, server, lab })
    }

    /// Both clients, for what must hold across nodes and on one node.
    fn clients(&self) -> [&Pod; 2] {
        [&self.far, &self.near]
    }
}

/// An address that an application printed, v4-mapped or not.
fn address(value: &Value) -> Result<SocketAddr> {
    let text = value.as_str().with_context(|| format!("no address: {value}"))?;
    let address: SocketAddr = text.parse().with_context(|| format!("no address: {text:?}"))?;
    Ok(SocketAddr::new(address.ip().to_canonical(), address.port()))
}

/// Asserts that a conversation took place in full and ended cleanly.
#[track_caller]
fn assert_echoed(answer: &Value) {
    assert!(answer["echoed"].as_u64() > Some(0) && answer["ended"] == "eof", "{answer}");
}

/// Asserts that an attempt failed, and not by a clean end of stream.
#[track_caller]
fn assert_refused(answer: &Value) {
    assert!(answer["echoed"].is_null(), "{answer}");
    assert!(answer["ended"] == "refused" || answer["ended"] == "reset", "{answer}");
}
