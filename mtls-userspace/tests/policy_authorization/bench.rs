//! A small mesh, policies for it, and what each connection comes to.

use std::net::{IpAddr, SocketAddr};

use mtls::identity::SpiffeId;
use mtls::mesh::{Mesh, Objects, Settings};
use mtls::policy::{Authorized, Denied, Peer, Request};

pub fn mesh(policies: &str) -> Mesh {
    let settings =
        Settings { trust_domain: "cluster.local".parse().unwrap(), root_namespace: "istio-system".into() };
    Mesh::build(
        &mut Objects::from_yaml("p.yaml", &format!("{PODS}{policies}"), &settings).unwrap(),
        &settings,
        1,
    )
    .unwrap()
}

pub const PODS: &str = "
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

pub const WEB: &str = "10.0.0.1:80";
pub const DB: &str = "10.0.0.2:80";
pub const BANK: &str = "10.0.0.3:80";

/// Who asks: an identity as `namespace/account`, or nothing for plaintext; and from where.
pub fn ask(mesh: &Mesh, from: &str, to: &str) -> Result<Authorized, Denied> {
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

pub fn outcome(mesh: &Mesh, from: &str, to: &str) -> String {
    match ask(mesh, from, to) {
        Ok(authorized) => authorized.policy().map_or("ok".to_owned(), |policy| format!("ok {policy}")),
        Err(denied) => denied.to_string(),
    }
}

pub fn policy(namespace: &str, name: &str, spec: &str) -> String {
    annotated(namespace, name, "", spec)
}

pub fn dry_run(namespace: &str, name: &str, spec: &str) -> String {
    annotated(namespace, name, ", annotations: {istio.io/dry-run: 'true'}", spec)
}

pub fn annotated(namespace: &str, name: &str, annotations: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: {namespace}{annotations}}}\nspec: {spec}\n"
    )
}

/// An ALLOW policy of namespace shop with one rule.
pub fn allow(rule: &str) -> String {
    policy("shop", "p", &format!("{{rules: [{rule}]}}"))
}

pub fn deny(rule: &str) -> String {
    policy("shop", "p", &format!("{{action: DENY, rules: [{rule}]}}"))
}

pub fn source(fields: &str) -> String {
    allow(&format!("{{from: [{{source: {{{fields}}}}}]}}"))
}

pub fn operation(fields: &str) -> String {
    allow(&format!("{{to: [{{operation: {{{fields}}}}}]}}"))
}

pub fn when(key: &str, fields: &str) -> String {
    allow(&format!("{{when: [{{key: {key}, {fields}}}]}}"))
}

pub fn strict(namespace: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: default, namespace: {namespace}}}\nspec: {{mtls: {{mode: STRICT}}}}\n"
    )
}

/// (rule, policies, (from, to, outcome)...)
pub type Row<'a> = (&'a str, String, Vec<(&'a str, &'a str, &'a str)>);

#[track_caller]
pub fn check(rows: Vec<Row<'_>>) {
    for (rule, policies, expected) in rows {
        let mesh = mesh(&policies);
        for (from, to, expected) in expected {
            assert_eq!(outcome(&mesh, from, to), expected, "{rule}: {from} to {to}");
        }
    }
}

pub const NONE: &str = "no ALLOW policy matched";
pub const OK: &str = "ok shop/p";
pub const DENY: &str = "denied by AuthorizationPolicy shop/p";
pub const PLAINTEXT: &str = "";
