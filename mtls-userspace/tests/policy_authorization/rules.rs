//! Scopes and how rules combine: which policies apply, and when one matches.

use crate::bench::*;

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
