//! The compiled engine decides as a plain reading of the rules does, on generated policies and connections.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use mtls::identity::SpiffeId;
use mtls::mesh::{Mesh, Objects, Settings, Workload};
use mtls::policy::{Peer, Reason, Request, Verdict};
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use proptest::sample::select;
use serde_json::{Value, json};

/// A policy as generated: field names and texts, as people write them.
#[derive(Clone, Debug)]
struct Policy {
    name: String,
    namespace: &'static str,
    labels: BTreeMap<&'static str, &'static str>,
    deny: bool,
    dry_run: bool,
    rules: Vec<Rule>,
}

#[derive(Clone, Debug)]
struct Rule {
    from: Option<Vec<Fields>>,
    to: Option<Vec<Fields>>,
    when: Vec<(&'static str, Vec<String>, Vec<String>)>,
}

type Fields = BTreeMap<&'static str, Vec<String>>;

#[derive(Clone, Debug)]
struct Asking {
    identity: Option<(&'static str, &'static str)>,
    source: IpAddr,
    destination: usize,
    port: u16,
}

const ROOT: &str = "istio-system";

fn strings(pool: &'static [&'static str]) -> impl Strategy<Value = Vec<String>> {
    vec(select(pool).prop_map(str::to_owned), 1..4)
}

const PRINCIPALS: &[&str] = &[
    "td/ns/a/sa/x",
    "td/ns/a/sa/y",
    "td/ns/b/sa/x",
    "td/ns/ab/sa/xy",
    "other/ns/a/sa/x",
    "td/ns/a/*",
    "td/ns/a*",
    "other/*",
    "*/sa/x",
    "*x",
    "*",
];
const NAMESPACES: &[&str] = &["a", "b", "ab", "c", "a*", "*b", "*"];
const ACCOUNTS: &[&str] = &["x", "y", "a/x", "b/x", "ab/xy", "x*", "a/*", "a/x*", "*/x", "*b/xy", "*"];
const BLOCKS: &[&str] =
    &["10.0.0.1", "10.0.0.0/24", "10.0.1.9/16", "10.1.0.0/16", "0.0.0.0/0", "fd00::1", "fd00::/64", "::/0"];
const PORTS: &[&str] = &["1", "80", "81", "65535"];

fn fields(pools: &'static [(&'static str, &'static [&'static str])]) -> impl Strategy<Value = Fields> {
    let one = select(pools).prop_flat_map(|(name, pool)| (Just(name), strings(pool)));
    vec(one, 1..4).prop_map(|fields| fields.into_iter().collect())
}

const SOURCE: &[(&str, &[&str])] = &[
    ("principals", PRINCIPALS),
    ("principals", PRINCIPALS),
    ("notPrincipals", PRINCIPALS),
    ("namespaces", NAMESPACES),
    ("namespaces", NAMESPACES),
    ("notNamespaces", NAMESPACES),
    ("serviceAccounts", ACCOUNTS),
    ("notServiceAccounts", ACCOUNTS),
    ("ipBlocks", BLOCKS),
    ("ipBlocks", BLOCKS),
    ("notIpBlocks", BLOCKS),
    ("requestPrincipals", &["*"]),
];
const OPERATION: &[(&str, &[&str])] =
    &[("ports", PORTS), ("ports", PORTS), ("ports", PORTS), ("notPorts", PORTS), ("methods", &["GET"])];
const CONDITION: &[(&str, &[&str])] = &[
    ("source.principal", PRINCIPALS),
    ("source.namespace", NAMESPACES),
    ("source.serviceAccount", ACCOUNTS),
    ("source.ip", BLOCKS),
    ("destination.ip", BLOCKS),
    ("destination.port", PORTS),
    ("request.headers[x]", &["v"]),
];

fn rule() -> impl Strategy<Value = Rule> {
    let condition = select(CONDITION).prop_flat_map(|(key, pool)| {
        prop_oneof![
            (Just(key), strings(pool), Just(Vec::new())),
            (Just(key), Just(Vec::new()), strings(pool)),
            (Just(key), strings(pool), strings(pool)),
        ]
    });
    (
        prop::option::weighted(0.8, vec(fields(SOURCE), 1..3)),
        prop::option::weighted(0.4, vec(fields(OPERATION), 1..3)),
        vec(condition, 0..2),
    )
        .prop_map(|(from, to, when)| Rule { from, to, when })
}

fn policy() -> impl Strategy<Value = Policy> {
    let label = (select(&["app", "tier"]), select(&["web", "db"]));
    (
        select(&[ROOT, "a", "a", "b"]),
        prop_oneof![3 => Just(BTreeMap::new()), 1 => btree_map(label.0, label.1, 1..3)],
        prop::bool::weighted(0.4),
        prop::bool::weighted(0.2),
        vec(rule(), 0..4),
    )
        .prop_map(|(namespace, labels, deny, dry_run, rules)| Policy {
            name: String::new(),
            namespace,
            labels,
            deny,
            dry_run,
            rules,
        })
}

/// Few make each rule count; many make the engine use its indices.
fn policies() -> impl Strategy<Value = Vec<Policy>> {
    prop_oneof![vec(policy(), 0..5), vec(policy(), 40..80)].prop_map(|mut policies| {
        for (number, policy) in policies.iter_mut().enumerate() {
            // Not in the order of the manifests.
            policy.name = format!("p{}", number * 37 % 101);
        }
        policies
    })
}

fn asking() -> impl Strategy<Value = Asking> {
    let sources =
        ["10.0.0.1", "10.0.0.7", "10.0.5.5", "10.1.2.3", "192.0.2.1", "fd00::1", "fd00::2", "2001:db8::1"];
    (
        prop::option::weighted(0.8, (select(&["a", "b", "ab", "c"]), select(&["x", "y", "xy", "z"]))),
        select(sources.map(|ip| ip.parse().unwrap()).to_vec()),
        0..PODS.len(),
        select(vec![1, 80, 81, 82, 65535]),
    )
        .prop_map(|(identity, source, destination, port)| Asking { identity, source, destination, port })
}

/// Namespace, address, labels.
type Pod = (&'static str, &'static str, &'static [(&'static str, &'static str)]);

const PODS: &[Pod] = &[
    ("a", "10.0.0.1", &[("app", "web"), ("tier", "db")]),
    ("a", "10.0.0.2", &[("app", "db")]),
    ("a", "fd00::1", &[]),
    ("b", "10.1.0.1", &[("app", "web"), ("tier", "web")]),
    (ROOT, "10.1.0.2", &[("app", "web")]),
];

fn manifests(policies: &[Policy]) -> String {
    let mut objects: Vec<Value> = Vec::new();
    for (namespace, ip, labels) in PODS {
        let labels: BTreeMap<_, _> =
            labels.iter().copied().chain([("istio.io/dataplane-mode", "ambient")]).collect();
        objects.push(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": format!("pod-{}", ip.replace([':', '.'], "-")), "namespace": namespace, "labels": labels},
            "status": {"podIP": ip},
        }));
    }
    for policy in policies {
        let list = |terms: &Vec<Fields>, name: &str| -> Vec<Value> {
            terms.iter().map(|fields| json!({ name: fields })).collect()
        };
        let rules: Vec<Value> = policy
            .rules
            .iter()
            .map(|rule| {
                let mut written = serde_json::Map::new();
                if let Some(from) = &rule.from {
                    written.insert("from".into(), list(from, "source").into());
                }
                if let Some(to) = &rule.to {
                    written.insert("to".into(), list(to, "operation").into());
                }
                let when = rule.when.iter().map(|(key, values, not_values)| {
                    json!({"key": key, "values": values, "notValues": not_values})
                });
                written.insert("when".into(), when.collect());
                written.into()
            })
            .collect();
        objects.push(json!({
            "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": {
                "name": policy.name, "namespace": policy.namespace,
                "annotations": {"istio.io/dry-run": policy.dry_run.to_string()},
            },
            "spec": {
                "selector": {"matchLabels": policy.labels},
                "action": if policy.deny { "DENY" } else { "ALLOW" },
                "rules": rules,
            },
        }));
    }
    objects.iter().map(|object| format!("{object}\n")).collect()
}

/// The reading: every policy, every rule, every field, as the text says.
fn read(policies: &[Policy], with_dry_run: bool, destination: &Workload, asking: &Asking) -> Verdict {
    let mut pooled: Vec<(String, &Policy)> = policies
        .iter()
        .filter(|p| with_dry_run || !p.dry_run)
        .filter(|p| p.namespace == ROOT || p.namespace == &*destination.namespace)
        .filter(|p| p.labels.iter().all(|(k, v)| destination.labels.get(*k).map(String::as_str) == Some(*v)))
        .map(|p| (format!("{}/{}", p.namespace, p.name), p))
        .collect();
    pooled.sort_by(|a, b| a.0.cmp(&b.0));
    let matches = |p: &Policy| p.rules.iter().any(|rule| rule_matches(p, rule, destination, asking));
    if let Some((name, _)) = pooled.iter().find(|(_, p)| p.deny && matches(p)) {
        return Verdict::Denied { reason: Reason::DenyPolicy, policy: Some(name.as_str().into()) };
    }
    if !pooled.iter().any(|(_, p)| !p.deny) {
        return Verdict::Allowed { policy: None };
    }
    match pooled.iter().find(|(_, p)| !p.deny && matches(p)) {
        Some((name, _)) => Verdict::Allowed { policy: Some(name.as_str().into()) },
        None => Verdict::Denied { reason: Reason::NoAllowMatched, policy: None },
    }
}

fn is_l7(name: &str) -> bool {
    ["requestPrincipals", "methods", "request.headers[x]"].contains(&name)
}

fn rule_matches(policy: &Policy, rule: &Rule, destination: &Workload, asking: &Asking) -> bool {
    let terms = || rule.from.iter().chain(&rule.to).flatten().flat_map(|fields| fields.keys());
    let mut names = terms().copied().chain(rule.when.iter().map(|(key, _, _)| *key)).peekable();
    let anything = names.peek().is_none();
    let (l7, l4): (Vec<&str>, Vec<&str>) = names.partition(|name| is_l7(name));
    if !l7.is_empty() && (!policy.deny || l4.is_empty()) {
        return false;
    }
    if anything {
        return true;
    }
    let any_term = |terms: &Option<Vec<Fields>>| {
        terms.as_ref().is_none_or(|terms| {
            terms.iter().any(|fields| {
                let judged = fields.iter().filter(|(name, _)| !is_l7(name));
                judged
                    .into_iter()
                    .all(|(name, values)| field_holds(policy, name, values, destination, asking))
            })
        })
    };
    any_term(&rule.from)
        && any_term(&rule.to)
        && rule.when.iter().filter(|(key, _, _)| !is_l7(key)).all(|(key, values, not_values)| {
            let hit = |value: &String| value_matches(policy, key, value, destination, asking);
            (values.is_empty() || values.iter().any(hit)) && !not_values.iter().any(hit)
        })
}

fn field_holds(
    policy: &Policy,
    name: &str,
    values: &[String],
    destination: &Workload,
    asking: &Asking,
) -> bool {
    let key = match name {
        "principals" | "notPrincipals" => "source.principal",
        "namespaces" | "notNamespaces" => "source.namespace",
        "serviceAccounts" | "notServiceAccounts" => "source.serviceAccount",
        "ipBlocks" | "notIpBlocks" => "source.ip",
        "ports" | "notPorts" => "destination.port",
        _ => panic!("{name}"),
    };
    let hit = values.iter().any(|value| value_matches(policy, key, value, destination, asking));
    hit != name.starts_with("not")
}

fn value_matches(policy: &Policy, key: &str, value: &str, destination: &Workload, asking: &Asking) -> bool {
    match (key, asking.identity) {
        ("source.principal", Some((namespace, account))) => {
            text_matches(value, &format!("td/ns/{namespace}/sa/{account}"))
        }
        ("source.namespace", Some((namespace, _))) => text_matches(value, namespace),
        ("source.serviceAccount", Some((namespace, account))) => {
            let in_full = value.contains('/') || value == "*";
            let value = if in_full { value.to_owned() } else { format!("{}/{value}", policy.namespace) };
            text_matches(&value, &format!("{namespace}/{account}"))
        }
        ("source.ip", _) => in_block(value, asking.source),
        ("destination.ip", _) => in_block(value, destination.addresses[0]),
        ("destination.port", _) => value == asking.port.to_string(),
        (_, None) => false,
        _ => panic!("{key}"),
    }
}

fn text_matches(pattern: &str, text: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == text,
        Some((before, after)) => text.starts_with(before) && text.ends_with(after),
    }
}

fn in_block(block: &str, address: IpAddr) -> bool {
    let bits = |address: IpAddr| match address {
        IpAddr::V4(v4) => u128::from(v4.to_bits()) << 96,
        IpAddr::V6(v6) => v6.to_bits(),
    };
    let (network, length) = block.split_once('/').unwrap_or((block, "128"));
    let network: IpAddr = network.parse().unwrap();
    let length: u32 = length.parse().unwrap();
    network.is_ipv4() == address.is_ipv4()
        && (length == 0 || (bits(network) ^ bits(address)) >> (128 - length) == 0)
}

fn mesh(policies: &[Policy]) -> Mesh {
    let settings = Settings { trust_domain: "td".parse().unwrap(), root_namespace: ROOT.into() };
    Mesh::build(&mut Objects::from_yaml("p.json", &manifests(policies), &settings).unwrap(), &settings, 1)
        .unwrap()
}

/// The engine's answers: what it enforces, and what it would with dry-run policies.
fn decide(mesh: &Mesh, destination: &Workload, asking: &Asking) -> (Verdict, Option<Verdict>) {
    let trust_domain = "td".parse().unwrap();
    let id = asking.identity.map(|(ns, account)| SpiffeId::new(&trust_domain, ns, account).unwrap());
    let request = Request {
        destination,
        address: SocketAddr::new(destination.addresses[0], asking.port),
        source_ip: asking.source,
        peer: id.as_ref().map_or(Peer::Plaintext, Peer::Verified),
    };
    match mesh.policies.authorize(&request) {
        Ok(authorized) => {
            (Verdict::Allowed { policy: authorized.policy().cloned() }, authorized.dry_run().cloned())
        }
        Err(denied) => (Verdict::Denied { reason: denied.reason, policy: denied.policy }, denied.dry_run),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn the_engine_decides_as_the_reading_does(policies in policies(), asking in vec(asking(), 40)) {
        let mesh = mesh(&policies);
        for asking in &asking {
            let destination = mesh.workload(PODS[asking.destination].1.parse().unwrap()).unwrap();
            let (enforced, dry_run) = decide(&mesh, destination, asking);
            prop_assert_eq!(&enforced, &read(&policies, false, destination, asking), "{:?}", asking);
            if let Some(dry_run) = dry_run {
                prop_assert_eq!(dry_run, read(&policies, true, destination, asking), "{:?}", asking);
            } else {
                prop_assert_eq!(enforced, read(&policies, true, destination, asking), "{:?}", asking);
            }
        }
    }
}

/// The property would hold trivially if the generated policies never matched, or always did.
#[test]
fn the_generated_connections_meet_every_outcome() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;
    let mut runner = TestRunner::deterministic();
    let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
    for _ in 0..100 {
        let policies = policies().new_tree(&mut runner).unwrap().current();
        let mesh = mesh(&policies);
        for _ in 0..20 {
            let asking = asking().new_tree(&mut runner).unwrap().current();
            let destination = mesh.workload(PODS[asking.destination].1.parse().unwrap()).unwrap();
            *seen
                .entry(match decide(&mesh, destination, &asking).0 {
                    Verdict::Allowed { policy: None } => "no policy",
                    Verdict::Allowed { .. } => "allowed",
                    Verdict::Denied { reason: Reason::DenyPolicy, .. } => "denied",
                    Verdict::Denied { .. } => "nothing matched",
                })
                .or_default() += 1;
        }
    }
    assert!(seen.len() == 4 && seen.values().all(|times| *times > 50), "{seen:?}");
}
