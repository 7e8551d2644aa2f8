//! A file that the operator may change at any time: its path in, its last good content out.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use crate::ca::Error;

/// Looked at whenever it is asked for; while the file is broken its last good content counts.
pub(super) struct Followed<T> {
    path: PathBuf,
    read: fn(&Path) -> Result<T, Error>,
    known: Mutex<Known<T>>,
}

struct Known<T> {
    content: Arc<T>,
    stamp: Option<Stamp>,
}

/// Enough to see that a file is another, or was written to.
type Stamp = (SystemTime, u64, u64);

impl<T> Followed<T> {
    pub fn open(path: &Path, read: fn(&Path) -> Result<T, Error>) -> Result<Self, Error> {
        let stamp =
            stamp(path).map_err(|source| Error::File { attempt: "read", path: path.into(), source })?;
        let content = Arc::new(read(path)?);
        Ok(Self { path: path.into(), read, known: Mutex::new(Known { content, stamp: Some(stamp) }) })
    }

    pub fn current(&self) -> Arc<T> {
        let now = stamp(&self.path).ok();
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if now != known.stamp {
            known.stamp = now;
            match (self.read)(&self.path) {
                Ok(content) => {
                    tracing::info!(path = %self.path.display(), "read again, because it changed");
                    known.content = Arc::new(content);
                }
                Err(error) => tracing::error!(%error, "not replaced: the last good content still counts"),
            }
        }
        known.content.clone()
    }
}

fn stamp(path: &Path) -> std::io::Result<Stamp> {
    use std::os::unix::fs::MetadataExt;
    let file = std::fs::metadata(path)?;
    Ok((file.modified()?, file.len(), file.ino()))
}
