//! Manifests that can't be understood: the error names the place and the remedy.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use mtls::mesh::{Mesh, Objects, Settings};

fn settings() -> Settings {
    Settings { trust_domain: "cluster.local".parse().unwrap(), root_namespace: "istio-system".into() }
}

fn refused(manifest: &str) -> String {
    match Objects::from_yaml("a.yaml", manifest, &settings()) {
        Err(error) => error.to_string(),
        Ok(mut objects) => Mesh::build(&mut objects, &settings(), 1).unwrap_err().to_string(),
    }
}

fn accepted(manifest: &str) -> Objects {
    Objects::from_yaml("a.yaml", manifest, &settings()).unwrap()
}

fn names(objects: &Objects) -> Vec<String> {
    objects.heads().map(|(kind, key)| format!("{kind} {key}")).collect()
}

fn peer_authentication(spec: &str) -> String {
    format!(
        "{{apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {{name: p, namespace: shop}}, spec: {spec}}}"
    )
}

fn authorization_policy(spec: &str) -> String {
    format!(
        "{{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {{name: p, namespace: shop}}, spec: {spec}}}"
    )
}

#[test]
fn every_refusal_names_file_document_object_field_and_remedy() {
    let pod = "{apiVersion: v1, kind: Pod, metadata: {name: p, namespace: shop}";
    let rows = [
        (
            "kind: [".to_owned(),
            "a.yaml, document 1: not valid YAML or JSON: did not find expected node content at line 2 column 1, while parsing a flow node; correct the syntax",
        ),
        (
            "- one".to_owned(),
            "a.yaml, document 1: a manifest is a mapping with apiVersion, kind and metadata; this document is something else",
        ),
        (
            "---\n# nothing\n---\napiVersion: v1".to_owned(),
            "a.yaml, document 2: field kind is missing; every manifest has apiVersion and kind",
        ),
        (
            "kind: Pod".to_owned(),
            "a.yaml, document 1: field apiVersion is missing; every manifest has apiVersion and kind",
        ),
        (
            "{apiVersion: v2, kind: Pod, metadata: {name: p}}".to_owned(),
            "a.yaml, document 1: Pod of apiVersion \"v2\" isn't understood; write apiVersion: v1",
        ),
        (
            "{apiVersion: security.istio.io/v1alpha1, kind: PeerAuthentication, metadata: {name: p}}".to_owned(),
            "a.yaml, document 1: PeerAuthentication of apiVersion \"security.istio.io/v1alpha1\" isn't understood; write apiVersion: security.istio.io/v1",
        ),
        (
            "{apiVersion: v1, kind: Pod}".to_owned(),
            "a.yaml, document 1: Pod: field metadata.name: missing",
        ),
        (
            "{apiVersion: v1, kind: Pod, metadata: {name: p, labels: {app: 7}}}".to_owned(),
            "a.yaml, document 1: Pod: field metadata.labels.app: invalid type: integer `7`, expected a string",
        ),
        (
            format!("{pod}, spec: {{containers: [{{name: c, ports: [{{containerPort: http}}]}}]}}}}"),
            "a.yaml, document 1: Pod shop/p: field spec.containers[0].ports[0].containerPort: invalid type: string \"http\", expected i32",
        ),
        (
            format!("{pod}, status: {{podIP: 10.0.0.256}}}}"),
            "a.yaml, document 1: Pod shop/p: field status.podIP: \"10.0.0.256\" is not an IP address",
        ),
        (
            format!("{pod}, spec: {{containers: [{{name: c, ports: [{{containerPort: 70000}}]}}]}}, status: {{podIP: 10.0.0.1}}}}"),
            "a.yaml, document 1: Pod shop/p: field spec.containers.ports.containerPort: 70000 is not a port; write a number from 1 to 65535",
        ),
        (
            "{apiVersion: v1, kind: Pod, metadata: {name: p, namespace: shop, annotations: {mtls.dev/netns: web}}, status: {podIP: 10.0.0.1}}".to_owned(),
            "a.yaml, document 1: Pod shop/p: annotation mtls.dev/netns is \"web\"; write an absolute path",
        ),
        (
            "{apiVersion: v1, kind: Pod, metadata: {name: p}}\n---\n{apiVersion: v1, kind: Pod, metadata: {name: p, namespace: default}}".to_owned(),
            "Pod default/p is defined twice: a.yaml, document 1; and a.yaml, document 2; remove one of them",
        ),
        (
            "{apiVersion: v1, kind: List, items: [{apiVersion: v1, kind: Pod, metadata: {name: p}}, {kind: Pod}]}".to_owned(),
            "a.yaml, document 1, items[1]: field apiVersion is missing; every manifest has apiVersion and kind",
        ),
        (
            "{apiVersion: v1, kind: List}".to_owned(),
            "a.yaml, document 1: field items: a List has a sequence of objects",
        ),
        (
            peer_authentication("{mtls: {mode: STRIKT}}"),
            "a.yaml, document 1: PeerAuthentication shop/p: field spec.mtls.mode: unknown variant `STRIKT`, expected one of `UNSET`, `DISABLE`, `PERMISSIVE`, `STRICT`",
        ),
        (
            peer_authentication("{mlts: {mode: STRICT}}"),
            "a.yaml, document 1: PeerAuthentication shop/p: field spec.mlts: unknown field `mlts`, expected one of `selector`, `mtls`, `portLevelMtls`",
        ),
        (
            peer_authentication("{portLevelMtls: {80: {mode: STRICT}}}"),
            "a.yaml, document 1: PeerAuthentication shop/p: field spec: portLevelMtls needs a selector: ports belong to pods; add selector.matchLabels, or use mtls.mode for the whole namespace",
        ),
        (
            peer_authentication("{selector: {matchLabels: {app: a}}, portLevelMtls: {0: {mode: STRICT}}}"),
            "a.yaml, document 1: PeerAuthentication shop/p: field spec.portLevelMtls.0: \"0\" is no port; write a number from 1 to 65535",
        ),
        (
            peer_authentication("{selector: {matchLabels: {app: 'a*'}}}"),
            "a.yaml, document 1: PeerAuthentication shop/p: field spec: `app: a*`: a selector compares labels exactly; `*` isn't allowed",
        ),
        (
            authorization_policy("{action: AUDIT}"),
            "a.yaml, document 1: AuthorizationPolicy shop/p: field spec: action AUDIT isn't supported; this mesh enforces ALLOW and DENY",
        ),
        (
            authorization_policy("{action: CUSTOM, provider: {name: x}}"),
            "a.yaml, document 1: AuthorizationPolicy shop/p: field spec: action CUSTOM isn't supported; this mesh enforces ALLOW and DENY",
        ),
        (
            authorization_policy("{action: PERMIT}"),
            "a.yaml, document 1: AuthorizationPolicy shop/p: field spec: unknown action \"PERMIT\"; write ALLOW or DENY",
        ),
        (
            authorization_policy("{rules: [{from: [{source: {principal: [x]}}]}]}"),
            "a.yaml, document 1: AuthorizationPolicy shop/p: field spec.rules[0].from[0].source.principal: unknown field `principal`, expected one of `principals`, `notPrincipals`, `namespaces`, `notNamespaces`, `serviceAccounts`, `notServiceAccounts`, `ipBlocks`, `notIpBlocks`, `requestPrincipals`, `notRequestPrincipals`, `remoteIpBlocks`, `notRemoteIpBlocks`",
        ),
        (
            authorization_policy("{rules: [{from: [{source: {ipBlocks: [10.0.0.0/8, 10.0.0/8]}}]}]}"),
            "a.yaml, document 1: AuthorizationPolicy shop/p: field spec.rules[0].from[0].source.ipBlocks[1]: \"10.0.0/8\" is neither an IP address nor a CIDR block such as 10.0.0.0/8",
        ),
        (
            authorization_policy("{rules: [{from: [{source: {principals: ['spiffe://td/ns/a/sa/b']}}]}]}"),
            "a.yaml, document 1: AuthorizationPolicy shop/p: field spec.rules[0].from[0].source.principals[0]: principals are written without `spiffe://`, as in cluster.local/ns/shop/sa/web; this is \"spiffe://td/ns/a/sa/b\"",
        ),
        (
            authorization_policy("{rules: [{from: [{source: {namespaces: ['a*b']}}]}]}"),
            "a.yaml, document 1: AuthorizationPolicy shop/p: field spec.rules[0].from[0].source.namespaces[0]: `*` stands only first or last in a value, or alone; \"a*b\" could never match",
        ),
        (
            authorization_policy("{rules: [{from: [{source: {namespaces: ['']}}]}]}"),
            "a.yaml, document 1: AuthorizationPolicy shop/p: field spec.rules[0].from[0].source.namespaces[0]: empty text; write a value, or `*` for any",
        ),
        (
            authorization_policy("{rules: [{from: [{source: {serviceAccounts: ['a/b/c']}}]}]}"),
            "a.yaml, document 1: AuthorizationPolicy shop/p: field spec.rules[0].from[0].source.serviceAccounts[0]: \"a/b/c\" is no service account; write `account` (in the policy's namespace), `namespace/account`, `namespace/*` or `*/account`",
        ),
        (
            authorization_policy("{rules: [{from: []}]}"),
            "a.yaml, document 1: AuthorizationPolicy shop/p: field spec.rules[0]: `from` is an empty list; remove it to match everything, or add an entry",
        ),
        (
            authorization_policy("{rules: [{from: [{source: {}}]}]}"),
            "a.yaml, document 1: AuthorizationPolicy shop/p: field spec.rules[0].from[0].source: `source` has no fields and would match everything; remove it, or say what it must match",
        ),
        (
            authorization_policy("{rules: [{to: [{operation: {ports: ['http']}}]}]}"),
            "a.yaml, document 1: AuthorizationPolicy shop/p: field spec.rules[0].to[0].operation.ports[0]: \"http\" is no port; write a number from 1 to 65535",
        ),
        (
            authorization_policy("{rules: [{when: [{key: source.port, values: ['1']}]}]}"),
            "a.yaml, document 1: AuthorizationPolicy shop/p: field spec.rules[0].when[0]: unknown condition key \"source.port\"; at L4 there are source.ip, source.namespace, source.principal, source.serviceAccount, destination.ip and destination.port",
        ),
        (
            authorization_policy("{rules: [{when: [{key: source.ip}]}]}"),
            "a.yaml, document 1: AuthorizationPolicy shop/p: field spec.rules[0].when[0]: the condition on source.ip has neither values nor notValues; add one of them",
        ),
        (
            "{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {name: p, namespace: shop, annotations: {istio.io/dry-run: 'yes'}}}".to_owned(),
            "a.yaml, document 1: AuthorizationPolicy shop/p: field metadata: annotation istio.io/dry-run is \"yes\"; write \"true\" or \"false\"",
        ),
    ];
    for (manifest, expected) in rows {
        assert_eq!(refused(&manifest), expected, "for {manifest}");
    }
}

#[test]
fn a_service_account_that_makes_no_identity_is_refused() {
    let error = refused(
        "{apiVersion: v1, kind: Pod, metadata: {name: p, namespace: shop}, spec: {serviceAccountName: 'a/b', containers: []}, status: {podIP: 10.0.0.1}}",
    );
    assert!(error.starts_with("a.yaml, document 1: Pod shop/p has no valid identity: "), "{error}");
}

#[test]
fn what_people_write_is_accepted() {
    let objects = accepted(
        "# a comment only
---
apiVersion: v1
kind: List
items:
- &web
  apiVersion: v1
  kind: Pod
  metadata: {name: a}
- <<: *web
  metadata: {name: b, creationTimestamp: null}
---
apiVersion: v1
kind: PodList
items:
- metadata: {name: c}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: d}
spec: {anything: [1]}
---
apiVersion: serving.knative.dev/v1
kind: Service
metadata: {name: d}
---
apiVersion: security.istio.io/v1beta1
kind: PeerAuthentication
metadata: {name: p}
spec:
  selector: {matchLabels: {app: web}}
  mtls: {mode: STRICT}
  portLevelMtls: {80: {mode: DISABLE}, '81': {mode: UNSET}}
status: {}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p}
---
apiVersion: v1
kind: Service
metadata: {name: s}
",
    );
    let expected = [
        "Pod default/a",
        "Pod default/b",
        "Pod default/c",
        "Service default/s",
        "PeerAuthentication default/p",
        "AuthorizationPolicy default/p",
    ];
    assert_eq!(names(&objects), expected);
}

#[test]
fn json_is_accepted_with_tabs_and_several_documents() {
    let objects = Objects::from_yaml(
        "a.json",
        "{\n\t\"apiVersion\": \"v1\",\n\t\"kind\": \"Pod\",\n\t\"metadata\": {\"name\": \"a\"}\n}\n{\"apiVersion\": \"v1\", \"kind\": \"Pod\", \"metadata\": {\"name\": \"b\"}}\n",
        &settings(),
    )
    .unwrap();
    assert_eq!(names(&objects), ["Pod default/a", "Pod default/b"]);
    let error = Objects::from_yaml("a.json", "{\"apiVersion\": ", &settings()).unwrap_err().to_string();
    assert_eq!(
        error,
        "a.json, document 1: not valid YAML or JSON: EOF while parsing a value at line 1 column 15; correct the syntax"
    );
}

proptest::proptest! {
    /// Whatever stands in a manifest, the answer is objects or an error that names the file.
    #[test]
    fn no_text_is_too_strange(
        after in "[ -~\\n]{0,40}",
        mode in "[ -~]{0,12}",
        port in "[ -~]{0,8}",
        block in "[0-9a-f:./*]{0,20}",
    ) {
        let manifest = format!(
            "{{apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {{name: p}}, \
             spec: {{selector: {{matchLabels: {{a: b}}}}, mtls: {{mode: {mode}}}, portLevelMtls: {{{port}: {{}}}}}}}}\n---\n\
             {{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {{name: p}}, spec: {{rules: \
             [{{from: [{{source: {{ipBlocks: ['{block}'], principals: ['{block}'], serviceAccounts: ['{block}']}}}}]}}]}}}}\n---\n{after}\n"
        );
        if let Err(error) = Objects::from_yaml("a.yaml", &manifest, &settings()) {
            let error = error.to_string();
            proptest::prop_assert!(error.contains("a.yaml, document "), "{}", error);
        }
    }
}
