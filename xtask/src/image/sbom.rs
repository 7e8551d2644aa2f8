//! The bill of materials: what cargo resolved in, a CycloneDX 1.5 document out.
//!
//! What is linked into the binary: crates of both halves, Rust's standard library and glibc.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::Arch;
use crate::{build, cargo};

/// Describes the image's binary.
pub fn describe(arch: Arch) -> Result<String> {
    let mut components = BTreeMap::new();
    for (manifest, package, target) in
        [("Cargo.toml", "mtls-userspace", Some(arch.target())), ("mtls-ebpf/Cargo.toml", "mtls-ebpf", None)]
    {
        for (purl, component) in linked(manifest, package, target)? {
            components.insert(purl, component);
        }
    }
    if let Some(version) = glibc(arch) {
        let purl = format!("pkg:deb/debian/glibc@{version}");
        let license = json!([{"license": {"id": "LGPL-2.1-or-later"}}]);
        let glibc = json!({
            "type": "library", "bom-ref": purl, "name": "glibc", "version": version, "purl": purl, "licenses": license,
        });
        components.insert(purl, glibc);
    }
    let document = json!({
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": {"type": "application", "name": "mtls", "version": env!("CARGO_PKG_VERSION")}},
        "components": components.into_values().collect::<Vec<_>>(),
    });
    Ok(serde_json::to_string_pretty(&document)?)
}

/// The crates that a package links, by package URL.
fn linked(manifest: &str, package: &str, target: Option<&str>) -> Result<Vec<(String, Value)>> {
    let mut command = cargo();
    command.args(["metadata", "--locked", "--format-version=1", "--manifest-path", manifest]);
    command.current_dir(build::workspace());
    if let Some(target) = target {
        command.args(["--filter-platform", target]);
    }
    let output = command.output().context("run cargo metadata")?;
    ensure!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr).trim());
    let metadata: Value = serde_json::from_slice(&output.stdout)?;
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let packages: BTreeMap<String, Value> = list(&metadata["packages"])
        .into_iter()
        .filter_map(|package| Some((package["id"].as_str()?.to_owned(), package)))
        .collect();
    let nodes: BTreeMap<String, Value> = list(&metadata["resolve"]["nodes"])
        .into_iter()
        .filter_map(|node| Some((node["id"].as_str()?.to_owned(), node)))
        .collect();
    let root = packages.iter().find(|(_, found)| found["name"] == package).context("no such package")?;
    let (mut seen, mut left) = (BTreeSet::new(), vec![root.0.clone()]);
    while let Some(id) = left.pop() {
        if !seen.insert(id.clone()) {
            continue;
        }
        for dependency in nodes.get(&id).map(|node| list(&node["deps"])).unwrap_or_default() {
            // Those that only a build script or a test needs are not in the binary.
            let is_linked = list(&dependency["dep_kinds"]).iter().any(|kind| kind["kind"].is_null());
            let package = dependency["pkg"].as_str().and_then(|id| packages.get(id));
            let is_macro = package.is_some_and(|package| {
                list(&package["targets"]).iter().any(|target| target["kind"][0] == "proc-macro")
            });
            if is_linked && !is_macro {
                left.extend(dependency["pkg"].as_str().map(str::to_owned));
            }
        }
    }
    seen.iter().filter_map(|id| packages.get(id)).map(component).collect()
}

fn component(package: &Value) -> Result<(String, Value)> {
    let text = |key: &str| package[key].as_str().map(str::to_owned);
    let (name, version) = (text("name").context("no name")?, text("version").context("no version")?);
    let purl = format!("pkg:cargo/{name}@{version}");
    let mut component =
        json!({"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl});
    if let Some(license) = text("license") {
        component["licenses"] = json!([{"expression": license.replace('/', " OR ")}]);
    }
    Ok((purl, component))
}

/// The C library's version, where Debian's package manager knows it.
fn glibc(arch: Arch) -> Option<String> {
    let package = match arch.is_native() {
        true => "libc6-dev".to_owned(),
        false => format!("libc6-dev-{}-cross", arch.name()),
    };
    let mut query = Command::new("dpkg-query");
    let output = query.args(["--show", "--showformat=${Version}", &package]).output().ok()?;
    let version = String::from_utf8(output.stdout).ok()?;
    (output.status.success() && !version.is_empty()).then_some(version)
}
