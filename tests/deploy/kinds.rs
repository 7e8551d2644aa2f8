//! The policy kinds: what the CRDs' schemas take and refuse, beside what the agent does.

use std::io::Write;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use crate::{Scratch, deployed, needs, run};

#[derive(Clone, Copy, PartialEq, Debug)]
enum Verdict {
    Taken,
    Refused,
}
use Verdict::{Refused, Taken};

/// A spec; what the schema says, what the agent says.
const PEER_AUTHENTICATIONS: [(&str, Verdict, Verdict); 11] = [
    ("{}", Taken, Taken),
    ("{mtls: {mode: STRICT}}", Taken, Taken),
    ("{mtls: {mode: UNSET}}", Taken, Taken),
    ("{selector: {matchLabels: {app: web}}, mtls: {mode: PERMISSIVE}}", Taken, Taken),
    ("{selector: {matchLabels: {app: web}}, portLevelMtls: {\"8080\": {mode: DISABLE}}}", Taken, Taken),
    ("{mtls: {mode: strict}}", Refused, Refused),
    ("{mtls: {mod: STRICT}}", Refused, Refused),
    ("{mtl: {mode: STRICT}}", Refused, Refused),
    ("{selector: {matchLabels: {app: 1}}}", Refused, Refused),
    // The rest stands in the schema's rules (CEL), which only an API server evaluates.
    ("{portLevelMtls: {\"8080\": {mode: STRICT}}}", Taken, Refused),
    ("{selector: {matchLabels: {app: web}}, portLevelMtls: {\"80800\": {mode: STRICT}}}", Taken, Refused),
];

const AUTHORIZATION_POLICIES: [(&str, Verdict, Verdict); 21] = [
    ("{}", Taken, Taken),
    ("{rules: [{}]}", Taken, Taken),
    ("{action: DENY, rules: [{from: [{source: {notPrincipals: ['*']}}]}]}", Taken, Taken),
    (
        "{selector: {matchLabels: {app: web}}, action: ALLOW, rules: [{from: [{source: {principals: [a/ns/b/sa/c]}}]}]}",
        Taken,
        Taken,
    ),
    (
        "{rules: [{from: [{source: {namespaces: [a], notNamespaces: [b]}}], to: [{operation: {ports: ['80']}}]}]}",
        Taken,
        Taken,
    ),
    (
        "{rules: [{from: [{source: {serviceAccounts: [a/b], ipBlocks: [10.0.0.0/8], notIpBlocks: [10.1.0.0/16]}}]}]}",
        Taken,
        Taken,
    ),
    (
        "{rules: [{to: [{operation: {notPorts: ['80'], methods: [GET], paths: [/a], hosts: [h]}}]}]}",
        Taken,
        Taken,
    ),
    ("{rules: [{from: [{source: {requestPrincipals: ['*'], remoteIpBlocks: [10.0.0.1]}}]}]}", Taken, Taken),
    ("{rules: [{when: [{key: source.ip, values: [10.0.0.1], notValues: [10.0.0.2]}]}]}", Taken, Taken),
    // For a gateway or waypoint, which Istio may have beside us.
    (
        "{targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: w}], rules: [{}]}",
        Taken,
        Refused,
    ),
    ("{action: AUDIT, rules: [{}]}", Refused, Refused),
    ("{action: CUSTOM, provider: {name: x}, rules: [{}]}", Refused, Refused),
    ("{action: allow}", Refused, Refused),
    ("{rules: [{from: []}]}", Refused, Refused),
    ("{rules: [{from: [{source: {}}]}]}", Refused, Refused),
    ("{rules: [{from: [{source: {principal: [a]}}]}]}", Refused, Refused),
    ("{rules: [{from: [{principals: [a]}]}]}", Refused, Refused),
    ("{rules: [{to: [{operation: {ports: [80]}}]}]}", Refused, Refused),
    ("{rules: [{when: [{values: [a]}]}]}", Refused, Refused),
    // What a schema can't say.
    ("{rules: [{from: [{source: {ipBlocks: [10.0.0.300]}}]}]}", Taken, Refused),
    ("{rules: [{when: [{key: source.ports, values: ['80']}]}]}", Taken, Refused),
];

fn document(kind: &str, version: &str, spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/{version}\nkind: {kind}\nmetadata: {{name: p, namespace: shop}}\nspec: {spec}\n"
    )
}

/// What the schema has against each document.
fn by_schema(crd: &str, version: &str, documents: &[String]) -> Result<Vec<String>> {
    let tool = mtls_tests::find("kubernetes-validate").context("no kubernetes-validate")?;
    // Its environment has what the judge needs.
    let python = tool.canonicalize()?.with_file_name("python");
    let judge = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/judge.py");
    let mut child = Command::new(python)
        .arg(judge)
        .arg(deployed("crds").join(crd))
        .arg(version)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    child.stdin.take().context("no standard input")?.write_all(documents.join("---\n").as_bytes())?;
    let output = child.wait_with_output()?;
    let said: Vec<String> = serde_json::from_slice(&output.stdout).context("the judge failed")?;
    anyhow::ensure!(said.len() == documents.len(), "{} of {} judged", said.len(), documents.len());
    Ok(said)
}

fn by_agent(document: &str) -> Result<(Verdict, String)> {
    let scratch = Scratch::new("kinds")?;
    scratch.write("policy.yaml", document)?;
    let checked = run(mtls_tests::mtls()?, &["policy", "check", &scratch.0.to_string_lossy()])?;
    let verdict = if checked.status.success() { Taken } else { Refused };
    Ok((verdict, checked.stdout + &checked.stderr))
}

fn judged(kind: &str, crd: &str, table: &[(&str, Verdict, Verdict)]) -> Result<()> {
    let documents: Vec<String> = table.iter().map(|(spec, _, _)| document(kind, "v1", spec)).collect();
    let said = by_schema(crd, "v1", &documents)?;
    for (((spec, schema, agent), document), said) in table.iter().zip(&documents).zip(said) {
        assert_eq!(if said.is_empty() { Taken } else { Refused }, *schema, "the schema on {spec}: {said}");
        let (verdict, said) = by_agent(document)?;
        assert_eq!(verdict, *agent, "the agent on {spec}: {said}");
    }
    Ok(())
}

#[test]
fn peer_authentications_are_taken_and_refused_as_by_the_agent() -> Result<()> {
    needs!("kubernetes-validate");
    judged("PeerAuthentication", "peerauthentications.yaml", &PEER_AUTHENTICATIONS)
}

#[test]
fn authorization_policies_are_taken_and_refused_as_by_the_agent() -> Result<()> {
    needs!("kubernetes-validate");
    judged("AuthorizationPolicy", "authorizationpolicies.yaml", &AUTHORIZATION_POLICIES)
}

#[test]
fn manifests_written_for_istios_older_version_name_are_taken() -> Result<()> {
    needs!("kubernetes-validate");
    for (kind, crd) in [
        ("PeerAuthentication", "peerauthentications.yaml"),
        ("AuthorizationPolicy", "authorizationpolicies.yaml"),
    ] {
        let document = document(kind, "v1beta1", "{selector: {matchLabels: {a: b}}}");
        assert_eq!(by_schema(crd, "v1beta1", &[document])?, [""]);
    }
    Ok(())
}
