//! Configuration: flags and a YAML file in, one validated [`Config`] out.
//!
//! The same struct is read from both, so that every flag is also a key of the file; flags win. All mistakes are
//! reported at once, each with the flag's name and the remedy.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::ValueEnum;
use ipnet::IpNet;
use serde::Deserialize;

use crate::addr;
use crate::agent_socket;
use crate::cni::{self, WhenAway};
use crate::features::Forced;
use crate::identity::TrustDomain;
use crate::observe::AccessLog;

mod identity_source;
mod mesh_source;

pub use identity_source::IdentitySource;
pub use mesh_source::MeshSource;

/// What `mtls node` was told, before validation.
#[derive(clap::Args, Deserialize, Default, Debug)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Options {
    /// YAML file with the same keys as these flags; flags win
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    config: Option<PathBuf>,
    /// Name of this node, as in the pods' `spec.nodeName`
    #[arg(long)]
    node: Option<String>,
    /// Directory of Kubernetes manifests that describe the mesh; changes are picked up as they happen
    #[arg(long, value_name = "DIR")]
    manifests: Option<PathBuf>,
    /// Follow the Kubernetes API instead, as this pod's service account [default in a pod without --manifests]
    #[arg(long)]
    kubernetes: bool,
    /// Follow the Kubernetes API that this file names, as the user that it names
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// With the Kubernetes API: believe pods' annotations mtls.dev/netns and mtls.dev/cgroup. For laboratories: whoever may
    /// make a pod could name another pod's
    #[arg(long)]
    trust_pod_annotations: bool,
    /// Certificate authority, for example https://10.0.0.1:15012
    #[arg(long, value_name = "URL")]
    ca_address: Option<String>,
    /// Instead of an authority's address: the signer of the Kubernetes API's certificate signing requests, for example
    /// example.org/mesh
    #[arg(long, value_name = "NAME")]
    ca_signer: Option<String>,
    /// Roots that the authority's own certificate, or what a --ca-signer signs, must lead to (PEM)
    #[arg(long, value_name = "FILE")]
    ca_root: Option<PathBuf>,
    /// File with the token that proves this node to the authority
    #[arg(long, value_name = "FILE")]
    ca_token_file: Option<PathBuf>,
    /// Instead of a token: this node's own certificate (PEM, leaf first), O=system:nodes, CN=system:node:NAME
    #[arg(long, value_name = "FILE")]
    ca_node_cert: Option<PathBuf>,
    /// Its private key (PEM) [default: in the same file]
    #[arg(long, value_name = "FILE")]
    ca_node_key: Option<PathBuf>,
    /// Instead of an authority: unix socket of a SPIFFE Workload API, for example unix:///run/spire/agent.sock
    #[arg(long, value_name = "SOCKET")]
    spiffe_socket: Option<String>,
    /// Revocation lists (PEM) for peers' certificates, besides what the authority gives; changes are picked up
    #[arg(long, value_name = "FILE")]
    crl: Option<PathBuf>,
    /// Trust domain of every identity [default: cluster.local]
    #[arg(long)]
    trust_domain: Option<String>,
    /// Namespace whose selector-less policies hold for the whole mesh [default: istio-system]
    #[arg(long)]
    root_namespace: Option<String>,
    /// Lifetime asked for workload certificates, in seconds [default: 86400]
    #[arg(long, value_name = "SECONDS")]
    certificate_lifetime: Option<u64>,
    /// cgroup2 directory above every pod of this node, or where version 1 is mounted the one that holds it as `unified`
    /// [default: the cgroup2 mount]
    #[arg(long, value_name = "DIR")]
    cgroup_root: Option<PathBuf>,
    /// Directory on a bpffs where links and maps outlive this process [default: /sys/fs/bpf/mtls]
    #[arg(long, value_name = "DIR")]
    bpffs: Option<PathBuf>,
    /// Address for /metrics and /healthz [default: 127.0.0.1:15020]
    #[arg(long, value_name = "ADDR", value_parser = addr::listening)]
    admin: Option<SocketAddr>,
    /// Unix socket for `mtls status` and its kin [default: /run/mtls/admin.sock]
    #[arg(long, value_name = "PATH")]
    admin_socket: Option<PathBuf>,
    /// Unix socket for CNI plugins and succeeding agents [default: agent.sock beside the admin socket]
    #[arg(long, value_name = "PATH")]
    agent_socket: Option<PathBuf>,
    /// The node's /proc, where pods are found by their processes [default: /proc]
    #[arg(long, value_name = "DIR")]
    proc: Option<PathBuf>,
    /// Install the CNI plugin here, and keep it in the configuration that --cni-conf-dir names
    #[arg(long, value_name = "DIR")]
    cni_bin_dir: Option<PathBuf>,
    /// The node's network configuration, usually /etc/cni/net.d
    #[arg(long, value_name = "DIR")]
    cni_conf_dir: Option<PathBuf>,
    /// Seconds that a pod's start waits for the agent before it fails and is tried again [default: 20]
    #[arg(long, value_name = "SECONDS")]
    cni_wait: Option<u64>,
    /// What becomes of pods that start while no agent runs [default: refuse]
    #[arg(long)]
    cni_when_agent_is_away: Option<WhenAway>,
    /// Namespaces whose pods start without the agent's word [default: kube-system, mtls-system]
    #[arg(long, value_name = "NAMESPACE")]
    cni_exclude_namespace: Vec<String>,
    /// Capture connections to these networks [default: exactly the addresses of enrolled pods and services]
    #[arg(long, value_name = "CIDR")]
    mesh_prefix: Vec<IpNet>,
    /// What happens between two pods of this node [default: relay]
    #[arg(long)]
    same_node: Option<SameNode>,
    /// Data threads [default: one per core, at most 8]
    #[arg(long)]
    workers: Option<usize>,
    /// Access log, one line per connection end, on standard output [default: text]
    #[arg(long)]
    access_log: Option<AccessLog>,
    /// Seconds that open connections get to finish after SIGTERM [default: 30]
    #[arg(long, value_name = "SECONDS")]
    drain: Option<u64>,
    /// Congestion control of the pods' loopback legs; `host` leaves it alone [default: cubic, else reno]
    #[arg(long, value_name = "NAME")]
    loopback_congestion: Option<String>,
    /// Congestion control of the tunnels between nodes [default: the host's]
    #[arg(long, value_name = "NAME")]
    tunnel_congestion: Option<String>,
    /// Whether connections that exchange little share the tunnels from one pod to another [default: auto]
    #[arg(long)]
    share_tunnels: Option<ShareTunnels>,
    /// Whether connections that move much go on on threads of their own, in nobody's way [default: auto]
    #[arg(long)]
    bulk_threads: Option<BulkThreads>,
    /// Not what the kernel is found to do: NAME=on must work, NAME=off is left alone; names are those of `mtls lab features`
    #[arg(long, value_name = "NAME=on|off")]
    feature: Vec<Forced>,
    /// Whether the kernel carries the TLS records of long streams; `on` fails at start where it can't [default: auto]
    #[arg(long)]
    kernel_tls: Option<KernelTls>,
    /// Bytes after which a stream counts as long [default: 67108864]
    #[arg(long, value_name = "BYTES")]
    kernel_tls_after: Option<u64>,
}

/// How many connections a tunnel carries at once.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ShareTunnels {
    /// Those that go from one pod to another share one until they become fast
    #[default]
    Auto,
    /// One
    Off,
}

/// Where connections are relayed that move much.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BulkThreads {
    /// On a second thread of each worker, from when they have moved some megabytes at a high pace
    #[default]
    Auto,
    /// Among all others
    Off,
}

/// Who carries the records of long streams.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KernelTls {
    /// The kernel, where it has TLS and is no slower at it than this process
    #[default]
    Auto,
    /// This process
    Off,
    /// The kernel
    On,
}

/// Same-node connections: the same checks either way.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SameNode {
    /// From loopback to loopback through the agent, without TLS: nothing crosses a veth or bridge
    #[default]
    Relay,
    /// Through a TLS tunnel, as between nodes
    Encrypt,
    /// From pod to pod in the kernel, once the first connection of a pair was let in: nobody copies a byte. They cross
    /// the node's pod network (veth, bridge) as the application wrote them
    Direct,
}

/// What `mtls node` runs with.
#[derive(Debug)]
pub struct Config {
    pub node: Arc<str>,
    pub mesh: MeshSource,
    pub identities: IdentitySource,
    pub crl: Option<PathBuf>,
    pub trust_domain: TrustDomain,
    pub root_namespace: Arc<str>,
    pub certificate_lifetime: Duration,
    pub cgroup_root: Option<PathBuf>,
    pub bpffs: PathBuf,
    pub admin: SocketAddr,
    pub admin_socket: PathBuf,
    pub agent_socket: PathBuf,
    /// Of the node.
    pub proc: PathBuf,
    /// Absent: no plugin is installed.
    pub cni: Option<cni::Settings>,
    /// Empty: exactly the addresses in the mesh.
    pub mesh_prefixes: Vec<IpNet>,
    pub same_node: SameNode,
    pub workers: usize,
    pub access_log: AccessLog,
    pub drain: Duration,
    /// Congestion control on the legs that never leave a pod, where a paced one (BBR) costs a third of the throughput.
    /// Absent: cubic, else reno. Empty: the host's choice.
    pub loopback_congestion: Option<String>,
    /// Congestion control between the nodes. Absent: the host's choice.
    pub tunnel_congestion: Option<String>,
    pub share_tunnels: ShareTunnels,
    pub bulk_threads: BulkThreads,
    pub kernel_tls: KernelTls,
    /// Bytes.
    pub kernel_tls_after: u64,
    /// What the operator decided about paths; about the others the kernel decides.
    pub features: Vec<Forced>,
}

/// Everything wrong with a configuration, together.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read configuration file {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("configuration file {path}: {message}; the keys are the flags of `mtls node --help`")]
    Parse { path: PathBuf, message: String },
    #[error("{0}")]
    Invalid(Mistakes),
}

/// A list of independent mistakes.
#[derive(Debug, Default)]
pub struct Mistakes(Vec<String>);

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("; "))
    }
}

impl Options {
    /// Merges the file under the flags and validates the result.
    pub fn validate(self) -> Result<Config, Error> {
        let options = match &self.config {
            Some(path) => {
                let file = Self::read(path)?;
                self.over(file)
            }
            None => self,
        };
        let mut mistakes = Mistakes::default();
        let agent_socket = options.agent_socket.clone();
        let admin_socket = options.admin_socket.clone().unwrap_or_else(|| "/run/mtls/admin.sock".into());
        let agent_socket = agent_socket.unwrap_or_else(|| agent_socket::beside(&admin_socket));
        let cni = mistakes.cni(&options, &agent_socket);
        let identities = options.identities(&mut mistakes);
        let mesh = options.mesh(std::env::var_os(IN_A_POD).is_some(), &mut mistakes);
        let node = mistakes.required("node", options.node);
        let trust_domain = options.trust_domain.as_deref().unwrap_or("cluster.local").parse::<TrustDomain>();
        if let Err(error) = &trust_domain {
            mistakes.0.push(format!("--trust-domain: {error}"));
        }
        let workers = options.workers.unwrap_or_else(default_workers);
        if !(1..=MAX_WORKERS).contains(&workers) {
            mistakes.0.push(format!("--workers must be between 1 and {MAX_WORKERS}"));
        }
        let certificate_lifetime = options.certificate_lifetime.unwrap_or(24 * 3600);
        if certificate_lifetime == 0 {
            mistakes.0.push("--certificate-lifetime must be at least 1".into());
        }
        let (Some(node), Some(mesh), Some(identities), Ok(trust_domain), true) =
            (node, mesh, identities, trust_domain, mistakes.0.is_empty())
        else {
            return Err(Error::Invalid(mistakes));
        };
        Ok(Config {
            node: node.into(),
            mesh,
            identities,
            crl: options.crl,
            trust_domain,
            root_namespace: options.root_namespace.as_deref().unwrap_or("istio-system").into(),
            certificate_lifetime: Duration::from_secs(certificate_lifetime),
            cgroup_root: options.cgroup_root,
            bpffs: options.bpffs.unwrap_or_else(|| "/sys/fs/bpf/mtls".into()),
            admin: options.admin.unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], 15020))),
            admin_socket,
            agent_socket,
            proc: options.proc.unwrap_or_else(|| "/proc".into()),
            cni,
            mesh_prefixes: options.mesh_prefix,
            same_node: options.same_node.unwrap_or_default(),
            workers,
            access_log: options.access_log.unwrap_or(AccessLog::Text),
            drain: Duration::from_secs(options.drain.unwrap_or(30)),
            loopback_congestion: options
                .loopback_congestion
                .map(|name| if name == "host" { String::new() } else { name }),
            tunnel_congestion: options.tunnel_congestion.filter(|name| name != "host"),
            share_tunnels: options.share_tunnels.unwrap_or_default(),
            bulk_threads: options.bulk_threads.unwrap_or_default(),
            kernel_tls: options.kernel_tls.unwrap_or_default(),
            kernel_tls_after: options.kernel_tls_after.unwrap_or(64 << 20),
            features: options.feature,
        })
    }

    fn read(path: &Path) -> Result<Self, Error> {
        let text =
            std::fs::read_to_string(path).map_err(|source| Error::Read { path: path.into(), source })?;
        serde_path_to_error::deserialize(serde_yaml_ng::Deserializer::from_str(&text))
            .map_err(|error| Error::Parse { path: path.into(), message: error.to_string() })
    }

    fn over(self, file: Self) -> Self {
        Self {
            config: self.config,
            node: self.node.or(file.node),
            manifests: self.manifests.or(file.manifests),
            kubernetes: self.kubernetes || file.kubernetes,
            kubeconfig: self.kubeconfig.or(file.kubeconfig),
            trust_pod_annotations: self.trust_pod_annotations || file.trust_pod_annotations,
            ca_address: self.ca_address.or(file.ca_address),
            ca_signer: self.ca_signer.or(file.ca_signer),
            ca_root: self.ca_root.or(file.ca_root),
            ca_token_file: self.ca_token_file.or(file.ca_token_file),
            ca_node_cert: self.ca_node_cert.or(file.ca_node_cert),
            ca_node_key: self.ca_node_key.or(file.ca_node_key),
            spiffe_socket: self.spiffe_socket.or(file.spiffe_socket),
            crl: self.crl.or(file.crl),
            trust_domain: self.trust_domain.or(file.trust_domain),
            root_namespace: self.root_namespace.or(file.root_namespace),
            certificate_lifetime: self.certificate_lifetime.or(file.certificate_lifetime),
            cgroup_root: self.cgroup_root.or(file.cgroup_root),
            bpffs: self.bpffs.or(file.bpffs),
            admin: self.admin.or(file.admin),
            admin_socket: self.admin_socket.or(file.admin_socket),
            agent_socket: self.agent_socket.or(file.agent_socket),
            proc: self.proc.or(file.proc),
            cni_bin_dir: self.cni_bin_dir.or(file.cni_bin_dir),
            cni_conf_dir: self.cni_conf_dir.or(file.cni_conf_dir),
            cni_wait: self.cni_wait.or(file.cni_wait),
            cni_when_agent_is_away: self.cni_when_agent_is_away.or(file.cni_when_agent_is_away),
            cni_exclude_namespace: if self.cni_exclude_namespace.is_empty() {
                file.cni_exclude_namespace
            } else {
                self.cni_exclude_namespace
            },
            mesh_prefix: if self.mesh_prefix.is_empty() { file.mesh_prefix } else { self.mesh_prefix },
            same_node: self.same_node.or(file.same_node),
            workers: self.workers.or(file.workers),
            access_log: self.access_log.or(file.access_log),
            drain: self.drain.or(file.drain),
            loopback_congestion: self.loopback_congestion.or(file.loopback_congestion),
            tunnel_congestion: self.tunnel_congestion.or(file.tunnel_congestion),
            share_tunnels: self.share_tunnels.or(file.share_tunnels),
            bulk_threads: self.bulk_threads.or(file.bulk_threads),
            kernel_tls: self.kernel_tls.or(file.kernel_tls),
            kernel_tls_after: self.kernel_tls_after.or(file.kernel_tls_after),
            // The last word on a feature counts.
            feature: [file.feature, self.feature].concat(),
        }
    }
}

impl Mistakes {
    fn cni(&mut self, options: &Options, agent_socket: &Path) -> Option<cni::Settings> {
        let (bin_dir, conf_dir) = match (&options.cni_bin_dir, &options.cni_conf_dir) {
            (Some(bin_dir), Some(conf_dir)) => (bin_dir.clone(), conf_dir.clone()),
            (None, None) => return None,
            _ => {
                self.0.push("--cni-bin-dir and --cni-conf-dir go together".into());
                return None;
            }
        };
        let wait = options.cni_wait.unwrap_or(20);
        if !(1..=120).contains(&wait) {
            self.0.push("--cni-wait must be between 1 and 120".into());
        }
        let mut exclude_namespaces = options.cni_exclude_namespace.clone();
        if exclude_namespaces.is_empty() {
            exclude_namespaces = ["kube-system", "mtls-system"].map(str::to_owned).into();
        }
        Some(cni::Settings {
            bin_dir,
            conf_dir,
            agent_socket: agent_socket.into(),
            wait: Duration::from_secs(wait),
            when_agent_is_away: options.cni_when_agent_is_away.unwrap_or_default(),
            exclude_namespaces,
        })
    }

    fn required<T>(&mut self, flag: &str, value: Option<T>) -> Option<T> {
        if value.is_none() {
            self.0.push(format!("--{flag} is missing"));
        }
        value
    }
}

/// Kubernetes sets this in every pod.
const IN_A_POD: &str = "KUBERNETES_SERVICE_HOST";
const MAX_WORKERS: usize = 64;

fn default_workers() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(8)
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn complete() -> Options {
        Options {
            node: Some("a".into()),
            manifests: Some("/m".into()),
            ca_address: Some("https://10.0.0.1:15012".into()),
            ca_root: Some("/r".into()),
            ca_token_file: Some("/t".into()),
            ..Options::default()
        }
    }

    #[test]
    fn all_mistakes_are_reported_at_once() {
        let error = Options { workers: Some(0), ..Options::default() }.validate().unwrap_err().to_string();
        for expected in
            ["--node is missing", "--manifests is missing", "--ca-root is missing", "--workers must be"]
        {
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn a_complete_configuration_gets_the_documented_defaults() {
        let config = complete().validate().unwrap();
        assert_eq!(config.same_node, SameNode::Relay);
        assert_eq!(config.certificate_lifetime, Duration::from_secs(86_400));
        assert_eq!((config.kernel_tls, config.kernel_tls_after), (KernelTls::Auto, 64 << 20));
        assert_eq!(config.admin.to_string(), "127.0.0.1:15020");
    }

    #[test]
    fn certificates_are_never_asked_for_in_the_clear() {
        let error = Options { ca_address: Some("http://ca:1".into()), ..complete() }.validate().unwrap_err();
        assert!(error.to_string().contains("https://"), "{error}");
    }

    #[test]
    fn flags_win_over_the_file_and_unknown_keys_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node.yaml");
        std::fs::write(&path, "node: from-file\nsame-node: encrypt\nmesh-prefix: [10.0.0.0/8]\n").unwrap();
        let config = Options { config: Some(path.clone()), ..complete() }.validate().unwrap();
        assert_eq!(&*config.node, "a");
        assert_eq!(config.same_node, SameNode::Encrypt);
        assert_eq!(config.mesh_prefixes.len(), 1);

        std::fs::write(&path, "same-nod: encrypt\n").unwrap();
        let error = Options { config: Some(path), ..complete() }.validate().unwrap_err().to_string();
        assert!(error.contains("same-nod") && error.contains("node.yaml"), "{error}");
    }
}
