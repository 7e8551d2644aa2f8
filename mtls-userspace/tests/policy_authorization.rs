//! The rules of `AuthorizationPolicy` at L4, a row each.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::net::{IpAddr, SocketAddr};

use mtls::identity::SpiffeId;
use mtls::mesh::{Mesh, Objects, Settings};
use mtls::policy::{Authorized, Denied, Mode, Peer, Reason, Request, Verdict};

fn mesh(policies: &str) -> Mesh {
    let settings =
        Settings { trust_domain: "cluster.local".parse().unwrap(), root_namespace: "istio-system".into() };
    Mesh::build(&Objects::from_yaml("p.yaml", &format!("{PODS}{policies}")).unwrap(), &settings, 1).unwrap()
}

const PODS: &str = "
{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: bank, labels: {istio.io/dataplane-mode: ambient}}}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
status: {podIPs: [{ip: 10.0.0.1}, {ip: 'fd00::1'}]}
---
{apiVersion: v1, kind: Pod, metadata: {name: db, namespace: shop, labels: {app: db}}, status: {podIP: 10.0.0.2}}
---
{apiVersion: v1, kind: Pod, metadata: {name: web, namespace: bank, labels: {app: web}}, status: {podIP: 10.0.0.3}}
";

const WEB: &str = "10.0.0.1:80";
const DB: &str = "10.0.0.2:80";
const BANK: &str = "10.0.0.3:80";

/// Who asks: an identity as `namespace/account`, or nothing for plaintext; and from where.
fn ask(mesh: &Mesh, from: &str, to: &str) -> Result<Authorized, Denied> {
    let (identity, source) = from.split_once('@').unwrap_or((from, "10.9.9.9"));
    let address: SocketAddr = to.parse().unwrap();
    let id = identity.split_once('/').map(|(namespace, account)| {
        SpiffeId::new(&"cluster.local".parse().unwrap(), namespace, account).unwrap()
    });
    mesh.policies.authorize(&Request {
        destination: mesh.workload(address.ip()).unwrap(),
        address,
        source_ip: source.parse::<IpAddr>().unwrap(),
        peer: id.as_ref().map_or(Peer::Plaintext, Peer::Verified),
    })
}

fn outcome(mesh: &Mesh, from: &str, to: &str) -> String {
    match ask(mesh, from, to) {
        Ok(authorized) => authorized.policy().map_or("ok".to_owned(), |policy| format!("ok {policy}")),
        Err(denied) => denied.to_string(),
    }
}

fn policy(namespace: &str, name: &str, spec: &str) -> String {
    annotated(namespace, name, "", spec)
}

fn dry_run(namespace: &str, name: &str, spec: &str) -> String {
    annotated(namespace, name, ", annotations: {istio.io/dry-run: 'true'}", spec)
}

fn annotated(namespace: &str, name: &str, annotations: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: {namespace}{annotations}}}\nspec: {spec}\n"
    )
}

/// An ALLOW policy of namespace shop with one rule.
fn allow(rule: &str) -> String {
    policy("shop", "p", &format!("{{rules: [{rule}]}}"))
}

fn deny(rule: &str) -> String {
    policy("shop", "p", &format!("{{action: DENY, rules: [{rule}]}}"))
}

fn source(fields: &str) -> String {
    allow(&format!("{{from: [{{source: {{{fields}}}}}]}}"))
}

fn operation(fields: &str) -> String {
    allow(&format!("{{to: [{{operation: {{{fields}}}}}]}}"))
}

fn when(key: &str, fields: &str) -> String {
    allow(&format!("{{when: [{{key: {key}, {fields}}}]}}"))
}

fn strict(namespace: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: default, namespace: {namespace}}}\nspec: {{mtls: {{mode: STRICT}}}}\n"
    )
}

/// (rule, policies, (from, to, outcome)...)
type Row<'a> = (&'a str, String, Vec<(&'a str, &'a str, &'a str)>);

#[track_caller]
fn check(rows: Vec<Row<'_>>) {
    for (rule, policies, expected) in rows {
        let mesh = mesh(&policies);
        for (from, to, expected) in expected {
            assert_eq!(outcome(&mesh, from, to), expected, "{rule}: {from} to {to}");
        }
    }
}

const NONE: &str = "no ALLOW policy matched";
const OK: &str = "ok shop/p";
const DENY: &str = "denied by AuthorizationPolicy shop/p";
const PLAINTEXT: &str = "";

#[test]
fn scopes_are_pooled_and_none_outranks_another() {
    let all = "{rules: [{}]}";
    let nobody = "{rules: []}";
    let deny_all = "{action: DENY, rules: [{}]}";
    let on_web = |rest: &str| format!("{{selector: {{matchLabels: {{app: web}}}}, {rest}}}");
    check(vec![
        ("no policy: allowed", String::new(), vec![("shop/a", WEB, "ok"), (PLAINTEXT, WEB, "ok")]),
        (
            "root namespace without selector: every workload",
            policy("istio-system", "p", nobody),
            vec![("shop/a", WEB, NONE), ("shop/a", BANK, NONE)],
        ),
        (
            "elsewhere without selector: that namespace",
            policy("shop", "p", nobody),
            vec![("shop/a", WEB, NONE), ("shop/a", DB, NONE), ("shop/a", BANK, "ok")],
        ),
        (
            "selector: the matching workloads of its namespace",
            policy("shop", "p", &on_web("rules: []")),
            vec![("shop/a", WEB, NONE), ("shop/a", DB, "ok"), ("shop/a", BANK, "ok")],
        ),
        (
            "selector in the root namespace: the matching workloads of every namespace",
            policy("istio-system", "p", &on_web("rules: []")),
            vec![("shop/a", WEB, NONE), ("shop/a", DB, "ok"), ("shop/a", BANK, NONE)],
        ),
        (
            "a mesh ALLOW lets in what a workload's ALLOW does not",
            policy("istio-system", "p", all) + &policy("shop", "p", &on_web("rules: []")),
            vec![("shop/a", WEB, "ok istio-system/p")],
        ),
        (
            "a workload's ALLOW lets in what the mesh's ALLOW does not",
            policy("istio-system", "p", nobody) + &policy("shop", "p", &on_web("rules: [{}]")),
            vec![("shop/a", WEB, OK), ("shop/a", DB, NONE)],
        ),
        (
            "a mesh DENY is not outranked by a workload's ALLOW",
            policy("istio-system", "p", deny_all) + &policy("shop", "p", &on_web("rules: [{}]")),
            vec![("shop/a", WEB, "denied by AuthorizationPolicy istio-system/p")],
        ),
        (
            "any matching DENY wins over every ALLOW",
            policy("shop", "a", all) + &policy("shop", "p", deny_all),
            vec![("shop/a", WEB, DENY)],
        ),
        (
            "a DENY that does not match leaves it to the others",
            policy("shop", "p", "{action: DENY, rules: [{from: [{source: {namespaces: [bank]}}]}]}"),
            vec![("shop/a", WEB, "ok"), ("bank/a", WEB, DENY)],
        ),
        (
            "of several that match, the first by name is named",
            policy("shop", "b", all) + &policy("shop", "a", all) + &policy("istio-system", "z", all),
            vec![("shop/a", WEB, "ok istio-system/z"), ("shop/a", DB, "ok istio-system/z")],
        ),
        ("action is ALLOW by default", allow("{}"), vec![("shop/a", WEB, OK)]),
        (
            "targetRefs means no pod",
            policy(
                "shop",
                "p",
                "{targetRefs: [{kind: Gateway, group: gateway.networking.k8s.io, name: w}], action: DENY, rules: [{}]}",
            ),
            vec![("shop/a", WEB, "ok")],
        ),
    ]);
}

#[test]
fn rules_combine_as_written() {
    let namespaces = "from: [{source: {namespaces: [a]}}, {source: {namespaces: [b]}}]";
    let ports = "to: [{operation: {ports: ['80']}}, {operation: {ports: ['81']}}]";
    check(vec![
        ("ALLOW without rules denies all", policy("shop", "p", "{}"), vec![("shop/a", WEB, NONE)]),
        (
            "ALLOW with empty rules denies all",
            policy("shop", "p", "{rules: []}"),
            vec![("shop/a", WEB, NONE)],
        ),
        (
            "DENY without rules does nothing",
            policy("shop", "p", "{action: DENY}"),
            vec![("shop/a", WEB, "ok")],
        ),
        ("an empty rule matches everything", allow("{}"), vec![("shop/a", WEB, OK), (PLAINTEXT, WEB, OK)]),
        (
            "an empty DENY rule matches everything",
            deny("{}"),
            vec![("shop/a", WEB, DENY), (PLAINTEXT, WEB, DENY)],
        ),
        (
            "a policy matches if any rule does",
            allow("{from: [{source: {namespaces: [a]}}]}, {from: [{source: {namespaces: [b]}}]}"),
            vec![("a/x", WEB, OK), ("b/x", WEB, OK), ("c/x", WEB, NONE)],
        ),
        (
            "from matches if any source does",
            allow(&format!("{{{namespaces}}}")),
            vec![("a/x", WEB, OK), ("b/x", WEB, OK), ("c/x", WEB, NONE)],
        ),
        (
            "to matches if any operation does",
            allow(&format!("{{{ports}}}")),
            vec![("a/x", WEB, OK), ("a/x", "10.0.0.1:81", OK), ("a/x", "10.0.0.1:82", NONE)],
        ),
        (
            "from, to and every when must match",
            allow(&format!(
                "{{{namespaces}, {ports}, when: [{{key: source.ip, values: [10.9.9.9]}}, {{key: source.serviceAccount, values: [a/x, b/x]}}]}}"
            )),
            vec![
                ("a/x", WEB, OK),
                ("b/x", "10.0.0.1:81", OK),
                ("c/x", WEB, NONE),
                ("a/x", "10.0.0.1:82", NONE),
                ("a/x@10.9.9.8", WEB, NONE),
                ("a/y", WEB, NONE),
            ],
        ),
        (
            "within one source all fields must hold",
            source("namespaces: [a], ipBlocks: [10.9.9.0/24]"),
            vec![("a/x", WEB, OK), ("b/x", WEB, NONE), ("a/x@10.9.8.1", WEB, NONE)],
        ),
        (
            "within one field any value will do",
            source("namespaces: [a, b]"),
            vec![("a/x", WEB, OK), ("b/x", WEB, OK), ("c/x", WEB, NONE)],
        ),
        (
            "an empty field is an absent one",
            source("namespaces: [a], principals: []"),
            vec![("a/x", WEB, OK), ("b/x", WEB, NONE)],
        ),
    ]);
}

#[test]
fn every_field_and_its_not_form() {
    let any = "10.0.0.1:81";
    check(vec![
        (
            "principals",
            source("principals: [cluster.local/ns/a/sa/x]"),
            vec![("a/x", WEB, OK), ("a/y", WEB, NONE), ("b/x", WEB, NONE)],
        ),
        (
            "principals of another trust domain",
            source("principals: [example.org/ns/a/sa/x]"),
            vec![("a/x", WEB, NONE)],
        ),
        (
            "notPrincipals holds if no value matches",
            source("notPrincipals: [cluster.local/ns/a/sa/x, cluster.local/ns/a/sa/y]"),
            vec![("a/x", WEB, NONE), ("a/y", WEB, NONE), ("a/z", WEB, OK)],
        ),
        ("namespaces", source("namespaces: [a]"), vec![("a/x", WEB, OK), ("aa/x", WEB, NONE)]),
        ("notNamespaces", source("notNamespaces: [a]"), vec![("a/x", WEB, NONE), ("b/x", WEB, OK)]),
        (
            "serviceAccounts with a namespace",
            source("serviceAccounts: [a/x]"),
            vec![("a/x", WEB, OK), ("shop/x", WEB, NONE)],
        ),
        (
            "serviceAccounts without: the policy's own namespace",
            source("serviceAccounts: [x]"),
            vec![("shop/x", WEB, OK), ("a/x", WEB, NONE)],
        ),
        (
            "notServiceAccounts",
            source("notServiceAccounts: [x, a/y]"),
            vec![("shop/x", WEB, NONE), ("a/y", WEB, NONE), ("a/x", WEB, OK)],
        ),
        (
            "a value and its not form in one source",
            source("namespaces: [a], notServiceAccounts: [a/x]"),
            vec![("a/x", WEB, NONE), ("a/y", WEB, OK), ("b/y", WEB, NONE)],
        ),
        (
            "ipBlocks: a CIDR",
            source("ipBlocks: [192.168.0.0/16]"),
            vec![("a/x@192.168.3.4", WEB, OK), ("a/x@192.169.0.1", WEB, NONE)],
        ),
        (
            "ipBlocks: host bits do not matter",
            source("ipBlocks: [192.168.7.7/16]"),
            vec![("a/x@192.168.3.4", WEB, OK), ("a/x@192.169.0.1", WEB, NONE)],
        ),
        (
            "ipBlocks: an address",
            source("ipBlocks: [192.168.0.1]"),
            vec![("a/x@192.168.0.1", WEB, OK), ("a/x@192.168.0.2", WEB, NONE)],
        ),
        (
            "ipBlocks: IPv6, and v4-mapped means IPv4",
            source("ipBlocks: ['fd00::/8', '::ffff:192.168.0.0/112']"),
            vec![
                ("a/x@fd01::1", WEB, OK),
                ("a/x@192.168.0.9", WEB, OK),
                ("a/x@::ffff:192.168.0.9", WEB, OK),
                ("a/x@2001:db8::1", WEB, NONE),
            ],
        ),
        (
            "ipBlocks: 0.0.0.0/0 is IPv4 only",
            source("ipBlocks: [0.0.0.0/0]"),
            vec![("a/x@1.2.3.4", WEB, OK), ("a/x@fd00::1", WEB, NONE)],
        ),
        (
            "notIpBlocks",
            source("notIpBlocks: [192.168.0.0/16]"),
            vec![("a/x@192.168.3.4", WEB, NONE), ("a/x@192.169.0.1", WEB, OK)],
        ),
        ("ports", operation("ports: ['80']"), vec![("a/x", WEB, OK), ("a/x", any, NONE)]),
        ("notPorts", operation("notPorts: ['80']"), vec![("a/x", WEB, NONE), ("a/x", any, OK)]),
        (
            "when source.ip",
            when("source.ip", "values: [10.9.9.0/24]"),
            vec![("a/x", WEB, OK), ("a/x@1.1.1.1", WEB, NONE)],
        ),
        (
            "when source.ip, not",
            when("source.ip", "notValues: [10.9.9.9]"),
            vec![("a/x", WEB, NONE), ("a/x@1.1.1.1", WEB, OK)],
        ),
        (
            "when source.namespace",
            when("source.namespace", "values: [a]"),
            vec![("a/x", WEB, OK), ("b/x", WEB, NONE)],
        ),
        (
            "when source.namespace, not",
            when("source.namespace", "notValues: [a]"),
            vec![("a/x", WEB, NONE), ("b/x", WEB, OK)],
        ),
        (
            "when source.principal",
            when("source.principal", "values: [cluster.local/ns/a/sa/x]"),
            vec![("a/x", WEB, OK), ("a/y", WEB, NONE)],
        ),
        (
            "when source.principal, not",
            when("source.principal", "notValues: [cluster.local/ns/a/sa/x]"),
            vec![("a/x", WEB, NONE), ("a/y", WEB, OK)],
        ),
        (
            "when source.serviceAccount",
            when("source.serviceAccount", "values: [x, a/y]"),
            vec![("shop/x", WEB, OK), ("a/y", WEB, OK), ("a/x", WEB, NONE)],
        ),
        (
            "when source.serviceAccount, not",
            when("source.serviceAccount", "notValues: [x, a/y]"),
            vec![("shop/x", WEB, NONE), ("a/y", WEB, NONE), ("a/x", WEB, OK)],
        ),
        (
            "when destination.ip",
            when("destination.ip", "values: [10.0.0.1]"),
            vec![("a/x", WEB, OK), ("a/x", DB, NONE), ("a/x", "[fd00::1]:80", NONE)],
        ),
        (
            "when destination.ip, not",
            when("destination.ip", "notValues: [10.0.0.1]"),
            vec![("a/x", WEB, NONE), ("a/x", DB, OK), ("a/x", "[fd00::1]:80", OK)],
        ),
        (
            "when destination.port",
            when("destination.port", "values: ['80']"),
            vec![("a/x", WEB, OK), ("a/x", any, NONE)],
        ),
        (
            "when destination.port, not",
            when("destination.port", "notValues: ['80']"),
            vec![("a/x", WEB, NONE), ("a/x", any, OK)],
        ),
        (
            "values and notValues of one condition must both hold",
            when("source.namespace", "values: ['a*'], notValues: [ab]"),
            vec![("a/x", WEB, OK), ("ab/x", WEB, NONE), ("ac/x", WEB, OK), ("b/x", WEB, NONE)],
        ),
    ]);
}

#[test]
fn every_form_of_text() {
    check(vec![
        (
            "exact",
            source("namespaces: [abc]"),
            vec![("abc/x", WEB, OK), ("abcd/x", WEB, NONE), ("xabc/x", WEB, NONE)],
        ),
        (
            "prefix",
            source("namespaces: ['abc*']"),
            vec![("abc/x", WEB, OK), ("abcd/x", WEB, OK), ("xabc/x", WEB, NONE)],
        ),
        (
            "suffix",
            source("namespaces: ['*abc']"),
            vec![("abc/x", WEB, OK), ("abcd/x", WEB, NONE), ("xabc/x", WEB, OK)],
        ),
        ("presence", source("namespaces: ['*']"), vec![("abc/x", WEB, OK), (PLAINTEXT, WEB, NONE)]),
        (
            "principal prefix: a namespace",
            source("principals: ['cluster.local/ns/a/*']"),
            vec![("a/x", WEB, OK), ("ab/x", WEB, NONE)],
        ),
        (
            "principal suffix: an account",
            source("principals: ['*/sa/x']"),
            vec![("a/x", WEB, OK), ("a/xx", WEB, NONE)],
        ),
        ("principal presence", source("principals: ['*']"), vec![("a/x", WEB, OK), (PLAINTEXT, WEB, NONE)]),
        (
            "service account prefix: in the policy's namespace",
            source("serviceAccounts: ['x*']"),
            vec![("shop/x1", WEB, OK), ("a/x1", WEB, NONE), ("shop/y", WEB, NONE)],
        ),
        (
            "service account prefix: a namespace's accounts",
            source("serviceAccounts: ['a/*']"),
            vec![("a/x", WEB, OK), ("b/x", WEB, NONE)],
        ),
        (
            "service account suffix: an account of any namespace",
            source("serviceAccounts: ['*/x']"),
            vec![("a/x", WEB, OK), ("b/x", WEB, OK), ("b/xx", WEB, NONE)],
        ),
        (
            "service account presence",
            source("serviceAccounts: ['*']"),
            vec![("a/x", WEB, OK), (PLAINTEXT, WEB, NONE)],
        ),
        (
            "prefix in a not form",
            source("notNamespaces: ['a*']"),
            vec![("ab/x", WEB, NONE), ("b/x", WEB, OK)],
        ),
    ]);
}

#[test]
fn plaintext_has_no_identity() {
    check(vec![
        ("never a positive principal", source("principals: ['*']"), vec![(PLAINTEXT, WEB, NONE)]),
        ("never a positive namespace", source("namespaces: ['*']"), vec![(PLAINTEXT, WEB, NONE)]),
        ("never a positive service account", source("serviceAccounts: ['*']"), vec![(PLAINTEXT, WEB, NONE)]),
        ("never in a condition", when("source.principal", "values: ['*']"), vec![(PLAINTEXT, WEB, NONE)]),
        (
            "notPrincipals [*] matches it, and nothing else",
            deny("{from: [{source: {notPrincipals: ['*']}}]}"),
            vec![(PLAINTEXT, WEB, DENY), ("a/x", WEB, "ok")],
        ),
        (
            "notNamespaces matches it",
            deny("{from: [{source: {notNamespaces: [a]}}]}"),
            vec![(PLAINTEXT, WEB, DENY), ("a/x", WEB, "ok"), ("b/x", WEB, DENY)],
        ),
        (
            "it has an address",
            source("ipBlocks: [10.9.9.9]"),
            vec![(PLAINTEXT, WEB, OK), ("@10.9.9.8", WEB, NONE)],
        ),
        (
            "it has a port",
            operation("ports: ['80']"),
            vec![(PLAINTEXT, WEB, OK), (PLAINTEXT, "10.0.0.1:81", NONE)],
        ),
    ]);
}

#[test]
fn what_only_l7_can_judge() {
    let with = |source: &str, operation: &str| {
        format!("{{from: [{{source: {{{source}}}}}], to: [{{operation: {{{operation}}}}}]}}")
    };
    let web_or = |rule: &str| policy("shop", "p", &format!("{{action: DENY, rules: [{rule}]}}"));
    let mut rows: Vec<Row<'_>> = Vec::new();
    for field in [
        "requestPrincipals: ['*']",
        "notRequestPrincipals: [a]",
        "remoteIpBlocks: [10.0.0.0/8]",
        "notRemoteIpBlocks: [10.0.0.0/8]",
    ] {
        rows.push((
            "ALLOW with an L7 source never matches",
            source(&format!("{field}, namespaces: [a]")),
            vec![("a/x", WEB, NONE)],
        ));
        rows.push((
            "DENY with an L7 source is enforced without it",
            deny(&format!("{{from: [{{source: {{{field}, namespaces: [a]}}}}]}}")),
            vec![("a/x", WEB, DENY), ("b/x", WEB, "ok")],
        ));
    }
    for field in
        ["hosts: [h]", "notHosts: [h]", "methods: [GET]", "notMethods: [GET]", "paths: [/]", "notPaths: [/]"]
    {
        rows.push((
            "ALLOW with an L7 operation never matches",
            operation(&format!("{field}, ports: ['80']")),
            vec![("a/x", WEB, NONE)],
        ));
        rows.push((
            "DENY with an L7 operation is enforced without it",
            deny(&format!("{{to: [{{operation: {{{field}, ports: ['80']}}}}]}}")),
            vec![("a/x", WEB, DENY), ("a/x", "10.0.0.1:81", "ok")],
        ));
        rows.push((
            "DENY of nothing but L7 denies nothing",
            deny(&format!("{{to: [{{operation: {{{field}}}}}]}}")),
            vec![("a/x", WEB, "ok")],
        ));
    }
    for key in [
        "request.headers[x]",
        "request.auth.claims[iss]",
        "remote.ip",
        "connection.sni",
        "experimental.envoy.filters.a",
    ] {
        rows.push((
            "ALLOW with an L7 condition never matches",
            allow(&format!(
                "{{from: [{{source: {{namespaces: [a]}}}}], when: [{{key: '{key}', values: [v]}}]}}"
            )),
            vec![("a/x", WEB, NONE)],
        ));
        rows.push((
            "DENY with an L7 condition is enforced without it",
            deny(&format!(
                "{{from: [{{source: {{namespaces: [a]}}}}], when: [{{key: '{key}', values: [v]}}]}}"
            )),
            vec![("a/x", WEB, DENY), ("b/x", WEB, "ok")],
        ));
        rows.push((
            "DENY of nothing but L7 denies nothing",
            deny(&format!("{{when: [{{key: '{key}', values: [v]}}]}}")),
            vec![("a/x", WEB, "ok")],
        ));
    }
    rows.push((
        "ALLOW: the other rules of the policy still count",
        policy(
            "shop",
            "p",
            "{rules: [{to: [{operation: {methods: [GET]}}]}, {from: [{source: {namespaces: [a]}}]}]}",
        ),
        vec![("a/x", WEB, OK), ("b/x", WEB, NONE)],
    ));
    rows.push((
        "ALLOW: one L7 source takes the whole rule",
        allow("{from: [{source: {namespaces: [a]}}, {source: {requestPrincipals: ['*']}}]}"),
        vec![("a/x", WEB, NONE)],
    ));
    rows.push((
        "DENY: a source of nothing but L7 stands for any source",
        web_or(&with("requestPrincipals: ['*']", "ports: ['80']")),
        vec![("a/x", WEB, DENY), ("a/x", "10.0.0.1:81", "ok")],
    ));
    rows.push((
        "DENY: a source of nothing but L7 beside another stands for any source too",
        web_or("{from: [{source: {namespaces: [a]}}, {source: {requestPrincipals: ['*']}}]}"),
        vec![("a/x", WEB, DENY), ("b/x", WEB, DENY)],
    ));
    check(rows);
}

#[test]
fn strict_comes_first() {
    let refusal = "plaintext to a STRICT port, denied by PeerAuthentication shop/default";
    check(vec![
        (
            "plaintext to STRICT is refused before any ALLOW",
            strict("shop") + &allow("{}"),
            vec![(PLAINTEXT, WEB, refusal), ("a/x", WEB, OK)],
        ),
        (
            "and before any DENY",
            strict("shop") + &deny("{}"),
            vec![(PLAINTEXT, WEB, refusal), ("a/x", WEB, DENY)],
        ),
        (
            "without policies too",
            strict("shop"),
            vec![(PLAINTEXT, WEB, refusal), (PLAINTEXT, BANK, "ok"), ("a/x", WEB, "ok")],
        ),
    ]);
    let denied = ask(&mesh(&strict("shop")), PLAINTEXT, WEB).unwrap_err();
    assert_eq!((denied.reason, denied.policy.as_deref()), (Reason::StrictMode, Some("shop/default")));
}

#[test]
fn a_refusal_has_a_reason_and_a_policy() {
    let denied = ask(&mesh(&deny("{}")), "a/x", WEB).unwrap_err();
    assert_eq!((denied.reason, denied.policy.as_deref()), (Reason::DenyPolicy, Some("shop/p")));
    let denied = ask(&mesh(&policy("shop", "p", "{}")), "a/x", WEB).unwrap_err();
    assert_eq!((denied.reason, denied.policy), (Reason::NoAllowMatched, None));
}

#[test]
fn dry_run_is_reported_and_never_enforced() {
    let allowed = |policy: Option<&str>| Some(Verdict::Allowed { policy: policy.map(Into::into) });
    let denied =
        |reason, policy: Option<&str>| Some(Verdict::Denied { reason, policy: policy.map(Into::into) });
    let all = "{rules: [{}]}";
    let deny_all = "{action: DENY, rules: [{}]}";
    let dry_strict =
        strict("shop").replace("namespace: shop", "namespace: shop, annotations: {istio.io/dry-run: 'true'}");
    // (rule, policies, from, enforced, with dry-run)
    let rows = [
        ("DENY", dry_run("shop", "t", deny_all), "a/x", "ok", denied(Reason::DenyPolicy, Some("shop/t"))),
        ("ALLOW that matches", dry_run("shop", "t", all), "a/x", "ok", allowed(Some("shop/t"))),
        (
            "ALLOW that does not",
            dry_run("shop", "t", "{}"),
            "a/x",
            "ok",
            denied(Reason::NoAllowMatched, None),
        ),
        (
            "ALLOW that would let in what is refused",
            policy("shop", "p", "{}") + &dry_run("shop", "t", all),
            "a/x",
            NONE,
            allowed(Some("shop/t")),
        ),
        (
            "DENY over an enforced ALLOW",
            policy("shop", "p", all) + &dry_run("shop", "t", deny_all),
            "a/x",
            OK,
            denied(Reason::DenyPolicy, Some("shop/t")),
        ),
        ("elsewhere", dry_run("bank", "t", deny_all), "a/x", "ok", None),
        ("none", policy("shop", "p", all), "a/x", OK, None),
        ("STRICT", dry_strict.clone(), PLAINTEXT, "ok", denied(Reason::StrictMode, Some("shop/default"))),
        ("STRICT and mTLS", dry_strict, "a/x", "ok", None),
        (
            "a milder mode",
            strict("shop").replace("name: default", "name: strict")
                + &strict("shop")
                    .replace("STRICT", "PERMISSIVE")
                    .replace("namespace: shop", "namespace: shop, annotations: {istio.io/dry-run: 'true'}"),
            PLAINTEXT,
            "plaintext to a STRICT port, denied by PeerAuthentication shop/strict",
            allowed(None),
        ),
    ];
    for (rule, policies, from, enforced, with_dry_run) in rows {
        let mesh = mesh(&policies);
        assert_eq!(outcome(&mesh, from, WEB), enforced, "{rule}");
        let reported = match ask(&mesh, from, WEB) {
            Ok(authorized) => authorized.dry_run().cloned(),
            Err(denied) => denied.dry_run,
        };
        assert_eq!(reported, with_dry_run, "{rule}");
    }
}

#[test]
fn plaintext_goes_through_the_agent_where_a_policy_must_judge_it() {
    let judged = |policies: &str, to: &str| {
        let mesh = mesh(policies);
        let to: SocketAddr = to.parse().unwrap();
        mesh.policies.modes(mesh.workload(to.ip()).unwrap()).judged
    };
    assert!(!judged("", WEB));
    assert!(judged(&allow("{}"), WEB));
    assert!(!judged(&allow("{}"), BANK));
    assert!(judged(&dry_run("shop", "t", "{}"), WEB));
    let refused = mesh(&(strict("shop") + &allow("{}")));
    let modes = refused.policies.modes(refused.workload(WEB.parse::<SocketAddr>().unwrap().ip()).unwrap());
    assert_eq!(modes.default, Mode::Strict, "the kernel refuses it, judged or not");
}

#[test]
fn what_a_policy_does_not_do_is_said() {
    let rows = [
        (
            operation("methods: [GET], paths: [/]"),
            "AuthorizationPolicy shop/p rule 1 never allows anything: methods, paths can only be judged at L7, and \
             this mesh works at L4",
            false,
        ),
        (
            deny("{}, {to: [{operation: {methods: [GET], ports: ['80']}}]}"),
            "AuthorizationPolicy shop/p rule 2 denies more than it says: methods can only be judged at L7, so the \
             rule is enforced without that part",
            false,
        ),
        (
            deny("{to: [{operation: {methods: [GET]}}]}"),
            "AuthorizationPolicy shop/p rule 1 denies nothing: it consists only of methods, which can only be judged \
             at L7; deny by principals, namespaces, ipBlocks or ports instead",
            true,
        ),
        (
            policy("shop", "p", "{action: DENY}"),
            "AuthorizationPolicy shop/p denies nothing: it has no rules; `rules: [{}]` denies everything",
            false,
        ),
        (
            policy("shop", "p", "{targetRef: {kind: Service, name: s}, action: DENY, rules: [{}]}"),
            "AuthorizationPolicy shop/p has targetRefs and is not enforced: this mesh has no gateways or waypoints; \
             use a selector to protect pods",
            true,
        ),
        (
            policy("nowhere", "p", "{}"),
            "AuthorizationPolicy nowhere/p selects no enrolled pod; compare its selector and namespace with the \
             pods' labels",
            false,
        ),
    ];
    for (policies, expected, is_error) in rows {
        let mesh = mesh(&policies);
        let warnings = mesh.policies.warnings();
        assert_eq!(warnings.iter().map(ToString::to_string).collect::<Vec<_>>(), [expected]);
        assert_eq!(warnings[0].is_error(), is_error, "{expected}");
    }
    assert!(mesh(&(allow("{}") + &policy("istio-system", "q", "{}"))).policies.warnings().is_empty());
}
