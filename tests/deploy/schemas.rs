//! Kubernetes takes what is rendered: its own schemas of every supported version.

use anyhow::Result;
use mtls_tests::Finished;

use crate::rendered::{charted, kustomized};
use crate::{Scratch, VARIANTS, needs, read, run};

const VERSIONS: std::ops::RangeInclusive<u32> = 26..=37;

/// Judges documents by every version's schemas, refusing unknown fields.
fn judged(text: &str) -> Result<Finished> {
    let scratch = Scratch::new("schemas")?;
    let file = scratch.write("objects.yaml", text)?;
    let mut args = Vec::new();
    for version in VERSIONS {
        args.extend(["-k".to_owned(), format!("1.{version}")]);
    }
    args.extend(["--strict".to_owned(), "--quiet".to_owned(), file.to_string_lossy().into_owned()]);
    run("kubernetes-validate", &args.iter().map(String::as_str).collect::<Vec<_>>())
}

#[test]
fn every_version_takes_what_is_installed() -> Result<()> {
    needs!("kubectl", "helm", "kubernetes-validate");
    for (directory, _) in VARIANTS {
        judged(&kustomized(directory)?)?.success()?;
    }
    judged(&charted(&["--set", "image.pullSecrets={a,b}"])?)?.success()?;
    judged(&read("network-policies/only-tunnels.yaml")?)?.success()?;
    Ok(())
}

#[test]
fn a_mistake_would_be_noticed() -> Result<()> {
    needs!("kubectl", "kubernetes-validate");
    let rendered = kustomized("")?;
    for (right, wrong) in [("hostNetwork: true", "hostNetwrk: true"), ("maxSurge: 1", "maxSurge: [1]")] {
        assert!(rendered.contains(right));
        assert!(judged(&rendered.replace(right, wrong))?.success().is_err(), "{wrong}");
    }
    Ok(())
}
