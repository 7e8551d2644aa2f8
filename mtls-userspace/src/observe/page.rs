//! The status page: one document that needs nothing else, and may do nothing else.
//!
//! Its policy lets the browser run exactly the script and styles that are in it, ask nobody but the agent, and turn no
//! string into markup: names of workloads come from manifests, which the reader of the page may not have written.

use std::sync::LazyLock;

use aws_lc_rs::digest::{SHA256, digest};
use axum::http::header::{self, HeaderName};
use axum::response::{Html, IntoResponse};
use base64::prelude::{BASE64_STANDARD, Engine};

const STYLE: &str = include_str!("page/page.css");
const SCRIPT: &str = concat!(
    include_str!("page/words.js"),
    include_str!("page/layout.js"),
    include_str!("page/graph.js"),
    include_str!("page/tables.js"),
    include_str!("page/page.js"),
);

static DOCUMENT: LazyLock<String> =
    LazyLock::new(|| include_str!("page/page.html").replace("{style}", STYLE).replace("{script}", SCRIPT));

static POLICY: LazyLock<String> = LazyLock::new(|| {
    let hash = |text: &str| BASE64_STANDARD.encode(digest(&SHA256, text.as_bytes()));
    format!(
        "default-src 'none'; script-src 'sha256-{}'; style-src 'sha256-{}'; connect-src 'self'; img-src data:; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; \
         trusted-types 'none'",
        hash(SCRIPT),
        hash(STYLE)
    )
});

/// For what only a page of this origin is to read, as it is now.
pub(super) const HEADERS: [(HeaderName, &str); 3] = [
    (header::CACHE_CONTROL, "no-store"),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
];

pub(super) async fn page() -> impl IntoResponse {
    let policy =
        [(header::CONTENT_SECURITY_POLICY, POLICY.as_str()), (header::REFERRER_POLICY, "no-referrer")];
    (HEADERS, policy, Html(DOCUMENT.as_str()))
}
