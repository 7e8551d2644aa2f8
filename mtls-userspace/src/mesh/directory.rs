//! A directory of manifests that is followed: a path in, snapshots out.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use notify::event::{AccessKind, AccessMode, EventKind, ModifyKind};
use notify::{RecommendedWatcher, RecursiveMode, Watcher};

use super::files::Files;
use super::parts::Parts;
use super::source::Shared;
use super::{Error, Settings};

/// Changes come in groups; wait until none came for this long.
const QUIET: Duration = Duration::from_millis(50);
/// A file that is being written is left alone until it is closed, or for this long after its last write.
const QUIET_WHILE_WRITING: Duration = Duration::from_millis(500);
/// A directory that never rests is read nonetheless.
const MAX_WAIT: Duration = Duration::from_secs(2);
/// The safety net for changes that no event told of.
const RESCAN: Duration = Duration::from_secs(5);
/// A file that vanishes while the directory is read is a change in progress, not an error.
const READ_ATTEMPTS: u32 = 5;

/// Loads a directory, and follows it until the second half of what this returns is dropped.
pub(super) fn follow(directory: PathBuf, settings: Settings) -> Result<(Arc<Shared>, Watching), Error> {
    let (send, receive) = mpsc::channel();
    let mut follower = Follower {
        watch: Watch::new(&directory, send.clone()),
        directory,
        settings,
        files: Files::default(),
        parts: Parts::default(),
        accepted: Vec::new(),
        refused: None,
    };
    // Watching began before this, so that no change can fall between.
    follower.read()?;
    let parts = follower.files.parts(&follower.parts, &follower.settings)?;
    if follower.files.is_empty() {
        tracing::warn!(directory = %follower.directory.display(), "no manifest yet; the mesh is empty");
    }
    let shared = Shared::new(parts.mesh(1));
    follower.accept(parts);
    let directory = follower.directory.clone();
    let following = {
        let shared = shared.clone();
        let builder = thread::Builder::new().name("mtls-manifests".to_owned());
        builder.spawn(move || follower.follow(&receive, &shared))
    };
    let thread = following.map_err(|source| Error::Thread { directory, source: Arc::new(source) })?;
    Ok((shared, Watching { stop: send, thread: Some(thread) }))
}

/// Ends the thread when dropped.
pub(super) struct Watching {
    stop: Sender<Message>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Watching {
    fn drop(&mut self) {
        // A thread that is gone already needs no telling.
        let _ = self.stop.send(Message::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

enum Message {
    Changed(notify::Event),
    Stop,
}

/// The thread's own state.
struct Follower {
    directory: PathBuf,
    settings: Settings,
    watch: Watch,
    files: Files,
    /// What is in force, and the digest of the files that say so.
    parts: Parts,
    accepted: Vec<u8>,
    /// What was last reported as an error, so that a rescan does not repeat it.
    refused: Option<String>,
}

impl Follower {
    fn follow(mut self, messages: &Receiver<Message>, shared: &Shared) {
        loop {
            match messages.recv_timeout(RESCAN) {
                Ok(Message::Changed(event)) => {
                    if settle(event, messages).is_err() {
                        return;
                    }
                }
                Ok(Message::Stop) | Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {}
            }
            self.watch.renew(&self.directory);
            match self.load(shared) {
                Ok(()) => {
                    if self.refused.take().is_some() {
                        tracing::info!(directory = %self.directory.display(), "manifests are valid again");
                        shared.say(None);
                    }
                }
                Err(error) => {
                    let error = error.to_string();
                    if self.refused.as_ref() != Some(&error) {
                        tracing::error!(error, "manifests refused; the last good state stays in force");
                        shared.count_error();
                        shared.say(Some(error.clone()));
                        self.refused = Some(error);
                    }
                }
            }
        }
    }

    fn load(&mut self, shared: &Shared) -> Result<(), Error> {
        self.read()?;
        if self.files.digest() == self.accepted {
            self.files.accept();
            return Ok(());
        }
        let before = shared.current();
        // An unmounted or half-copied directory must not turn everything into plaintext.
        if self.files.is_empty() && !before.workloads.is_empty() {
            return Err(Error::Emptied { directory: self.directory.clone() });
        }
        let parts = self.files.parts(&self.parts, &self.settings)?;
        shared.publish(parts.mesh(before.generation + 1));
        self.accept(parts);
        Ok(())
    }

    fn accept(&mut self, parts: Parts) {
        self.accepted = self.files.digest();
        self.files.accept();
        self.parts = parts;
    }

    fn read(&mut self) -> Result<(), Error> {
        let mut attempt = 1;
        loop {
            match self.files.refresh(&self.directory, &self.settings) {
                Err(Error::Read { source, .. })
                    if source.kind() == io::ErrorKind::NotFound && attempt < READ_ATTEMPTS =>
                {
                    attempt += 1;
                    thread::sleep(QUIET / 5);
                }
                outcome => return outcome,
            }
        }
    }
}

/// Waits until a group of changes is over. Errs when told to stop.
fn settle(first: notify::Event, messages: &Receiver<Message>) -> Result<(), ()> {
    let deadline = Instant::now() + MAX_WAIT;
    let mut writing = HashSet::new();
    let mut event = first;
    loop {
        for path in event.paths {
            match event.kind {
                EventKind::Modify(ModifyKind::Data(_)) => drop(writing.insert(path)),
                _ => drop(writing.remove(&path)),
            }
        }
        let quiet = if writing.is_empty() { QUIET } else { QUIET_WHILE_WRITING };
        let left = deadline.saturating_duration_since(Instant::now());
        match messages.recv_timeout(quiet.min(left)) {
            Ok(Message::Changed(next)) if !left.is_zero() => event = next,
            Ok(Message::Changed(_)) | Err(RecvTimeoutError::Timeout) => return Ok(()),
            Ok(Message::Stop) | Err(RecvTimeoutError::Disconnected) => return Err(()),
        }
    }
}

/// The kernel's notices of changes, as far as they can be had.
struct Watch {
    watcher: Option<RecommendedWatcher>,
    /// Device and inode of the directory watched: the path may come to mean another.
    watched: Option<(u64, u64)>,
}

impl Watch {
    fn new(directory: &Path, send: Sender<Message>) -> Self {
        let notice = move |event: notify::Result<notify::Event>| {
            if let Ok(event) = event
                && concerns(&event)
            {
                // The follower ends first; then nobody wants to know.
                let _ = send.send(Message::Changed(event));
            }
        };
        let watcher = match notify::recommended_watcher(notice) {
            Ok(watcher) => Some(watcher),
            Err(error) => {
                tracing::warn!(%error, "no notices of changed manifests; they are noticed within {RESCAN:?}");
                None
            }
        };
        let mut watch = Self { watcher, watched: None };
        watch.renew(directory);
        watch
    }

    fn renew(&mut self, directory: &Path) {
        let Some(watcher) = &mut self.watcher else { return };
        let now = fs::metadata(directory).map(|m| (m.dev(), m.ino())).ok();
        if now == self.watched {
            return;
        }
        if self.watched.take().is_some() {
            // Of a directory that is gone, the kernel has dropped the watch already.
            let _ = watcher.unwatch(directory);
        }
        if now.is_none() {
            return;
        }
        match watcher.watch(directory, RecursiveMode::Recursive) {
            Ok(()) => self.watched = now,
            Err(error) => tracing::warn!(
                directory = %directory.display(), %error,
                "no notices of changed manifests; they are noticed within {RESCAN:?}"
            ),
        }
    }
}

/// Reading the manifests makes events too.
fn concerns(event: &notify::Event) -> bool {
    match event.kind {
        EventKind::Access(AccessKind::Close(AccessMode::Write)) => true,
        EventKind::Access(_) => false,
        _ => true,
    }
}
