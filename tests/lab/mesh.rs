//! The product in the lab: a lab and options in, a certificate authority and an agent on each node out.
//!
//! Knows the command line, the admin port and the log lines; nothing of the product's inside.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::kubernetes::lab as cluster;
use crate::network::plan;
use crate::process::{Finished, Running};
use crate::{Cni, Lab, Node, Response, http_get, requirements};

const CA_PORT: u16 = 15012;

/// How agents and the authority are started.
#[derive(Clone, Debug)]
pub struct Options {
    pub same_node: &'static str,
    pub drain_seconds: u32,
    pub leaf_lifetime: &'static str,
    pub trust_domain: &'static str,
    /// Agents put their CNI plugin into their node's directories.
    pub cni: bool,
    /// Agents and the authority follow the lab's API server, as in a cluster, instead of the directory of manifests.
    pub kubernetes: bool,
    /// Further flags for `mtls node`.
    pub node_flags: Vec<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            same_node: "relay",
            drain_seconds: 2,
            leaf_lifetime: "24h",
            trust_domain: "cluster.local",
            cni: false,
            kubernetes: false,
            node_flags: Vec::new(),
        }
    }
}

/// A certificate authority on the first node and an agent on every node.
#[derive(Debug)]
pub struct Mesh {
    ca: Option<Running>,
    agents: Vec<Agent>,
    ca_dir: PathBuf,
}

impl Mesh {
    pub fn start(lab: &Lab) -> Result<Self> {
        Self::start_with(lab, &Options::default())
    }

    pub fn start_with(lab: &Lab, options: &Options) -> Result<Self> {
        let dir = lab.dir();
        let first = lab.nodes().first().context("a lab without nodes")?;
        let mut tokens = String::new();
        for node in lab.nodes() {
            let token = format!("token-of-{}-{}", lab.id(), node.name());
            tokens += &format!("{}: {token}\n", node.name());
            std::fs::write(token_file(dir, node), token)?;
        }
        std::fs::write(dir.join("tokens.yaml"), tokens)?;
        if options.kubernetes {
            cluster::give_access(lab)?;
        }
        let ca_dir = dir.join("ca");
        std::fs::create_dir_all(&ca_dir)?;
        let mut mesh = Self { ca: None, agents: Vec::new(), ca_dir };
        mesh.ca = Some(start_ca(lab, first, options)?);
        for node in lab.nodes() {
            mesh.agents.push(Agent::new(lab, node, options)?);
        }
        for agent in &mut mesh.agents {
            agent.launch()?;
        }
        for agent in &mut mesh.agents {
            agent.await_ready()?;
        }
        Ok(mesh)
    }

    pub fn agent(&mut self, node: &str) -> &mut Agent {
        let known = self.agents.iter_mut().find(|agent| agent.node.name() == node);
        known.unwrap_or_else(|| panic!("no agent on {node}"))
    }

    /// Process ids of the agents; none if one doesn't run.
    pub fn pids(&self) -> Option<Vec<u32>> {
        self.agents.iter().map(Agent::pid).collect()
    }

    /// Where the authority keeps its key: tests sign certificates of their own with it.
    pub fn ca_dir(&self) -> &Path {
        &self.ca_dir
    }

    /// Takes the authority away.
    pub fn stop_ca(&mut self) {
        self.ca = None;
    }

    pub fn restart_ca(&mut self, lab: &Lab, options: &Options) -> Result<()> {
        self.ca = None;
        self.ca = Some(start_ca(lab, lab.nodes().first().context("a lab without nodes")?, options)?);
        Ok(())
    }

    /// The same without waiting until it serves: it may never do so.
    pub fn relaunch_ca(&mut self, lab: &Lab, options: &Options) -> Result<()> {
        self.ca = None;
        self.ca = Some(launch_ca(lab, lab.nodes().first().context("a lab without nodes")?, options)?);
        Ok(())
    }
}

/// The agent of one node.
#[derive(Debug)]
pub struct Agent {
    node: Arc<Node>,
    args: Vec<String>,
    dir: PathBuf,
    process: Option<Running>,
}

impl Agent {
    fn new(lab: &Lab, node: &Arc<Node>, options: &Options) -> Result<Self> {
        let dir = lab.dir();
        let ca = lab.nodes().first().context("a lab without nodes")?.ip();
        let bpffs = dir.join("bpf").join(node.name());
        std::fs::create_dir_all(&bpffs)?;
        let path = |path: &Path| path.to_string_lossy().into_owned();
        let mut args = vec!["node".to_owned()];
        for (flag, value) in [
            ("--node", node.name().to_owned()),
            ("--ca-address", format!("https://{ca}:{CA_PORT}")),
            ("--ca-root", path(&root_file(dir))),
            ("--ca-token-file", path(&token_file(dir, node))),
            ("--trust-domain", options.trust_domain.to_owned()),
            ("--cgroup-root", path(node.cgroup())),
            ("--bpffs", path(&bpffs)),
            ("--admin", "127.0.0.1:15020".to_owned()),
            ("--admin-socket", path(&dir.join(format!("{}.sock", node.name())))),
            ("--same-node", options.same_node.to_owned()),
            ("--access-log", "json".to_owned()),
            ("--drain", options.drain_seconds.to_string()),
        ] {
            args.extend([flag.to_owned(), value]);
        }
        if options.kubernetes {
            args.push("--trust-pod-annotations".to_owned());
            args.extend(["--kubeconfig".to_owned(), path(&cluster::kubeconfig(dir, "agent"))]);
        } else {
            args.extend(["--manifests".to_owned(), path(&dir.join("manifests"))]);
        }
        for prefix in plan::MESH_PREFIXES {
            args.extend(["--mesh-prefix".to_owned(), prefix.to_owned()]);
        }
        if options.cni {
            let cni = Cni::of(dir, node);
            args.extend(["--cni-bin-dir".to_owned(), path(&cni.bin_dir)]);
            args.extend(["--cni-conf-dir".to_owned(), path(&cni.conf_dir)]);
        }
        args.extend(options.node_flags.iter().cloned());
        Ok(Self { node: Arc::clone(node), args, dir: dir.into(), process: None })
    }

    /// Starts the agent and waits until it is ready.
    pub fn start(&mut self) -> Result<()> {
        self.launch()?;
        self.await_ready()
    }

    /// Starts the agent without waiting.
    pub fn launch(&mut self) -> Result<()> {
        ensure!(self.process.is_none(), "the agent of {} runs already", self.node.name());
        self.process = Some(self.start_another()?);
        Ok(())
    }

    /// Starts another agent beside this one, as a rolling update does, without waiting for anything.
    pub fn start_another(&self) -> Result<Running> {
        let mut command = self.command()?;
        command.args(&self.args);
        let (stdout, stderr) = (self.access_log_file(), self.log_file());
        Running::start_logged(command, &stdout, &stderr)
    }

    /// The same until the new one has this one's place, and is what this is from now on. Returns the old one.
    pub fn replace(&mut self) -> Result<Running> {
        let new = self.start_another()?;
        self.is_replaced_by(new)
    }

    /// The same by another command, as in [`Self::launch_by`].
    pub fn replace_by(&mut self, command: Command) -> Result<Running> {
        let new = self.start_by(command)?;
        self.is_replaced_by(new)
    }

    fn is_replaced_by(&mut self, new: Running) -> Result<Running> {
        let old = self.process.replace(new).context("the agent does not run")?;
        let succeeded = eventually(Duration::from_secs(30), || {
            let metrics = self.metrics().ok()?;
            (metrics.sum("mtls_agent_ready", &[("condition", "succession")]) == 1.0).then_some(())
        });
        succeeded.with_context(|| format!("no agent succeeded on {}:\n{}", self.node.name(), self.log()))?;
        self.await_ready()?;
        Ok(old)
    }

    /// Starts it by another command, which is asked to end when it is dropped: a container runtime, say.
    pub fn launch_by(&mut self, command: Command) -> Result<()> {
        ensure!(self.process.is_none(), "the agent of {} runs already", self.node.name());
        self.process = Some(self.start_by(command)?);
        Ok(())
    }

    fn start_by(&self, command: Command) -> Result<Running> {
        let process = Running::start_logged(command, &self.access_log_file(), &self.log_file())?;
        Ok(process.stopped_by(nix::sys::signal::Signal::SIGTERM))
    }

    /// The product's binary in the place where this agent runs, without arguments.
    pub fn command(&self) -> Result<Command> {
        let mut command = self.node.command_in("agent", requirements::mtls()?);
        command.env("RUST_LOG", std::env::var("MTLS_LAB_RUST_LOG").unwrap_or_else(|_| "info".into()));
        Ok(command)
    }

    /// The arguments it is started with.
    pub fn args(&mut self) -> &mut Vec<String> {
        &mut self.args
    }

    pub fn await_ready(&mut self) -> Result<()> {
        self.await_ready_within(Duration::from_secs(30))
    }

    pub fn await_ready_within(&mut self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            match self.get("/healthz/ready") {
                Ok(answer) if answer.status == 200 => return Ok(()),
                _ if !self.process.as_mut().is_some_and(Running::alive) => {
                    bail!("the agent of {} ended:\n{}", self.node.name(), self.log());
                }
                answer if Instant::now() > deadline => {
                    bail!("the agent of {} is not ready: {answer:?}\n{}", self.node.name(), self.log());
                }
                _ => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    /// Ends it as a crash would.
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// Asks it to end, and returns at once.
    pub fn terminate(&self) -> Result<()> {
        self.process.as_ref().context("the agent does not run")?.terminate()
    }

    /// Waits for its end after [`terminate`](Self::terminate); its exit must be clean.
    pub fn await_end(&mut self, limit: Duration) -> Result<()> {
        self.process.take().context("the agent does not run")?.finish_within(limit)?.success().map(drop)
    }

    pub fn alive(&mut self) -> bool {
        self.process.as_mut().is_some_and(Running::alive)
    }

    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Running::pid)
    }

    /// Memory the agent occupies now, in bytes.
    pub fn resident_bytes(&self) -> Result<u64> {
        let pid = self.pid().context("the agent does not run")?;
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        Ok(line.trim().trim_end_matches(" kB").trim().parse::<u64>()? * 1024)
    }

    /// A page of the admin port.
    pub fn get(&self, path: &str) -> Result<Response> {
        http_get(self.node.netns(), SocketAddr::from(([127, 0, 0, 1], 15020)), path)
    }

    pub fn metrics(&self) -> Result<Metrics> {
        Ok(Metrics::parse(&self.get("/metrics")?.body))
    }

    /// What `mtls status` prints.
    pub fn status(&self, args: &[&str]) -> Result<String> {
        Ok(self.ask(&[&["status"], args].concat())?.success()?.stdout)
    }

    /// Runs a subcommand that asks this agent; its exit status is the caller's to judge.
    pub fn ask(&self, args: &[&str]) -> Result<Finished> {
        let mut command = self.command()?;
        command.args(args).arg("--admin-socket").arg(self.dir.join(format!("{}.sock", self.node.name())));
        Running::start(command)?.finish()
    }

    /// `mtls readiness` to its end; its exit status is the caller's to judge.
    pub fn readiness(&self, args: &[&str]) -> Result<Finished> {
        let mut command = self.command()?;
        command.arg("readiness").args(args);
        command.arg("--admin-socket").arg(self.dir.join(format!("{}.sock", self.node.name())));
        Running::start(command)?.finish()
    }

    /// Every line of the access log so far.
    pub fn access_log(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(self.access_log_file()).unwrap_or_default();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Waits for a line of the access log.
    pub fn access_log_line(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        let found =
            eventually(Duration::from_secs(10), || self.access_log().into_iter().find(|line| wanted(line)));
        found.with_context(|| {
            let lines: Vec<String> = self.access_log().iter().rev().take(10).map(Value::to_string).collect();
            format!(
                "no {what} in the access log of {}; its last lines:\n{}",
                self.node.name(),
                lines.join("\n")
            )
        })
    }

    /// Everything the agent logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_file()).unwrap_or_default()
    }

    fn access_log_file(&self) -> PathBuf {
        self.dir.join(format!("{}.access.log", self.node.name()))
    }

    fn log_file(&self) -> PathBuf {
        self.dir.join(format!("{}.log", self.node.name()))
    }
}

/// Prometheus metrics of one scrape.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    samples: Vec<(String, BTreeMap<String, String>, f64)>,
}

impl Metrics {
    fn parse(text: &str) -> Self {
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        Self { samples: lines.filter_map(sample).collect() }
    }

    /// The sum of all samples of a name that carry these labels.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let carries = |have: &BTreeMap<String, String>| {
            labels.iter().all(|(key, value)| have.get(*key).is_some_and(|found| found == value))
        };
        self.samples.iter().filter(|(have, l, _)| have == name && carries(l)).map(|(_, _, value)| value).sum()
    }

    /// The labels that samples of a name carry; None if there is no sample.
    pub fn labels(&self, name: &str) -> Option<BTreeSet<String>> {
        let samples = self.samples.iter().filter(|(have, _, _)| have == name);
        samples.map(|(_, labels, _)| labels.keys().cloned().collect()).reduce(|a: BTreeSet<_>, b| &a | &b)
    }

    pub fn has(&self, name: &str) -> bool {
        self.samples.iter().any(|(have, _, _)| have == name)
    }

    /// Names, for a person who looks for one.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.samples.iter().map(|(name, _, _)| name.as_str()).collect();
        names.dedup();
        names
    }
}

/// `name{label="value",…} number`, as the Prometheus text format has it.
fn sample(line: &str) -> Option<(String, BTreeMap<String, String>, f64)> {
    let (head, value) = line.rsplit_once(' ')?;
    let (name, rest) = head.split_once('{').unwrap_or((head, "}"));
    let mut labels = BTreeMap::new();
    let mut rest = rest.trim_end_matches('}');
    while let Some((key, after)) = rest.split_once("=\"") {
        let (value, after) = after.split_once('"')?;
        labels.insert(key.trim_start_matches(',').to_owned(), value.to_owned());
        rest = after;
    }
    Some((name.to_owned(), labels, value.parse().ok()?))
}

/// Tries until something is there or the time is over.
pub fn eventually<T>(limit: Duration, mut attempt: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = attempt() {
            return Some(found);
        }
        if Instant::now() > deadline {
            return None;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn launch_ca(lab: &Lab, node: &Arc<Node>, options: &Options) -> Result<Running> {
    let dir = lab.dir();
    let listen = SocketAddr::new(node.ip(), CA_PORT);
    let mut command = node.command_in("agent", requirements::mtls()?);
    command.arg("ca").arg("--listen").arg(listen.to_string());
    command.arg("--trust-domain").arg(options.trust_domain);
    if options.kubernetes {
        command.arg("--kubeconfig").arg(cluster::kubeconfig(dir, "ca"));
    } else {
        command.arg("--ca-dir").arg(dir.join("ca")).arg("--root-out").arg(root_file(dir));
        command.arg("--manifests").arg(dir.join("manifests")).arg("--tokens").arg(dir.join("tokens.yaml"));
    }
    command.arg("--leaf-lifetime").arg(options.leaf_lifetime);
    let log = dir.join("ca.log");
    Running::start_logged(command, &log, &log)
}

fn start_ca(lab: &Lab, node: &Arc<Node>, options: &Options) -> Result<Running> {
    let (dir, listen) = (lab.dir(), SocketAddr::new(node.ip(), CA_PORT));
    let mut ca = launch_ca(lab, node, options)?;
    let serving = eventually(Duration::from_secs(20), || {
        if options.kubernetes {
            cluster::mount_roots(lab, &root_file(dir));
        }
        let up =
            root_file(dir).exists() && node.netns().within(|| std::net::TcpStream::connect(listen)).is_ok();
        (up || !ca.alive()).then_some(up)
    });
    if serving != Some(true) {
        bail!(
            "the certificate authority does not serve:\n{}",
            std::fs::read_to_string(dir.join("ca.log")).unwrap_or_default()
        );
    }
    Ok(ca)
}

fn root_file(dir: &Path) -> PathBuf {
    dir.join("root-cert.pem")
}

pub(crate) fn token_file(dir: &Path, node: &Node) -> PathBuf {
    dir.join(format!("{}.token", node.name()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_summed_by_label() {
        let text = "# TYPE a counter\na{x=\"1\",y=\"p, q\"} 2\na{x=\"2\"} 3\nb 4\n";
        let metrics = Metrics::parse(text);
        assert_eq!(metrics.sum("a", &[]), 5.0);
        assert_eq!(metrics.sum("a", &[("y", "p, q")]), 2.0);
        assert_eq!(metrics.sum("a", &[("x", "3")]), 0.0);
        assert_eq!(metrics.sum("b", &[]), 4.0);
        assert_eq!(metrics.labels("a"), Some(["x", "y"].map(str::to_owned).into()));
        assert_eq!((metrics.labels("b"), metrics.labels("c")), (Some(BTreeSet::new()), None));
    }
}
