//! Who may ask: each kind of proof end to end, and that one stolen from a node gets no other node's identities.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::authentication::v1::{TokenReviewStatus, UserInfo};
use mtls::ca::{AnyOf, JoinTokens, NodeCertificates, ReviewFailed, ServiceAccounts, TokenReviews};
use mtls::identity::{Credential, Identities};
use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};

use crate::bench::*;

/// An authority that takes all kinds of proof.
async fn bench() -> Bench {
    let mut bench = Bench::new(DAY).await;
    bench.stop().await;
    std::fs::write(bench.path("node-ca.pem"), nodes_authority(bench.dir.path())).unwrap();
    bench.callers = Some(Arc::new(AnyOf(vec![
        Box::new(NodeCertificates::open(&bench.path("node-ca.pem")).unwrap()),
        Box::new(JoinTokens::open(&bench.path("tokens.yaml")).unwrap()),
        Box::new(ServiceAccounts::new(
            Box::new(ApiServer),
            "mtls-ca".into(),
            vec!["mtls-system/mtls-node".parse().unwrap()],
        )),
    ])));
    bench.start().await;
    bench
}

/// Knows tokens of the form `<account>.<node>.token`, for the audience of the authority.
struct ApiServer;

#[tonic::async_trait]
impl TokenReviews for ApiServer {
    async fn review(&self, token: &str, audience: &str) -> Result<TokenReviewStatus, ReviewFailed> {
        let [account, node, signature] = token.split('.').collect::<Vec<_>>()[..] else {
            return Err("three parts expected".into());
        };
        let extra = [("node-name", node), ("pod-name", "agent")];
        Ok(TokenReviewStatus {
            authenticated: Some(signature == "token"),
            audiences: Some(vec![audience.into()]),
            user: Some(UserInfo {
                username: Some(format!("system:serviceaccount:mtls-system:{account}")),
                extra: Some(
                    extra
                        .map(|(key, value)| {
                            (format!("authentication.kubernetes.io/{key}"), vec![value.to_owned()])
                        })
                        .into(),
                ),
                ..UserInfo::default()
            }),
            error: None,
        })
    }
}

/// Makes `node-a.pem`: certificate and key in one file, as kubelet keeps them. Gives the authority's certificate.
fn nodes_authority(dir: &Path) -> String {
    let (ca_key, key) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let mut ca = CertificateParams::default();
    ca.distinguished_name.push(DnType::CommonName, "kubernetes");
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = ca.self_signed(&ca_key).unwrap().pem();
    let mut node = CertificateParams::default();
    node.distinguished_name = rcgen::DistinguishedName::new();
    node.distinguished_name.push(DnType::OrganizationName, "system:nodes");
    node.distinguished_name.push(DnType::CommonName, "system:node:node-a");
    node.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    let certificate = node.signed_by(&key, &Issuer::new(ca, ca_key)).unwrap().pem();
    std::fs::write(dir.join("node-a.pem"), format!("{certificate}{}", key.serialize_pem())).unwrap();
    authority
}

/// What an agent with this credential gets of the two nodes' identities: its own must come, of the other's the refusal
/// is returned.
async fn refused_beside_its_own(bench: &Bench, credential: Credential) -> String {
    let identities = Identities::new(Arc::new(bench.remote_with(credential)), quick());
    identities.want(HashSet::from([cart(), db()]));
    let task = tokio::spawn(identities.clone().run(std::future::pending()));
    identities.ready(&cart(), Duration::from_secs(10)).await.expect("the identity of the node's own pod");
    let refused = identities.ready(&db(), Duration::from_millis(500)).await.unwrap_err().to_string();
    task.abort();
    refused
}

#[tokio::test]
async fn no_kind_of_proof_gets_another_nodes_identities() {
    let bench = bench().await;
    let file = |name: &str, content: &str| {
        std::fs::write(bench.path(name), content).unwrap();
        Credential::Token(bench.path(name))
    };
    let certificate = bench.path("node-a.pem");
    for (kind, credential) in [
        ("join token", file("join", TOKEN_A)),
        ("ServiceAccount token", file("account", "mtls-node.node-a.token")),
        ("node certificate", Credential::Certificate { certificate: certificate.clone(), key: certificate }),
    ] {
        let refused = refused_beside_its_own(&bench, credential).await;
        assert!(refused.contains("no enrolled pod on node node-a has the identity"), "{kind}: {refused}");
    }
}

#[tokio::test]
async fn a_proof_that_is_no_good_is_refused_in_words() {
    let bench = bench().await;
    let stranger = tempfile::tempdir().unwrap();
    nodes_authority(stranger.path());
    let foreign = stranger.path().join("node-a.pem");
    std::fs::write(bench.path("other.key"), KeyPair::generate().unwrap().serialize_pem()).unwrap();
    std::fs::write(bench.path("token"), "mtls-node.node-a.forged").unwrap();
    std::fs::write(bench.path("pods-token"), "cart.node-a.token").unwrap();
    for (credential, expected) in [
        (Credential::Token(bench.path("token")), "does not accept the token"),
        (Credential::Token(bench.path("pods-token")), "mtls-system:cart\" is not the ServiceAccount"),
        (
            Credential::Certificate { certificate: foreign.clone(), key: foreign },
            "certificate is not accepted",
        ),
        (
            Credential::Certificate { certificate: bench.path("node-a.pem"), key: bench.path("other.key") },
            "other.key is unusable",
        ),
        (
            Credential::Certificate { certificate: bench.path("node-a.pem"), key: bench.path("none.key") },
            "none.key",
        ),
    ] {
        let identities = Identities::new(Arc::new(bench.remote_with(credential)), quick());
        identities.want(HashSet::from([cart()]));
        let task = tokio::spawn(identities.clone().run(std::future::pending()));
        let refused = identities.ready(&cart(), Duration::from_millis(700)).await.unwrap_err().to_string();
        task.abort();
        assert!(refused.contains(expected), "{expected}: {refused}");
    }
}
