//! What the API server itself dials: webhooks of all three kinds and aggregated APIs, found before they are called.

use mtls::mesh::Source;
use mtls_tests::kubernetes::{Rule, agent_rules};
use serde_json::{Value, json};

use crate::cluster::{World, namespace, pod, service, slice, soon};

/// Who is called at a pod's address.
fn called(source: &Source, address: &str) -> Vec<String> {
    let mesh = source.current();
    let calls = mesh.server_calls();
    calls.get(&address.parse().unwrap()).into_iter().flatten().map(ToString::to_string).collect()
}

fn webhooks(kind: &str, name: &str, clients: &[Value]) -> Value {
    let webhooks: Vec<Value> = clients
        .iter()
        .map(|client| {
            json!({ "name": "a.example.com", "clientConfig": client, "sideEffects": "None",
                "admissionReviewVersions": ["v1"], "rules": [{ "operations": ["*"], "apiGroups": [""] }] })
        })
        .collect();
    json!({ "apiVersion": "admissionregistration.k8s.io/v1", "kind": kind, "metadata": { "name": name },
        "webhooks": webhooks })
}

fn validating(name: &str, clients: &[Value]) -> Value {
    webhooks("ValidatingWebhookConfiguration", name, clients)
}

fn api(name: &str, service: Value) -> Value {
    json!({ "apiVersion": "apiregistration.k8s.io/v1", "kind": "APIService", "metadata": { "name": name },
        "spec": { "group": "metrics.k8s.io", "version": "v1beta1", "service": service,
            "groupPriorityMinimum": 100, "versionPriority": 100 } })
}

/// Of a custom resource that this client converts; the schema, which nobody needs, says `service`, too.
fn definition(name: &str, client: Option<Value>) -> Value {
    let conversion = match client {
        Some(client) => json!({ "strategy": "Webhook",
            "webhook": { "clientConfig": client, "conversionReviewVersions": ["v1"] } }),
        None => json!({ "strategy": "None" }),
    };
    let service = json!({ "type": "object", "properties": { "name": { "type": "string" } } });
    let schema = json!({ "openAPIV3Schema": { "type": "object", "properties": { "service": service } } });
    json!({ "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": { "name": name },
        "spec": { "group": "example.com", "scope": "Namespaced", "names": { "plural": "shelves", "kind": "Shelf" },
            "versions": [{ "name": "v1", "served": true, "storage": true, "schema": schema }],
            "conversion": conversion } })
}

fn client(name: &str, port: Value) -> Value {
    json!({ "service": { "namespace": "shop", "name": name, "path": "/check", "port": port }, "caBundle": "AA==" })
}

/// Two pods behind a Service, on whose port 443 they listen on 8443.
async fn world() -> (World, Source) {
    let world = World::new();
    let ports = json!([{ "name": "", "port": 443, "targetPort": 8443 }, { "name": "other", "port": 80 }]);
    let hook = json!({ "clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1"], "ports": ports });
    world
        .api
        .apply_all(&[
            namespace("shop", true),
            pod("a", "10.0.0.1"),
            pod("b", "10.0.0.2"),
            service("hook", hook),
            slice("hook-1", "hook", 8443, &[("a", "10.0.0.1"), ("b", "10.0.0.2")]),
        ])
        .unwrap();
    let source = world.follow().await;
    soon("the callers", || source.current().unread_callers().is_empty()).await;
    (world, source)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_called_through_a_service_is_called_at_its_pods_and_nothing_else_is() {
    let (world, source) = world().await;
    assert!(source.current().server_calls().is_empty());
    let elsewhere = json!({ "url": "https://10.0.0.1:8443/" });
    let twice = [client("hook", Value::Null), client("hook", json!(443)), elsewhere.clone()];
    world.api.apply(&validating("rules", &twice)).unwrap();
    let expected = ["ValidatingWebhookConfiguration rules through Service shop/hook port 443"];
    soon("the webhook", || called(&source, "10.0.0.1:8443") == expected).await;
    assert_eq!(called(&source, "10.0.0.2:8443"), expected);
    assert_eq!(source.current().server_calls().len(), 2, "no other port of theirs");

    // A URL is nobody's Service, whatever it leads to; nor are ports and Services that are not there.
    let nobody =
        [elsewhere, client("hook", json!(444)), client("other", json!(443)), client("hook", json!(99_999))];
    world.api.apply(&validating("rules", &nobody)).unwrap();
    soon("its end", || source.current().server_calls().is_empty()).await;

    world
        .api
        .apply(&webhooks("MutatingWebhookConfiguration", "defaults", &[client("hook", json!(443))]))
        .unwrap();
    world.api.apply(&api("v1beta1.metrics.k8s.io", json!({ "namespace": "shop", "name": "hook" }))).unwrap();
    world.api.apply(&api("v1.apps", Value::Null)).unwrap();
    let both = [
        "APIService v1beta1.metrics.k8s.io through Service shop/hook port 443",
        "MutatingWebhookConfiguration defaults through Service shop/hook port 443",
    ];
    soon("both", || called(&source, "10.0.0.2:8443") == both).await;
    world.api.delete(&webhooks("MutatingWebhookConfiguration", "defaults", &[])).unwrap();
    soon("one", || called(&source, "10.0.0.2:8443") == both[..1]).await;
    world.api.delete(&api("v1beta1.metrics.k8s.io", Value::Null)).unwrap();
    soon("none", || source.current().server_calls().is_empty()).await;

    // More of them than come in one answer.
    let shelves = |n| format!("shelves-{n}.example.com");
    for n in 0..20 {
        let converted = (n == 19).then(|| client("hook", json!(443)));
        world.api.apply(&definition(&shelves(n), converted)).unwrap();
    }
    let converted = ["CustomResourceDefinition shelves-19.example.com through Service shop/hook port 443"];
    soon("the conversion", || called(&source, "10.0.0.1:8443") == converted).await;
    let anew = world.follow().await;
    soon("the conversion, listed", || called(&anew, "10.0.0.1:8443") == converted).await;
    world.api.apply(&definition(&shelves(19), None)).unwrap();
    soon("its end", || source.current().server_calls().is_empty()).await;
    assert_eq!(source.last_error(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn whose_calls_cannot_be_read_is_said_and_nothing_waits_for_it() {
    let (world, _) = world().await;
    let name = "system:serviceaccount:mtls-system:newcomer";
    let without = |kind: &str| -> Vec<Rule> {
        agent_rules().into_iter().filter(|rule| !rule.resource.starts_with(kind)).collect()
    };
    let cluster = world.access(name, without("validatingwebhook")).await;
    let scope = mtls::mesh::Scope::Traffic { annotations: false };
    let source = Source::kubernetes(cluster, crate::cluster::settings(), scope).await;
    assert_eq!(source.current().workloads.len(), 2);
    let unread = ["validatingwebhookconfigurations.admissionregistration.k8s.io"];
    soon("the others", || source.current().unread_callers() == unread).await;
    let said = || source.last_error().unwrap_or_default();
    soon("the reason", || said().contains("list and watch validatingwebhookconfigurations")).await;

    world.api.apply(&validating("rules", &[client("hook", Value::Null)])).unwrap();
    world.api.rules(name, agent_rules());
    soon("the webhook", || called(&source, "10.0.0.1:8443").len() == 1).await;
    assert!(source.current().unread_callers().is_empty());
    soon("no reason", || source.last_error().is_none()).await;
}
