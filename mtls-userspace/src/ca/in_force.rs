//! The authority in force: a directory in, what it last held in good order out, followed while it changes.
//!
//! A change counts only when all of the directory's files are good together; until then the last good state signs on,
//! and the error names what to correct. Never makes a root for a directory that lost its files.

use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use tokio::sync::watch;

use super::directory::FILES;
use super::{CertificateAuthority, Error};
use crate::identity::TrustDomain;

/// Between looks at the directory. A change is read when it has rested for one of them: files come one by one.
const GLANCE: Duration = Duration::from_millis(500);
/// A refused directory is tried again after this long even if unchanged: it may just not have been valid yet.
const AGAIN: Duration = Duration::from_secs(60);

/// Hands out the current [`CertificateAuthority`]; shared by all that sign or publish.
pub struct InForce {
    current: ArcSwap<CertificateAuthority>,
    changes: watch::Sender<u64>,
    directory: Option<Directory>,
}

struct Directory {
    path: PathBuf,
    trust_domain: TrustDomain,
    leaf_lifetime: Duration,
    /// As it was before it was first read.
    stamp: Stamp,
}

impl InForce {
    /// An authority that stays as it is.
    pub fn fixed(authority: CertificateAuthority) -> Arc<Self> {
        Self::new(authority, None)
    }

    /// The authority of a directory, as [`CertificateAuthority::at`] reads it; [`Self::follow`] keeps up with changes.
    pub fn directory(
        path: &Path,
        trust_domain: TrustDomain,
        leaf_lifetime: Duration,
    ) -> Result<Arc<Self>, Error> {
        let stamp = stamp(path);
        let authority = CertificateAuthority::at(path, trust_domain.clone(), leaf_lifetime)?;
        let directory = Directory { path: path.into(), trust_domain, leaf_lifetime, stamp };
        Ok(Self::new(authority, Some(directory)))
    }

    fn new(authority: CertificateAuthority, directory: Option<Directory>) -> Arc<Self> {
        Arc::new(Self {
            current: ArcSwap::from_pointee(authority),
            changes: watch::Sender::new(0),
            directory,
        })
    }

    pub fn current(&self) -> Arc<CertificateAuthority> {
        self.current.load_full()
    }

    /// Wakes when [`Self::current`] has become another.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Follows the directory until dropped; a fixed authority has nothing to follow.
    pub async fn follow(&self) {
        let Some(directory) = &self.directory else { return std::future::pending().await };
        let (mut read, mut last) = (directory.stamp.clone(), directory.stamp.clone());
        let mut refused: Option<Instant> = None;
        loop {
            tokio::time::sleep(GLANCE).await;
            let now = stamp(&directory.path);
            let rested = now == std::mem::replace(&mut last, now.clone());
            let due = now != read || refused.is_some_and(|at| at.elapsed() >= AGAIN);
            if rested && due {
                read = now;
                refused = self.reload(directory).err().map(|error| {
                    tracing::error!(%error, "the changed CA directory is refused; its last good state stays in force");
                    Instant::now()
                });
            }
        }
    }

    fn reload(&self, directory: &Directory) -> Result<(), Error> {
        let Directory { path, trust_domain, leaf_lifetime, .. } = directory;
        let next = CertificateAuthority::again(path, trust_domain.clone(), *leaf_lifetime)?;
        self.replace(next, &path.display());
        Ok(())
    }

    /// Puts another authority in force, if it is another; `place` is where it comes from.
    pub(super) fn replace(&self, next: CertificateAuthority, place: &dyn fmt::Display) {
        let before = self.current();
        if next.same_as(&before) {
            return;
        }
        tracing::info!(
            %place,
            roots = next.roots().len(),
            roots_before = before.roots().len(),
            revocation_lists = next.revocations().lists().count(),
            root_sha256 = next.root_fingerprint(),
            "the changed authority is in force"
        );
        self.current.store(Arc::new(next));
        self.changes.send_modify(|changes| *changes += 1);
    }
}

/// Enough to see that a file is another, or was written to; `None` for one that is not there.
type Stamp = Vec<Option<[i64; 6]>>;

fn stamp(directory: &Path) -> Stamp {
    let of = |name: &&str| {
        let file = fs::metadata(directory.join(name)).ok()?;
        let size = i64::try_from(file.len()).unwrap_or(i64::MAX);
        Some([file.ino() as i64, size, file.mtime(), file.mtime_nsec(), file.ctime(), file.ctime_nsec()])
    };
    FILES.iter().map(of).collect()
}
