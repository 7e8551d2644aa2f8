//! A directory's files: paths in, what each says out. A file is read again when it is another or has changed, and no
//! other is.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};
use std::{io, thread};

use aws_lc_rs::digest;

use super::error::Error;
use super::interner::Interner;
use super::objects::{Concerned, Objects};
use super::parts::Parts;
use super::{Settings, manifests};

const MAX_DEPTH: usize = 16;
/// Clocks of filesystems are coarse: what was written so shortly before it was read may have been written again since
/// without looking any different.
const SETTLED: Duration = Duration::from_secs(2);
/// From so many bytes on, reading is worth a thread for each core.
const WORTH_THREADS: u64 = 1 << 20;

/// What the files of a directory say.
#[derive(Default)]
pub(super) struct Files {
    /// In the order of their paths: the first of two that contradict each other is always the same.
    files: BTreeMap<PathBuf, File>,
    interner: Mutex<Interner>,
    /// What those that came, changed or went have a say in, since [`Self::accept`].
    concerned: Concerned,
}

struct File {
    stamp: Stamp,
    /// Whether the stamp will be another after the next change.
    settled: bool,
    digest: digest::Digest,
    objects: Objects,
    errors: Vec<Error>,
}

/// Tells a file from any other, and from what it was.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    /// Seconds and nanoseconds.
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    fn is_settled(&self, now: SystemTime) -> bool {
        let before = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().saturating_sub(SETTLED);
        let last = self.modified.max(self.changed);
        u64::try_from(last.0).is_ok_and(|seconds| seconds < before.as_secs())
    }
}

impl Files {
    /// Reads what has changed. After an error some of it may not have been.
    pub(super) fn refresh(&mut self, directory: &Path, settings: &Settings) -> Result<(), Error> {
        self.interner.get_mut().unwrap_or_else(PoisonError::into_inner).sweep_if_grown();
        let mut found = Vec::new();
        list(directory, 0, &mut found)?;
        let paths: HashSet<&Path> = found.iter().map(|(path, _)| path.as_path()).collect();
        let concerned = &mut self.concerned;
        self.files.retain(|path, file| {
            let stays = paths.contains(path.as_path());
            if !stays {
                concerned.add(file.objects.concerned());
            }
            stays
        });
        let is_known = |path: &Path, stamp: &Stamp| {
            self.files.get(path).is_some_and(|file| file.settled && file.stamp == *stamp)
        };
        found.retain(|(path, stamp)| !is_known(path, stamp));
        for (at, outcome) in self.read(&found, settings) {
            let Some((path, stamp)) = found.get(at) else { continue };
            match outcome? {
                Outcome::Same { settled } => {
                    if let Some(file) = self.files.get_mut(path) {
                        (file.stamp, file.settled) = (*stamp, settled);
                    }
                }
                Outcome::Other(file) => {
                    self.concerned.add(file.objects.concerned());
                    if let Some(before) = self.files.insert(path.clone(), *file) {
                        self.concerned.add(before.objects.concerned());
                    }
                }
            }
        }
        Ok(())
    }

    /// Reads files, many of them on every core. With the place of each in `found`, in no order.
    fn read(&self, found: &[(PathBuf, Stamp)], settings: &Settings) -> Vec<(usize, Result<Outcome, Error>)> {
        let bytes: u64 = found.iter().map(|(_, stamp)| stamp.size).sum();
        let threads =
            if bytes < WORTH_THREADS { 1 } else { thread::available_parallelism().map_or(1, Into::into) };
        let next = AtomicUsize::new(0);
        let work = || {
            let mut outcomes = Vec::new();
            loop {
                let at = next.fetch_add(1, Ordering::Relaxed);
                let Some((path, stamp)) = found.get(at) else { return outcomes };
                outcomes.push((at, self.read_one(path, *stamp, settings)));
            }
        };
        thread::scope(|scope| {
            let others: Vec<_> = (1..threads.min(found.len())).map(|_| scope.spawn(work)).collect();
            let mut outcomes = work();
            for other in others {
                outcomes.extend(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            }
            outcomes
        })
    }

    fn read_one(&self, path: &Path, stamp: Stamp, settings: &Settings) -> Result<Outcome, Error> {
        // The stamp is older than the text: one that is written meanwhile is read again.
        let settled = stamp.is_settled(SystemTime::now());
        let text = fs::read_to_string(path)
            .map_err(|source| Error::Read { path: path.into(), source: Arc::new(source) })?;
        let digest = digest::digest(&digest::SHA256, text.as_bytes());
        if self.files.get(path).is_some_and(|file| file.digest.as_ref() == digest.as_ref()) {
            return Ok(Outcome::Same { settled });
        }
        let (objects, errors) = manifests::read(path, &text, settings, &self.interner);
        Ok(Outcome::Other(Box::new(File { stamp, settled, digest, objects, errors })))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// Tells whether anything differs from another time.
    pub(super) fn digest(&self) -> Vec<u8> {
        let mut context = digest::Context::new(&digest::SHA256);
        for (path, file) in &self.files {
            let path = path.as_os_str().as_encoded_bytes();
            context.update(&(path.len() as u64).to_le_bytes());
            context.update(path);
            context.update(file.digest.as_ref());
        }
        context.finish().as_ref().to_vec()
    }

    /// The parts of a mesh of these files; `last` are those of what was accepted last.
    ///
    /// # Errors
    ///
    /// The first thing that can't be understood, or contradicts another.
    pub(super) fn parts(&mut self, last: &Parts, settings: &Settings) -> Result<Parts, Error> {
        if let Some(error) = self.files.values().find_map(|file| file.errors.first()) {
            return Err(error.clone());
        }
        let mut objects: Vec<&mut Objects> = self.files.values_mut().map(|file| &mut file.objects).collect();
        last.anew(&mut objects, self.concerned, settings)
    }

    /// What is there now is what counts.
    pub(super) fn accept(&mut self) {
        self.concerned = Concerned::default();
    }

    /// Everything that can be understood, and everything that can't.
    pub(super) fn understood(self) -> (Vec<Objects>, Vec<Error>) {
        let (objects, errors): (_, Vec<_>) =
            self.files.into_values().map(|file| (file.objects, file.errors)).unzip();
        (objects, errors.into_iter().flatten().collect())
    }
}

enum Outcome {
    Same { settled: bool },
    Other(Box<File>),
}

/// `*.yaml`, `*.yml` and `*.json` of a directory and its subdirectories. Names with a leading dot are passed over:
/// editors' swap files, and the `..data` that a mounted ConfigMap's files link to.
fn list(directory: &Path, depth: usize, found: &mut Vec<(PathBuf, Stamp)>) -> Result<(), Error> {
    if depth > MAX_DEPTH {
        return Err(Error::TooDeep { path: directory.into(), limit: MAX_DEPTH });
    }
    let unreadable = |path: &Path| {
        let path = path.to_owned();
        move |source: io::Error| Error::Read { path, source: Arc::new(source) }
    };
    for entry in fs::read_dir(directory).map_err(unreadable(directory))? {
        let path = entry.map_err(unreadable(directory))?.path();
        if path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b".")) {
            continue;
        }
        let extension = path.extension().and_then(|e| e.to_str());
        let is_manifest = matches!(extension, Some("yaml" | "yml" | "json"));
        match fs::metadata(&path) {
            Ok(metadata) if metadata.is_dir() => list(&path, depth + 1, found)?,
            Ok(metadata) if is_manifest => found.push((path, Stamp::of(&metadata))),
            Err(error) if is_manifest => return Err(unreadable(&path)(error)),
            Ok(_) | Err(_) => {}
        }
    }
    Ok(())
}
