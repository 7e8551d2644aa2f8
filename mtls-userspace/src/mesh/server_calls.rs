//! What the API server itself dials: the Services that webhook configurations, definitions of custom resources and
//! aggregated APIs name in, who calls which port out.
//!
//! The API server is no member of the mesh and has no identity there: its calls come in plaintext, and a STRICT port
//! refuses them.

use std::fmt;
use std::sync::Arc;

/// A port of a Service that the API server dials, and on whose behalf.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ServerCall {
    /// `ValidatingWebhookConfiguration gatekeeper`.
    pub by: Arc<str>,
    /// `namespace/name`.
    pub service: Arc<str>,
    pub port: u16,
}

/// As in `ValidatingWebhookConfiguration gatekeeper through Service gatekeeper/webhook port 443`.
impl fmt::Display for ServerCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} through Service {} port {}", self.by, self.service, self.port)
    }
}

/// Everything known of such calls. Without an API server nobody makes any.
#[derive(Debug, Default)]
pub(super) struct ServerCalls {
    pub calls: Vec<ServerCall>,
    /// Kinds, in the plural, of which nothing is known.
    pub unread: Vec<&'static str>,
}
