//! A signing request: PEM in, the one identity and the public key that it proves possession of out.
//!
//! Takes nothing else from the request: subject, usages and constraints are the authority's own.

use rcgen::{PublicKeyData, SubjectPublicKeyInfo};
use rustls_pki_types::CertificateSigningRequestDer;
use rustls_pki_types::pem::PemObject;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::FromDer;

use crate::identity::{InvalidSpiffeId, SpiffeId};

/// A P-256 request with one SPIFFE ID has some 400 bytes.
const MAX_PEM: usize = 16 * 1024;

#[derive(Debug)]
pub(super) struct Request {
    pub identity: SpiffeId,
    pub public_key: SubjectPublicKeyInfo,
}

impl Request {
    pub fn parse(pem: &str) -> Result<Self, InvalidRequest> {
        if pem.len() > MAX_PEM {
            return Err(InvalidRequest::TooLong { bytes: pem.len() });
        }
        let der = CertificateSigningRequestDer::from_pem_slice(pem.as_bytes())
            .map_err(|error| InvalidRequest::Pem { reason: error.to_string() })?;
        let (rest, csr) = X509CertificationRequest::from_der(&der)
            .map_err(|error| InvalidRequest::Der { reason: error.to_string() })?;
        if !rest.is_empty() {
            return Err(InvalidRequest::Der { reason: "bytes follow its end".into() });
        }
        let public_key = public_key(&csr)?;
        csr.verify_signature().map_err(|_| InvalidRequest::Signature)?;
        Ok(Self { identity: identity(&csr)?, public_key })
    }
}

fn public_key(csr: &X509CertificationRequest<'_>) -> Result<SubjectPublicKeyInfo, InvalidRequest> {
    let key = SubjectPublicKeyInfo::from_der(csr.certification_request_info.subject_pki.raw)
        .map_err(|_| InvalidRequest::Key)?;
    let allowed = [&rcgen::PKCS_ECDSA_P256_SHA256, &rcgen::PKCS_ECDSA_P384_SHA384];
    if !allowed.contains(&PublicKeyData::algorithm(&key)) {
        return Err(InvalidRequest::Key);
    }
    Ok(key)
}

fn identity(csr: &X509CertificationRequest<'_>) -> Result<SpiffeId, InvalidRequest> {
    let mut names = csr
        .requested_extensions()
        .into_iter()
        .flatten()
        .filter_map(|extension| match extension {
            ParsedExtension::SubjectAlternativeName(names) => Some(&names.general_names),
            _ => None,
        })
        .flatten();
    match (names.next(), names.next()) {
        (Some(GeneralName::URI(uri)), None) => Ok(uri.parse()?),
        _ => Err(InvalidRequest::Names),
    }
}

/// What is wrong with a request; told to the caller.
#[derive(Debug, thiserror::Error)]
pub(super) enum InvalidRequest {
    #[error("the signing request has {bytes} bytes; {MAX_PEM} are allowed")]
    TooLong { bytes: usize },
    #[error("the signing request is no PEM block \"CERTIFICATE REQUEST\": {reason}")]
    Pem { reason: String },
    #[error("the signing request is malformed: {reason}")]
    Der { reason: String },
    #[error("the signing request's signature doesn't match its key")]
    Signature,
    #[error("the signing request's key must be ECDSA P-256 or P-384")]
    Key,
    #[error("the signing request must name exactly one subject alternative name, the SPIFFE ID as a URI")]
    Names,
    #[error("the signing request's name is no workload's: {0}")]
    SpiffeId(#[from] InvalidSpiffeId),
}
