//! The Kubernetes API as this process reaches it: a pod's service account or a kubeconfig in, a client and the objects
//! of a kind as they come and go out.
//!
//! Knows no kind by itself; what objects mean is for the rooms that ask. Never gives up: an API server that is away,
//! or refuses, is asked again.

use std::path::{Path, PathBuf};
use std::time::Duration;

use kube::config::{Config, KubeConfigOptions, Kubeconfig};

mod follow;

pub(crate) use follow::{Change, Ended, Trouble, follow, while_absent};

/// For one request; a watch lasts longer, and has its own limit.
const CONNECT: Duration = Duration::from_secs(10);

/// Access to one API server.
#[derive(Clone)]
pub struct Cluster {
    pub(crate) client: kube::Client,
    /// For logs and errors.
    pub(crate) server: String,
    /// This process's own.
    pub(crate) namespace: String,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "this process has no way to the Kubernetes API: {reason}; run it in a pod with a service account's token, or \
         give a --kubeconfig (outside Kubernetes: a directory of --manifests)"
    )]
    NotInCluster { reason: String },
    #[error("kubeconfig {path} is unusable: {reason}", path = path.display())]
    Kubeconfig { path: PathBuf, reason: String },
    #[error("cannot set up a client for the Kubernetes API at {server}: {reason}")]
    Client { server: String, reason: String },
}

impl Cluster {
    /// Reads where the API server is and who we are to it; does not call it yet. Without a kubeconfig this is what
    /// Kubernetes gives a pod. Tokens and roots in files are read again as they are rotated.
    ///
    /// # Errors
    ///
    /// When there is neither, or it can't be used.
    pub async fn open(kubeconfig: Option<&Path>) -> Result<Self, Error> {
        // kube takes the process's choice; ours is the same everywhere.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let mut config = match kubeconfig {
            Some(path) => {
                let unusable = |error: kube::config::KubeconfigError| Error::Kubeconfig {
                    path: path.into(),
                    reason: chain(&error),
                };
                let file = Kubeconfig::read_from(path).map_err(unusable)?;
                Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.map_err(unusable)?
            }
            None => Config::incluster().map_err(|error| Error::NotInCluster { reason: chain(&error) })?,
        };
        config.connect_timeout = Some(CONNECT);
        let server = config.cluster_url.to_string();
        let namespace = config.default_namespace.clone();
        let client = kube::Client::try_from(config)
            .map_err(|error| Error::Client { server: server.clone(), reason: chain(&error) })?;
        Ok(Self { client, server, namespace })
    }
}

/// An error with what caused it: what matters is often at the end.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}
