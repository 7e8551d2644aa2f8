//! The authority inside a Kubernetes cluster: a Secret that it is kept in, objects that its roots are published as, and
//! the API server that knows callers' tokens.
//!
//! Several replicas serve at once and agree because they share the Secret: whoever creates it first has made the root.

mod published;
mod secret;
mod token_reviews;

use std::time::Duration;

pub use published::{Published, published_in};
pub use secret::Secret;
pub use token_reviews::reviewed_by;

use super::Error;
use crate::kubernetes::chain;

/// For one request to the API server.
const PATIENCE: Duration = Duration::from_secs(10);

/// One request, within its time.
async fn ask<T>(
    attempt: &'static str,
    what: &str,
    request: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, Error> {
    let failed = |reason: String| Error::Api { attempt, what: what.into(), reason };
    match tokio::time::timeout(PATIENCE, request).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(kube::Error::Api(status))) => Err(failed(format!("{} ({})", status.message, status.code))),
        Ok(Err(error)) => Err(failed(chain(&error))),
        Err(_) => Err(failed(format!("no answer within {} s", PATIENCE.as_secs()))),
    }
}
