//! ServiceAccount tokens: what the API server says of a token in, the node of the agent's pod out.
//!
//! An agent that runs as a pod shows the token that kubelet projected into it. The API server alone knows whether it
//! is good: it is asked each time, so that a token ends with its pod. Which agents are believed, and for which node,
//! is decided here; how the API server is asked is behind [`TokenReviews`].

use std::fmt;
use std::str::FromStr;

use k8s_openapi::api::authentication::v1::{TokenReviewStatus, UserInfo};

use super::{Caller, Callers, Proof, Unidentified};

/// Asks the API server about tokens.
#[tonic::async_trait]
pub trait TokenReviews: Send + Sync {
    /// The status of an `authentication.k8s.io/v1` TokenReview for this token and this one audience. A token that is
    /// no good is an answer, not an error.
    async fn review(&self, token: &str, audience: &str) -> Result<TokenReviewStatus, ReviewFailed>;
}

/// Why the API server could not be asked.
pub type ReviewFailed = Box<dyn std::error::Error + Send + Sync>;

/// `NAMESPACE/NAME` of a ServiceAccount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceAccount {
    user: Box<str>,
}

impl FromStr for ServiceAccount {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('/') {
            Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
                Ok(Self { user: format!("{USER}{namespace}:{name}").into() })
            }
            _ => Err(format!("{text:?} is no ServiceAccount; it is written NAMESPACE/NAME")),
        }
    }
}

impl fmt::Display for ServiceAccount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.user.trim_start_matches(USER).replacen(':', "/", 1))
    }
}

/// Agents known by their pods' tokens.
pub struct ServiceAccounts {
    reviews: Box<dyn TokenReviews>,
    audience: String,
    agents: Vec<ServiceAccount>,
}

/// How the API server names a ServiceAccount.
const USER: &str = "system:serviceaccount:";
/// Where the API server says on which node the token's pod runs: in every token made by Kubernetes 1.30 or later.
const NODE: &str = "authentication.kubernetes.io/node-name";
/// Absent from tokens that are bound to no pod, which outlive every pod.
const POD: &str = "authentication.kubernetes.io/pod-name";

impl ServiceAccounts {
    /// Believes tokens made for `audience` and one of `agents`: another workload's token says nothing of its node.
    pub fn new(reviews: Box<dyn TokenReviews>, audience: String, agents: Vec<ServiceAccount>) -> Self {
        Self { reviews, audience, agents }
    }

    fn judge(&self, status: &TokenReviewStatus) -> Result<Caller, String> {
        if status.authenticated != Some(true) {
            let why = status.error.as_deref().unwrap_or("it says no more");
            return Err(format!("the API server does not accept the token: {why}"));
        }
        // An API server that knows no audiences leaves them out, and has not looked at the token's.
        if !status.audiences.iter().flatten().any(|audience| *audience == self.audience) {
            return Err(format!("the token is not for the audience {:?}", self.audience));
        }
        let nobody = UserInfo::default();
        let user = status.user.as_ref().unwrap_or(&nobody);
        let name = user.username.as_deref().unwrap_or_default();
        if !self.agents.iter().any(|agent| *agent.user == *name) {
            return Err(format!("{name:?} is not the ServiceAccount of this mesh's agents"));
        }
        let said = |key| match user.extra.as_ref()?.get(key)?.as_slice() {
            [one] if !one.is_empty() => Some(one.as_str()),
            _ => None,
        };
        if said(POD).is_none() {
            return Err("the token is bound to no pod: mount a projected one".into());
        }
        let node =
            said(NODE).ok_or("the token says on no node its pod runs; Kubernetes 1.30 or later does")?;
        Ok(Caller { node: node.into() })
    }
}

#[tonic::async_trait]
impl Callers for ServiceAccounts {
    async fn identify(&self, proof: &Proof<'_>) -> Result<Caller, Unidentified> {
        let token = proof.token.ok_or(Unidentified::Absent)?;
        // A join token is none of the API server's business.
        if token.split('.').count() != 3 {
            return Err(Unidentified::Unknown);
        }
        let status = self.reviews.review(token, &self.audience).await.map_err(|error| {
            Unidentified::Unavailable { reason: format!("the API server cannot be asked: {error}") }
        })?;
        self.judge(&status).map_err(|reason| Unidentified::Refused { reason })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const AUDIENCE: &str = "mtls-ca";

    /// An API server that answers every token alike.
    struct Always(Result<TokenReviewStatus, &'static str>);

    #[tonic::async_trait]
    impl TokenReviews for Always {
        async fn review(&self, token: &str, audience: &str) -> Result<TokenReviewStatus, ReviewFailed> {
            assert_eq!((token, audience), ("a.b.c", AUDIENCE));
            self.0.clone().map_err(Into::into)
        }
    }

    fn good() -> TokenReviewStatus {
        let extra = [(POD, "agent-x7"), (NODE, "node-a")];
        TokenReviewStatus {
            audiences: Some(vec![AUDIENCE.into()]),
            authenticated: Some(true),
            error: None,
            user: Some(UserInfo {
                username: Some("system:serviceaccount:mtls-system:mtls-node".into()),
                extra: Some(extra.map(|(key, value)| (key.into(), vec![value.into()])).into()),
                ..UserInfo::default()
            }),
        }
    }

    async fn identify(answer: Result<TokenReviewStatus, &'static str>) -> Result<Caller, Unidentified> {
        let agents = vec!["mtls-system/mtls-node".parse().unwrap()];
        let accounts = ServiceAccounts::new(Box::new(Always(answer)), AUDIENCE.into(), agents);
        accounts.identify(&Proof { token: Some("a.b.c"), certificates: &[] }).await
    }

    #[tokio::test]
    async fn an_agents_own_token_speaks_for_its_pods_node() {
        assert_eq!(identify(Ok(good())).await, Ok(Caller { node: "node-a".into() }));
    }

    #[tokio::test]
    async fn any_other_token_is_refused_with_the_reason() {
        type Change = fn(&mut TokenReviewStatus);
        fn extra(status: &mut TokenReviewStatus) -> &mut BTreeMap<String, Vec<String>> {
            status.user.as_mut().unwrap().extra.as_mut().unwrap()
        }
        fn name(status: &mut TokenReviewStatus, name: &str) {
            status.user.as_mut().unwrap().username = Some(name.into());
        }
        let cases: [(&str, Change); 12] = [
            ("does not accept", |status| status.authenticated = Some(false)),
            ("does not accept", |status| status.authenticated = None),
            ("has expired", |status| {
                status.authenticated = Some(false);
                status.error = Some("token has expired".into());
            }),
            ("audience", |status| status.audiences = None),
            ("audience", |status| status.audiences = Some(vec!["https://kubernetes.default.svc".into()])),
            ("shop:cart", |status| name(status, "system:serviceaccount:shop:cart")),
            ("system:node:node-a", |status| name(status, "system:node:node-a")),
            ("not the ServiceAccount", |status| status.user = None),
            ("on no node", |status| drop(extra(status).remove(NODE))),
            ("on no node", |status| drop(extra(status).insert(NODE.into(), vec!["a".into(), "b".into()]))),
            ("on no node", |status| drop(extra(status).insert(NODE.into(), vec![String::new()]))),
            ("bound to no pod", |status| drop(extra(status).remove(POD))),
        ];
        for (expected, change) in cases {
            let mut status = good();
            change(&mut status);
            let refused = identify(Ok(status)).await;
            let Err(Unidentified::Refused { reason }) = &refused else { panic!("{expected}: {refused:?}") };
            assert!(reason.contains(expected), "{expected}: {reason}");
        }
        let away = identify(Err("connection refused")).await.unwrap_err();
        assert!(
            matches!(&away, Unidentified::Unavailable { reason } if reason.contains("connection refused"))
        );
    }

    #[tokio::test]
    async fn the_api_server_is_asked_about_nothing_but_its_own_kind_of_token() {
        struct Never;
        #[tonic::async_trait]
        impl TokenReviews for Never {
            async fn review(&self, token: &str, _: &str) -> Result<TokenReviewStatus, ReviewFailed> {
                panic!("asked about {token:?}")
            }
        }
        let accounts = ServiceAccounts::new(Box::new(Never), AUDIENCE.into(), Vec::new());
        for (token, expected) in
            [(None, Unidentified::Absent), (Some("0123456789abcdef0123456789abcdef"), Unidentified::Unknown)]
        {
            assert_eq!(accounts.identify(&Proof { token, certificates: &[] }).await, Err(expected));
        }
    }

    #[test]
    fn a_service_account_is_written_with_its_namespace() {
        let account: ServiceAccount = "mtls-system/mtls-node".parse().unwrap();
        assert_eq!(account.to_string(), "mtls-system/mtls-node");
        for wrong in ["", "mtls-node", "/mtls-node", "mtls-system/", "a/b/c"] {
            assert!(wrong.parse::<ServiceAccount>().is_err(), "{wrong:?}");
        }
    }
}
