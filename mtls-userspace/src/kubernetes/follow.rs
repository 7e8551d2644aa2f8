//! One kind of object, followed: a complete list first, then every change, and a list again whenever the API server
//! no longer knows where we were.

use std::fmt::Debug;
use std::pin::pin;
use std::time::Duration;

use k8s_openapi::serde::de::DeserializeOwned;
use kube::api::Api;
use kube::runtime::watcher::{self, Event};
use rand::Rng;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;

use super::chain;

/// Objects in one answer: at ten kilobytes each, what is in memory at one time stays small.
const PAGE: u32 = 250;
const FIRST_RETRY: Duration = Duration::from_millis(500);
const LAST_RETRY: Duration = Duration::from_secs(15);
const ABSENT_RETRY: Duration = Duration::from_secs(10);

/// What happens to the objects of a kind.
#[derive(Debug)]
pub(crate) enum Change<K> {
    /// A list begins: what is not seen until [`Change::Complete`] is there no more.
    Restart,
    /// New, changed, or as before.
    Seen(K),
    Gone(K),
    Complete,
    /// What is known stays as it is meanwhile; it is tried again.
    Trouble(Trouble),
}

/// Why a kind can't be followed now.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub(crate) enum Trouble {
    #[error("the API server doesn't know {what}; their definitions (CRDs) are part of the installation")]
    Absent { what: &'static str },
    #[error(
        "the API server doesn't let us list and watch {what} ({message}); grant both verbs in the ClusterRole"
    )]
    Forbidden { what: &'static str, message: String },
    #[error("{what} are not followed: {reason}")]
    Failed { what: &'static str, reason: String },
}

/// Why following ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Ended {
    /// The API server has no such kind.
    Absent,
    /// Nobody listens any more.
    Unheard,
}

/// Follows a kind; `what` is its name in the plural, for errors, and `message` what changes are told as.
pub(crate) async fn follow<K, M>(
    api: Api<K>,
    what: &'static str,
    send: &mpsc::Sender<M>,
    message: impl Fn(Change<K>) -> M,
) -> Ended
where
    K: kube::Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let mut failures = 0;
    loop {
        let config = watcher::Config::default().page_size(PAGE);
        let mut events = pin!(watcher::watcher(api.clone(), config));
        while let Some(event) = events.next().await {
            let change = match event {
                // It is said before the list is asked for, so it proves nothing.
                Ok(Event::Init) => Change::Restart,
                Ok(event) => {
                    failures = 0;
                    match event {
                        Event::Apply(object) | Event::InitApply(object) => Change::Seen(object),
                        Event::Delete(object) => Change::Gone(object),
                        Event::Init | Event::InitDone => Change::Complete,
                    }
                }
                // Our place in the history is forgotten: ordinary, and the list that follows makes it good. When a
                // watch can't even begin for it, the watcher would ask for the same place for ever.
                Err(watcher::Error::WatchError(status)) if status.code == 410 => continue,
                Err(watcher::Error::WatchStartFailed(kube::Error::Api(status))) if status.code == 410 => {
                    break;
                }
                Err(error) => {
                    failures += 1;
                    let trouble = Trouble::of(what, &error);
                    if matches!(trouble, Trouble::Absent { .. }) {
                        return Ended::Absent;
                    }
                    if send.send(message(Change::Trouble(trouble))).await.is_err() {
                        return Ended::Unheard;
                    }
                    tokio::time::sleep(back_off(failures)).await;
                    continue;
                }
            };
            if send.send(message(change)).await.is_err() {
                return Ended::Unheard;
            }
        }
    }
}

/// Until it is worth asking for a kind again that was not there: somebody may have installed its definition.
pub(crate) async fn while_absent() {
    tokio::time::sleep(jitter(ABSENT_RETRY)).await;
}

impl Trouble {
    fn of(what: &'static str, error: &watcher::Error) -> Self {
        use watcher::Error::{InitialListFailed, WatchFailed, WatchStartFailed};
        match error {
            InitialListFailed(kube::Error::Api(status)) | WatchStartFailed(kube::Error::Api(status)) => {
                match status.code {
                    404 => Self::Absent { what },
                    401 | 403 => Self::Forbidden { what, message: status.message.clone() },
                    _ => Self::Failed { what, reason: format!("{} ({})", status.message, status.code) },
                }
            }
            InitialListFailed(cause) | WatchStartFailed(cause) | WatchFailed(cause) => {
                Self::Failed { what, reason: chain(cause) }
            }
            other => Self::Failed { what, reason: chain(other) },
        }
    }
}

fn back_off(failures: u32) -> Duration {
    jitter(FIRST_RETRY.saturating_mul(1 << failures.saturating_sub(1).min(10)).min(LAST_RETRY))
}

/// Five hundred agents must not come back at one moment.
fn jitter(longest: Duration) -> Duration {
    longest.mul_f64(rand::rng().random_range(0.5..=1.0))
}
