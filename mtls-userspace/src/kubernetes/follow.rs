//! One kind of object, followed: a complete list first, then every change, and a list again whenever the API server
//! no longer knows where we were.

use std::fmt::Debug;
use std::marker::PhantomData;
use std::pin::pin;
use std::time::{Duration, Instant};

use kube::api::{Api, ListParams, WatchEvent, WatchParams};
use rand::Rng;
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;

use super::chain;

/// For a page, and for a watch to begin.
const PAGE_LIMIT: Duration = Duration::from_secs(60);
/// Shorter than what API servers allow (295 s): a dead connection is noticed when a watch outlives this.
const WATCH_SECONDS: u32 = 240;
const WATCH_GRACE: Duration = Duration::from_secs(10);
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
    /// The API server answers, whether there is anything new or not.
    Well,
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

/// Follows a kind; `what` is its name in the plural, for errors, `page` how many objects are asked for at a time, and
/// `message` what changes are told as.
pub(crate) async fn follow<K, M>(
    api: Api<K>,
    what: &'static str,
    page: u32,
    send: &mpsc::Sender<M>,
    message: impl Fn(Change<K>) -> M,
) -> Ended
where
    K: kube::Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let teller = Teller { send, message: &message, kind: PhantomData };
    let mut failures = 0;
    let mut version: Option<String> = None;
    loop {
        let step = match &mut version {
            None => list(&api, page, &teller).await.map(|listed| version = Some(listed)),
            Some(version) => watch(&api, version, &teller).await,
        };
        let trouble = match step {
            Ok(()) => {
                failures = 0;
                continue;
            }
            Err(Stop::Unheard) => return Ended::Unheard,
            // Our place in the history is forgotten: ordinary, and the list that follows makes it good.
            Err(Stop::Forgotten) => {
                version = None;
                failures += 1;
                if failures == 1 {
                    continue;
                }
                None
            }
            Err(Stop::Early) => None,
            Err(Stop::Failed(error)) => {
                let trouble = Trouble::of(what, &error);
                if matches!(trouble, Trouble::Absent { .. }) {
                    return Ended::Absent;
                }
                failures += 1;
                Some(trouble)
            }
        };
        if let Some(trouble) = trouble
            && teller.tell(Change::Trouble(trouble)).await.is_err()
        {
            return Ended::Unheard;
        }
        tokio::time::sleep(back_off(failures)).await;
    }
}

/// Why a list or a watch did not come to its ordinary end.
enum Stop {
    Unheard,
    Forgotten,
    /// A watch ended at once and without an event; the next may as well.
    Early,
    Failed(kube::Error),
}

impl From<kube::Error> for Stop {
    fn from(error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status) if status.code == 410 => Self::Forgotten,
            other => Self::Failed(other),
        }
    }
}

/// Whoever listens, and as what it takes changes.
struct Teller<'a, K, M, F> {
    send: &'a mpsc::Sender<M>,
    message: &'a F,
    kind: PhantomData<fn(K)>,
}

impl<K, M, F: Fn(Change<K>) -> M> Teller<'_, K, M, F> {
    async fn tell(&self, change: Change<K>) -> Result<(), Stop> {
        self.send.send((self.message)(change)).await.map_err(|_| Stop::Unheard)
    }
}

/// Tells everything there is, page by page, and returns the version of that.
async fn list<K: Clone + DeserializeOwned + Debug, M, F: Fn(Change<K>) -> M>(
    api: &Api<K>,
    page: u32,
    teller: &Teller<'_, K, M, F>,
) -> Result<String, Stop> {
    let mut params = ListParams::default().limit(page);
    let mut begun = false;
    loop {
        let page = tokio::time::timeout(PAGE_LIMIT, api.list(&params)).await.map_err(|_| timed_out())??;
        if !std::mem::replace(&mut begun, true) {
            teller.tell(Change::Restart).await?;
        }
        for object in page.items {
            teller.tell(Change::Seen(object)).await?;
        }
        params.continue_token = page.metadata.continue_.filter(|token| !token.is_empty());
        if params.continue_token.is_none() {
            teller.tell(Change::Complete).await?;
            return Ok(page.metadata.resource_version.unwrap_or_default());
        }
    }
}

/// Tells what happens after a version, and moves that on. Ends when the API server ends it.
async fn watch<K: kube::Resource + Clone + DeserializeOwned + Debug, M, F: Fn(Change<K>) -> M>(
    api: &Api<K>,
    version: &mut String,
    teller: &Teller<'_, K, M, F>,
) -> Result<(), Stop> {
    let begun = Instant::now();
    let params = WatchParams::default().timeout(WATCH_SECONDS);
    let started = tokio::time::timeout(PAGE_LIMIT, api.watch(&params, version)).await;
    let mut events = pin!(started.map_err(|_| timed_out())??);
    teller.tell(Change::Well).await?;
    let mut quiet = true;
    let limit = Duration::from_secs(WATCH_SECONDS.into()) + WATCH_GRACE;
    // A connection that is dead without a word is given up some time after the server should have ended the watch.
    while let Ok(Some(event)) = tokio::time::timeout(limit, events.next()).await {
        quiet = false;
        match event? {
            WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                if let Some(newest) = object.meta().resource_version.clone() {
                    *version = newest;
                }
                teller.tell(Change::Seen(object)).await?;
            }
            WatchEvent::Deleted(object) => {
                if let Some(newest) = object.meta().resource_version.clone() {
                    *version = newest;
                }
                teller.tell(Change::Gone(object)).await?;
            }
            WatchEvent::Bookmark(bookmark) => *version = bookmark.metadata.resource_version,
            WatchEvent::Error(status) => return Err(kube::Error::Api(status).into()),
        }
    }
    if quiet && begun.elapsed() < Duration::from_secs(1) { Err(Stop::Early) } else { Ok(()) }
}

fn timed_out() -> Stop {
    Stop::Failed(kube::Error::Service(format!("no answer within {} s", PAGE_LIMIT.as_secs()).into()))
}

/// Until it is worth asking for a kind again that was not there: somebody may have installed its definition.
pub(crate) async fn while_absent() {
    tokio::time::sleep(jitter(ABSENT_RETRY)).await;
}

impl Trouble {
    fn of(what: &'static str, error: &kube::Error) -> Self {
        match error {
            kube::Error::Api(status) => match status.code {
                404 => Self::Absent { what },
                401 | 403 => Self::Forbidden { what, message: status.message.clone() },
                _ => Self::Failed { what, reason: format!("{} ({})", status.message, status.code) },
            },
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
