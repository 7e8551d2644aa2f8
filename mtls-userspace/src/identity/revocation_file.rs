//! A file of revocation lists: followed, and its last good content kept in force.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use rustls_pki_types::CertificateDer;
use tokio::sync::mpsc;

use super::{InvalidRevocations, Revocations};

/// Between looks at the file. A ConfigMap's is a link that changes its target.
const GLANCE: Duration = Duration::from_millis(500);
/// A refused file is read again after this long even if unchanged: its authorities may have become known.
const AGAIN: Duration = Duration::from_secs(30);

pub(super) struct RevocationFile {
    path: PathBuf,
}

/// Enough to see that a file is another, or was written to.
type Stamp = (SystemTime, u64, u64);

impl RevocationFile {
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// Sends what the file holds, at first and whenever it changes for something good. Never ends.
    pub async fn follow(
        self,
        lists: &mpsc::Sender<Arc<Revocations>>,
        authorities: impl Fn() -> Vec<CertificateDer<'static>>,
    ) {
        let mut read: Option<Option<Stamp>> = None;
        let mut refused: Option<Instant> = None;
        loop {
            let now = stamp(&self.path).ok();
            if read != Some(now) || refused.is_some_and(|at| at.elapsed() >= AGAIN) {
                read = Some(now);
                match self.read(&authorities()) {
                    Ok(good) => {
                        refused = None;
                        // Fails only when nobody polls this any more.
                        let _ = lists.send(Arc::new(good)).await;
                    }
                    Err(error) => {
                        tracing::error!(%error, "the revocation lists that were read last stay in force");
                        refused = Some(Instant::now());
                    }
                }
            }
            tokio::time::sleep(GLANCE).await;
        }
    }

    fn read(&self, authorities: &[CertificateDer<'_>]) -> Result<Revocations, Error> {
        let path = || self.path.clone();
        let pem = std::fs::read(&self.path).map_err(|source| Error::Read { path: path(), source })?;
        Revocations::from_pem(&pem, authorities).map_err(|source| Error::Content { path: path(), source })
    }
}

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("cannot read the revocation file {path}: {source}", path = path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("the revocation file {path} is unusable: {source}", path = path.display())]
    Content { path: PathBuf, source: InvalidRevocations },
}

fn stamp(path: &Path) -> std::io::Result<Stamp> {
    use std::os::unix::fs::MetadataExt;
    let file = std::fs::metadata(path)?;
    Ok((file.modified()?, file.len(), file.ino()))
}
