//! Kubernetes takes what is rendered: its own schemas of every supported version.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;

use anyhow::Result;
use mtls_tests::Finished;

use crate::rendered::{charted, kustomized};
use crate::{Scratch, VARIANTS, needs, read, run};

const VERSIONS: RangeInclusive<u32> = 26..=37;

/// Judges documents by these versions' schemas, refusing unknown fields.
fn judged(text: &str, versions: RangeInclusive<u32>) -> Result<Finished> {
    let scratch = Scratch::new("schemas")?;
    let file = scratch.write("objects.yaml", text)?;
    let mut args = Vec::new();
    for version in versions {
        args.extend(["-k".to_owned(), format!("1.{version}")]);
    }
    args.extend(["--strict".to_owned(), "--quiet".to_owned(), file.to_string_lossy().into_owned()]);
    run("kubernetes-validate", &args.iter().map(String::as_str).collect::<Vec<_>>())
}

#[test]
fn every_version_takes_what_is_installed() -> Result<()> {
    needs!("kubectl", "helm", "kubernetes-validate");
    let mut rendered =
        vec![read("network-policies/only-tunnels.yaml")?, charted(&["--set", "image.pullSecrets={a,b}"])?];
    for directory in VARIANTS.map(|(directory, _)| directory).into_iter().chain(["check", "uninstall"]) {
        rendered.push(kustomized(directory)?);
    }
    // Most objects are the same in every variant.
    let all: BTreeSet<&str> = rendered.iter().flat_map(|text| text.split("\n---\n").map(str::trim)).collect();
    let all: Vec<&str> = all.into_iter().collect();
    judged(&all.join("\n---\n"), VERSIONS)?.success()?;
    Ok(())
}

#[test]
fn a_mistake_would_be_noticed() -> Result<()> {
    needs!("kubectl", "kubernetes-validate");
    let rendered = kustomized("")?;
    for (right, wrong) in [("hostNetwork: true", "hostNetwrk: true"), ("maxSurge: 1", "maxSurge: [1]")] {
        assert!(rendered.contains(right));
        assert!(judged(&rendered.replace(right, wrong), 30..=30)?.success().is_err(), "{wrong}");
    }
    Ok(())
}
