//! The authority in a cluster: where it is kept, who may call it, and where its roots are found.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use mtls::ca::{Callers, InForce, Proof, Secret, ServiceAccounts, Unidentified, published_in, reviewed_by};
use mtls::identity::{Config, Identities, Signer, SpiffeId};
use mtls::mesh::{Scope, Source};
use mtls_tests::kubernetes::{Rule, User};
use serde_json::{Value, json};

use crate::cluster::{World, namespace, pod, settings, soon, with};

/// What the authority's Role grants, and not a verb more.
fn rules() -> Vec<Rule> {
    let own = |verbs, resource| Rule::new(verbs, resource).within("mtls-system");
    vec![
        own(&["get", "create"], "secrets"),
        own(&["get", "create", "update"], "configmaps"),
        Rule::new(&["create"], "tokenreviews.authentication.k8s.io"),
        Rule::new(&["list", "watch"], "pods"),
        Rule::new(&["list", "watch"], "namespaces"),
    ]
}

async fn secret(world: &World) -> Secret {
    let cluster = world.access("system:serviceaccount:mtls-system:mtls-ca", rules()).await;
    Secret::new(&cluster, "mtls-system", "mtls-ca", settings().trust_domain, Duration::from_secs(3600))
}

fn object(kind: &str) -> Value {
    let name = if kind == "Secret" { "mtls-ca" } else { "mtls-ca-root" };
    json!({ "apiVersion": "v1", "kind": kind, "metadata": { "name": name, "namespace": "mtls-system" } })
}

fn fingerprint(authority: &InForce) -> String {
    authority.current().root_fingerprint()
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_that_start_together_agree_on_one_root() {
    let world = World::new();
    let secrets = [secret(&world).await, secret(&world).await, secret(&world).await];
    let (a, b, c) = tokio::join!(secrets[0].open(), secrets[1].open(), secrets[2].open());
    let roots = [a.unwrap(), b.unwrap(), c.unwrap()].map(|authority| fingerprint(&authority));
    assert!(roots.iter().all(|root| *root == roots[0]), "{roots:?}");
    let kept = world.api.get(&object("Secret")).unwrap();
    let keys: Vec<&String> = kept["data"].as_object().unwrap().keys().collect();
    assert_eq!(keys, ["ca-cert.pem", "ca-key.pem", "cert-chain.pem", "root-cert.pem"]);
    // And one that starts later, which is not allowed to make anything.
    world.api.rules("system:serviceaccount:mtls-system:mtls-ca", vec![Rule::new(&["get"], "secrets")]);
    assert_eq!(fingerprint(&secret(&world).await.open().await.unwrap()), roots[0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_is_followed_and_never_filled_or_replaced() {
    let world = World::new();
    let kept = secret(&world).await;
    let authority = kept.open().await.unwrap();
    let first = fingerprint(&authority);
    let good = world.api.get(&object("Secret")).unwrap();

    let incomplete = with(good.clone(), "/data", json!({ "ca-cert.pem": good["data"]["ca-cert.pem"] }));
    let garbled = with(good.clone(), "/data/ca-key.pem", json!(STANDARD.encode("no key")));
    for (broken, expected) in [
        (incomplete, r#"Secret mtls-system/mtls-ca is incomplete: "#),
        (with(good.clone(), "/data", json!({})), "Secret mtls-system/mtls-ca has lost all its files"),
        (garbled, "Secret mtls-system/mtls-ca/ca-key.pem is unusable"),
    ] {
        world.api.apply(&broken).unwrap();
        let error = kept.refresh(&authority).await.unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert_eq!(fingerprint(&authority), first, "the last good state stays");
        // Nor does one that starts now make another root over it.
        let error = secret(&world).await.open().await.err().unwrap().to_string();
        assert!(error.contains(expected), "{error}");
        assert_eq!(world.api.get(&object("Secret")).unwrap()["data"], broken["data"]);
    }

    // The operator's own, as another authority made it.
    let elsewhere = World::new();
    let other = fingerprint(&secret(&elsewhere).await.open().await.unwrap());
    world.api.apply(&elsewhere.api.get(&object("Secret")).unwrap()).unwrap();
    let mut changes = authority.subscribe();
    kept.refresh(&authority).await.unwrap();
    assert_eq!(fingerprint(&authority), other);
    assert!(changes.has_changed().unwrap());
    changes.mark_unchanged();
    kept.refresh(&authority).await.unwrap();
    assert!(!changes.has_changed().unwrap(), "nothing has changed");
    world.api.delete(&object("Secret")).unwrap();
    let error = kept.refresh(&authority).await.unwrap_err().to_string();
    assert!(error.contains("has lost all its files"), "{error}");
    assert_eq!(fingerprint(&authority), other);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_server_that_is_away_is_waited_for() {
    let world = World::new();
    world.api.go_away();
    let kept = secret(&world).await;
    let opening = tokio::spawn(async move { kept.open().await });
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!opening.is_finished());
    world.api.come_back();
    let authority = tokio::time::timeout(Duration::from_secs(15), opening).await.unwrap().unwrap().unwrap();
    assert!(!fingerprint(&authority).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn roots_are_published_put_back_and_no_more_is_asked_for() {
    let world = World::new();
    let cluster = world.access("system:serviceaccount:mtls-system:mtls-ca", rules()).await;
    let mut published = published_in(&cluster, "mtls-system", "mtls-ca-root");
    published.publish("one").await.unwrap();
    let map = || world.api.get(&object("ConfigMap")).unwrap();
    assert_eq!(map()["data"], json!({ "root-cert.pem": "one" }));
    let version = map()["metadata"]["resourceVersion"].clone();
    published.publish("one").await.unwrap();
    assert_eq!(map()["metadata"]["resourceVersion"], version, "nothing to write");
    published.publish("two").await.unwrap();
    assert_eq!(map()["data"]["root-cert.pem"], "two");
    world.api.apply(&with(map(), "/data/root-cert.pem", json!("an intruder's"))).unwrap();
    published.publish("two").await.unwrap();
    assert_eq!(map()["data"]["root-cert.pem"], "two");
    world.api.delete(&object("ConfigMap")).unwrap();
    published.publish("two").await.unwrap();
    assert_eq!(map()["data"]["root-cert.pem"], "two");

    // Where the API server has trust bundles and lets us, they say the same.
    let bundles = "clustertrustbundles.certificates.k8s.io";
    assert!(world.api.list(bundles).is_empty());
    world.api.define(bundles, true);
    published.publish("two").await.unwrap();
    assert!(world.api.list(bundles).is_empty(), "not allowed, and no error");
    let allowed = [rules(), vec![Rule::new(&["get", "create", "update"], bundles)]].concat();
    world.api.rules("system:serviceaccount:mtls-system:mtls-ca", allowed);
    for bundle in ["two", "three"] {
        published.publish(bundle).await.unwrap();
        let [object] = &world.api.list(bundles)[..] else { panic!("one bundle") };
        assert_eq!(
            (&object["metadata"]["name"], &object["spec"]["trustBundle"]),
            (&json!("mtls-ca-root"), &json!(bundle))
        );
    }
}

const AGENT: &str = "system:serviceaccount:mtls-system:mtls-node";

struct Tokens {
    world: World,
    accounts: ServiceAccounts,
}

impl Tokens {
    async fn new(world: World) -> Self {
        let cluster = world.access("system:serviceaccount:mtls-system:mtls-ca", rules()).await;
        let pods = Source::kubernetes(cluster.clone(), settings(), Scope::Workloads).await;
        let agents = vec!["mtls-system/mtls-node".parse().unwrap()];
        let accounts = ServiceAccounts::new(reviewed_by(&cluster, pods), "mtls-ca".into(), agents);
        Self { world, accounts }
    }

    /// Whose token it is said to be, of a token like that.
    async fn node_of(
        &self,
        name: &str,
        audience: &str,
        extra: &[(&str, &str)],
    ) -> Result<String, Unidentified> {
        let token = self.world.api.user(User {
            name: name.into(),
            token: format!("header.{}.signature", extra.len() + name.len() + audience.len()),
            audiences: vec![audience.into()],
            extra: extra.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
            ..User::default()
        });
        self.identify(&token).await
    }

    async fn identify(&self, token: &str) -> Result<String, Unidentified> {
        let proof = Proof { token: Some(token), certificates: &[] };
        self.accounts.identify(&proof).await.map(|caller| caller.node.to_string())
    }
}

const POD: (&str, &str) = ("authentication.kubernetes.io/pod-name", "mtls-node-x");
const NODE: (&str, &str) = ("authentication.kubernetes.io/node-name", "node-a");

#[tokio::test(flavor = "multi_thread")]
async fn the_api_server_says_whose_a_token_is() {
    let tokens = Tokens::new(World::new()).await;
    assert_eq!(tokens.node_of(AGENT, "mtls-ca", &[POD, NODE]).await, Ok("node-a".into()));
    for (name, audience, extra, expected) in [
        (AGENT, "vault", &[POD, NODE][..], "does not accept the token"),
        ("system:serviceaccount:shop:web", "mtls-ca", &[POD, NODE], "not the ServiceAccount"),
        (AGENT, "mtls-ca", &[], "bound to no pod"),
        (AGENT, "mtls-ca", &[POD], "on no node"),
    ] {
        let refused = tokens.node_of(name, audience, extra).await;
        let Err(Unidentified::Refused { reason }) = &refused else { panic!("{expected}: {refused:?}") };
        assert!(reason.contains(expected), "{expected}: {reason}");
    }
    let refused = tokens.identify("a.forged.token").await;
    assert!(
        matches!(&refused, Err(Unidentified::Refused { reason }) if reason.contains("invalid bearer token")),
        "{refused:?}"
    );
    // A token ends with what it was made for.
    let token = tokens.world.api.user(User {
        name: AGENT.into(),
        token: "its.pod.lives".into(),
        audiences: vec!["mtls-ca".into()],
        extra: [POD, NODE].map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
        ..User::default()
    });
    assert_eq!(tokens.identify(&token).await, Ok("node-a".into()));
    tokens.world.api.revoke(&token);
    assert!(matches!(tokens.identify(&token).await, Err(Unidentified::Refused { .. })));
    tokens.world.api.go_away();
    let away = tokens.identify(&token).await;
    assert!(matches!(&away, Err(Unidentified::Unavailable { .. })), "{away:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_of_an_older_kubernetes_is_its_pods_nodes() {
    let world = World::new();
    let agent = with(pod("mtls-node-x", "192.0.2.1"), "/metadata/namespace", json!("mtls-system"));
    let agent = with(agent, "/spec/serviceAccountName", json!("mtls-node"));
    let agent = with(with(agent, "/spec/hostNetwork", json!(true)), "/metadata/uid", json!("uid-1"));
    world.api.apply_all(&[namespace("mtls-system", false), agent]).unwrap();
    let tokens = Tokens::new(world).await;
    const UID: &str = "authentication.kubernetes.io/pod-uid";
    assert_eq!(tokens.node_of(AGENT, "mtls-ca", &[POD, (UID, "uid-1")]).await, Ok("node-a".into()));
    // Of a pod that was there before, under the same name.
    let refused = tokens.node_of(AGENT, "mtls-ca", &[POD, (UID, "another"), ("x", "y")]).await;
    assert!(
        matches!(&refused, Err(Unidentified::Refused { reason }) if reason.contains("on no node")),
        "{refused:?}"
    );
}

/// Signs with an authority of its own whatever is approved, as a controller would.
struct Controller {
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
    root: String,
}

impl Controller {
    fn new() -> Self {
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name.push(rcgen::DnType::CommonName, "the cluster's signer");
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate().unwrap();
        let root = params.self_signed(&key).unwrap().pem();
        Self { issuer: rcgen::Issuer::new(params, key), root }
    }

    /// Waits for a request, and answers it.
    async fn answer(&self, world: &World, sign: bool) -> Value {
        let mut found = None;
        soon("a signing request", || {
            found = world.api.list("certificatesigningrequests.certificates.k8s.io").pop();
            found.is_some()
        })
        .await;
        let mut request = found.unwrap();
        request["status"] = if sign {
            let pem = STANDARD.decode(request["spec"]["request"].as_str().unwrap()).unwrap();
            let asked = rcgen::CertificateSigningRequestParams::from_pem(std::str::from_utf8(&pem).unwrap());
            let certificate = asked.unwrap().signed_by(&self.issuer).unwrap().pem();
            json!({ "conditions": [{ "type": "Approved", "status": "True" }],
            "certificate": STANDARD.encode(certificate) })
        } else {
            json!({ "conditions": [{ "type": "Denied", "status": "True", "message": "not on my watch" }] })
        };
        world.api.apply(&request).unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_signs_for_the_cluster_signs_for_workloads_too() {
    let world = World::new();
    let controller = Controller::new();
    let root_file = world.dir.path().join("root.pem");
    std::fs::write(&root_file, &controller.root).unwrap();
    let csrs = "certificatesigningrequests.certificates.k8s.io";
    let agent = world.access(AGENT, vec![Rule::new(&["create", "get", "delete"], csrs)]).await;
    let signer = Signer::new(&agent, "example.org/mesh".into(), root_file);
    let identities = Identities::new(Arc::new(signer), Config::default());
    let id: SpiffeId = "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap();
    identities.want([id.clone()].into());
    let running = tokio::spawn(identities.clone().run(std::future::pending()));

    let denied = controller.answer(&world, false).await;
    assert_eq!(denied["spec"]["signerName"], "example.org/mesh");
    assert_eq!(denied["spec"]["usages"], json!(["digital signature", "client auth", "server auth"]));
    assert_eq!(
        (&denied["spec"]["username"], &denied["spec"]["expirationSeconds"]),
        (&json!(AGENT), &json!(86400))
    );
    let told = || {
        identities.status()[0].last_error.clone().is_some_and(|it| it.contains("is Denied: not on my watch"))
    };
    soon("the denial", told).await;
    let gone = || !world.api.list(csrs).iter().any(|it| it["metadata"]["name"] == denied["metadata"]["name"]);
    soon("the denied request gone", gone).await;
    assert!(identities.current(&id).is_none());

    controller.answer(&world, true).await;
    let identity = identities.ready(&id, Duration::from_secs(10)).await.unwrap();
    assert_eq!((identity.svid.chain.len(), identity.bundle.roots.len()), (1, 1));
    soon("the answered request gone", || world.api.list(csrs).is_empty()).await;
    running.abort();

    // What another authority signed is not used, whoever put it there.
    let other = Signer::new(&agent, "example.org/mesh".into(), world.dir.path().join("other.pem"));
    std::fs::write(world.dir.path().join("other.pem"), Controller::new().root).unwrap();
    let identities = Identities::new(Arc::new(other), Config::default());
    identities.want([id.clone()].into());
    let running = tokio::spawn(identities.clone().run(std::future::pending()));
    controller.answer(&world, true).await;
    let told =
        || identities.status()[0].last_error.clone().is_some_and(|it| it.contains("chain leads to no root"));
    soon("the refusal", told).await;
    running.abort();
}
