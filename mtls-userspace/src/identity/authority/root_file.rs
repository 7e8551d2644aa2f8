//! The file of roots that an authority must prove itself with: its path in, its certificates and news of a change out.
//!
//! A mounted ConfigMap or Secret changes under its path; so does what `mtls ca` writes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rustls_pki_types::CertificateDer;
use tokio::sync::mpsc;
use zeroize::Zeroizing;

use super::News;
use crate::identity::{Error, pem_certificates};

/// Between looks at the file.
const GLANCE: Duration = Duration::from_secs(1);

pub(super) struct RootFile {
    path: PathBuf,
}

impl RootFile {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) async fn read(&self) -> Result<Vec<CertificateDer<'static>>, Error> {
        let pem = read("the certificate authority's root file", &self.path).await?;
        pem_certificates(&pem).map_err(|source| Error::RootFile { path: self.path.clone(), source })
    }

    /// Never completes.
    pub(super) async fn follow(&self, news: &mpsc::Sender<News>) {
        let mut seen = None;
        loop {
            // A file that is missing or half written is no news; its next good content is.
            if let Ok(roots) = self.read().await {
                let before = seen.replace(roots);
                if before.is_some() && before != seen {
                    let why = "the authority's root file has changed";
                    // Fails only when nobody polls this any more.
                    let _ = news.send(News::Renew { why }).await;
                }
            }
            tokio::time::sleep(GLANCE).await;
        }
    }
}

/// The content is overwritten when dropped: it may be a token or a key.
pub(super) async fn read(what: &'static str, path: &Path) -> Result<Zeroizing<Vec<u8>>, Error> {
    let content = tokio::fs::read(path).await;
    content.map(Zeroizing::new).map_err(|source| Error::File { what, path: path.into(), source })
}
