//! `mtls ca`: flags in, a running certificate authority until SIGTERM or SIGINT.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use crate::ca::{
    AnyOf, Callers, CertificateAuthority, InForce, JoinTokens, NodeAuthorization, NodeCertificates, Service,
    serve, write_root_bundle,
};
use crate::identity::{SpiffeId, TrustDomain};
use crate::mesh::{Settings, Source};

use super::ca_in_cluster::{InCluster, Joined, in_cluster};

/// Sets up the process around [`Ca::run`].
pub fn main(ca: Ca) -> anyhow::Result<()> {
    super::log_to_stderr();
    super::forbid_core_dumps()?;
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("starting the control runtime")?
        .block_on(ca.run())
}

/// Below this, the authority's own end is worth a warning at each start.
const NEAR_END: Duration = Duration::from_secs(30 * 24 * 3600);

/// Serve certificates to the nodes' agents.
#[derive(clap::Args, Debug)]
pub struct Ca {
    /// Address to serve on.
    #[arg(long, value_name = "ADDR", default_value = "0.0.0.0:15012")]
    listen: SocketAddr,

    /// DNS name or IP address under which agents reach this authority; repeatable. By default the listen address, or
    /// every address of this machine if that is a wildcard.
    #[arg(long, value_name = "NAME_OR_IP")]
    advertise: Vec<String>,

    /// Trust domain of every identity it signs for.
    #[arg(long, value_name = "NAME", default_value = "cluster.local")]
    pub(super) trust_domain: TrustDomain,

    /// Directory of ca-cert.pem, ca-key.pem, cert-chain.pem and root-cert.pem. A root is made there if it has none
    /// of them; changed files are taken over when all are good together. Without this flag a root is made in memory,
    /// another one at every start; in a cluster it is in a Secret.
    #[arg(long, value_name = "DIR")]
    ca_dir: Option<PathBuf>,

    /// Where to write the public root bundle, for agents.
    #[arg(long, value_name = "FILE")]
    root_out: Option<PathBuf>,

    /// Directory of Kubernetes manifests: a node gets certificates only for identities of its own enrolled pods.
    #[arg(long, value_name = "DIR", required_unless_present_any = ["kubernetes", "kubeconfig"],
        conflicts_with_all = ["kubernetes", "kubeconfig"])]
    manifests: Option<PathBuf>,

    #[command(flatten)]
    cluster: InCluster,

    /// YAML map from node name to the join token of the node's agent.
    #[arg(long, value_name = "FILE", required_unless_present_any = ["node_ca", "kubernetes", "kubeconfig"])]
    tokens: Option<PathBuf>,

    /// Authorities (PEM) of the nodes' own certificates, whose subject is O=system:nodes, CN=system:node:NAME as
    /// kubelets have it: an agent that shows one needs no token.
    #[arg(long, value_name = "FILE")]
    node_ca: Option<PathBuf>,

    /// Longest lifetime of a workload's certificate, for example 24h or 10s.
    #[arg(long, value_name = "DURATION", default_value = "24h", value_parser = lifetime)]
    pub(super) leaf_lifetime: Duration,
}

impl Ca {
    pub async fn run(self) -> anyhow::Result<()> {
        // First, so that a signal during the start is not lost.
        let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;

        let cluster = self.cluster.open(&self.trust_domain).await?;
        let kept = match &cluster {
            Some(cluster) if self.ca_dir.is_none() => Some(cluster.secret(&self)),
            _ => None,
        };
        let authority = match &kept {
            Some(secret) => secret.open().await?,
            None => self.authority()?,
        };
        warn_of_end(&authority);
        let callers = self.callers(cluster.as_ref())?;
        let nodes = Arc::new(self.nodes(cluster.as_ref())?);
        let listener = TcpListener::bind(self.listen)
            .await
            .with_context(|| format!("cannot serve certificates on {}", self.listen))?;
        let address = listener.local_addr().context("cannot tell the address served on")?;
        let names = match &self.advertise[..] {
            [] => local_names(address.ip())?,
            names => names.to_vec(),
        };
        if let Some(path) = &self.root_out {
            write_root_bundle(path, &authority.current())?;
        }
        let now = authority.current();
        tracing::info!(
            %address,
            names = names.join(","),
            trust_domain = %self.trust_domain,
            root_sha256 = now.root_fingerprint(),
            roots = now.roots().len(),
            leaf_lifetime = ?self.leaf_lifetime,
            "serving certificates"
        );
        let service = Service { authority: authority.clone(), callers: Arc::new(callers), nodes };
        let serving = serve(listener, names, service, async {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            tracing::info!("told to stop");
        });
        tokio::select! {
            served = serving => served?,
            () = authority.follow() => {}
            () = self.publish(&authority) => {}
            () = in_cluster(cluster, kept, &authority) => {}
        }
        tracing::info!("certificate authority stopped");
        Ok(())
    }

    /// Writes what agents need anew whenever it has changed. Never returns.
    async fn publish(&self, authority: &InForce) {
        let mut changes = authority.subscribe();
        loop {
            if changes.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
            let Some(path) = &self.root_out else { continue };
            while let Err(error) = write_root_bundle(path, &authority.current()) {
                tracing::error!(%error, "agents don't learn of the changed roots");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            tracing::info!(path = %path.display(), "the changed roots are written");
        }
    }

    /// Every kind of proof that was asked for.
    fn callers(&self, cluster: Option<&Joined>) -> anyhow::Result<AnyOf> {
        let mut kinds: Vec<Box<dyn Callers>> = Vec::new();
        if let Some(path) = &self.node_ca {
            tracing::info!(authorities = %path.display(), "nodes may show a certificate");
            kinds.push(Box::new(NodeCertificates::open(path)?));
        }
        if let Some(path) = &self.tokens {
            let tokens = JoinTokens::open(path)?;
            tracing::info!(nodes = tokens.nodes().join(","), "nodes may show a join token");
            kinds.push(Box::new(tokens));
        }
        kinds.extend(cluster.map(Joined::callers));
        Ok(AnyOf(kinds))
    }

    /// A node's identities, by the manifests or the API server's objects as they are at each request.
    fn nodes(&self, cluster: Option<&Joined>) -> anyhow::Result<impl NodeAuthorization + use<>> {
        let source = match (cluster, &self.manifests) {
            (Some(cluster), _) => cluster.pods.clone(),
            (None, Some(directory)) => Source::directory(directory.clone(), settings(&self.trust_domain))?,
            (None, None) => anyhow::bail!("--manifests is missing, and so is --kubernetes or --kubeconfig"),
        };
        Ok(move |node: &str, identity: &SpiffeId| {
            source.current().identities_on(node).any(|known| known == identity)
        })
    }

    fn authority(&self) -> anyhow::Result<Arc<InForce>> {
        let trust_domain = self.trust_domain.clone();
        let authority = match &self.ca_dir {
            Some(dir) => InForce::directory(dir, trust_domain, self.leaf_lifetime)?,
            None => {
                tracing::warn!(
                    "the root is in memory and ends with this process; agents must get the new one after a restart \
                     (--ca-dir keeps it)"
                );
                InForce::fixed(CertificateAuthority::in_memory(trust_domain, self.leaf_lifetime)?)
            }
        };
        Ok(authority)
    }
}

fn warn_of_end(authority: &InForce) {
    let left = authority.current().not_after().duration_since(SystemTime::now()).unwrap_or_default();
    if left < NEAR_END {
        let days_left = left.as_secs() / 86_400;
        tracing::warn!(days_left, "the authority's certificate ends soon: replace it");
    }
}

/// Who runs where does not depend on which policies are the mesh's.
pub(super) fn settings(trust_domain: &TrustDomain) -> Settings {
    Settings { trust_domain: trust_domain.clone(), root_namespace: "istio-system".into() }
}

/// What agents may call this machine by, seen from its listen address.
fn local_names(listen: IpAddr) -> anyhow::Result<Vec<String>> {
    if !listen.is_unspecified() {
        return Ok(vec![listen.to_canonical().to_string()]);
    }
    let interfaces = nix::ifaddrs::getifaddrs().context("cannot list this machine's addresses")?;
    let mut names: Vec<String> = interfaces
        .filter_map(|interface| {
            let address = interface.address?;
            let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
        })
        // A link-local address means nothing without its interface.
        .filter(|ip| !matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local()))
        .map(|ip| ip.to_string())
        .collect();
    names.push("localhost".into());
    names.sort();
    names.dedup();
    Ok(names)
}

fn lifetime(text: &str) -> Result<Duration, String> {
    let duration: jiff::SignedDuration = text.parse().map_err(|error: jiff::Error| error.to_string())?;
    Duration::try_from(duration)
        .ok()
        .filter(|lifetime| *lifetime >= Duration::from_secs(1))
        .ok_or_else(|| "a certificate's lifetime is at least 1s".into())
}
