//! `try.sh` of kind and minikube, without either: a stub answers in a cluster's place. That what a cluster really answers
//! is what the stub does is not shown here.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use mtls_tests::{Finished, Running};

use crate::{Scratch, deployed, needs, run};

const SCRIPTS: [&str; 2] = ["kind/try.sh", "minikube/try.sh"];

struct Tried {
    finished: Finished,
    calls: Vec<String>,
    /// Every manifest that was applied.
    applied: String,
}

impl Tried {
    /// The first call that contains this, by its position.
    fn position(&self, part: &str) -> Result<usize> {
        let position = self.calls.iter().position(|call| call.contains(part));
        position.with_context(|| format!("no call of {part}:\n{}", self.calls.join("\n")))
    }
}

/// Runs a script in a cluster that behaves in these ways.
fn tried(script: &str, args: &[&str], behaves: &str) -> Result<Tried> {
    let scratch = Scratch::new("scripts")?;
    let stub = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/stub.sh");
    for program in ["kind", "minikube", "docker", "kubectl"] {
        symlink(&stub, scratch.0.join(program))?;
    }
    let image = scratch.write("image.tar", "")?;
    let mut command = Command::new("bash");
    command.arg(deployed(script)).args(args);
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{}:{path}", scratch.0.display()));
    command.env("STUB", &scratch.0).env("STUB_BEHAVES", behaves).env("IMAGE", &image);
    command.env("STUB_KUBECTL", mtls_tests::find("kubectl").context("no kubectl")?);
    command.env("PAUSE", "0").env("CAPTURE_SETTLE", "0");
    let finished = Running::start(command)?.finish()?;
    let mut applied = Vec::new();
    for entry in std::fs::read_dir(&scratch.0)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with("applied-") {
            applied.push(std::fs::read_to_string(entry.path())?);
        }
    }
    let calls = std::fs::read_to_string(scratch.0.join("calls")).unwrap_or_default();
    Ok(Tried {
        finished,
        calls: calls.lines().map(str::to_owned).collect(),
        applied: applied.join("\n---\n"),
    })
}

#[test]
fn scripts_are_sound_in_the_eyes_of_shellcheck() -> Result<()> {
    needs!("shellcheck");
    for script in SCRIPTS {
        run("shellcheck", &["--external-sources", &deployed(script).to_string_lossy()])?.success()?;
    }
    let scratch = Scratch::new("shellcheck")?;
    let unsound = scratch.write("unsound.sh", "#!/bin/bash\nrm -r $1/*\n")?;
    assert!(run("shellcheck", &[&unsound.to_string_lossy()])?.success().is_err());
    Ok(())
}

#[test]
fn they_install_prove_and_measure() -> Result<()> {
    needs!("bash", "kubectl", "kubernetes-validate");
    for script in SCRIPTS {
        let tried = tried(script, &[], "")?;
        assert!(tried.finished.status.success(), "{}", tried.finished.stderr);
        // In this order, and not in another.
        let mut last = 0;
        for part in [
            "start --profile|create cluster",
            "image load|load image-archive",
            "apply -k",
            "rollout status daemonset/mtls-check",
            "delete -k",
            "rollout status daemonset/mtls-node",
            "apply -f",
            "logs capture",
            "exec client -- mtls bench client --to 10.244.2.2:7000 --workload upload",
            "label namespace",
            "strict.yaml",
        ] {
            let position = part.split('|').find_map(|part| tried.position(part).ok()).context(part)?;
            assert!(position >= last, "{part} comes too early:\n{}", tried.calls.join("\n"));
            last = position;
        }
        let table: Vec<&str> = tried.finished.stdout.lines().rev().take(3).collect();
        let cells = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(cells(table[0]), ["mtls", "10.00", "10.00", "10000", "10000", "10000"]);
        assert_eq!(cells(table[1])[0], "plain");
        assert!(table[2].contains("req/s"), "{table:?}");
        assert!(
            tried.finished.stderr.contains("node mtls-worker: can take part"),
            "{}",
            tried.finished.stderr
        );
        // Nothing was applied that Kubernetes would not take; policies are judged elsewhere.
        let documents =
            tried.applied.split("\n---\n").filter(|text| !text.contains("security.istio.io/v1\nkind: Peer"));
        let scratch = Scratch::new("applied")?;
        let file = scratch.write("applied.yaml", &documents.collect::<Vec<_>>().join("\n---\n"))?;
        run("kubernetes-validate", &["--strict", "--quiet", &file.to_string_lossy()])?.success()?;
        assert!(tried.applied.contains("nodeName: mtls-worker2"), "the capture is on the server's node");
    }
    Ok(())
}

#[test]
fn what_is_not_proven_fails_and_says_so() -> Result<()> {
    needs!("bash", "kubectl");
    for (behaves, expected) in [
        ("blind", "the capture proves nothing"),
        ("leaky", "plaintext is on the wire"),
        ("unreachable", "the intruder cannot reach the server even before"),
        ("open", "the intruder still gets in"),
        ("unenrolled", "the pods are not enrolled"),
        ("cgroup1", "has no cgroup2"),
        ("deaf", "tcpdump does not listen"),
        ("unfit", "not every node can take part"),
    ] {
        for script in SCRIPTS {
            let tried = tried(script, &[], behaves)?;
            assert!(!tried.finished.status.success(), "{script}, {behaves}");
            assert!(
                tried.finished.stderr.contains(expected),
                "{script}, {behaves}: {}",
                tried.finished.stderr
            );
            assert!(!tried.finished.stdout.contains("req/s"), "{script}, {behaves}: a table all the same");
        }
    }
    Ok(())
}

#[test]
fn nodes_are_prepared_and_addresses_of_both_kinds_understood() -> Result<()> {
    needs!("bash", "kubectl");
    for script in SCRIPTS {
        let tried = tried(script, &[], "without-bpffs ipv6")?;
        assert!(tried.finished.status.success(), "{}", tried.finished.stderr);
        assert!(tried.position("mount -t bpf bpf /sys/fs/bpf")? < tried.position("apply -k")?);
        tried.position("--to [fd00::2]:7000")?;
    }
    let beside_version_1 = tried(SCRIPTS[0], &[], "hybrid")?;
    assert!(beside_version_1.finished.status.success(), "{}", beside_version_1.finished.stderr);
    Ok(())
}

#[test]
fn a_cluster_is_removed_when_asked_and_never_otherwise() -> Result<()> {
    needs!("bash", "kubectl");
    for script in SCRIPTS {
        let removed = tried(script, &["down"], "")?;
        assert!(removed.finished.status.success() && removed.calls.len() == 1, "{:?}", removed.calls);
        removed.position("delete")?;
        let misspelt = tried(script, &["dwon"], "")?;
        assert!(!misspelt.finished.status.success() && misspelt.calls.is_empty(), "{:?}", misspelt.calls);
    }
    Ok(())
}
