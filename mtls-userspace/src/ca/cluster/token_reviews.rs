//! Tokens, as the API server knows them: a token in, whose it is and where its pod runs out.

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use kube::api::{Api, PostParams};

use super::ask;
use crate::ca::{ReviewFailed, TokenReviews};
use crate::kubernetes::Cluster;
use crate::mesh::Source;

const NODE: &str = "authentication.kubernetes.io/node-name";
const POD: &str = "authentication.kubernetes.io/pod-name";
const UID: &str = "authentication.kubernetes.io/pod-uid";

/// Asks this API server. Before Kubernetes 1.30 a token does not say where its pod runs; `pods` does.
pub fn reviewed_by(cluster: &Cluster, pods: Source) -> Box<dyn TokenReviews> {
    Box::new(ApiServer { api: Api::all(cluster.client.clone()), pods })
}

struct ApiServer {
    api: Api<TokenReview>,
    pods: Source,
}

#[tonic::async_trait]
impl TokenReviews for ApiServer {
    async fn review(&self, token: &str, audience: &str) -> Result<TokenReviewStatus, ReviewFailed> {
        let review = TokenReview {
            spec: TokenReviewSpec { token: token.into(), audiences: Some(vec![audience.into()]) },
            ..TokenReview::default()
        };
        let params = PostParams::default();
        let request = self.api.create(&params, &review);
        let mut status = ask("make", "a TokenReview", request).await?.status.unwrap_or_default();
        self.complete(&mut status);
        Ok(status)
    }
}

impl ApiServer {
    /// Adds the node of the pod that the token is bound to, if the token does not say.
    fn complete(&self, status: &mut TokenReviewStatus) {
        let Some(user) = &mut status.user else { return };
        let account = user.username.as_deref().and_then(|name| name.strip_prefix("system:serviceaccount:"));
        let Some((namespace, account)) = account.and_then(|account| account.split_once(':')) else { return };
        let Some(extra) = &mut user.extra else { return };
        let said = |key: &str| extra.get(key).and_then(|values| values.first()).map(String::as_str);
        let (None, Some(pod), Some(uid)) = (said(NODE), said(POD), said(UID)) else { return };
        let mesh = self.pods.current();
        let node = mesh.workloads_and_starting().find_map(|workload| {
            let is_it = *workload.namespace == *namespace
                && *workload.name == *pod
                && *workload.service_account == *account
                && workload.uid.as_deref() == Some(uid);
            workload.node.as_ref().filter(|_| is_it)
        });
        if let Some(node) = node {
            extra.insert(NODE.into(), vec![node.to_string()]);
        }
    }
}
