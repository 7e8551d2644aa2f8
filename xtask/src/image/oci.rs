//! The image format: a root file system in, an OCI layout, and the archive that engines load, out.
//!
//! Sources: OCI Image Format 1.1 (image-layout, manifest, config); Docker's archive, which is the same layout with a
//! `manifest.json` beside.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::rootfs::SBOM;
use super::{Arch, tar};
use crate::call;

/// What the image is called and comes from.
pub struct Subject<'a> {
    pub name: &'a str,
    pub arch: Arch,
    /// Seconds since 1970.
    pub created: u64,
    pub revision: String,
}

/// A blob as others refer to it.
struct Blob {
    digest: String,
    size: u64,
}

/// Writes the layout anew and returns the manifest's digest.
pub fn lay_out(layout: &Path, root: &Path, subject: &Subject<'_>, sbom: &str) -> Result<String> {
    if layout.exists() {
        fs::remove_dir_all(layout).with_context(|| format!("remove {}", layout.display()))?;
    }
    fs::create_dir_all(layout.join("blobs/sha256")).with_context(|| format!("make {}", layout.display()))?;
    let (layer, uncompressed) = layer(layout, root, subject.created)?;
    let created = rfc3339(subject.created);
    let labels = labels(subject, &created);
    let config = blob(
        layout,
        json!({
            "architecture": subject.arch.name(),
            "os": "linux",
            "created": created,
            "config": {
                "User": "65532:65532",
                "Env": ["PATH=/usr/bin"],
                "Entrypoint": ["/usr/bin/mtls"],
                "WorkingDir": "/",
                "Labels": labels,
            },
            "rootfs": {"type": "layers", "diff_ids": [uncompressed]},
            "history": [{"created": created, "created_by": "cargo xtask image"}],
        }),
    )?;
    let manifest = blob(
        layout,
        json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": config.described("application/vnd.oci.image.config.v1+json"),
            "layers": [layer.described("application/vnd.oci.image.layer.v1.tar+gzip")],
            "annotations": labels,
        }),
    )?;
    let referrer = attach(layout, &manifest, sbom)?;
    let (_, tag) = subject.name.rsplit_once(':').context("the image's name has no tag")?;
    let mut named = manifest.described(MANIFEST);
    named["platform"] = json!({"architecture": subject.arch.name(), "os": "linux"});
    named["annotations"] = json!({
        "org.opencontainers.image.ref.name": tag,
        "io.containerd.image.name": familiar(subject.name),
    });
    let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [named, referrer]});
    write(&layout.join("index.json"), &index)?;
    write(&layout.join("oci-layout"), &json!({"imageLayoutVersion": "1.0.0"}))?;
    // Docker's own list of what an archive holds.
    let docker = json!([{
        "Config": config.path(),
        "RepoTags": [subject.name],
        "Layers": [layer.path()],
    }]);
    write(&layout.join("manifest.json"), &docker)?;
    Ok(manifest.digest)
}

/// The layout as one file.
pub fn archive(layout: &Path, to: &Path) -> Result<()> {
    tar(layout, to, 0)
}

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const CYCLONE: &str = "application/vnd.cyclonedx+json";

fn labels(subject: &Subject<'_>, created: &str) -> Value {
    json!({
        "org.opencontainers.image.title": "mtls",
        "org.opencontainers.image.description": "Transparent mutual TLS for Kubernetes workloads",
        "org.opencontainers.image.version": env!("CARGO_PKG_VERSION"),
        "org.opencontainers.image.revision": subject.revision,
        "org.opencontainers.image.created": created,
        "org.opencontainers.image.licenses": "Apache-2.0",
        "dev.mtls.sbom": SBOM,
    })
}

/// The bill of materials as an artifact that refers to the image, where registries and scanners look for one.
fn attach(layout: &Path, image: &Blob, sbom: &str) -> Result<Value> {
    let bill = blob_of(layout, sbom.as_bytes())?;
    let empty = blob_of(layout, b"{}")?;
    let manifest = blob(
        layout,
        json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "artifactType": CYCLONE,
            "config": empty.described("application/vnd.oci.empty.v1+json"),
            "layers": [bill.described(CYCLONE)],
            "subject": image.described(MANIFEST),
        }),
    )?;
    let mut described = manifest.described(MANIFEST);
    described["artifactType"] = CYCLONE.into();
    Ok(described)
}

/// The compressed layer, and the digest of what is in it.
fn layer(layout: &Path, root: &Path, created: u64) -> Result<(Blob, String)> {
    let plain = layout.join("layer.tar");
    tar(root, &plain, created)?;
    let uncompressed = sha256(&plain)?;
    // Without name and time.
    call(Command::new("gzip").args(["--no-name", "-9"]).arg(&plain))?;
    let packed = layout.join("layer.tar.gz");
    let digest = sha256(&packed)?;
    let size = fs::metadata(&packed)?.len();
    let blob = Blob { digest, size };
    fs::rename(&packed, layout.join(blob.path()))?;
    Ok((blob, uncompressed))
}

fn blob(layout: &Path, value: Value) -> Result<Blob> {
    blob_of(layout, &serde_json::to_vec(&value)?)
}

fn blob_of(layout: &Path, bytes: &[u8]) -> Result<Blob> {
    let aside: PathBuf = layout.join("blob");
    fs::write(&aside, bytes)?;
    let blob = Blob { digest: sha256(&aside)?, size: bytes.len() as u64 };
    fs::rename(aside, layout.join(blob.path()))?;
    Ok(blob)
}

impl Blob {
    fn path(&self) -> String {
        format!("blobs/{}", self.digest.replace(':', "/"))
    }

    fn described(&self, media_type: &str) -> Value {
        json!({"mediaType": media_type, "digest": self.digest, "size": self.size})
    }
}

fn write(path: &Path, value: &Value) -> Result<()> {
    fs::write(path, serde_json::to_vec(value)?).with_context(|| format!("write {}", path.display()))
}

fn sha256(path: &Path) -> Result<String> {
    let output =
        Command::new("sha256sum").arg(path).stderr(Stdio::inherit()).output().context("run sha256sum")?;
    let text = String::from_utf8(output.stdout)?;
    let hex = text.split(' ').next().unwrap_or_default();
    ensure!(output.status.success() && hex.len() == 64, "no digest of {}", path.display());
    Ok(format!("sha256:{hex}"))
}

/// A name as containerd knows it, whose short form is ours.
fn familiar(name: &str) -> String {
    let host = name.split('/').next().filter(|_| name.contains('/')).unwrap_or_default();
    match (name.contains('/'), host.contains(['.', ':'])) {
        (_, true) => name.to_owned(),
        (true, false) => format!("docker.io/{name}"),
        (false, false) => format!("docker.io/library/{name}"),
    }
}

/// `1970-01-01T00:00:00Z`.
fn rfc3339(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Days from 0000-03-01, in eras of 400 years (Howard Hinnant's algorithm).
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest % 3600 / 60, rest % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_images_have_them() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00Z");
        assert_eq!(rfc3339(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(rfc3339(1_767_225_599), "2025-12-31T23:59:59Z");
    }

    #[test]
    fn a_short_name_is_completed_as_engines_do() {
        assert_eq!(familiar("mtls:1"), "docker.io/library/mtls:1");
        assert_eq!(familiar("some/mtls:1"), "docker.io/some/mtls:1");
        assert_eq!(familiar("registry.example.com/mtls:1"), "registry.example.com/mtls:1");
        assert_eq!(familiar("localhost:5000/mtls:1"), "localhost:5000/mtls:1");
    }

    #[test]
    fn the_same_files_make_the_same_image() -> Result<()> {
        let place = std::env::temp_dir().join(format!("mtls-oci-{}", std::process::id()));
        let root = place.join("root");
        fs::create_dir_all(root.join("b/c"))?;
        fs::write(root.join("b/c/file"), "text")?;
        let subject = |created| Subject { name: "mtls:1", arch: Arch::Amd64, created, revision: "r".into() };
        let digests = |created| lay_out(&place.join("oci"), &root, &subject(created), "{}");
        let first = digests(5)?;
        // Another time and another order of creation.
        fs::remove_dir_all(&root)?;
        fs::create_dir_all(root.join("b/c"))?;
        std::thread::sleep(std::time::Duration::from_millis(20));
        fs::write(root.join("b/c/file"), "text")?;
        assert_eq!(digests(5)?, first);
        assert_ne!(digests(6)?, first);
        fs::write(root.join("b/c/file"), "other")?;
        assert_ne!(digests(5)?, first);
        fs::remove_dir_all(&place)?;
        Ok(())
    }
}
