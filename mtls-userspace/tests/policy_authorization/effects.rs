//! What becomes of a decision: STRICT before it, its words, dry-run, and what a policy doesn't do.

use std::net::SocketAddr;

use mtls::policy::{Mode, Reason, Verdict};

use crate::bench::*;

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
