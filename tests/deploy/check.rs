//! The check of nodes before anything is installed: from its container it sees what it sees on the node itself, and without
//! any part of its privileges it does not say that all is well.

use anyhow::{Context, Result};
use mtls_tests::{Finished, skip};
use serde_json::Value;

use crate::container::{Container, NEEDS};
use crate::run;

/// Findings by what was looked at. Without those about ports, in which other tests' pods come and go.
fn findings(printed: &str) -> Result<Vec<Value>> {
    let all: Vec<Value> = serde_json::from_str(printed).with_context(|| format!("not JSON: {printed}"))?;
    assert!(all.len() > 5, "{all:?}");
    Ok(all.into_iter().filter(|finding| !finding["what"].to_string().contains("port")).collect())
}

/// Runs a program on a node whose first process sees a BPF file system, whatever this machine has. A process that was
/// killed while it tried what the kernel can do has left something there, which must be gone when the program ends.
fn on_a_node(program: &str, args: &[&str]) -> Result<Finished> {
    let own = ["--pid", "--fork", "--mount", "--mount-proc"];
    let left = "/sys/fs/bpf/mtls/mtls-probe-0";
    let script = format!(
        "mount -t bpf bpf /sys/fs/bpf && mkdir -p {left}/whole && {{ \"$@\"; code=$?; }} && \
         if [ $code -eq 0 ] && [ -e {left} ]; then exit 99; fi; exit $code"
    );
    run("unshare", &[&own[..], &["sh", "-c", &script, "sh", program], args].concat())
}

fn in_its_pod(change: impl FnOnce(Container) -> Result<Container>) -> Result<Finished> {
    let container = change(Container::check()?.with_more_arguments(&["--output", "json"])?)?;
    container.run_by(on_a_node)
}

#[test]
fn in_its_pod_it_sees_what_it_sees_on_the_node_itself() -> Result<()> {
    if skip(&NEEDS) {
        return Ok(());
    }
    let here = on_a_node(&mtls_tests::mtls()?.to_string_lossy(), &["node-check", "--output", "json"])?;
    let inside = in_its_pod(Ok)?;
    assert_eq!(findings(&inside.stdout)?, findings(&here.stdout)?, "{}", inside.stderr);
    assert_eq!((inside.status.code(), here.status.code()), (Some(0), Some(0)), "{}", here.stdout);

    // With nothing but its processes' view of itself it judges its own container.
    let alone = in_its_pod(|container| container.in_its_own("pid"))?;
    assert_eq!(alone.status.code(), Some(1), "{}", alone.stdout);
    Ok(())
}

#[test]
fn without_one_of_its_capabilities_it_does_not_say_that_all_is_well() -> Result<()> {
    if skip(&NEEDS) {
        return Ok(());
    }
    for capability in ["NET_ADMIN", "SYS_ADMIN"] {
        let checked = in_its_pod(|container| container.without_capability(capability))?;
        let findings = findings(&checked.stdout)?;
        let kernel = findings.iter().find(|finding| finding["what"] == "kernel").context("no kernel")?;
        assert_eq!(kernel["verdict"]["verdict"], "conflict", "without {capability}: {findings:?}");
        assert_eq!(checked.status.code(), Some(1));
    }
    let checked = in_its_pod(|container| container.without_capability("SYS_PTRACE"))?;
    assert_eq!(checked.status.code(), Some(2), "{checked:?}");
    let unread = format!("cannot read {}", ["/proc/1", "root", "proc/1/mountinfo"].join("/"));
    assert!(checked.stderr.contains(&unread), "{}", checked.stderr);
    Ok(())
}
