//! Policies of a cluster: one that can't be understood stops neither the others nor anything else, and lets nobody in.

use std::net::SocketAddr;
use std::time::Duration;

use mtls::mesh::Source;
use mtls::policy::{Mode, Peer, Request};
use serde_json::{Value, json};

use crate::cluster::{World, namespace, owner, pod, policy, soon, with, within};

fn mode_of(source: &Source, address: &str) -> Mode {
    let mesh = source.current();
    mesh.policies.mode(mesh.workload(address.parse().unwrap()).unwrap(), 8080)
}

/// Whether a workload of the mesh is let in.
fn lets_in(source: &Source, address: &str, client: &str) -> bool {
    let mesh = source.current();
    let identity = client.parse().unwrap();
    let request = Request {
        destination: mesh.workload(address.parse().unwrap()).unwrap(),
        address: SocketAddr::new(address.parse().unwrap(), 8080),
        source_ip: "10.9.9.9".parse().unwrap(),
        peer: Peer::Verified(&identity),
    };
    mesh.policies.authorize(&request).is_ok()
}

const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";

fn mode(namespace: &str, mode: &str) -> Value {
    policy("PeerAuthentication", namespace, "default", json!({ "mtls": { "mode": mode } }))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_good_version_of_a_policy_stays_and_everything_else_moves_on() {
    let world = World::new();
    world
        .api
        .apply_all(&[namespace("shop", true), pod("a", "10.0.0.1"), mode("shop", "PERMISSIVE")])
        .unwrap();
    let source = world.follow().await;
    assert_eq!(mode_of(&source, "10.0.0.1"), Mode::Permissive);
    world.api.apply(&mode("shop", "STRIKT")).unwrap();
    soon("the error", || source.last_error().is_some()).await;
    let error = source.last_error().unwrap();
    assert!(
        error.starts_with(
            "the Kubernetes API: PeerAuthentication shop/default: field spec.mtls.mode: unknown variant"
        ),
        "{error}"
    );
    assert_eq!(source.errors(), 1);
    assert_eq!(mode_of(&source, "10.0.0.1"), Mode::Permissive, "as it was last said clearly");

    world.api.apply(&pod("b", "10.0.0.2")).unwrap();
    soon("another object", || owner(&source, "10.0.0.2").is_some()).await;
    world.api.apply(&mode("istio-system", "STRICT")).unwrap();
    world.api.delete(&mode("shop", "")).unwrap();
    soon("another policy", || mode_of(&source, "10.0.0.1") == Mode::Strict).await;
    assert_eq!((source.last_error(), source.errors()), (None, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_that_never_was_in_good_order_denies_until_it_is() {
    let world = World::new();
    let elsewhere = with(pod("c", "10.0.0.3"), "/metadata/namespace", json!("other"));
    world
        .api
        .apply_all(&[
            namespace("shop", true),
            namespace("other", true),
            pod("a", "10.0.0.1"),
            pod("b", "10.0.0.2"),
            elsewhere,
        ])
        .unwrap();
    let only_a = json!({ "matchLabels": { "app": "a" } });
    let misspelt =
        json!({ "selector": only_a, "rules": [{ "from": [{ "source": { "principal": ["x"] } }] }] });
    world.api.apply(&policy("AuthorizationPolicy", "shop", "p", misspelt)).unwrap();
    world.api.apply(&mode("other", "STRIKT")).unwrap();
    let source = world.follow().await;
    let let_in = || ["10.0.0.1", "10.0.0.2", "10.0.0.3"].map(|address| lets_in(&source, address, WEB));
    assert_eq!(let_in(), [false, true, true]);
    assert_eq!(["10.0.0.1", "10.0.0.3"].map(|it| mode_of(&source, it)), [Mode::Permissive, Mode::Strict]);
    let error = source.last_error().unwrap();
    assert!(
        error.contains("AuthorizationPolicy shop/p: field spec.rules[0].from[0].source.principal"),
        "{error}"
    );
    assert!(error.contains("PeerAuthentication other/default"), "{error}");

    let right =
        json!({ "selector": only_a, "rules": [{ "from": [{ "source": { "namespaces": ["shop"] } }] }] });
    world.api.apply(&policy("AuthorizationPolicy", "shop", "p", right)).unwrap();
    world.api.apply(&mode("other", "PERMISSIVE")).unwrap();
    soon("the corrections", || source.last_error().is_none()).await;
    soon("the corrections in force", || let_in() == [true, true, true]).await;
    assert!(!lets_in(&source, "10.0.0.1", "spiffe://cluster.local/ns/other/sa/any"));
    assert_eq!(mode_of(&source, "10.0.0.3"), Mode::Permissive);
}

#[tokio::test(flavor = "multi_thread")]
async fn policies_whose_definitions_come_later_are_followed_from_then_on() {
    let kinds = ["peerauthentications.security.istio.io", "authorizationpolicies.security.istio.io"];
    let world = World::new();
    kinds.iter().for_each(|kind| world.api.define(kind, false));
    world.api.apply_all(&[namespace("shop", true), pod("a", "10.0.0.1")]).unwrap();
    let source = world.follow().await;
    assert_eq!(mode_of(&source, "10.0.0.1"), Mode::Permissive);
    assert_eq!(source.last_error(), None, "a cluster without policies is no faulty one");
    kinds.iter().for_each(|kind| world.api.define(kind, true));
    world.api.apply(&mode("shop", "STRICT")).unwrap();
    within(Duration::from_secs(30), "the policy", || mode_of(&source, "10.0.0.1") == Mode::Strict).await;

    // Definitions that vanish take nobody's protection with them.
    world.api.define(kinds[0], false);
    world.api.forget_history(false);
    world.api.apply(&pod("b", "10.0.0.2")).unwrap();
    soon("another object", || owner(&source, "10.0.0.2").is_some()).await;
    assert_eq!(mode_of(&source, "10.0.0.1"), Mode::Strict);
}
