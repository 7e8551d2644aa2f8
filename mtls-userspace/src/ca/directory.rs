//! The authority's PEM files, four and revocation lists if there are any, laid out as Istio's `cacerts`, in a directory or kept elsewhere: their content in, or a
//! self-made root out.
//!
//! Judges each file by itself and the key against its certificate; whether the whole leads to a root is tried by
//! signing. Never changes a directory that has any of the files.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rcgen::{KeyPair, PublicKeyData};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use zeroize::{Zeroize, Zeroizing};

use super::authority::SigningKey;
use super::{CertificateAuthority, Error};
use crate::identity::{Certificate, Revocations, pem_certificates, to_pem};

const SIGNER: &str = "ca-cert.pem";
const KEY: &str = "ca-key.pem";
const CHAIN: &str = "cert-chain.pem";
const ROOTS: &str = "root-cert.pem";
/// What makes a directory an authority's.
const NEEDED: [&str; 4] = [SIGNER, KEY, CHAIN, ROOTS];
const REVOKED: &str = "ca-crl.pem";
/// All that counts in a directory.
pub(super) const FILES: [&str; 5] = [SIGNER, KEY, CHAIN, ROOTS, REVOKED];

/// What a directory holds.
pub(super) struct Stored {
    pub signer: CertificateDer<'static>,
    pub key: SigningKey,
    /// From the signing certificate towards the root, roots left out.
    pub intermediates: Vec<CertificateDer<'static>>,
    pub roots: Vec<CertificateDer<'static>>,
    pub revocations: Revocations,
}

impl Stored {
    /// A root that signs by itself.
    pub fn root(root: CertificateDer<'static>, key: SigningKey) -> Self {
        let (signer, roots) = (root.clone(), vec![root]);
        Self { signer, key, intermediates: Vec::new(), roots, revocations: Revocations::default() }
    }
}

/// The files' content, wherever they are kept. The key is overwritten when dropped.
pub(super) struct Contents {
    pub signer: Vec<u8>,
    pub key: Zeroizing<Vec<u8>>,
    pub chain: Vec<u8>,
    pub roots: Vec<u8>,
    pub revoked: Option<Vec<u8>>,
}

impl Contents {
    /// Of what `content` gives for each name; `None` when it has none of them. `place` is for errors.
    pub(super) fn of(
        place: &Path,
        mut content: impl FnMut(&'static str) -> Result<Option<Vec<u8>>, Error>,
    ) -> Result<Option<Self>, Error> {
        let revoked = content(REVOKED)?;
        let [signer, key, chain, roots] = NEEDED;
        match (content(signer)?, content(key)?.map(Zeroizing::new), content(chain)?, content(roots)?) {
            (Some(signer), Some(key), Some(chain), Some(roots)) => {
                Ok(Some(Self { signer, key, chain, roots, revoked }))
            }
            // A revocation list alone is a mistake, and no reason to make a root.
            (None, None, None, None) if revoked.is_none() => Ok(None),
            (signer, key, chain, roots) => {
                let there = [signer.is_some(), key.is_some(), chain.is_some(), roots.is_some()];
                let names =
                    |wanted| NEEDED.into_iter().zip(there).filter(move |it| it.1 == wanted).map(|it| it.0);
                let list = revoked.is_some().then_some(REVOKED);
                let (found, missing) = (names(true).chain(list).collect(), names(false).collect());
                Err(Error::Incomplete { dir: place.into(), found, missing })
            }
        }
    }

    /// A self-made root: signing certificate, chain and root are one.
    pub(super) fn root(root: &CertificateDer<'static>, key: &SigningKey) -> Self {
        let pem = to_pem([root]).into_bytes();
        let key = Zeroizing::new(key.0.serialize_pem().into_bytes());
        Self { signer: pem.clone(), key, chain: pem.clone(), roots: pem, revoked: None }
    }

    /// Those that an authority needs, with the names that they are kept under.
    pub(super) fn named(&self) -> [(&'static str, &[u8]); 4] {
        let [signer, key, chain, roots] = NEEDED;
        [(signer, &self.signer), (key, &self.key), (chain, &self.chain), (roots, &self.roots)]
    }

    /// Judges each by itself and the key against its certificate.
    pub(super) fn understood(&self, place: &Path) -> Result<Stored, Error> {
        let [signer_path, key_path, chain_path, roots_path, revoked_path] =
            FILES.map(|name| place.join(name));
        let signer = signer(&signer_path, &self.signer)?;
        let key = key(&key_path, &self.key)?;
        let certificate = facts(&signer_path, &signer)?;
        if key.subject_public_key_info() != certificate.public_key {
            return Err(Error::KeyMismatch { certificate: signer_path, key: key_path });
        }
        let roots = roots(&roots_path, &self.roots)?;
        let intermediates = intermediates(&chain_path, &self.chain, &signer, &certificate)?;
        let revocations = match &self.revoked {
            Some(pem) => {
                let authorities: Vec<_> = intermediates.iter().chain(&roots).cloned().collect();
                revocations(&revoked_path, pem, &authorities)?
            }
            None => Revocations::default(),
        };
        Ok(Stored { signer, key, intermediates, roots, revocations })
    }
}

/// `None` when the directory has none of the files, or doesn't exist.
pub(super) fn read(dir: &Path) -> Result<Option<Stored>, Error> {
    let contents = Contents::of(dir, |name| {
        let path = dir.join(name);
        match fs::read(&path) {
            Ok(content) => {
                if name == KEY {
                    warn_if_public(&path);
                }
                Ok(Some(content))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(Error::File { attempt: "read", path, source }),
        }
    })?;
    contents.map(|contents| contents.understood(dir)).transpose()
}

fn warn_if_public(path: &Path) {
    if fs::metadata(path).is_ok_and(|metadata| metadata.permissions().mode() & 0o004 != 0) {
        tracing::warn!(path = %path.display(), "everybody can read the authority's key: chmod 600");
    }
}

/// Stores a self-made root.
pub(super) fn write(dir: &Path, contents: &Contents) -> Result<(), Error> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|source| Error::File {
        attempt: "make the CA directory",
        path: dir.into(),
        source,
    })?;
    for (name, content) in contents.named() {
        replace(&dir.join(name), content, if name == KEY { 0o600 } else { 0o644 })?;
    }
    Ok(())
}

/// Writes a file so that readers see the old content or the new, never a part.
fn replace(path: &Path, content: &[u8], mode: u32) -> Result<(), Error> {
    let failed = |source| Error::File { attempt: "write", path: path.into(), source };
    let name = path.file_name().ok_or_else(|| failed(io::ErrorKind::InvalidFilename.into()))?;
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    hidden.push(format!(".{}", std::process::id()));
    let draft = Draft(path.with_file_name(hidden));
    let write = || {
        // A leftover of a process that had this id and was killed.
        let _ = fs::remove_file(&draft.0);
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&draft.0)?;
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&draft.0, path)
    };
    write().map_err(failed)
}

/// A file on its way to its name; gone if it doesn't get there.
struct Draft(PathBuf);

impl Drop for Draft {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn signer(path: &Path, pem: &[u8]) -> Result<CertificateDer<'static>, Error> {
    let mut certificates = certificates(path, pem)?;
    let count = certificates.len();
    let Some(signer) = certificates.pop().filter(|_| count == 1) else {
        return Err(Error::SeveralSigners { path: path.into(), count });
    };
    let certificate = facts(path, &signer)?;
    may_sign(path, &certificate)?;
    valid_now(path, &certificate)?;
    Ok(signer)
}

fn roots(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, Error> {
    let roots = certificates(path, pem)?;
    let mut expired = None;
    let mut valid = 0;
    for root in &roots {
        let certificate = facts(path, root)?;
        if !certificate.self_issued {
            return Err(Error::NotARoot { path: path.into(), serial: certificate.serial });
        }
        may_sign(path, &certificate)?;
        match valid_now(path, &certificate) {
            Ok(()) => valid += 1,
            Err(error) => {
                tracing::warn!(%error, serial = certificate.serial, "a root in the bundle is not valid");
                expired = Some(error);
            }
        }
    }
    // During a rotation the old root may have run out already; one valid root is enough here.
    match expired {
        Some(error) if valid == 0 => Err(error),
        _ => Ok(roots),
    }
}

fn intermediates(
    path: &Path,
    pem: &[u8],
    signer: &CertificateDer<'static>,
    facts_of_signer: &Certificate,
) -> Result<Vec<CertificateDer<'static>>, Error> {
    let mut intermediates = Vec::new();
    // Istio's tools write the signing certificate at the head of the chain; others leave it out.
    if !facts_of_signer.self_issued {
        intermediates.push(signer.clone());
    }
    for link in certificates(path, pem)? {
        let certificate = facts(path, &link)?;
        may_sign(path, &certificate)?;
        if certificate.self_issued || intermediates.contains(&link) {
            continue;
        }
        valid_now(path, &certificate)?;
        intermediates.push(link);
    }
    Ok(intermediates)
}

/// Each list must be by an authority of this directory: another's would revoke nothing.
fn revocations(path: &Path, pem: &[u8], authorities: &[CertificateDer<'_>]) -> Result<Revocations, Error> {
    Revocations::from_pem(pem, authorities)
        .and_then(|lists| lists.issued_by(authorities).map(|()| lists))
        .map_err(|source| Error::Revocations { path: path.into(), source })
}

fn certificates(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, Error> {
    pem_certificates(pem).map_err(|source| Error::Certificates { path: path.into(), source })
}

fn key(path: &Path, pem: &[u8]) -> Result<SigningKey, Error> {
    let invalid = |reason: String| Error::Key { path: path.into(), reason };
    let mut der = PrivateKeyDer::from_pem_slice(pem).map_err(|error| invalid(error.to_string()))?;
    let key = KeyPair::try_from(&der);
    der.zeroize();
    key.map(SigningKey).map_err(|_| invalid("no ECDSA, RSA or Ed25519 key could be read from it".into()))
}

fn facts(path: &Path, certificate: &CertificateDer<'_>) -> Result<Certificate, Error> {
    Certificate::parse(certificate).map_err(|source| Error::Certificates { path: path.into(), source })
}

fn may_sign(path: &Path, certificate: &Certificate) -> Result<(), Error> {
    if certificate.authority {
        return Ok(());
    }
    Err(Error::NotAnAuthority { path: path.into(), serial: certificate.serial.clone() })
}

fn valid_now(path: &Path, certificate: &Certificate) -> Result<(), Error> {
    let now = SystemTime::now();
    let Certificate { not_before, not_after, .. } = *certificate;
    if not_before <= now && now < not_after {
        return Ok(());
    }
    Err(Error::Validity { path: path.into(), not_before, not_after })
}

/// Writes the public roots for agents; readers see the old file or the new, never a part.
pub fn write_root_bundle(path: &Path, authority: &CertificateAuthority) -> Result<(), Error> {
    replace(path, authority.root_bundle().as_bytes(), 0o644)
}
