//! The rules of `PeerAuthentication`, a row each.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use mtls::mesh::{Mesh, Objects, Settings};
use mtls::policy::Mode::{self, Disable, Permissive, Strict};

fn settings() -> Settings {
    Settings { trust_domain: "cluster.local".parse().unwrap(), root_namespace: "istio-system".into() }
}

fn mesh(policies: &str) -> Mesh {
    let text = format!("{PODS}{policies}");
    Mesh::build(&mut Objects::from_yaml("p.yaml", &text, &settings()).unwrap(), &settings(), 1).unwrap()
}

const PODS: &str = "
{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: bank, labels: {istio.io/dataplane-mode: ambient}}}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web, tier: front}}
spec: {containers: [{name: c, ports: [{containerPort: 80}, {containerPort: 81}]}]}
status: {podIP: 10.0.0.1}
---
apiVersion: v1
kind: Pod
metadata: {name: db, namespace: shop, labels: {app: db}}
status: {podIP: 10.0.0.2}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: bank, labels: {app: web}}
status: {podIP: 10.0.0.3}
";

/// One policy: `metadata` are further fields of it.
fn policy(namespace: &str, name: &str, metadata: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: {name}, namespace: {namespace}{metadata}}}\nspec: {spec}\n"
    )
}

fn mode(namespace: &str, mode: &str) -> String {
    policy(namespace, "default", "", &format!("{{mtls: {{mode: {mode}}}}}"))
}

fn selecting(namespace: &str, name: &str, rest: &str) -> String {
    policy(namespace, name, "", &format!("{{selector: {{matchLabels: {{app: web}}}}, {rest}}}"))
}

fn created(namespace: &str, name: &str, at: &str, spec: &str) -> String {
    policy(namespace, name, &format!(", creationTimestamp: '{at}'"), spec)
}

const OLD: &str = "2025-01-01T00:00:00Z";
const NEW: &str = "2026-01-01T00:00:00Z";

/// (rule, policies, (pod, port, mode)...)
type Row = (&'static str, String, Vec<(&'static str, u16, Mode)>);

#[test]
fn every_rule_of_the_effective_mode() {
    const ROOT: &str = "istio-system";
    let strict = "{mtls: {mode: STRICT}}";
    let permissive = "{mtls: {mode: PERMISSIVE}}";
    let web = |mode: &str| format!("{{selector: {{matchLabels: {{app: web}}}}, mtls: {{mode: {mode}}}}}");
    let rows: Vec<Row> = vec![
        ("without policies PERMISSIVE", String::new(), vec![("10.0.0.1", 80, Permissive)]),
        (
            "a mesh policy is everybody's",
            mode(ROOT, "STRICT"),
            vec![("10.0.0.1", 80, Strict), ("10.0.0.3", 80, Strict)],
        ),
        (
            "a namespace policy is its namespace's only",
            mode("shop", "STRICT"),
            vec![("10.0.0.1", 80, Strict), ("10.0.0.2", 80, Strict), ("10.0.0.3", 80, Permissive)],
        ),
        (
            "a workload policy is its selection's only, in its namespace only",
            selecting("shop", "web", "mtls: {mode: STRICT}"),
            vec![("10.0.0.1", 80, Strict), ("10.0.0.2", 80, Permissive), ("10.0.0.3", 80, Permissive)],
        ),
        (
            "a PERMISSIVE namespace under a STRICT mesh is permissive",
            mode(ROOT, "STRICT") + &mode("shop", "PERMISSIVE"),
            vec![("10.0.0.1", 80, Permissive), ("10.0.0.3", 80, Strict)],
        ),
        (
            "a STRICT namespace under a DISABLE mesh is strict",
            mode(ROOT, "DISABLE") + &mode("shop", "STRICT"),
            vec![("10.0.0.1", 80, Strict), ("10.0.0.3", 80, Disable)],
        ),
        (
            "a workload overrides its namespace",
            mode("shop", "STRICT") + &selecting("shop", "web", "mtls: {mode: DISABLE}"),
            vec![("10.0.0.1", 80, Disable), ("10.0.0.2", 80, Strict)],
        ),
        (
            "UNSET inherits, at every level",
            mode(ROOT, "STRICT") + &mode("shop", "UNSET") + &selecting("shop", "web", "mtls: {mode: UNSET}"),
            vec![("10.0.0.1", 80, Strict)],
        ),
        (
            "an absent mode inherits as UNSET does",
            mode(ROOT, "STRICT")
                + &policy("shop", "a", "", "{mtls: {}}")
                + &selecting("shop", "web", "portLevelMtls: {}"),
            vec![("10.0.0.1", 80, Strict)],
        ),
        (
            "an empty selector is none",
            policy("shop", "a", "", "{selector: {matchLabels: {}}, mtls: {mode: STRICT}}"),
            vec![("10.0.0.1", 80, Strict), ("10.0.0.2", 80, Strict), ("10.0.0.3", 80, Permissive)],
        ),
        (
            "a selector needs all its labels",
            policy(
                "shop",
                "a",
                "",
                "{selector: {matchLabels: {app: web, tier: front}}, mtls: {mode: STRICT}}",
            ) + &policy(
                "bank",
                "a",
                "",
                "{selector: {matchLabels: {app: web, tier: front}}, mtls: {mode: STRICT}}",
            ),
            vec![("10.0.0.1", 80, Strict), ("10.0.0.3", 80, Permissive)],
        ),
        (
            "a selector in the root namespace is ignored",
            selecting(ROOT, "web", "mtls: {mode: STRICT}"),
            vec![("10.0.0.1", 80, Permissive), ("10.0.0.3", 80, Permissive)],
        ),
        (
            "the oldest of a level wins: mesh",
            created(ROOT, "a", NEW, strict) + &created(ROOT, "b", OLD, permissive),
            vec![("10.0.0.1", 80, Permissive)],
        ),
        (
            "the oldest of a level wins: namespace",
            created("shop", "a", NEW, permissive) + &created("shop", "b", OLD, strict),
            vec![("10.0.0.1", 80, Strict)],
        ),
        (
            "the oldest of a level wins: workload, even by another selector",
            created("shop", "a", NEW, &web("PERMISSIVE"))
                + &created(
                    "shop",
                    "b",
                    OLD,
                    "{selector: {matchLabels: {tier: front}}, mtls: {mode: STRICT}}",
                ),
            vec![("10.0.0.1", 80, Strict)],
        ),
        (
            "ties go by name",
            created("shop", "b", OLD, permissive) + &created("shop", "a", OLD, strict),
            vec![("10.0.0.1", 80, Strict)],
        ),
        (
            "without timestamps names decide",
            policy("shop", "b", "", &web("PERMISSIVE")) + &policy("shop", "a", "", &web("STRICT")),
            vec![("10.0.0.1", 80, Strict)],
        ),
        (
            "the oldest wins even if its mode is UNSET",
            created("shop", "a", OLD, "{mtls: {mode: UNSET}}") + &created("shop", "b", NEW, strict),
            vec![("10.0.0.1", 80, Permissive)],
        ),
        (
            "a port beats everything, for that port only",
            mode(ROOT, "STRICT")
                + &selecting("shop", "web", "mtls: {mode: STRICT}, portLevelMtls: {80: {mode: PERMISSIVE}}"),
            vec![("10.0.0.1", 80, Permissive), ("10.0.0.1", 81, Strict), ("10.0.0.2", 80, Strict)],
        ),
        (
            "several strict ports are all strict",
            selecting("shop", "web", "portLevelMtls: {80: {mode: STRICT}, '81': {mode: STRICT}}"),
            vec![("10.0.0.1", 80, Strict), ("10.0.0.1", 81, Strict), ("10.0.0.1", 82, Permissive)],
        ),
        (
            "a port's UNSET inherits the workload's mode",
            mode("shop", "STRICT")
                + &selecting(
                    "shop",
                    "web",
                    "mtls: {mode: DISABLE}, portLevelMtls: {80: {mode: UNSET}, 81: {}}",
                ),
            vec![("10.0.0.1", 80, Disable), ("10.0.0.1", 81, Disable)],
        ),
        (
            "ports of a workload policy that lost are lost",
            created("shop", "a", OLD, &web("PERMISSIVE"))
                + &created(
                    "shop",
                    "b",
                    NEW,
                    "{selector: {matchLabels: {app: web}}, portLevelMtls: {80: {mode: STRICT}}}",
                ),
            vec![("10.0.0.1", 80, Permissive)],
        ),
        (
            "a dry-run policy is not enforced and shadows nobody",
            policy("shop", "a", ", annotations: {istio.io/dry-run: 'true'}", strict)
                + &policy("shop", "b", "", "{mtls: {mode: DISABLE}}"),
            vec![("10.0.0.1", 80, Disable)],
        ),
        (
            "dry-run: false is enforced",
            policy("shop", "a", ", annotations: {istio.io/dry-run: 'false'}", strict),
            vec![("10.0.0.1", 80, Strict)],
        ),
    ];
    for (rule, policies, expected) in rows {
        let mesh = mesh(&policies);
        for (pod, port, mode) in expected {
            let workload = mesh.workload(pod.parse().unwrap()).unwrap();
            let seen = (mesh.policies.mode(workload, port), mesh.policies.modes(workload).of(port));
            assert_eq!(seen, (mode, mode), "{rule}: {} port {port}", workload.key());
        }
    }
}

#[test]
fn a_table_of_modes_has_only_the_ports_that_differ_by_policy() {
    let mesh = mesh(&selecting(
        "shop",
        "web",
        "mtls: {mode: STRICT}, portLevelMtls: {80: {mode: DISABLE}, 81: {mode: UNSET}}",
    ));
    let modes = mesh.policies.modes(mesh.workload("10.0.0.1".parse().unwrap()).unwrap());
    assert_eq!(modes.to_string(), "STRICT, 80 DISABLE");
    assert_eq!((modes.default, modes.ports), (Strict, [(80, Disable)].into()));
}

#[test]
fn dry_run_modes_say_what_would_change() {
    let dry = ", annotations: {istio.io/dry-run: 'true'}";
    let mesh = mesh(
        &(policy("shop", "trial", dry, "{selector: {matchLabels: {app: web}}, mtls: {mode: STRICT}}")
            + &policy("bank", "real", "", "{mtls: {mode: STRICT}}")
            + &policy("bank", "trial", dry, "{selector: {matchLabels: {app: web}}, mtls: {mode: STRICT}}")),
    );
    let dry_run = |ip: &str| mesh.policies.dry_run_modes(mesh.workload(ip.parse().unwrap()).unwrap());
    assert_eq!(dry_run("10.0.0.1").map(|modes| modes.default), Some(Strict));
    assert_eq!(dry_run("10.0.0.2"), None, "not selected");
    assert_eq!(dry_run("10.0.0.3"), None, "STRICT already");
}

/// (rule, policies, (pod, port, mode and who sets it if the dry-run policies were enforced; None: no change)...)
type DryRunRow = (&'static str, String, Vec<(&'static str, u16, Option<(Mode, Option<&'static str>)>)>);

#[test]
fn every_rule_of_a_dry_run_mode() {
    const ROOT: &str = "istio-system";
    let dry = |namespace: &str, name: &str, spec: &str| {
        policy(namespace, name, ", annotations: {istio.io/dry-run: 'true'}", spec)
    };
    let strict = "{mtls: {mode: STRICT}}";
    let web = |rest: &str| format!("{{selector: {{matchLabels: {{app: web}}}}, {rest}}}");
    let rows: Vec<DryRunRow> = vec![
        ("without dry-run policies nothing would change", mode(ROOT, "STRICT"), vec![("10.0.0.1", 80, None)]),
        (
            "a mesh policy would be everybody's",
            dry(ROOT, "trial", strict),
            vec![
                ("10.0.0.1", 80, Some((Strict, Some("istio-system/trial")))),
                ("10.0.0.3", 9, Some((Strict, Some("istio-system/trial")))),
            ],
        ),
        (
            "a namespace policy would be its namespace's only",
            dry("shop", "trial", strict),
            vec![("10.0.0.2", 80, Some((Strict, Some("shop/trial")))), ("10.0.0.3", 80, None)],
        ),
        (
            "what is STRICT already would not change, whoever sets it",
            mode("shop", "STRICT") + &dry("shop", "trial", &web("mtls: {mode: STRICT}")),
            vec![("10.0.0.1", 80, None)],
        ),
        (
            "a port-level mode would change that port only",
            dry("shop", "trial", &web("portLevelMtls: {80: {mode: STRICT}}")),
            vec![
                ("10.0.0.1", 80, Some((Strict, Some("shop/trial")))),
                ("10.0.0.1", 81, None),
                ("10.0.0.2", 80, None),
            ],
        ),
        (
            "a port-level mode in force still beats a workload's dry run",
            selecting("shop", "web", "portLevelMtls: {80: {mode: PERMISSIVE}}")
                + &dry("shop", "trial", strict),
            vec![("10.0.0.1", 80, None), ("10.0.0.1", 81, Some((Strict, Some("shop/trial"))))],
        ),
        (
            "the narrower level wins against a dry run too",
            mode("shop", "PERMISSIVE") + &dry(ROOT, "trial", strict),
            vec![("10.0.0.1", 80, None), ("10.0.0.3", 80, Some((Strict, Some("istio-system/trial"))))],
        ),
        (
            "of one level the oldest wins: a newer dry run would do nothing",
            created("shop", "a", OLD, "{mtls: {mode: PERMISSIVE}}")
                + &policy(
                    "shop",
                    "trial",
                    &format!(", creationTimestamp: '{NEW}', annotations: {{istio.io/dry-run: 'true'}}"),
                    strict,
                ),
            vec![("10.0.0.1", 80, None)],
        ),
        (
            "an UNSET dry run in front of an enforced policy would open what that closes",
            mode("shop", "STRICT") + &dry("shop", "a-trial", "{mtls: {mode: UNSET}}"),
            vec![("10.0.0.1", 80, Some((Permissive, None)))],
        ),
        (
            "DISABLE would be reported as such",
            dry("shop", "trial", "{mtls: {mode: DISABLE}}"),
            vec![("10.0.0.1", 80, Some((Disable, Some("shop/trial"))))],
        ),
        (
            "dry-run: false is no dry run",
            policy("shop", "real", ", annotations: {istio.io/dry-run: 'false'}", strict),
            vec![("10.0.0.1", 80, None)],
        ),
        (
            "a selector in the root namespace is ignored in a dry run too",
            dry(ROOT, "trial", &web("mtls: {mode: STRICT}")),
            vec![("10.0.0.1", 80, None)],
        ),
    ];
    for (rule, policies, expected) in rows {
        let (with, without) = (mesh(&policies), mesh(&undone(&policies)));
        for (pod, port, would_be) in expected {
            let workload = with.workload(pod.parse().unwrap()).unwrap();
            let dry_run = with.policies.dry_run_mode_set_by(workload, port);
            let dry_run = dry_run.map(|(mode, policy)| (mode, policy.map(|name| &**name)));
            assert_eq!(dry_run, would_be, "{rule}: {} port {port}", workload.key());
            // Whatever it would do, it does nothing.
            let in_force = (with.policies.mode(workload, port), without.policies.mode(workload, port));
            assert_eq!(in_force.0, in_force.1, "{rule}: {} port {port}", workload.key());
        }
    }
}

/// The policies without those that are dry runs.
fn undone(policies: &str) -> String {
    let kept = policies.split("---\n").filter(|policy| !policy.contains("istio.io/dry-run: 'true'"));
    kept.filter(|policy| !policy.is_empty()).map(|policy| format!("---\n{policy}")).collect()
}

#[test]
fn a_dry_run_is_checked_like_any_other_policy() {
    let dry = ", annotations: {istio.io/dry-run: 'true'}";
    let refused = |metadata: &str, spec: &str| {
        let text = policy("shop", "trial", metadata, spec);
        Objects::from_yaml("p.yaml", &text, &settings()).unwrap_err().to_string()
    };
    let error = refused(dry, "{portLevelMtls: {80: {mode: STRICT}}}");
    assert!(error.contains("portLevelMtls needs a selector"), "{error}");
    let error = refused(dry, "{mtls: {mode: STRICTLY}}");
    assert!(error.contains("STRICTLY"), "{error}");
    let error = refused(", annotations: {istio.io/dry-run: 'yes'}", "{mtls: {mode: STRICT}}");
    assert!(error.contains("istio.io/dry-run is \"yes\""), "{error}");
    let said = |spec: &str| {
        let mesh = mesh(&policy("shop", "trial", dry, spec));
        mesh.policies.warnings().iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(said("{mtls: {mode: STRICT}}"), [""; 0]);
    let nobody = said("{selector: {matchLabels: {app: wbe}}, mtls: {mode: STRICT}}");
    assert!(nobody.len() == 1 && nobody[0].contains("selects no enrolled pod"), "{nobody:?}");
    let port = said("{selector: {matchLabels: {app: web}}, portLevelMtls: {8080: {mode: STRICT}}}");
    assert!(port.len() == 1 && port[0].contains("port 8080, which no container"), "{port:?}");
}

#[test]
fn what_a_policy_does_not_do_is_said() {
    let rows = [
        (
            selecting("istio-system", "web", "mtls: {mode: STRICT}"),
            vec![
                "PeerAuthentication istio-system/web has a selector in the root namespace and is ignored; move it to \
                 the namespace of the pods it means, or remove the selector to make it the mesh's default",
            ],
        ),
        (
            created("shop", "b", NEW, "{}") + &created("shop", "a", OLD, "{}"),
            vec![
                "PeerAuthentication shop/b is without effect: shop/a has the same scope and is older (or comes first \
                 by name); remove one",
            ],
        ),
        (
            selecting("shop", "web", "portLevelMtls: {80: {mode: STRICT}, 8080: {mode: STRICT}}"),
            vec![
                "PeerAuthentication shop/web sets a mode for port 8080, which no container of the selected pods \
                 declares; ports here are the pod's, not the Service's",
            ],
        ),
        (
            policy("shop", "w", "", "{selector: {matchLabels: {app: wbe}}}"),
            vec![
                "PeerAuthentication shop/w selects no enrolled pod; compare its selector and namespace with the \
                 pods' labels",
            ],
        ),
        (mode("shop", "STRICT") + &mode("istio-system", "STRICT"), vec![]),
    ];
    for (policies, expected) in rows {
        let mesh = mesh(&policies);
        let said: Vec<String> = mesh.policies.warnings().iter().map(ToString::to_string).collect();
        assert_eq!(said, expected);
    }
}
