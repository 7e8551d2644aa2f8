//! Features: a machine in; what its kernel can do, found by doing it, and what the agent does about it out.
//!
//! [`examine`] tries everything, in a place of its own, for `mtls lab features`. [`Chosen::at_start`] tries what the agent
//! has a choice about, within a bounded time. Neither asks for a version number, and neither leaves anything behind.

mod choice;
mod ktls;
mod machine;
mod path;

use std::path::Path;

use serde::Serialize;

use crate::capture::probe::{self, Outcome, Part};

pub use choice::{Choice, Chosen, Error, Forced};
pub use machine::{CgroupRoot, Hook, Machine, Module};

/// What is known about a feature before it is tried.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct Feature {
    pub name: &'static str,
    /// The agent does not run without it.
    pub required: bool,
    pub needed_for: &'static str,
    /// The Linux that introduced it, and what it must be built with.
    pub since: &'static str,
    /// What the agent does without it.
    pub instead: &'static str,
}

const NOT_AT_ALL: &str = "no agent";

const fn required(name: &'static str, needed_for: &'static str, since: &'static str) -> Feature {
    Feature { name, required: true, needed_for, since, instead: NOT_AT_ALL }
}

const fn optional(
    name: &'static str,
    needed_for: &'static str,
    since: &'static str,
    instead: &'static str,
) -> Feature {
    Feature { name, required: false, needed_for, since, instead }
}

fn of_part(part: Part) -> Feature {
    let name = part.name();
    match part {
        Part::Object => required(name, "everything below: what is loaded into the kernel", "4.9 (BPF)"),
        Part::Capabilities => required(name, "loading programs, entering pods' namespaces", "5.8 (CAP_BPF)"),
        Part::Cgroup => required(name, "attaching hooks to pods' processes", "4.5"),
        Part::Bpffs => required(name, "enforcement that outlives the agent", "4.4"),
        Part::NetnsCookie => required(name, "telling pods apart", "5.14"),
        Part::LpmTrie => required(name, "which destinations are captured", "4.11"),
        Part::LruHash => required(name, "original addresses", "4.10"),
        Part::RingBuffer => required(name, "reporting plaintext", "5.8"),
        Part::SkStorage => required(name, "what a socket dialled", "5.2"),
        Part::SockHash => required(name, "handing connections to the agent", "4.18"),
        Part::Connect4 => required(name, "capture", "4.17, CONFIG_CGROUP_BPF"),
        Part::Connect6 => required(name, "capture over IPv6", "4.17, CONFIG_CGROUP_BPF"),
        Part::Getpeername4 => required(name, "applications see their real peer", "5.8"),
        Part::Getpeername6 => required(name, "the same over IPv6", "5.8"),
        Part::SockOps => required(name, "publishing original addresses", "4.13 (netns cookie: 5.15)"),
        Part::SkLookup => required(name, "STRICT, whether or not an agent runs", "5.9"),
        Part::CgroupReach => required(name, "hooks at the cgroup root see pods' processes", "4.10"),
        Part::Adoption => required(name, "the next agent takes over without a gap", "5.7"),
        Part::LoopbackCongestion => optional(
            name,
            "legs over loopback are not paced",
            "4.13",
            "they keep the host's congestion control",
        ),
        Part::SocketDestroy => of_choice(Choice::SocketDestroy),
    }
}

fn of_choice(choice: Choice) -> Feature {
    let name = choice.name();
    let records = "userspace seals and opens the records";
    match choice {
        Choice::KtlsAes128Gcm => {
            optional(name, "the kernel carries a long stream's records", "5.1, CONFIG_TLS", records)
        }
        Choice::KtlsAes256Gcm => optional(name, "the same for AES-256-GCM", "5.1, CONFIG_TLS", records),
        Choice::KtlsChacha20Poly1305 => {
            optional(name, "the same for ChaCha20-Poly1305", "5.11, CONFIG_TLS", records)
        }
        Choice::KtlsRekey => optional(
            name,
            "a stream in the kernel outlives its first key",
            "6.14, CONFIG_TLS",
            "it ends with a reset when the peer changes its key, or when ours is used up",
        ),
        Choice::Splice => optional(name, "moving bytes without copying them", "2.6.17", "bytes are copied"),
        Choice::TcpRtoMax => optional(
            name,
            "a tunnel to a dead peer ends within half a minute",
            "6.15",
            "it ends when TCP gives up, after up to a quarter of an hour",
        ),
        Choice::SocketDestroy => optional(
            name,
            "resetting open plaintext when a port becomes STRICT",
            "4.9, CONFIG_INET_DIAG_DESTROY",
            "a pod is not reported as protected until such connections have ended",
        ),
    }
}

const SAME_NODE_DIRECT: Feature = optional(
    "same-node-direct",
    "`--same-node direct`",
    "5.19, where there is Multipath TCP",
    "no agent with that setting; `relay` and `encrypt` do without",
);

/// Why an agent can't let pods of its node speak directly, if so.
pub fn against_same_node_direct() -> Option<String> {
    probe::same_node_direct().err().map(|obstacle| obstacle.reason)
}

/// A feature, and what came of trying it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Finding {
    #[serde(flatten)]
    pub feature: Feature,
    /// Absent: it was not tried, for the reason given.
    pub works: Option<bool>,
    /// What was seen, or why it doesn't work: the error, or the verifier's last line.
    pub seen: String,
    pub errno: Option<i32>,
}

impl Finding {
    fn new(feature: Feature, outcome: Outcome) -> Self {
        match outcome {
            Ok(seen) => Self { feature, works: Some(true), seen, errno: None },
            Err(obstacle) => Self {
                feature,
                works: obstacle.tried.then_some(false),
                seen: obstacle.reason,
                errno: obstacle.errno,
            },
        }
    }
}

/// Everything there is to say about a machine.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Nothing that the agent needs was tried in vain.
    pub can_run: bool,
    pub machine: Machine,
    pub features: Vec<Finding>,
}

/// Tries everything. The process visits cgroups and namespaces made for this, so it must do nothing else meanwhile.
pub fn examine(cgroup_root: Option<&Path>, bpffs: &Path) -> Report {
    let findings = probe::probe(cgroup_root, bpffs);
    let parts = findings.parts.into_iter().map(|(part, outcome)| Finding::new(of_part(part), outcome));
    let mut features: Vec<Finding> = parts.collect();
    // By now the kernel has loaded what it loads on demand.
    let more = Choice::ALL.into_iter().filter(|choice| *choice != Choice::SocketDestroy);
    features.extend(more.map(|choice| Finding::new(of_choice(choice), path::attempt(choice))));
    features.push(Finding::new(SAME_NODE_DIRECT, probe::same_node_direct()));
    features.sort_by_key(|finding| !finding.feature.required);
    let can_run = !features.iter().any(|finding| finding.feature.required && finding.works == Some(false));
    let machine = Machine::look(findings.cgroup_root.as_deref(), bpffs, findings.occupants);
    Report { can_run, machine, features }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_feature_has_a_name_of_its_own() {
        let parts = Part::ALL.into_iter().map(of_part);
        let more = Choice::ALL.into_iter().filter(|choice| *choice != Choice::SocketDestroy).map(of_choice);
        let mut names: Vec<_> =
            parts.chain(more).chain([SAME_NODE_DIRECT]).map(|feature| feature.name).collect();
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
    }
}
