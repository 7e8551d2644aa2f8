//! What L4 can't judge, and connections without an identity.

use crate::bench::*;

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
