//! A SPIFFE Workload API, such as a SPIRE agent's socket: identities with their keys in, as somebody else makes and
//! renews them.
//!
//! The API tells workloads apart by the process that calls, and this agent is one process: it gets, in one answer, every
//! identity that it is registered for, and takes those that its node's pods have. Each answer replaces the one before:
//! an identity that is no longer in it is no longer ours. While the API is away the last answer counts, each
//! certificate to its end. Keys stay in memory here too.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use spiffe::{WorkloadApiClient, WorkloadApiError, X509BundleSet, X509Context};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;

use super::issuing::accept;
use super::slot::lock;
use super::{Error, Fault, Issued, News, SpiffeId, Svid, TrustBundle, certified};

const RETRY_MIN: Duration = Duration::from_millis(250);
const RETRY_MAX: Duration = Duration::from_secs(15);
/// From connecting to the first answer.
const ATTEMPT: Duration = Duration::from_secs(10);

pub struct WorkloadApi {
    /// As the operator wrote it, for errors.
    socket: String,
    answer: Mutex<Answer>,
}

#[derive(Default)]
struct Answer {
    context: Option<Arc<X509Context>>,
    /// Why there is none, or no newer one.
    fault: Option<String>,
}

impl WorkloadApi {
    /// `socket` is `unix:///PATH` or, without a scheme, a path.
    ///
    /// # Errors
    ///
    /// When it is neither. Whether somebody serves there shows later: it may start after us.
    pub fn new(socket: &str) -> Result<Self, Error> {
        let socket = if socket.starts_with('/') { format!("unix://{socket}") } else { socket.to_owned() };
        let endpoint = spiffe::transport::Endpoint::parse(&socket)
            .map_err(|error| Error::NoWorkloadApi { socket: socket.clone(), reason: error.to_string() })?;
        if !matches!(endpoint, spiffe::transport::Endpoint::Unix(_)) {
            let reason = "it must be a unix socket: keys pass over it".into();
            return Err(Error::NoWorkloadApi { socket, reason });
        }
        Ok(Self { socket, answer: Mutex::default() })
    }

    /// What the last answer has for this identity.
    pub(super) fn svid(&self, id: &SpiffeId) -> Result<(Svid, TrustBundle), Error> {
        let (context, fault) = {
            let answer = lock(&self.answer);
            (answer.context.clone(), answer.fault.clone())
        };
        let Some(context) = context else {
            let reason = fault.unwrap_or_else(|| "it has not answered yet".into());
            return Err(Error::NoWorkloadApi { socket: self.socket.clone(), reason });
        };
        let given = || context.svids().iter().map(|svid| svid.spiffe_id().to_string());
        let Some(svid) = context.svids().iter().find(|svid| svid.spiffe_id().to_string() == id.uri()) else {
            let given = given().collect();
            return Err(Error::Withdrawn { socket: self.socket.clone(), id: id.clone(), given });
        };
        let bundle = context.bundle_set().get(svid.spiffe_id().trust_domain());
        let der =
            |certificate: &spiffe::cert::Certificate| CertificateDer::from(certificate.as_bytes().to_vec());
        let issued = Issued {
            chain: svid.cert_chain().iter().map(der).collect(),
            roots: bundle.iter().flat_map(|bundle| bundle.authorities()).map(der).collect(),
        };
        let key = PrivatePkcs8KeyDer::from(svid.private_key().as_bytes().to_vec());
        let (chain, copy) = (issued.chain.clone(), PrivateKeyDer::Pkcs8(key.clone_key()));
        let accepted = accept(id, issued, key, |_| certified(chain, copy).is_ok());
        match (accepted, fault) {
            // A certificate that has run out meanwhile: what keeps the next one away says more.
            (Err(Error::Unusable { fault: Fault::Validity { .. }, .. }), Some(reason)) => {
                Err(Error::NoWorkloadApi { socket: self.socket.clone(), reason })
            }
            (accepted, _) => accepted,
        }
    }

    /// Keeps the last answer, and tells of each. Never ends.
    pub(super) async fn follow(&self, news: &mpsc::Sender<News>) {
        let mut pause = RETRY_MIN;
        loop {
            let fault = match self.listen(news, &mut pause).await {
                Ok(()) => "it closed the connection".to_owned(),
                Err(fault) => fault,
            };
            tracing::warn!(socket = self.socket, fault, retry_in = ?pause, "no news from the SPIFFE Workload API; its last answer counts");
            lock(&self.answer).fault = Some(fault);
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RETRY_MAX);
        }
    }

    async fn listen(&self, news: &mpsc::Sender<News>, pause: &mut Duration) -> Result<(), String> {
        let open = async {
            let client = WorkloadApiClient::connect_to(&self.socket).await?;
            client.stream_x509_contexts().await
        };
        let late = |_| format!("no answer within {} s", ATTEMPT.as_secs());
        let mut answers = match tokio::time::timeout(ATTEMPT, open).await.map_err(late)? {
            Ok(answers) => answers,
            Err(error) => return Err(self.refused(&error, news).await),
        };
        while let Some(answer) = answers.next().await {
            let context = match answer {
                Ok(context) => context,
                Err(error) => return Err(self.refused(&error, news).await),
            };
            *pause = RETRY_MIN;
            self.keep(context, news).await;
        }
        Ok(())
    }

    /// A refusal is an answer: this process is registered for nothing. Any other fault leaves the last answer.
    async fn refused(&self, error: &WorkloadApiError, news: &mpsc::Sender<News>) -> String {
        if matches!(error, WorkloadApiError::NoIdentityIssued | WorkloadApiError::PermissionDenied(_)) {
            self.keep(X509Context::new([], X509BundleSet::new()), news).await;
        }
        words(error)
    }

    async fn keep(&self, context: X509Context, news: &mpsc::Sender<News>) {
        let known = {
            let mut last = lock(&self.answer);
            last.fault = None;
            let known = last.context.as_deref() == Some(&context);
            last.context = Some(Arc::new(context));
            known
        };
        if !known {
            let why = "the SPIFFE Workload API has other certificates or roots";
            // Fails only when nobody polls this any more.
            let _ = news.send(News::Renew { why }).await;
        }
    }
}

/// An error with what caused it: the crate's own words often stop at "transport error".
fn words(error: &dyn std::error::Error) -> String {
    let mut said = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !said.contains(&more) {
            said = format!("{said}: {more}");
        }
        cause = error.source();
    }
    said
}
