//! One request from arrival to answer: who calls, for whom, may it, sign.
//!
//! A refusal says what is wrong and is told to the caller as a gRPC status; it is logged here, once.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use prost_types::value::Kind;
use tonic::metadata::MetadataMap;
use tonic::{Response, Status};

use super::request::Request;
use super::server::Origin;
use super::{Caller, Callers, CertificateAuthority, InForce, Proof, Unidentified};
use crate::identity::wire::istio_certificate_service_server::IstioCertificateService;
use crate::identity::wire::{IMPERSONATED_IDENTITY, IstioCertificateRequest, IstioCertificateResponse};
use crate::identity::{Certificate, SpiffeId, timestamp, to_pem};

/// Knows which identities the pods on a node have.
pub trait NodeAuthorization: Send + Sync {
    /// Whether an enrolled pod on `node` has this identity.
    fn has(&self, node: &str, identity: &SpiffeId) -> bool;
}

impl<F: Fn(&str, &SpiffeId) -> bool + Send + Sync> NodeAuthorization for F {
    fn has(&self, node: &str, identity: &SpiffeId) -> bool {
        self(node, identity)
    }
}

/// `istio.v1.auth.IstioCertificateService`; the trust service beside it knows callers by this too.
#[derive(Clone)]
pub struct Service {
    pub authority: Arc<InForce>,
    pub callers: Arc<dyn Callers>,
    pub nodes: Arc<dyn NodeAuthorization>,
}

#[tonic::async_trait]
impl IstioCertificateService for Service {
    async fn create_certificate(
        &self,
        request: tonic::Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let (caller, peer) = self.identify(&request).await?;
        self.answer(&caller, request.get_ref()).map(Response::new).inspect_err(|status| {
            tracing::warn!(?peer, node = %caller.node, reason = status.message(), "certificate refused");
        })
    }
}

impl Service {
    /// Who sent a request, and from where.
    pub(super) async fn identify<T>(
        &self,
        request: &tonic::Request<T>,
    ) -> Result<(Caller, Option<SocketAddr>), Status> {
        let from = request.extensions().get::<Origin>();
        let peer = from.map(|from| from.address);
        let caller = self.caller(request.metadata(), from).await.inspect_err(|status| {
            tracing::warn!(?peer, reason = status.message(), "refused: unknown caller");
        })?;
        Ok((caller, peer))
    }

    async fn caller(&self, metadata: &MetadataMap, from: Option<&Origin>) -> Result<Caller, Status> {
        let certificates = from.and_then(|from| from.certificates.as_deref()).unwrap_or_default();
        let proof = Proof { token: bearer(metadata), certificates };
        if proof.is_empty() {
            return Err(Status::unauthenticated(
                "no bearer token and no client certificate: send `authorization: Bearer <the node's token>`, or \
                 connect with the node's certificate",
            ));
        }
        self.callers.identify(&proof).await.map_err(|error| match error {
            Unidentified::Unavailable { .. } => Status::unavailable(error.to_string()),
            _ => Status::unauthenticated(error.to_string()),
        })
    }

    fn answer(
        &self,
        caller: &Caller,
        asked: &IstioCertificateRequest,
    ) -> Result<IstioCertificateResponse, Status> {
        let invalid = |error: &dyn std::fmt::Display| Status::invalid_argument(error.to_string());
        let request = Request::parse(&asked.csr).map_err(|e| invalid(&e))?;
        let identity = &request.identity;
        if let Some(impersonated) = impersonated(asked)?
            && impersonated != *identity
        {
            return Err(invalid(&format!(
                "the signing request names {identity}, but {IMPERSONATED_IDENTITY} is {impersonated}"
            )));
        }
        let lifetime = u64::try_from(asked.validity_duration)
            .map(Duration::from_secs)
            .map_err(|_| invalid(&"validity_duration may not be negative"))?;
        // One for the whole answer: it may be replaced meanwhile.
        let authority = self.authority.current();
        self.authorize(caller, identity, &authority)?;

        let signed = authority.sign(&request, lifetime).map_err(|error| match error {
            super::Error::Expired { .. } => Status::unavailable(error.to_string()),
            _ => Status::internal(error.to_string()),
        })?;
        let serial =
            signed.chain.first().and_then(|leaf| Certificate::parse(leaf).ok()).map(|leaf| leaf.serial);
        tracing::info!(
            node = %caller.node,
            %identity,
            serial,
            not_after = timestamp(signed.not_after),
            "certificate issued"
        );
        let cert_chain = signed.chain.iter().map(|certificate| to_pem([certificate])).collect();
        Ok(IstioCertificateResponse { cert_chain })
    }

    fn authorize(
        &self,
        caller: &Caller,
        identity: &SpiffeId,
        authority: &CertificateAuthority,
    ) -> Result<(), Status> {
        let ours = authority.trust_domain();
        if identity.trust_domain() != ours {
            return Err(Status::permission_denied(format!(
                "{identity} is not of this certificate authority's trust domain, {ours}"
            )));
        }
        if !self.nodes.has(&caller.node, identity) {
            return Err(Status::permission_denied(format!(
                "no enrolled pod on node {} has the identity {identity}",
                caller.node
            )));
        }
        Ok(())
    }
}

fn bearer(metadata: &MetadataMap) -> Option<&str> {
    let (scheme, token) = metadata.get("authorization")?.to_str().ok()?.split_once(' ')?;
    // RFC 9110, section 11.1: the scheme's case doesn't count.
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim()).filter(|token| !token.is_empty())
}

fn impersonated(asked: &IstioCertificateRequest) -> Result<Option<SpiffeId>, Status> {
    let Some(value) = asked.metadata.as_ref().and_then(|metadata| metadata.fields.get(IMPERSONATED_IDENTITY))
    else {
        return Ok(None);
    };
    let invalid = |reason: String| Status::invalid_argument(format!("{IMPERSONATED_IDENTITY}: {reason}"));
    match &value.kind {
        Some(Kind::StringValue(id)) => id.parse().map(Some).map_err(|error| invalid(format!("{error}"))),
        _ => Err(invalid("it must be a string".into())),
    }
}
