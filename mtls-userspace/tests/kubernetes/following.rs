//! Pods that come and go, and an API server that does: the mesh has what the server has, or the last it had.

use std::time::{Duration, Instant};

use mtls::mesh::{Scope, Source};
use mtls_tests::kubernetes::{Rule, agent_rules};
use serde_json::json;

use crate::cluster::{World, names, namespace, owner, pod, settings, soon, with, within};

#[tokio::test(flavor = "multi_thread")]
async fn a_long_list_comes_in_pages_and_changes_come_after_it() {
    let world = World::new();
    world.api.apply(&namespace("shop", true)).unwrap();
    let pods: Vec<_> =
        (0..600).map(|i| pod(&format!("pod-{i:03}"), &format!("10.0.{}.{}", i / 200, i % 200 + 1))).collect();
    world.api.apply_all(&pods).unwrap();
    let source = world.follow().await;
    assert_eq!(source.current().workloads.len(), 600);
    assert!(source.current().workloads.iter().all(|workload| workload.enrolled));
    let pages = world.api.requests();
    let pages = pages.iter().filter(|it| it.starts_with("GET /api/v1/pods") && it.contains("limit="));
    assert!(pages.count() >= 3, "{:?}", world.api.requests());
    assert_eq!(source.last_error(), None);

    let generation = source.current().generation;
    world.api.apply(&pod("new", "10.0.9.1")).unwrap();
    soon("the new pod", || owner(&source, "10.0.9.1") == Some(("shop/new".into(), true))).await;
    assert!(source.current().generation > generation);
    world.api.delete(&pod("new", "10.0.9.1")).unwrap();
    soon("the pod's end", || owner(&source, "10.0.9.1").is_none()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn labels_enrol_and_release_pods_that_run() {
    let world = World::new();
    let opted_out = with(pod("out", "10.0.0.2"), "/metadata/labels/istio.io~1dataplane-mode", json!("none"));
    let opted_in = with(pod("in", "10.0.0.3"), "/metadata/labels/istio.io~1dataplane-mode", json!("ambient"));
    world.api.apply_all(&[namespace("shop", false), pod("a", "10.0.0.1"), opted_out, opted_in]).unwrap();
    let source = world.follow().await;
    let enrolled = || ["10.0.0.1", "10.0.0.2", "10.0.0.3"].map(|address| owner(&source, address).unwrap().1);
    assert_eq!(enrolled(), [false, false, true]);
    world.api.apply(&namespace("shop", true)).unwrap();
    soon("enrolment", || enrolled() == [true, false, true]).await;
    world.api.apply(&namespace("shop", false)).unwrap();
    soon("release", || enrolled() == [false, false, true]).await;
    world.api.apply(&pod("in", "10.0.0.3")).unwrap();
    soon("the pod's own label gone", || enrolled() == [false, false, false]).await;
    // A pod that says nothing of itself lives as its namespace does, even when that comes later.
    world.api.apply(&with(pod("early", "10.0.1.1"), "/metadata/namespace", json!("later"))).unwrap();
    soon("the early pod", || owner(&source, "10.0.1.1") == Some(("later/early".into(), false))).await;
    world.api.apply(&namespace("later", true)).unwrap();
    soon("its enrolment", || owner(&source, "10.0.1.1") == Some(("later/early".into(), true))).await;
    world.api.delete(&namespace("later", true)).unwrap();
    soon("the namespace gone", || owner(&source, "10.0.1.1") == Some(("later/early".into(), false))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_is_known_once_it_has_a_node_and_its_namespace_is_known() {
    let world = World::new();
    world.api.apply(&namespace("shop", true)).unwrap();
    let source = world.follow().await;
    let starting = |name: &str| {
        let mesh = source.current();
        let mut starting = mesh.starting("node-a").filter(|workload| *workload.name == *name);
        starting.next().map(|workload| (workload.enrolled, workload.uid.is_some()))
    };
    let without_address = |name: &str, namespace: &str| {
        let mut pod = with(pod(name, "10.0.0.1"), "/metadata/namespace", json!(namespace));
        pod["spec"]["nodeName"] = json!("node-a");
        pod["status"] = json!({ "phase": "Pending" });
        pod
    };
    world.api.apply(&without_address("bound", "shop")).unwrap();
    soon("the bound pod", || starting("bound") == Some((true, true))).await;
    assert!(source.current().identities_on("node-a").any(|id| id.namespace().as_ref() == "shop"));
    assert!(source.current().workloads.is_empty(), "{:?}", names(&source.current()));
    // Its namespace may be one that enrols: nobody can say yet.
    world.api.apply(&without_address("early", "later")).unwrap();
    world.api.apply(&without_address("after", "shop")).unwrap();
    soon("the pod after the early one", || starting("after").is_some()).await;
    assert_eq!(starting("early"), None);
    world.api.apply(&namespace("later", false)).unwrap();
    soon("the early pod", || starting("early") == Some((false, true))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forgotten_history_is_made_good_by_another_list() {
    for by_status in [false, true] {
        let world = World::new();
        world.api.apply_all(&[namespace("shop", true), pod("a", "10.0.0.1"), pod("b", "10.0.0.2")]).unwrap();
        let source = world.follow().await;
        world.api.go_away();
        world.api.delete(&pod("a", "10.0.0.1")).unwrap();
        world.api.apply(&pod("c", "10.0.0.3")).unwrap();
        // What is known of `d` is older than what the list will say.
        world.api.apply(&with(pod("b", "10.0.0.2"), "/spec/serviceAccountName", json!("other"))).unwrap();
        world.api.forget_history(by_status);
        world.api.come_back();
        soon("the list", || names(&source.current()) == ["shop/b", "shop/c"]).await;
        let account = source.current().workload("10.0.0.2".parse().unwrap()).unwrap().service_account.clone();
        assert_eq!(&*account, "other");
        soon("no error", || source.last_error().is_none()).await;
        world.api.apply(&pod("d", "10.0.0.4")).unwrap();
        soon("a change after it", || owner(&source, "10.0.0.4").is_some()).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_that_outlives_the_history_begins_again() {
    let world = World::new();
    let pods: Vec<_> =
        (0..300).map(|i| pod(&format!("pod-{i}"), &format!("10.0.{}.{}", i / 200, i % 200 + 1))).collect();
    world.api.apply_all(&pods).unwrap();
    let source = world.follow().await;
    // Every list from here on is in two pages, and the second is asked for in vain for a while.
    for round in 0..20 {
        world.api.forget_history(false);
        tokio::time::sleep(Duration::from_millis(round * 3)).await;
    }
    world.api.apply(&pod("last", "10.0.9.9")).unwrap();
    soon("the last pod", || source.current().workloads.len() == 301).await;
    assert!(owner(&source, "10.0.9.9").is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_server_is_away_the_last_state_stays_and_is_said_to() {
    let world = World::new();
    world.api.apply_all(&[namespace("shop", true), pod("a", "10.0.0.1")]).unwrap();
    let source = world.follow().await;
    world.api.go_away();
    soon("the error", || source.last_error().is_some()).await;
    let error = source.last_error().unwrap();
    assert!(error.contains("are not followed: ") && error.contains("stays in force"), "{error}");
    world.api.apply(&pod("b", "10.0.0.2")).unwrap();
    // Snapshots may follow for as long as what was listed before is taken in; none of them knows less.
    let until = Instant::now() + Duration::from_secs(1);
    while Instant::now() < until {
        assert_eq!(names(&source.current()), ["shop/a"]);
        assert_eq!(owner(&source, "10.0.0.1"), Some(("shop/a".into(), true)));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    world.api.come_back();
    soon("what happened meanwhile", || owner(&source, "10.0.0.2").is_some()).await;
    within(Duration::from_secs(20), "no error", || source.last_error().is_none()).await;
    // Watches end all the time: that is no error.
    world.api.limit_watches(Duration::from_millis(100));
    world.api.cut_connections();
    for round in 0..10 {
        let address = format!("10.0.1.{round}");
        world.api.apply(&pod(&format!("pod-{round}"), &address)).unwrap();
        soon("a pod in a later watch", || owner(&source, &address).is_some()).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_is_the_newer_pods_and_an_old_pods_end_does_not_take_it_away() {
    let world = World::new();
    let aged = |name: &str, second: u32| {
        let created = format!("2026-01-01T00:00:{second:02}Z");
        with(pod(name, "10.0.0.1"), "/metadata/creationTimestamp", json!(created))
    };
    world.api.apply_all(&[namespace("shop", true), aged("old", 1)]).unwrap();
    let source = world.follow().await;
    assert_eq!(owner(&source, "10.0.0.1"), Some(("shop/old".into(), true)));
    let new = with(aged("new", 2), "/spec/serviceAccountName", json!("other"));
    world.api.apply(&new).unwrap();
    soon("the new owner", || owner(&source, "10.0.0.1") == Some(("shop/new".into(), true))).await;
    assert_eq!(names(&source.current()), ["shop/new"]);
    assert!(source.current().warnings().iter().any(|it| it.to_string().contains("10.0.0.1 is claimed by")));
    world.api.delete(&aged("old", 1)).unwrap();
    soon("no more claims", || source.current().warnings().is_empty()).await;
    assert_eq!(owner(&source, "10.0.0.1"), Some(("shop/new".into(), true)));

    // Made in one second: the one that is not on its way out.
    let leaving = with(aged("leaving", 2), "/metadata/deletionTimestamp", json!("2026-01-01T00:01:00Z"));
    world.api.apply(&leaving).unwrap();
    world.api.apply(&pod("marker", "10.0.0.9")).unwrap();
    soon("the marker", || owner(&source, "10.0.0.9").is_some()).await;
    assert_eq!(owner(&source, "10.0.0.1"), Some(("shop/new".into(), true)));

    // A finished pod's address is free, and a pod made anew under a name is another.
    world.api.apply(&with(new.clone(), "/status/phase", json!("Succeeded"))).unwrap();
    soon("the finished pod", || owner(&source, "10.0.0.1").unwrap().0 == "shop/leaving").await;
    world.api.delete(&new).unwrap();
    let again = with(pod("new", "10.0.0.5"), "/metadata/uid", json!("another"));
    world.api.apply(&again).unwrap();
    soon("the pod made anew", || owner(&source, "10.0.0.5") == Some(("shop/new".into(), true))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_have_several_addresses_or_their_nodes_and_say_nothing_of_where_they_live() {
    let world = World::new();
    let both =
        with(pod("both", "10.0.0.1"), "/status/podIPs", json!([{ "ip": "10.0.0.1" }, { "ip": "fd00::1" }]));
    let host = with(pod("host", "192.0.2.1"), "/spec/hostNetwork", json!(true));
    let pending = with(pod("pending", "10.0.0.3"), "/status", json!({ "phase": "Pending" }));
    let annotations = json!({ "mtls.dev/netns": "/proc/1/ns/net", "mtls.dev/cgroup": "/sys/fs/cgroup" });
    let sly = with(pod("sly", "10.0.0.4"), "/metadata/annotations", annotations);
    let node = json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": { "name": "node-a", "labels": { "node-role.kubernetes.io/control-plane": "" } },
        "spec": { "podCIDR": "10.0.0.0/24", "podCIDRs": ["10.0.0.0/24"] },
        "status": { "addresses": [{ "type": "InternalIP", "address": "192.0.2.1" }, { "type": "Hostname",
        "address": "a" }] },
    });
    world.api.apply_all(&[namespace("shop", true), both, host, pending, sly.clone(), node]).unwrap();
    let source = world.follow().await;
    let mesh = source.current();
    assert_eq!(names(&mesh), ["shop/both", "shop/host", "shop/sly"]);
    assert_eq!(owner(&source, "fd00::1"), Some(("shop/both".into(), true)));
    assert_eq!(owner(&source, "192.0.2.1"), None, "a node's address tells nobody's identity");
    let at = mesh.node_at("192.0.2.1".parse().unwrap()).unwrap();
    assert_eq!((&*at.name, at.control_plane), ("node-a", true));
    assert_eq!(mesh.node_at("10.0.0.1".parse().unwrap()).map(|node| &*node.name), Some("node-a"));
    let host = mesh.workloads.iter().find(|workload| &*workload.name == "host").unwrap();
    assert!(!host.enrolled);
    let sly_here = mesh.workload("10.0.0.4".parse().unwrap()).unwrap();
    assert_eq!((&sly_here.netns, &sly_here.cgroup), (&None, &None));

    let scope = Scope::Traffic { annotations: true };
    let trusting = Source::kubernetes(world.agent().await, settings(), scope).await;
    let sly_there = trusting.current().workload("10.0.0.4".parse().unwrap()).unwrap().netns.clone();
    assert_eq!(sly_there.as_deref(), Some(std::path::Path::new("/proc/1/ns/net")));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_permission_it_waits_for_it_and_names_it() {
    let world = World::new();
    world.api.apply_all(&[namespace("shop", true), pod("a", "10.0.0.1")]).unwrap();
    let agent = world.access("system:serviceaccount:mtls-system:agent", agent_rules()).await;
    let source = Source::kubernetes(agent, settings(), Scope::Workloads).await;
    world
        .api
        .rules("system:serviceaccount:mtls-system:agent", vec![Rule::new(&["list", "watch"], "namespaces")]);
    world.api.cut_connections();
    // The cut itself may be the first that is heard of it.
    let refused = || source.last_error().is_some_and(|error| error.contains("list and watch pods"));
    soon("the refusal", refused).await;
    let error = source.last_error().unwrap();
    for expected in
        ["list and watch pods", "cannot watch resource \"pods\"", "grant both verbs", "stays in force"]
    {
        assert!(error.contains(expected), "{error}");
    }
    assert_eq!(owner(&source, "10.0.0.1"), Some(("shop/a".into(), true)));

    // From the start: nothing is there until everything is.
    let cluster = world.access("newcomer", vec![Rule::new(&["list", "watch"], "namespaces")]).await;
    let mut starting = Box::pin(Source::kubernetes(cluster, settings(), Scope::Workloads));
    assert!(tokio::time::timeout(Duration::from_secs(1), &mut starting).await.is_err());
    world.api.rules("newcomer", agent_rules());
    let started = tokio::time::timeout(Duration::from_secs(20), starting).await.unwrap();
    assert_eq!(owner(&started, "10.0.0.1"), Some(("shop/a".into(), true)));
}
