//! Every field with its `not` form, and every form of text.

use crate::bench::*;

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
