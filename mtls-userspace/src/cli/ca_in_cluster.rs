//! `mtls ca` in a Kubernetes cluster: where the authority is kept, who may call, and where its roots are published.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Context;

use super::ca::{Ca, settings};
use crate::ca::{
    Callers, InForce, Published, Secret, ServiceAccount, ServiceAccounts, published_in, reviewed_by,
};
use crate::identity::TrustDomain;
use crate::kubernetes::Cluster;
use crate::mesh::{Scope, Source};

/// How often the Secret is read again, and what is published looked at.
const ROUND: Duration = Duration::from_secs(15);
/// After a round that failed.
const AGAIN: Duration = Duration::from_secs(2);
/// How often somebody who looks is told that it still fails.
const SAY_AGAIN: Duration = Duration::from_secs(60);

/// Flags of the authority in a cluster.
#[derive(clap::Args, Debug)]
pub struct InCluster {
    /// Serve the agents of this pod's cluster: callers show ServiceAccount tokens, a node gets certificates only for
    /// identities of its own enrolled pods, and the root is kept in a Secret unless there is a --ca-dir.
    #[arg(long)]
    kubernetes: bool,

    /// The same, for the cluster and as the user that this file names.
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,

    /// Namespace of the Secret, the ConfigMap and the agents [default: this pod's own].
    #[arg(long, value_name = "NAME")]
    namespace: Option<String>,

    /// Secret with ca-cert.pem, ca-key.pem, cert-chain.pem and root-cert.pem; made with a new root if it isn't there.
    #[arg(long, value_name = "NAME", default_value = "mtls-ca")]
    ca_secret: String,

    /// ConfigMap, and ClusterTrustBundle where the API server has them, that the roots are published as.
    #[arg(long, value_name = "NAME", default_value = "mtls-ca-root")]
    root_name: String,

    /// Audience that agents' tokens are made for.
    #[arg(long, value_name = "NAME", default_value = "mtls-ca")]
    audience: String,

    /// ServiceAccount of the agents, NAMESPACE/NAME; repeatable [default: mtls-node of the namespace].
    #[arg(long, value_name = "ACCOUNT")]
    agent: Vec<ServiceAccount>,
}

/// A cluster that the authority serves.
pub(super) struct Joined {
    cluster: Cluster,
    /// Who runs where.
    pub(super) pods: Source,
    namespace: String,
    ca_secret: String,
    root_name: String,
    audience: String,
    agents: Vec<ServiceAccount>,
}

impl InCluster {
    /// `None` when no cluster is asked for.
    pub(super) async fn open(&self, trust_domain: &TrustDomain) -> anyhow::Result<Option<Joined>> {
        if !self.kubernetes && self.kubeconfig.is_none() {
            return Ok(None);
        }
        let cluster = Cluster::open(self.kubeconfig.as_deref()).await?;
        let namespace = self.namespace.clone().unwrap_or_else(|| cluster.namespace.clone());
        let agents = match &self.agent[..] {
            [] => {
                let default = format!("{namespace}/mtls-node").parse();
                vec![default.map_err(anyhow::Error::msg).context("--namespace")?]
            }
            agents => agents.to_vec(),
        };
        let pods = Source::kubernetes(cluster.clone(), settings(trust_domain), Scope::Workloads).await;
        Ok(Some(Joined {
            cluster,
            pods,
            namespace,
            ca_secret: self.ca_secret.clone(),
            root_name: self.root_name.clone(),
            audience: self.audience.clone(),
            agents,
        }))
    }
}

impl Joined {
    pub(super) fn secret(&self, ca: &Ca) -> Secret {
        let Self { cluster, namespace, ca_secret, .. } = self;
        Secret::new(cluster, namespace, ca_secret, ca.trust_domain.clone(), ca.leaf_lifetime)
    }

    pub(super) fn callers(&self) -> Box<dyn Callers> {
        let agents: Vec<String> = self.agents.iter().map(ToString::to_string).collect();
        tracing::info!(
            agents = agents.join(","),
            audience = self.audience,
            "agents may show ServiceAccount tokens"
        );
        let reviews = reviewed_by(&self.cluster, self.pods.clone());
        Box::new(ServiceAccounts::new(reviews, self.audience.clone(), self.agents.clone()))
    }

    fn published(&self) -> Published {
        published_in(&self.cluster, &self.namespace, &self.root_name)
    }
}

/// Follows the Secret and keeps the roots published. Never returns.
pub(super) async fn in_cluster(joined: Option<Joined>, kept: Option<Secret>, authority: &InForce) {
    let Some(joined) = joined else { return std::future::pending().await };
    let mut published = joined.published();
    let mut changes = authority.subscribe();
    let mut said: Option<(String, Instant)> = None;
    loop {
        changes.mark_unchanged();
        // In this order: a replica that has not heard of new roots must not put the old ones back.
        let read = match &kept {
            Some(secret) => secret.refresh(authority).await,
            None => Ok(()),
        };
        let outcome = match read {
            Ok(()) => published.publish(&authority.current().root_bundle()).await,
            Err(error) => Err(error),
        };
        let next = match outcome {
            Ok(()) => {
                said = None;
                ROUND
            }
            Err(error) => {
                let error = error.to_string();
                if said.as_ref().is_none_or(|(last, at)| *last != error || at.elapsed() >= SAY_AGAIN) {
                    tracing::error!(error, "the authority goes on as it last was");
                    said = Some((error, Instant::now()));
                }
                AGAIN
            }
        };
        tokio::select! {
            () = tokio::time::sleep(next) => {}
            Ok(()) = changes.changed() => {}
        }
    }
}
