//! An image for containers: `lab-app` and the libraries it needs in, an OCI archive that containerd imports out.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::requirements;

/// What the image is called in a runtime.
pub const NAME: &str = "localhost/lab:1";

/// Writes the archive into a directory.
pub fn archive(dir: &Path) -> Result<PathBuf> {
    let archive = dir.join("image.tar");
    if archive.exists() {
        return Ok(archive);
    }
    let rootfs = dir.join("image-root");
    let app = requirements::lab_app()?;
    fill(&rootfs, &app)?;
    let layout = dir.join("image-layout");
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs)?;
    let layer = dir.join("layer.tar");
    tar(&layer, &rootfs)?;
    let layer = blob(&blobs, &fs::read(&layer)?, "application/vnd.oci.image.layer.v1.tar")?;
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let config = json!({
        "architecture": architecture, "os": "linux",
        "config": { "Entrypoint": ["/lab-app"], "Cmd": ["pause"] },
        "rootfs": { "type": "layers", "diff_ids": [layer["digest"]] },
    });
    let config = blob(&blobs, config.to_string().as_bytes(), "application/vnd.oci.image.config.v1+json")?;
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    let manifest =
        json!({ "schemaVersion": 2, "mediaType": media_type, "config": config, "layers": [layer] });
    let mut manifest = blob(&blobs, manifest.to_string().as_bytes(), media_type)?;
    manifest["annotations"] = json!({ "io.containerd.image.name": NAME });
    let index = json!({ "schemaVersion": 2, "manifests": [manifest] });
    fs::write(layout.join("index.json"), index.to_string())?;
    fs::write(layout.join("oci-layout"), json!({ "imageLayoutVersion": "1.0.0" }).to_string())?;
    tar(&archive, &layout)?;
    Ok(archive)
}

/// The program and every library that its loader would look for.
fn fill(rootfs: &Path, app: &Path) -> Result<()> {
    let said = Command::new("ldd").arg(app).output().context("run ldd")?;
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    let libraries = said.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from);
    let files =
        libraries.map(|path| (path.clone(), path)).chain([(app.to_owned(), PathBuf::from("/lab-app"))]);
    for (from, to) in files {
        let to = rootfs.join(to.strip_prefix("/")?);
        fs::create_dir_all(to.parent().context("a file has no directory")?)?;
        fs::copy(&from, &to).with_context(|| format!("copy {}", from.display()))?;
    }
    Ok(())
}

fn tar(archive: &Path, directory: &Path) -> Result<()> {
    let status = Command::new("tar").arg("-C").arg(directory).arg("-cf").arg(archive).arg(".").status()?;
    ensure!(status.success(), "tar of {}: {status}", directory.display());
    Ok(())
}

/// Stores a blob, and describes it.
fn blob(blobs: &Path, content: &[u8], media_type: &str) -> Result<Value> {
    let new = blobs.join("new");
    fs::write(&new, content)?;
    let said = Command::new("sha256sum").arg(&new).output().context("run sha256sum")?;
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    let digest = said.split_whitespace().next().context("sha256sum says nothing")?;
    fs::rename(&new, blobs.join(digest))?;
    Ok(json!({ "mediaType": media_type, "digest": format!("sha256:{digest}"), "size": content.len() }))
}
