//! Agents that have something of everything to show, and what of a query they would not understand.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mtls_tests::{Forger, Lab, Mesh, Metrics, Mode, Pod, PodSpec, Running, eventually};
use serde_json::{Value, json};

use crate::promql::Query;

/// A server on `node-b`, an enrolled client far from it and one near, and one that is not enrolled.
pub struct Scene {
    // Fields are dropped in this order: processes before the lab they run in.
    _echo: Running,
    pub mesh: Mesh,
    pub far: Arc<Pod>,
    pub near: Arc<Pod>,
    pub server: Arc<Pod>,
    pub intruder: Arc<Pod>,
    pub lab: Lab,
}

impl Scene {
    pub fn new() -> Result<Self> {
        let lab = Lab::two_nodes()?;
        let far = lab.pod("node-a", "far")?;
        let near = lab.pod("node-b", "near")?;
        let server = lab.add(PodSpec::new("node-b", "server").port("main", 7000).port("strict", 7001))?;
        let intruder = lab.outsider("node-a", "intruder")?;
        let ports = mtls_tests::Level::Ports(&server, &[(7001, Mode::Strict)]);
        lab.peer_authentication(ports, Mode::Permissive)?;
        let mesh = Mesh::start(&lab)?;
        let echo = server.serve(&["echo", "--listen", "[::]:7000"])?;
        Ok(Self { _echo: echo, mesh, far, near, server, intruder, lab })
    }

    /// The port that takes anybody.
    pub fn open(&self) -> String {
        self.server.addr(7000).to_string()
    }

    pub fn strict(&self) -> String {
        self.server.addr(7001).to_string()
    }

    /// Says hello from a pod, and returns how that went.
    pub fn dial(&self, from: &Pod, to: &str) -> Result<Value> {
        from.app(&["dial", "echo", to])
    }

    /// Makes every kind of event once: carried, refused by policy, by mode, by certificate.
    pub fn everything_happens(&mut self) -> Result<()> {
        for from in [&self.far, &self.near, &self.intruder] {
            let answer = self.dial(from, &self.open())?;
            ensure!(answer["ended"] == "eof", "{}: {answer}", from.name());
        }
        // Each data thread keeps tunnels of its own.
        let reused = eventually(Duration::from_secs(10), || {
            self.dial(&self.far, &self.open()).ok()?;
            self.mesh.agent("node-a").metrics().ok()?.has("mtls_tunnels_reused_total").then_some(())
        });
        reused.context("no tunnel is reused")?;
        let refused = self.dial(&self.intruder, &self.strict())?;
        ensure!(refused["ended"] == "refused", "{refused}");
        self.a_stranger_calls()?;
        let near = json!([{ "from": [{ "source": { "principals": [self.near.principal()] } }] }]);
        let spec = json!({ "action": "DENY", "rules": near });
        self.lab.authorization_policy(&self.server, "not-near", &spec)?;
        let denied = eventually(Duration::from_secs(10), || {
            let answer = self.dial(&self.near, &self.open()).ok()?;
            answer["echoed"].is_null().then_some(())
        });
        denied.context("a DENY policy is not enforced")
    }

    /// With a certificate that nobody trusts.
    fn a_stranger_calls(&self) -> Result<()> {
        let id = format!("spiffe://{}", self.far.principal());
        let forged = Forger::unknown()?.sign(self.lab.dir(), "self-made", &id)?;
        let (chain, key) = (forged.chain.to_string_lossy(), forged.key.to_string_lossy());
        let to = format!("{}:15008", self.server.ip());
        self.intruder
            .app(&["tls-dial", &to, "--chain", &chain, "--key", &key, "--limit-ms", "2000"])
            .map(drop)
    }

    pub fn metrics(&mut self) -> Result<[Metrics; 2]> {
        Ok([self.mesh.agent("node-a").metrics()?, self.mesh.agent("node-b").metrics()?])
    }
}

/// What Prometheus itself puts on every sample.
const TARGET: [&str; 2] = ["instance", "job"];

/// Why a query would find nothing at these agents, if so. `shown` are labels whose values are written out to people.
pub fn unknown(agents: &[Metrics], query: &Query, shown: &BTreeSet<String>) -> Option<String> {
    let mut available: BTreeSet<String> = TARGET.map(str::to_owned).into();
    for selector in &query.selectors {
        let mut labels: BTreeSet<String> = TARGET.map(str::to_owned).into();
        if selector.metric != "up" {
            let found = agents.iter().filter_map(|metrics| metrics.labels(&selector.metric));
            let Some(found) = found.reduce(|a, b| &a | &b) else {
                return Some(format!("no agent has a metric {}", selector.metric));
            };
            labels.extend(found);
        }
        if let Some(label) = selector.labels.difference(&labels).next() {
            return Some(format!("{} has no label {label}", selector.metric));
        }
        available.extend(labels);
    }
    if let Some(label) = query.grouping.difference(&available).next() {
        return Some(format!("grouped by {label}, which no metric of the query has"));
    }
    let left = if query.grouping.is_empty() { &available } else { &query.grouping };
    shown.difference(left).next().map(|label| format!("shows {label}, which the result does not have"))
}
