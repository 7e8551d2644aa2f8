//! Who listens on ports that the agent needs: 15020 on the node, 15001, 15006 and 15008 in pods.
//!
//! Sources: `/proc/PID/net/tcp` and `tcp6` of one process of each network namespace.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use super::{Error, Finding, Verdict, inside};
use crate::capture::{OUTBOUND_PORT, PLAINTEXT_PORT, TUNNEL_PORT};

const ADMIN_PORT: u16 = 15020;
const IN_PODS: [u16; 3] = [OUTBOUND_PORT, PLAINTEXT_PORT, TUNNEL_PORT];
/// State `TCP_LISTEN` in the kernel's tables.
const LISTEN: &str = "0A";

/// Looks into every namespace that a process of the node is in.
pub fn look(root: &Path) -> Result<Vec<Finding>, Error> {
    let proc = inside(root, "proc");
    let entries = fs::read_dir(&proc).map_err(|source| Error::Unreadable { path: proc.clone(), source })?;
    let mut processes: Vec<u32> =
        entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    processes.sort_unstable();
    let mut seen = BTreeSet::new();
    let mut in_pods = BTreeMap::<u16, usize>::new();
    let mut on_node = false;
    for process in processes {
        let directory = proc.join(process.to_string());
        // One that has ended meanwhile, or belongs to somebody whom we may not look at.
        let Ok(namespace) = fs::read_link(directory.join("ns/net")) else { continue };
        let is_node = process == 1;
        if !seen.insert(namespace) {
            continue;
        }
        let ports = listening(&directory);
        if is_node {
            on_node = ports.contains(&ADMIN_PORT);
        } else {
            for port in IN_PODS.into_iter().filter(|port| ports.contains(port)) {
                *in_pods.entry(port).or_default() += 1;
            }
        }
    }
    Ok(vec![on_the_node(on_node), in_the_pods(&in_pods)])
}

fn on_the_node(is_taken: bool) -> Finding {
    let (seen, verdict) = match is_taken {
        false => ("free", Verdict::Good),
        true => (
            "taken",
            Verdict::Known {
                because: "if that is not an agent of ours: metrics and health of ours need it".into(),
            },
        ),
    };
    Finding { what: "port 15020 of the node", seen: seen.into(), verdict }
}

fn in_the_pods(taken: &BTreeMap<u16, usize>) -> Finding {
    const WHAT: &str = "ports 15001, 15006, 15008 in pods";
    if taken.is_empty() {
        return Finding { what: WHAT, seen: "free".into(), verdict: Verdict::Good };
    }
    let seen: Vec<String> = taken.iter().map(|(port, pods)| format!("{port} in {pods}")).collect();
    let because =
        "those pods have another mesh's proxy, or this one's: they can't be enrolled while it is in them; \
                   others can"
            .into();
    Finding { what: WHAT, seen: format!("taken: {}", seen.join(", ")), verdict: Verdict::Known { because } }
}

/// Ports that something listens on, over either address family.
fn listening(process: &Path) -> BTreeSet<u16> {
    let tables =
        ["net/tcp", "net/tcp6"].map(|table| fs::read_to_string(process.join(table)).unwrap_or_default());
    tables.iter().flat_map(|table| table.lines().skip(1)).filter_map(listener).collect()
}

/// `0: 00000000:3AAC 00000000:0000 0A …`: slot, local, remote, state; numbers in hexadecimal.
fn listener(line: &str) -> Option<u16> {
    let mut fields = line.split_whitespace().skip(1);
    let (local, state) = (fields.next()?, fields.nth(1)?);
    let (_, port) = local.rsplit_once(':')?;
    if state == LISTEN { u16::from_str_radix(port, 16).ok() } else { None }
}
