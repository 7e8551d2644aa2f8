//! From what was found to what is proven. Pure.

use crate::explain::Explanation;
use crate::observe::{CheckRow, End, Proof};

/// Which ends are on this node.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen {
    pub source: bool,
    pub destination: bool,
}

/// Checks that, when they fail, mean that readable bytes are on their way at this moment.
const LEAKS: [&str; 2] = ["direct_connections", "plaintext_connections"];

/// What is proven, and why not more.
pub(super) fn verdict(expected: &Explanation, seen: Seen, checks: &[CheckRow]) -> (Proof, Vec<String>) {
    let failed: Vec<&CheckRow> = checks.iter().filter(|check| !check.passed).collect();
    let reason = |check: &&CheckRow| {
        let end = match check.end {
            End::Source => &expected.from,
            End::Destination => &expected.to,
        };
        format!("{}: {}: {}", end.workload.as_deref().unwrap_or(&end.address), check.name, check.found)
    };
    let mut reasons: Vec<String> = failed.iter().map(reason).collect();
    if failed.iter().any(|check| LEAKS.contains(&check.name.as_str())) {
        return (Proof::Plaintext, reasons);
    }
    if !expected.allowed {
        // Whatever else is wrong, policy lets nothing through; but who enforces it must be in order.
        reasons.insert(0, expected.verdict.clone());
        return (if failed.is_empty() { Proof::Refused } else { Proof::Unproven }, reasons);
    }
    let protected = match expected.path.as_str() {
        "tunnel" => Proof::Encrypted,
        "same_node" => Proof::SameNode,
        "direct" => {
            reasons
                .insert(0, "--same-node direct: bytes cross the node's pod network unencrypted".to_owned());
            return (if failed.is_empty() { Proof::Direct } else { Proof::Unproven }, reasons);
        }
        "inside" => {
            reasons.push("both are one pod: its connections to itself are not the mesh's".to_owned());
            return (Proof::Unproven, reasons);
        }
        _ => {
            reasons.insert(0, readable(expected));
            return (Proof::Plaintext, reasons);
        }
    };
    let is_strict = expected.mode.as_ref().is_some_and(|mode| mode.mode == "STRICT");
    if !seen.source && !is_strict {
        let node = expected.from.node.as_deref().unwrap_or("its node");
        reasons.push(format!(
            "the destination's port also accepts plaintext ({}), and whether the source's connections are captured \
             can only be seen on {node}",
            expected.mode.as_ref().map_or("no mode", |mode| &mode.mode)
        ));
    }
    (if reasons.is_empty() { protected } else { Proof::Unproven }, reasons)
}

fn readable(expected: &Explanation) -> String {
    match &expected.mode {
        Some(mode) if expected.captured => {
            format!("the destination's mode is {}: connections are plaintext", mode.mode)
        }
        None if expected.captured => "the destination is not enrolled: connections are plaintext".to_owned(),
        _ => format!("not captured ({}): connections are plaintext", expected.why_captured),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::explain::{EndRow, ModeRow};

    fn expected(path: &str, mode: Option<&str>, allowed: bool) -> Explanation {
        let end = |workload: &str| EndRow {
            workload: Some(workload.to_owned()),
            address: "10.0.0.1".to_owned(),
            identity: None,
            enrolled: true,
            node: Some("node-a".to_owned()),
        };
        Explanation {
            from: end("shop/web"),
            to: end("shop/db"),
            port: 80,
            service: None,
            captured: true,
            why_captured: "yes".to_owned(),
            path: path.to_owned(),
            wire: String::new(),
            protected: true,
            mode: mode.map(|mode| ModeRow { mode: mode.to_owned(), policy: None }),
            dry_run_mode: None,
            allowed,
            verdict: "denied by AuthorizationPolicy shop/none".to_owned(),
            policy: None,
            dry_run: None,
            notes: Vec::new(),
        }
    }

    fn check(name: &str, passed: bool) -> CheckRow {
        CheckRow { end: End::Source, name: name.to_owned(), passed, found: "found".to_owned() }
    }

    #[test]
    fn only_what_was_seen_and_fits_is_proven() {
        let (both, source, destination) = (
            Seen { source: true, destination: true },
            Seen { source: true, destination: false },
            Seen { source: false, destination: true },
        );
        let good = || vec![check("listeners", true)];
        let bad = || vec![check("listeners", false)];
        let leak = || vec![check("listeners", true), check("plaintext_connections", false)];
        let (strict, permissive) = (Some("STRICT"), Some("PERMISSIVE"));
        let table = [
            ("tunnel", strict, true, both, good(), Proof::Encrypted),
            ("tunnel", permissive, true, source, good(), Proof::Encrypted),
            ("tunnel", strict, true, destination, good(), Proof::Encrypted),
            ("tunnel", permissive, true, destination, good(), Proof::Unproven),
            ("same_node", permissive, true, both, good(), Proof::SameNode),
            ("same_node", permissive, true, both, bad(), Proof::Unproven),
            ("direct", strict, true, both, good(), Proof::Direct),
            ("direct", strict, true, both, bad(), Proof::Unproven),
            ("tunnel", strict, true, both, bad(), Proof::Unproven),
            ("tunnel", strict, true, both, leak(), Proof::Plaintext),
            ("tunnel", strict, false, both, leak(), Proof::Plaintext),
            ("tunnel", strict, false, both, good(), Proof::Refused),
            ("plaintext", strict, false, both, bad(), Proof::Unproven),
            ("plaintext", permissive, true, both, good(), Proof::Plaintext),
            ("passthrough", None, true, both, Vec::new(), Proof::Plaintext),
            ("inside", strict, true, both, good(), Proof::Unproven),
        ];
        for (path, mode, allowed, seen, checks, proof) in table {
            let (found, reasons) = verdict(&expected(path, mode, allowed), seen, &checks);
            assert_eq!(found, proof, "{path} {mode:?} {allowed} {seen:?} {checks:?}: {reasons:?}");
            assert_eq!(reasons.is_empty(), found.is_protected(), "{path} {mode:?}: {reasons:?}");
        }
    }

    #[test]
    fn reasons_name_the_pod_the_check_and_the_policy() {
        let seen = Seen { source: true, destination: true };
        let (_, reasons) = verdict(&expected("tunnel", None, false), seen, &[check("listeners", false)]);
        assert_eq!(reasons, ["denied by AuthorizationPolicy shop/none", "shop/web: listeners: found"]);
    }
}
