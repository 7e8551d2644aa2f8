//! The admin API: metrics, health and the status page over TCP for scrapers, probes and browsers, everything over a
//! unix socket for the node's own tools.
//!
//! What TCP shows is meant for anybody who can reach the address: sums and dates, as metrics have them. Single
//! connections, addresses and the words of errors are for the socket.

use std::net::SocketAddr;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde::Deserialize;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;

use super::exposition::{Format, as_prometheus_text};
use super::overview::Overview;
use super::socket::{self, SocketFile};
use super::{Error, Observer, PodRow, Readiness, Status, inspector_api, page};
use crate::plaintext::{Asked, LONGEST_WINDOW, Report};

/// Connections that `/status` and, unless told otherwise, `/connections` list.
pub(super) const SHOWN: usize = 100;
/// How long answers under way may take once the agent stops.
const LAST_ANSWERS: Duration = Duration::from_secs(2);

/// The admin API's listeners, bound but not yet answering.
#[derive(Debug)]
pub struct Admin {
    tcp: Option<TcpListener>,
    unix: Option<(UnixListener, SocketFile)>,
}

#[derive(Clone)]
pub(super) struct Shared {
    pub observer: Observer,
    readiness: Readiness,
}

impl Admin {
    /// Takes the addresses, so that what is taken already is known before anything else starts.
    ///
    /// # Errors
    ///
    /// A taken port, a socket on which an agent answers, a file that is no socket, or what the system says.
    pub async fn bind(tcp: Option<SocketAddr>, unix: Option<&Path>) -> Result<Self, Error> {
        let tcp = match tcp {
            Some(address) => {
                Some(TcpListener::bind(address).await.map_err(|source| Error::Listen { address, source })?)
            }
            None => None,
        };
        let unix = unix.map(socket::bind).transpose()?;
        Ok(Self { tcp, unix })
    }

    /// The TCP address in use, its port chosen by the system if 0 was asked for.
    pub fn address(&self) -> Option<SocketAddr> {
        self.tcp.as_ref()?.local_addr().ok()
    }

    /// Answers until `shutdown`, then finishes what is under way and removes the socket.
    ///
    /// # Errors
    ///
    /// When a listener stops for another reason.
    pub async fn serve(
        self,
        observer: Observer,
        readiness: Readiness,
        shutdown: impl Future<Output = ()>,
    ) -> Result<(), Error> {
        let conditions = readiness.clone();
        observer.inner.providers.set_conditions(Arc::new(move || conditions.conditions()));
        let shared = Shared { observer, readiness };
        let (stop, stopping) = watch::channel(());
        let stopped = |mut stopping: watch::Receiver<()>| async move {
            let _ = stopping.changed().await;
        };
        let tcp = async {
            let Some(listener) = self.tcp else { return Ok(()) };
            let service = axum::serve(listener, public(shared.clone()));
            service.with_graceful_shutdown(stopped(stopping.clone())).await
        };
        let unix = async {
            let Some((listener, _file)) = self.unix else { return Ok(()) };
            let service = axum::serve(listener, local(shared.clone()));
            service.with_graceful_shutdown(stopped(stopping.clone())).await
        };
        let mut serving = pin!(async { tokio::try_join!(tcp, unix) });
        let mut shutdown = pin!(shutdown);
        tokio::select! {
            ended = &mut serving => {
                if let Err(source) = ended {
                    return Err(Error::Serve { source });
                }
                // Without a listener there is nothing to do but to wait.
                shutdown.await;
            }
            () = &mut shutdown => {
                drop(stop);
                let _ = tokio::time::timeout(LAST_ANSWERS, serving).await;
            }
        }
        Ok(())
    }
}

fn public(shared: Shared) -> Router {
    Router::new()
        .route("/", get(page::page))
        .route("/overview", get(overview))
        .route("/metrics", get(metrics))
        .route("/healthz/ready", get(ready))
        .route("/healthz/live", get(async || "live\n"))
        .with_state(shared)
}

fn local(shared: Shared) -> Router {
    let details = Router::new()
        .route("/status", get(status))
        .route("/pods", get(pods))
        .route("/readiness", get(strict_readiness))
        .merge(inspector_api::routes())
        .with_state(shared.clone());
    public(shared).merge(details)
}

async fn metrics(State(shared): State<Shared>, headers: HeaderMap) -> Response {
    let format = Format::accepted(headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok()));
    // Thousands of label sets take a while to write: not on a thread that others wait for.
    let text = blocking(move || match format {
        Format::OpenMetrics => shared.observer.scrape(),
        Format::Text => as_prometheus_text(&shared.observer.scrape()),
    });
    match text.await {
        Ok(text) => ([(header::CONTENT_TYPE, format.content_type())], text).into_response(),
        Err(status) => status.into_response(),
    }
}

async fn ready(State(shared): State<Shared>) -> Response {
    let missing = shared.readiness.missing();
    if missing.is_empty() {
        return "ready\n".into_response();
    }
    let reasons: String = missing.iter().map(|(condition, why)| format!("{condition}: {why}\n")).collect();
    (StatusCode::SERVICE_UNAVAILABLE, reasons).into_response()
}

async fn overview(State(shared): State<Shared>) -> Result<impl IntoResponse, StatusCode> {
    let overview: Overview = blocking(move || shared.observer.overview(&shared.readiness)).await?;
    Ok((page::HEADERS, Json(overview)))
}

async fn status(State(shared): State<Shared>) -> Result<Json<Status>, StatusCode> {
    blocking(move || shared.observer.status(&shared.readiness, SHOWN)).await.map(Json)
}

async fn pods(State(shared): State<Shared>) -> Result<Json<Vec<PodRow>>, StatusCode> {
    blocking(move || shared.observer.inner.providers.pods()).await.map(Json)
}

/// A day, unless told otherwise.
const WINDOW_SECONDS: u64 = 24 * 3600;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ReadinessQuery {
    namespace: Option<String>,
    window_seconds: Option<u64>,
    #[serde(default)]
    dry_run: bool,
}

/// Who would be cut off if STRICT came now: a [`Report`].
async fn strict_readiness(
    State(shared): State<Shared>,
    Query(query): Query<ReadinessQuery>,
) -> Result<Json<Report>, StatusCode> {
    let window = Duration::from_secs(query.window_seconds.unwrap_or(WINDOW_SECONDS));
    if window > LONGEST_WINDOW {
        return Err(StatusCode::BAD_REQUEST);
    }
    let asked = Asked { namespace: query.namespace, window, dry_run: query.dry_run };
    let facts = blocking(move || shared.observer.inner.providers.plaintext()).await?;
    facts.map(|facts| Json(Report::new(facts, &asked))).ok_or(StatusCode::SERVICE_UNAVAILABLE)
}

pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, StatusCode> {
    tokio::task::spawn_blocking(work).await.map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)
}
