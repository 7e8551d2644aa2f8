//! `mtls policy check` and `mtls policy explain`, asked as the command line asks.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

/// A web pod on node a, a database on node b, a neighbour of web's, and one that is not enrolled.
const MESH: &str = "
{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {serviceAccountName: web, nodeName: a, containers: [{name: c, ports: [{containerPort: 8080}]}]}
status: {podIP: 10.0.0.1}
---
apiVersion: v1
kind: Pod
metadata: {name: cache, namespace: shop, labels: {app: cache}}
spec: {serviceAccountName: cache, nodeName: a, containers: [{name: c}]}
status: {podIP: 10.0.0.2}
---
apiVersion: v1
kind: Pod
metadata: {name: db, namespace: shop, labels: {app: db}}
spec: {serviceAccountName: db, nodeName: b, containers: [{name: c, ports: [{containerPort: 5432}, {containerPort: 9187}]}]}
status: {podIP: 10.0.0.3}
---
apiVersion: v1
kind: Pod
metadata: {name: legacy, namespace: old}
spec: {nodeName: b, containers: [{name: c}]}
status: {podIP: 10.0.0.9}
---
apiVersion: v1
kind: Service
metadata: {name: postgres, namespace: shop}
spec: {clusterIP: 10.96.0.5, selector: {app: db}, ports: [{port: 5433, targetPort: 5432}]}
";

const POLICIES: &str = "
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: db, namespace: shop}
spec: {selector: {matchLabels: {app: db}}, mtls: {mode: STRICT}, portLevelMtls: {9187: {mode: PERMISSIVE}}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: db-clients, namespace: shop}
spec: {selector: {matchLabels: {app: db}}, rules: [{from: [{source: {serviceAccounts: [web]}}]}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: trial, namespace: shop, annotations: {istio.io/dry-run: 'true'}}
spec: {selector: {matchLabels: {app: db}}, action: DENY, rules: [{from: [{source: {serviceAccounts: [web]}}]}]}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: strict-trial, namespace: shop, annotations: {istio.io/dry-run: 'true'}}
spec: {selector: {matchLabels: {app: cache}}, mtls: {mode: STRICT}}
";

fn mtls(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mtls")).arg("policy").args(args).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// A directory with these files.
fn manifests(files: &[(&str, &str)]) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    for (name, content) in files {
        std::fs::write(directory.path().join(name), content).unwrap();
    }
    directory
}

fn check(directory: &Path, more: &[&str]) -> (bool, Vec<Value>) {
    let path = directory.to_str().unwrap();
    let answer = mtls(&[&["check", path, "-o", "json"], more].concat());
    let findings = serde_json::from_slice(&answer.stdout);
    (answer.status.success(), findings.unwrap_or_else(|_| panic!("{}", text(&answer.stderr))))
}

#[test]
fn sound_manifests_pass_without_a_remark() {
    let directory = manifests(&[("mesh.yaml", MESH), ("policies.yaml", POLICIES)]);
    assert_eq!(check(directory.path(), &["--deny-warnings"]), (true, vec![]));
    let answer = mtls(&["check", directory.path().to_str().unwrap()]);
    assert!(answer.status.success() && text(&answer.stdout).contains("nothing to remark"));
}

#[test]
fn every_kind_of_mistake_is_reported_at_once_with_its_file_document_and_field() {
    let head = |kind: &str, name: &str| {
        format!(
            "---\napiVersion: security.istio.io/v1\nkind: {kind}\nmetadata: {{name: {name}, namespace: shop}}\n"
        )
    };
    let refused = [
        head("PeerAuthentication", "typo") + "spec: {mlts: {mode: STRICT}}\n",
        head("PeerAuthentication", "ports") + "spec: {portLevelMtls: {80: {mode: STRICT}}}\n",
        head("AuthorizationPolicy", "audit") + "spec: {action: AUDIT}\n",
    ];
    let directory = manifests(&[("mesh.yaml", MESH), ("a.yaml", &refused.concat())]);
    let (passed, findings) = check(directory.path(), &[]);
    assert!(!passed);
    let rows: Vec<_> =
        findings.iter().map(|f| (&f["document"], &f["object"], &f["field"], &f["severity"])).collect();
    let expected = [
        (1, "PeerAuthentication shop/typo", "spec.mlts"),
        (2, "PeerAuthentication shop/ports", "spec"),
        (3, "AuthorizationPolicy shop/audit", "spec"),
    ];
    assert_eq!(rows.len(), expected.len(), "{findings:?}");
    for ((document, object, field, severity), (number, name, wrong)) in rows.into_iter().zip(expected) {
        assert_eq!(
            (document, object, field, severity),
            (&number.into(), &name.into(), &wrong.into(), &"error".into())
        );
    }
    assert!(findings.iter().all(|f| f["file"].as_str().is_some_and(|file| file.ends_with("/a.yaml"))));
    assert!(
        findings.iter().any(|f| f["message"].as_str().unwrap().contains("portLevelMtls needs a selector"))
    );
}

#[test]
fn policies_that_do_less_than_they_seem_to_are_remarked_on() {
    let policies = "
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: port, namespace: shop}
spec: {selector: {matchLabels: {app: db}}, portLevelMtls: {5433: {mode: STRICT}}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: nobody, namespace: shop}
spec: {selector: {matchLabels: {app: dbb}}, rules: [{}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: paths, namespace: shop}
spec: {action: DENY, rules: [{from: [{source: {namespaces: [old]}}]}, {to: [{operation: {paths: [/admin]}}]}]}
";
    let directory = manifests(&[("mesh.yaml", MESH), ("p.yaml", policies)]);
    let (passed, findings) = check(directory.path(), &[]);
    let row = |f: &Value| (f["severity"].clone(), f["document"].clone(), f["field"].clone());
    let rows: Vec<_> = findings.iter().map(row).collect();
    let expected = [
        ("error".into(), 3.into(), "spec.rules[1]".into()),
        ("warning".into(), 1.into(), "spec.portLevelMtls.5433".into()),
        ("warning".into(), 2.into(), "spec.selector".into()),
    ];
    assert_eq!(rows, expected, "{findings:?}");
    assert!(!passed, "a DENY that judges nothing is an error");

    let only_warnings = policies.split("---\n").take(2).collect::<Vec<_>>().join("---\n");
    let directory = manifests(&[("mesh.yaml", MESH), ("p.yaml", &only_warnings)]);
    let (passed, findings) = check(directory.path(), &[]);
    assert!(passed && findings.len() == 2);
    assert!(!check(directory.path(), &["--deny-warnings"]).0);

    // With a pod that can't be read, who selects nobody is not known.
    let broken = "{apiVersion: v1, kind: Pod, metadata: {name: dbb, namespace: shop, labels: {app: dbb}}, status: {podIP: 7}}";
    let directory = manifests(&[("mesh.yaml", MESH), ("p.yaml", &only_warnings), ("q.yaml", broken)]);
    let (passed, findings) = check(directory.path(), &[]);
    assert!(!passed);
    assert_eq!(findings.len(), 1, "{findings:?}");
}

#[test]
fn a_directory_that_is_not_there_is_an_error() {
    let answer = mtls(&["check", "/nowhere/at/all"]);
    assert_eq!(answer.status.code(), Some(1));
    assert!(text(&answer.stderr).contains("/nowhere/at/all"));
}

fn explain(from: &str, to: &str, port: &str, more: &[&str]) -> Vec<Value> {
    let directory = manifests(&[("mesh.yaml", MESH), ("policies.yaml", POLICIES)]);
    let path = directory.path().to_str().unwrap();
    let asked = ["explain", "--manifests", path, "--from", from, "--to", to, "--port", port, "-o", "json"];
    let answer = mtls(&[asked.as_slice(), more].concat());
    serde_json::from_slice(&answer.stdout).unwrap_or_else(|_| panic!("{}", text(&answer.stderr)))
}

#[test]
fn explanations_follow_the_policies() {
    let strict = "plaintext to a STRICT port, denied by PeerAuthentication shop/db";
    // From, to, port; captured, path, mode and who set it, allowed, verdict.
    let rows = [
        (
            "shop/web",
            "shop/db",
            "5432",
            true,
            "tunnel",
            "STRICT",
            "shop/db",
            true,
            "allowed by AuthorizationPolicy shop/db-clients",
        ),
        (
            "shop/cache",
            "shop/db",
            "5432",
            true,
            "tunnel",
            "STRICT",
            "shop/db",
            false,
            "no ALLOW policy matched",
        ),
        (
            "10.0.0.1",
            "10.0.0.3",
            "5432",
            true,
            "tunnel",
            "STRICT",
            "shop/db",
            true,
            "allowed by AuthorizationPolicy shop/db-clients",
        ),
        ("old/legacy", "shop/db", "5432", false, "plaintext", "STRICT", "shop/db", false, strict),
        ("192.0.2.7", "shop/db", "5432", false, "plaintext", "STRICT", "shop/db", false, strict),
        (
            "old/legacy",
            "shop/db",
            "9187",
            false,
            "plaintext",
            "PERMISSIVE",
            "shop/db",
            false,
            "no ALLOW policy matched",
        ),
        (
            "shop/web",
            "shop/cache",
            "80",
            true,
            "same_node",
            "PERMISSIVE",
            "",
            true,
            "allowed: no ALLOW policy applies",
        ),
        (
            "old/legacy",
            "shop/cache",
            "80",
            false,
            "plaintext",
            "PERMISSIVE",
            "",
            true,
            "allowed: no ALLOW policy applies",
        ),
        (
            "shop/web",
            "shop/web",
            "8080",
            false,
            "inside",
            "PERMISSIVE",
            "",
            true,
            "allowed: inside a pod nothing is judged",
        ),
        (
            "shop/web",
            "old/legacy",
            "80",
            false,
            "passthrough",
            "",
            "",
            true,
            "allowed: the destination is not enrolled, so no policy applies",
        ),
        (
            "shop/web",
            "shop/db",
            "15008",
            true,
            "tunnel",
            "STRICT",
            "shop/db",
            false,
            "refused: this port of an enrolled pod is the agent's own",
        ),
    ];
    for (from, to, port, captured, path, mode, set_by, allowed, verdict) in rows {
        let explained = explain(from, to, port, &[]);
        let [one] = explained.as_slice() else { panic!("{explained:?}") };
        let known = (&one["captured"], &one["path"], &one["allowed"], &one["verdict"]);
        assert_eq!(
            known,
            (&captured.into(), &path.into(), &allowed.into(), &verdict.into()),
            "{from} {to} {port}"
        );
        assert_eq!(one["mode"]["mode"].as_str().unwrap_or_default(), mode, "{from} {to} {port}");
        assert_eq!(one["mode"]["policy"].as_str().unwrap_or_default(), set_by, "{from} {to} {port}");
        assert_eq!(one["protected"], ["tunnel", "same_node", "inside"].contains(&path), "{from} {to} {port}");
    }
}

#[test]
fn dry_runs_are_told_beside_the_verdict_and_never_instead_of_it() {
    let tunnelled = &explain("shop/web", "shop/db", "5432", &[])[0];
    assert_eq!(tunnelled["dry_run"], "denied by AuthorizationPolicy shop/trial");
    assert_eq!(tunnelled["allowed"], true);
    let plain = &explain("old/legacy", "shop/cache", "80", &[])[0];
    assert_eq!(plain["dry_run_mode"]["mode"], "STRICT");
    assert_eq!(plain["dry_run_mode"]["policy"], "shop/strict-trial");
    assert_eq!((&plain["allowed"], &plain["mode"]["mode"]), (&true.into(), &"PERMISSIVE".into()));
    assert!(plain["dry_run"].as_str().unwrap().contains("denied by PeerAuthentication shop/strict-trial"));
    assert_eq!(explain("shop/web", "shop/web", "80", &[])[0]["dry_run"], Value::Null);
}

#[test]
fn a_service_is_explained_by_its_endpoints_and_prefixes_decide_about_capture() {
    let through_service = &explain("shop/web", "10.96.0.5", "5433", &[])[0];
    assert_eq!(through_service["service"], "shop/postgres");
    assert_eq!(through_service["to"]["address"], "10.0.0.3:5432");
    assert_eq!(through_service["policy"], "shop/db-clients");
    let prefix = &explain("shop/web", "old/legacy", "80", &["--mesh-prefix", "10.0.0.0/24"])[0];
    assert_eq!((&prefix["captured"], &prefix["path"]), (&true.into(), &"passthrough".into()));
    let outside = &explain("shop/web", "shop/db", "5432", &["--mesh-prefix", "10.9.0.0/24"])[0];
    assert_eq!(
        (&outside["captured"], &outside["path"], &outside["allowed"]),
        (&false.into(), &"plaintext".into(), &false.into())
    );
    let encrypted = &explain("shop/web", "shop/cache", "80", &["--same-node", "encrypt"])[0];
    assert_eq!(encrypted["path"], "tunnel");
}

#[test]
fn people_get_a_text_and_mistakes_an_error() {
    let directory = manifests(&[("mesh.yaml", MESH), ("policies.yaml", POLICIES)]);
    let path = directory.path().to_str().unwrap();
    let ask =
        |from, to, port| mtls(&["explain", "--manifests", path, "--from", from, "--to", to, "--port", port]);
    let answer = text(&ask("old/legacy", "shop/db", "5432").stdout);
    for line in [
        "CAPTURED  no: old/legacy is not enrolled",
        "ON WIRE   a SYN from 10.0.0.9 to 10.0.0.3:5432, answered with RST",
        "MODE      STRICT, set by PeerAuthentication shop/db",
    ] {
        assert!(answer.contains(line), "{answer}");
    }
    for (from, to, port, expected) in [
        ("shop/nobody", "shop/db", "1", "there is no pod shop/nobody"),
        ("shop/web", "10.96.0.5", "80", "service shop/postgres has no ready endpoint for port 80"),
        ("shop/web", "fd00::1", "80", "no addresses of the same family"),
        ("web", "shop/db", "1", "neither a pod"),
        ("shop/web", "shop/db", "0", "0"),
    ] {
        let answer = ask(from, to, port);
        assert!(!answer.status.success() && answer.stdout.is_empty());
        assert!(text(&answer.stderr).contains(expected), "{}", text(&answer.stderr));
    }
}
