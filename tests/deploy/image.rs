//! The image: another tool can read it, nothing is in it that need not be, and it works alone.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{Scratch, needs, run};

/// Made by `cargo xtask test`, or by `cargo xtask image --dev --out target/image/dev`.
fn made() -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/image/dev")).into()
}

const TAG: &str = env!("CARGO_PKG_VERSION");

/// Unpacks the image into `bundle/rootfs`.
pub fn unpack(bundle: &Path) -> Result<()> {
    let layout = made().join("oci-amd64");
    ensure!(layout.exists(), "no image: cargo xtask image --dev --out target/image/dev");
    let (image, rootfs) = (format!("{}:{TAG}", layout.display()), bundle.join("rootfs"));
    run("umoci", &["raw", "unpack", "--image", &image, &rootfs.to_string_lossy()])?.success()?;
    Ok(())
}

fn json(path: &Path) -> Result<Value> {
    let text = std::fs::read(path).with_context(|| format!("read {}", path.display()))?;
    Ok(serde_json::from_slice(&text)?)
}

fn blob(described: &Value) -> Result<PathBuf> {
    let digest = described["digest"].as_str().context("no digest")?;
    Ok(made().join("oci-amd64/blobs").join(digest.replace(':', "/")))
}

fn image() -> Result<(Value, Value)> {
    let index = json(&made().join("oci-amd64/index.json"))?;
    let manifest = json(&blob(&index["manifests"][0])?)?;
    let config = json(&blob(&manifest["config"])?)?;
    Ok((manifest, config))
}

#[test]
fn it_says_what_it_is() -> Result<()> {
    needs!("umoci");
    let (manifest, config) = image()?;
    assert_eq!((&config["os"], &config["architecture"]), (&"linux".into(), &"amd64".into()));
    assert_eq!(config["config"]["Entrypoint"], serde_json::json!(["/usr/bin/mtls"]));
    assert_eq!(config["config"]["User"], "65532:65532", "root only where a manifest says so");
    for key in ["title", "version", "revision", "created", "licenses"] {
        let label = &config["config"]["Labels"][format!("org.opencontainers.image.{key}")];
        assert!(label.as_str().is_some_and(|label| !label.is_empty()), "{key}: {label}");
        assert_eq!(&manifest["annotations"][format!("org.opencontainers.image.{key}")], label);
    }
    // And to another tool.
    let layout = format!("{}:{TAG}", made().join("oci-amd64").display());
    let seen = run("umoci", &["stat", "--image", &layout, "--json"])?.success()?.json()?;
    assert_eq!(seen["history"].as_array().map(Vec::len), Some(1), "{seen}");
    Ok(())
}

#[test]
fn the_archive_is_one_that_engines_load() -> Result<()> {
    needs!("tar");
    let archive = made().join(format!("mtls-{TAG}-amd64.tar"));
    let size = std::fs::metadata(&archive)?.len();
    assert!(size < 40_000_000, "{size} bytes");
    let scratch = Scratch::new("archive")?;
    let (from, to) = (archive.to_string_lossy(), scratch.0.to_string_lossy());
    run("tar", &["-xf", &from, "-C", &to])?.success()?;
    let docker = json(&scratch.0.join("manifest.json"))?;
    assert_eq!(docker[0]["RepoTags"], serde_json::json!([format!("mtls:{TAG}")]));
    let named = docker[0]["Layers"].as_array().context("no layers")?.iter().chain([&docker[0]["Config"]]);
    for path in named {
        let path = path.as_str().context("no path")?;
        let sum = run("sha256sum", &[&scratch.0.join(path).to_string_lossy()])?.success()?.stdout;
        assert_eq!(
            sum.split(' ').next(),
            path.strip_prefix("blobs/sha256/"),
            "a blob is called by its content"
        );
    }
    let index = json(&scratch.0.join("index.json"))?;
    let name = &index["manifests"][0]["annotations"]["io.containerd.image.name"];
    assert_eq!(*name, format!("docker.io/library/mtls:{TAG}"));
    Ok(())
}

#[test]
fn nothing_is_in_it_that_need_not_be() -> Result<()> {
    needs!("umoci");
    let scratch = Scratch::new("image")?;
    unpack(&scratch.0)?;
    let root = scratch.0.join("rootfs");
    let mut files = BTreeSet::new();
    let mut left = vec![root.clone()];
    while let Some(directory) = left.pop() {
        for entry in std::fs::read_dir(directory)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                left.push(entry.path());
            } else {
                files.insert(entry.path().strip_prefix(&root)?.to_string_lossy().into_owned());
            }
        }
    }
    let expected =
        ["etc/group", "etc/nsswitch.conf", "etc/passwd", "usr/bin/mtls", "usr/share/doc/mtls/sbom.cdx.json"];
    assert_eq!(files.iter().map(String::as_str).collect::<Vec<_>>(), expected);
    Ok(())
}

#[test]
fn its_bill_of_materials_names_what_is_linked() -> Result<()> {
    needs!("umoci");
    let scratch = Scratch::new("bill")?;
    unpack(&scratch.0)?;
    let bill = json(&scratch.0.join("rootfs/usr/share/doc/mtls/sbom.cdx.json"))?;
    assert_eq!((&bill["bomFormat"], &bill["specVersion"]), (&"CycloneDX".into(), &"1.5".into()));
    let components = bill["components"].as_array().context("no components")?;
    let names: BTreeSet<&str> =
        components.iter().filter_map(|component| component["name"].as_str()).collect();
    for linked in ["rustls", "tokio", "aws-lc-rs", "aya", "aya-ebpf", "glibc"] {
        assert!(names.contains(linked), "{linked} is missing");
    }
    // Needed to build or to test, but not in the binary.
    for unlinked in ["protox", "tempfile", "proptest", "serde_derive"] {
        assert!(!names.contains(unlinked), "{unlinked} is not linked");
    }
    // It is also attached to the image, as registries have it.
    let index = json(&made().join("oci-amd64/index.json"))?;
    let referrer = json(&blob(&index["manifests"][1])?)?;
    assert_eq!(referrer["subject"]["digest"], index["manifests"][0]["digest"]);
    assert_eq!(json(&blob(&referrer["layers"][0])?)?, bill);
    Ok(())
}

#[test]
fn it_runs_with_nothing_around_it() -> Result<()> {
    needs!("umoci", "chroot");
    let scratch = Scratch::new("alone")?;
    unpack(&scratch.0)?;
    let root = scratch.0.join("rootfs");
    let root = root.to_string_lossy();
    let version =
        run("chroot", &["--userspec=65532:65532", &root, "/usr/bin/mtls", "--version"])?.success()?;
    assert_eq!(version.stdout.trim(), format!("mtls {TAG}"));
    assert!(run("chroot", &[&root, "/bin/sh"])?.success().is_err(), "there is a shell in it");
    Ok(())
}
