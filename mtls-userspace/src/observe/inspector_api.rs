//! The admin socket's answers that an [`Inspector`] gives, and those about connections.

use std::sync::Arc;

use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde::Serialize;

use super::admin::{SHOWN, Shared, blocking};
use super::inspection::{Filter, Inspector, Listing, MOST_LISTED};
use super::{ConnectionRows, EndedRow, Flow, Observer, Pair, Party, Unverifiable, Verification};

/// Connections of a pair that a verification shows.
const SHOWN_OF_PAIR: usize = 10;

pub(super) fn routes() -> Router<Shared> {
    Router::new()
        .route("/workloads", get(|s, q| list(s, q, |inspector, filter| inspector.workloads(filter))))
        .route("/certs", get(|s, q| list(s, q, |inspector, filter| inspector.certificates(filter))))
        .route("/services", get(|s, q| list(s, q, |inspector, filter| inspector.services(filter))))
        .route("/policies", get(|s, q| list(s, q, |inspector, filter| inspector.policies(filter))))
        .route("/connections", get(connections))
        .route("/connections/ended", get(ended))
        .route("/verify", get(verify))
}

async fn list<T: Serialize + Send + 'static>(
    State(shared): State<Shared>,
    Query(filter): Query<Filter>,
    ask: fn(&dyn Inspector, &Filter) -> Listing<T>,
) -> Result<Json<Listing<T>>, StatusCode> {
    let inspector = shared.observer.inspector().ok_or(StatusCode::SERVICE_UNAVAILABLE)?;
    blocking(move || ask(&*inspector, &filter)).await.map(Json)
}

async fn connections(
    State(shared): State<Shared>,
    Query(filter): Query<Filter>,
) -> Result<Json<ConnectionRows>, StatusCode> {
    let limit = filter.limit.unwrap_or(SHOWN).min(MOST_LISTED);
    let shown = filter.offset..filter.offset.saturating_add(limit);
    blocking(move || shared.observer.connection_rows(shown, &|flow| concerns(flow, &filter))).await.map(Json)
}

async fn ended(
    State(shared): State<Shared>,
    Query(filter): Query<Filter>,
) -> Result<Json<Listing<EndedRow>>, StatusCode> {
    let rows = move || filter.page(shared.observer.ended_rows(&|flow| concerns(flow, &filter)), |row| row);
    blocking(rows).await.map(Json)
}

async fn verify(State(shared): State<Shared>, Query(pair): Query<Pair>) -> Response {
    match blocking(move || shared.observer.verify(&pair)).await {
        Ok(Ok(verification)) => Json(verification).into_response(),
        Ok(Err(error)) => {
            let status = match error {
                Unverifiable::UnknownPod { .. } => StatusCode::NOT_FOUND,
                Unverifiable::Starting => StatusCode::SERVICE_UNAVAILABLE,
                _ => StatusCode::BAD_REQUEST,
            };
            (status, error.to_string()).into_response()
        }
        Err(status) => status.into_response(),
    }
}

impl Observer {
    fn inspector(&self) -> Option<Arc<dyn Inspector>> {
        self.inner.providers.inspector()
    }

    /// What is known of a pair, with its connections.
    fn verify(&self, pair: &Pair) -> Result<Verification, Unverifiable> {
        let inspector = self.inspector().ok_or(Unverifiable::Starting)?;
        let mut verification = inspector.verify(pair)?;
        let of_pair = |flow: &Flow| {
            let (from, to) = (&verification.source, &verification.destination);
            is(&flow.source, from) && is(&flow.destination, to) && flow.address.port() == pair.port
        };
        let open = self.connection_rows(0..SHOWN_OF_PAIR, &of_pair).newest;
        let mut ended = self.ended_rows(&of_pair);
        ended.truncate(SHOWN_OF_PAIR);
        (verification.open, verification.ended) = (open, ended);
        Ok(verification)
    }
}

fn is(party: &Party, key: &str) -> bool {
    party
        .workload
        .as_ref()
        .is_some_and(|workload| key.split_once('/') == Some((&workload.namespace, &workload.name)))
}

/// Whether either end is one that is asked for.
fn concerns(flow: &Flow, filter: &Filter) -> bool {
    let asked = |party: &Party| {
        party.workload.as_ref().is_some_and(|workload| filter.wants(&workload.namespace, &workload.name))
    };
    filter.namespace.is_none() && filter.name.is_none() || asked(&flow.source) || asked(&flow.destination)
}
