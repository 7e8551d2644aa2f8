//! Services of a cluster: where a connection to an address of theirs goes.

use std::collections::BTreeSet;

use mtls::addr::OriginalDst;
use mtls::mesh::{Destination, Source};
use serde_json::{Value, json};

use crate::cluster::{World, namespace, pod, service, slice, soon, with};

/// Where connections to an address end, from a node, tried often enough to meet all of them.
fn reached(source: &Source, address: &str, node: &str) -> BTreeSet<String> {
    let mesh = source.current();
    let one = || match mesh.resolve(OriginalDst::new(address.parse().unwrap()), node) {
        Destination::Workload { address, workload, .. } => format!("{} {address}", workload.name),
        Destination::Plain { address, .. } => format!("plain {address}"),
        Destination::Nowhere { .. } => "nowhere".to_owned(),
    };
    (0..60).map(|_| one()).collect()
}

fn set(all: &[&str]) -> BTreeSet<String> {
    all.iter().map(ToString::to_string).collect()
}

fn web(spec: Value) -> Value {
    let mut all = json!({ "clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1"], "ports": [{ "port": 80,
    "targetPort": "http" }] });
    all.as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
    service("web", all)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_named_port_is_what_each_pod_calls_so() {
    let world = World::new();
    let slices = [
        slice("web-1", "web", 8080, &[("a", "10.0.0.1")]),
        slice("web-2", "web", 9090, &[("b", "10.0.0.2")]),
    ];
    world
        .api
        .apply_all(&[namespace("shop", true), pod("a", "10.0.0.1"), pod("b", "10.0.0.2"), web(json!({}))])
        .unwrap();
    world.api.apply_all(&slices).unwrap();
    let source = world.follow().await;
    assert_eq!(reached(&source, "10.96.0.1:80", "node-a"), set(&["a 10.0.0.1:8080", "b 10.0.0.2:9090"]));
    assert_eq!(reached(&source, "10.96.0.1:81", "node-a"), set(&["nowhere"]));
    world.api.delete(&slices[0]).unwrap();
    soon("one slice", || reached(&source, "10.96.0.1:80", "node-a") == set(&["b 10.0.0.2:9090"])).await;
    world.api.delete(&slices[1]).unwrap();
    soon("no slice", || reached(&source, "10.96.0.1:80", "node-a") == set(&["nowhere"])).await;
    world.api.delete(&web(json!({}))).unwrap();
    soon("no service", || reached(&source, "10.96.0.1:80", "node-a") == set(&["plain 10.96.0.1:80"])).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_only_its_slice_knows_is_not_dialled_in_plaintext() {
    let world = World::new();
    let both = slice("web-1", "web", 8080, &[("a", "10.0.0.1"), ("b", "10.0.0.2")]);
    world.api.apply_all(&[namespace("shop", true), pod("a", "10.0.0.1"), web(json!({})), both]).unwrap();
    let source = world.follow().await;
    assert_eq!(reached(&source, "10.96.0.1:80", "node-a"), set(&["a 10.0.0.1:8080"]));
    world.api.apply(&pod("b", "10.0.0.2")).unwrap();
    let all = set(&["a 10.0.0.1:8080", "b 10.0.0.2:8080"]);
    soon("the second pod", || reached(&source, "10.96.0.1:80", "node-a") == all).await;
    world.api.delete(&pod("a", "10.0.0.1")).unwrap();
    world.api.delete(&pod("b", "10.0.0.2")).unwrap();
    soon("no pod", || reached(&source, "10.96.0.1:80", "node-a") == set(&["nowhere"])).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn readiness_is_the_slices_unless_the_service_publishes_all() {
    let world = World::new();
    let mut endpoints =
        slice("web-1", "web", 8080, &[("a", "10.0.0.1"), ("b", "10.0.0.2"), ("c", "10.0.0.3")]);
    endpoints["endpoints"][0]["conditions"] =
        json!({ "ready": false, "serving": false, "terminating": false });
    endpoints["endpoints"][1]["conditions"] = json!({ "ready": false, "serving": true, "terminating": true });
    let pods = ["a", "b", "c"].map(|name| pod(name, &format!("10.0.0.{}", name.as_bytes()[0] - b'a' + 1)));
    world.api.apply_all(&pods).unwrap();
    world.api.apply_all(&[namespace("shop", true), web(json!({})), endpoints.clone()]).unwrap();
    let source = world.follow().await;
    let reaches = || reached(&source, "10.96.0.1:80", "node-a");
    assert_eq!(reaches(), set(&["c 10.0.0.3:8080"]));
    endpoints["endpoints"][2]["conditions"] = json!({ "ready": false });
    world.api.apply(&endpoints).unwrap();
    soon("the draining one", || reaches() == set(&["b 10.0.0.2:8080"])).await;
    world.api.apply(&web(json!({ "publishNotReadyAddresses": true }))).unwrap();
    soon("all", || reaches().len() == 3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_no_selector_is_what_its_slice_says_and_external_names_are_not_ours() {
    let world = World::new();
    let mut foreign = slice("db-1", "db", 5432, &[("any", "192.0.2.7")]);
    foreign["endpoints"][0]["targetRef"] = Value::Null;
    let db = service("db", json!({ "clusterIP": "10.96.0.2", "ports": [{ "port": 5432 }] }));
    let external = service("out", json!({ "type": "ExternalName", "externalName": "example.org" }));
    let headless =
        service("none", json!({ "clusterIP": "None", "clusterIPs": ["None"], "ports": [{ "port": 80 }] }));
    let mut names = slice("names-1", "db", 5432, &[]);
    names["addressType"] = "FQDN".into();
    world.api.apply_all(&[namespace("shop", true), foreign, db, external, headless, names]).unwrap();
    let source = world.follow().await;
    assert_eq!(reached(&source, "10.96.0.2:5432", "node-a"), set(&["plain 192.0.2.7:5432"]));
    assert_eq!(source.current().services().len(), 1);
    assert_eq!(source.last_error(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_family_leads_to_its_own() {
    let world = World::new();
    let both =
        with(pod("a", "10.0.0.1"), "/status/podIPs", json!([{ "ip": "10.0.0.1" }, { "ip": "fd00::1" }]));
    let four = slice("web-4", "web", 8080, &[("a", "10.0.0.1")]);
    let six = with(slice("web-6", "web", 8080, &[("a", "fd00::1")]), "/addressType", json!("IPv6"));
    let dual = web(json!({ "clusterIPs": ["10.96.0.1", "fd00:96::1"] }));
    world.api.apply_all(&[namespace("shop", true), both, four, six, dual]).unwrap();
    let source = world.follow().await;
    assert_eq!(reached(&source, "10.96.0.1:80", "node-a"), set(&["a 10.0.0.1:8080"]));
    assert_eq!(reached(&source, "[fd00:96::1]:80", "node-a"), set(&["a [fd00::1]:8080"]));
}

#[tokio::test(flavor = "multi_thread")]
async fn traffic_prefers_the_same_node_or_zone_where_the_service_says_so() {
    let world = World::new();
    let node = |name: &str, zone: &str| {
        json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": name,
    "labels": { "topology.kubernetes.io/zone": zone } } })
    };
    world
        .api
        .apply_all(&[node("node-a", "z1"), node("node-b", "z1"), node("node-c", "z2"), node("node-d", "z3")])
        .unwrap();
    let pods = [("a", "10.0.0.1"), ("b", "10.0.0.2"), ("c", "10.0.0.3")];
    let mut endpoints = slice("web-1", "web", 80, &pods);
    for (at, (node, zone)) in [("node-a", "z1"), ("node-b", "z1"), ("node-c", "z2")].into_iter().enumerate() {
        endpoints["endpoints"][at]["nodeName"] = node.into();
        endpoints["endpoints"][at]["zone"] = zone.into();
    }
    world.api.apply_all(&pods.map(|(name, address)| pod(name, address))).unwrap();
    world.api.apply_all(&[namespace("shop", true), web(json!({})), endpoints.clone()]).unwrap();
    let source = world.follow().await;
    let from = |node: &str| {
        let names = reached(&source, "10.96.0.1:80", node);
        names.iter().map(|name| name.split(' ').next().unwrap_or_default()).collect::<String>()
    };
    assert_eq!(["node-a", "node-c"].map(from), ["abc", "abc"]);
    world.api.apply(&web(json!({ "trafficDistribution": "PreferSameNode" }))).unwrap();
    soon("the same node", || ["node-a", "node-b", "node-c", "node-d"].map(from) == ["a", "b", "c", "abc"])
        .await;
    for name in ["PreferClose", "PreferSameZone"] {
        world.api.apply(&web(json!({ "trafficDistribution": name }))).unwrap();
        soon("the same zone", || {
            ["node-a", "node-b", "node-c", "node-d"].map(from) == ["ab", "ab", "c", "abc"]
        })
        .await;
    }
    world.api.apply(&web(json!({ "internalTrafficPolicy": "Local" }))).unwrap();
    soon("this node only", || ["node-a", "node-d"].map(from) == ["a", "nowhere"]).await;
    // Hints decide for whom an endpoint is, wherever it stands, if all have them.
    for (at, zone) in [(0, "z3"), (1, "z1"), (2, "z2")] {
        endpoints["endpoints"][at]["hints"] = json!({ "forZones": [{ "name": zone }] });
    }
    world.api.apply(&endpoints).unwrap();
    world.api.apply(&web(json!({}))).unwrap();
    soon("hints", || ["node-a", "node-c", "node-d"].map(from) == ["b", "c", "a"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_goes_to_the_service_made_last() {
    let world = World::new();
    let aged = |object: Value, second: u32| {
        with(object, "/metadata/creationTimestamp", json!(format!("2026-01-01T00:00:{second:02}Z")))
    };
    let named = |name: &str| with(web(json!({})), "/metadata/name", json!(name));
    world
        .api
        .apply_all(&[
            namespace("shop", true),
            pod("a", "10.0.0.1"),
            slice("new-1", "new", 80, &[("a", "10.0.0.1")]),
        ])
        .unwrap();
    world.api.apply(&aged(named("old"), 1)).unwrap();
    let source = world.follow().await;
    assert_eq!(reached(&source, "10.96.0.1:80", "node-a"), set(&["nowhere"]));
    world.api.apply(&aged(named("new"), 2)).unwrap();
    soon("the new service", || reached(&source, "10.96.0.1:80", "node-a") == set(&["a 10.0.0.1:80"])).await;
    world.api.delete(&named("old")).unwrap();
    world.api.apply(&pod("marker", "10.0.0.9")).unwrap();
    soon("the marker", || source.current().workload("10.0.0.9".parse().unwrap()).is_some()).await;
    assert_eq!(reached(&source, "10.96.0.1:80", "node-a"), set(&["a 10.0.0.1:80"]));
}
