//! One watch: a version to go on from in, a line for each change out, until somebody has enough.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde_json::json;
use tokio::sync::mpsc::Sender;
use tokio::time::Instant;

use super::kinds::Kind;
use super::store::{Change, Stored};
use super::{BOOKMARKS, Shared, lock};

pub(super) struct Watch {
    pub kind: &'static Kind,
    /// What the client calls the group's version.
    pub api_version: String,
    /// `None`: everything there is comes first.
    pub from: Option<u64>,
    pub wanted: Box<dyn Fn(&Stored) -> bool + Send + Sync>,
    pub bookmarks: bool,
    pub limit: Duration,
}

impl Watch {
    pub(super) async fn run(self, shared: Arc<Shared>, lines: Sender<Bytes>) {
        let end = Instant::now() + self.limit;
        let mut newest = shared.newest.subscribe();
        let mut at = match self.from {
            Some(revision) => revision,
            None => {
                let listed = lock(&shared.store).list(self.kind, 0, &self.wanted);
                for stored in &listed.items {
                    if lines.send(self.line("ADDED", stored)).await.is_err() {
                        return;
                    }
                }
                listed.revision
            }
        };
        loop {
            newest.mark_unchanged();
            let (revision, changes) = {
                let store = lock(&shared.store);
                (store.revision(), store.since(self.kind, at))
            };
            let Some(changes) = changes else {
                let gone = json!({ "type": "ERROR",
                "object": super::http::gone(&format!("too old resource version: {at}")) });
                let _ = lines.send(format!("{gone}\n").into()).await;
                return;
            };
            at = at.max(revision);
            for line in changes.iter().filter_map(|change| self.event(change)) {
                if lines.send(line).await.is_err() {
                    return;
                }
            }
            tokio::select! {
                _ = newest.changed() => {}
                () = tokio::time::sleep(BOOKMARKS), if self.bookmarks => {
                    if lines.send(self.bookmark(at)).await.is_err() {
                        return;
                    }
                }
                () = lines.closed() => return,
                () = tokio::time::sleep_until(end) => return,
            }
        }
    }

    /// What a client that wants only some objects sees of a change.
    fn event(&self, change: &Change) -> Option<Bytes> {
        let wanted = |stored: &Option<Arc<Stored>>| stored.clone().filter(|stored| (self.wanted)(stored));
        match (wanted(&change.before), wanted(&change.after)) {
            (None, None) => None,
            (None, Some(after)) => Some(self.line("ADDED", &after)),
            (Some(_), Some(after)) => Some(self.line("MODIFIED", &after)),
            (Some(before), None) => Some(self.line("DELETED", change.after.as_ref().unwrap_or(&before))),
        }
    }

    fn line(&self, event: &str, stored: &Stored) -> Bytes {
        let object = super::http::rendered(&stored.json, self.kind, &self.api_version);
        format!("{{\"type\":\"{event}\",\"object\":{object}}}\n").into()
    }

    fn bookmark(&self, revision: u64) -> Bytes {
        let object = json!({
            "apiVersion": self.api_version, "kind": self.kind.kind,
            "metadata": { "resourceVersion": revision.to_string(), "creationTimestamp": null },
        });
        format!("{}\n", json!({ "type": "BOOKMARK", "object": object })).into()
    }
}
