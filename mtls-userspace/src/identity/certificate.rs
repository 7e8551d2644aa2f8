//! Certificates: DER or PEM in, the few facts that identities need out. Judges nothing.

use std::time::{Duration, SystemTime};

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

/// What a certificate says of itself.
#[derive(Debug)]
pub(crate) struct Certificate {
    /// Hex, as `openssl x509 -serial` prints it.
    pub serial: String,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
    /// URI subject alternative names, as they stand there.
    pub uris: Vec<String>,
    /// DER of the SubjectPublicKeyInfo.
    pub public_key: Vec<u8>,
    /// Subject and issuer are the same name: how roots are told from intermediates.
    pub self_issued: bool,
    /// May sign certificates: basicConstraints says CA, and keyUsage, if there, has keyCertSign.
    pub authority: bool,
    /// May sign revocation lists: keyUsage, if there, has cRLSign.
    pub may_revoke: bool,
}

impl Certificate {
    pub fn parse(der: &CertificateDer<'_>) -> Result<Self, InvalidCertificate> {
        let malformed = |error: &dyn std::fmt::Display| InvalidCertificate::Der { reason: error.to_string() };
        let (rest, x509) = X509Certificate::from_der(der).map_err(|e| malformed(&e))?;
        if !rest.is_empty() {
            return Err(InvalidCertificate::Der { reason: "bytes follow its end".into() });
        }
        let constraints = x509.basic_constraints().map_err(|e| malformed(&e))?;
        let key_usage = x509.key_usage().map_err(|e| malformed(&e))?;
        let names = x509.subject_alternative_name().map_err(|e| malformed(&e))?;
        Ok(Self {
            serial: hex(x509.raw_serial()),
            not_before: at(x509.validity().not_before.timestamp()),
            not_after: at(x509.validity().not_after.timestamp()),
            uris: names
                .iter()
                .flat_map(|names| &names.value.general_names)
                .filter_map(|name| match name {
                    GeneralName::URI(uri) => Some((*uri).into()),
                    _ => None,
                })
                .collect(),
            public_key: x509.public_key().raw.to_vec(),
            self_issued: x509.subject().as_raw() == x509.issuer().as_raw(),
            authority: constraints.is_some_and(|c| c.value.ca)
                && key_usage.as_ref().is_none_or(|usage| usage.value.key_cert_sign()),
            may_revoke: key_usage.is_none_or(|usage| usage.value.crl_sign()),
        })
    }
}

/// Every certificate in a PEM text; other blocks are skipped.
pub(crate) fn pem_certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, InvalidCertificate> {
    let certificates = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| InvalidCertificate::Pem { reason: error.to_string() })?;
    if certificates.is_empty() {
        return Err(InvalidCertificate::None);
    }
    for (position, certificate) in certificates.iter().enumerate() {
        Certificate::parse(certificate)
            .map_err(|error| InvalidCertificate::At { position: position + 1, source: Box::new(error) })?;
    }
    Ok(certificates)
}

/// The certificates as a PEM text, in the order given.
pub(crate) fn to_pem<'a>(certificates: impl IntoIterator<Item = &'a CertificateDer<'static>>) -> String {
    certificates.into_iter().map(|certificate| pem_block("CERTIFICATE", certificate)).collect()
}

/// One object as a PEM text.
pub(crate) fn pem_block(label: &str, der: &[u8]) -> String {
    use base64::Engine as _;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let mut pem = format!("-----BEGIN {label}-----\n");
    // RFC 7468, section 2: 64 characters a line. Base64 is ASCII, so every cut is a character boundary.
    let mut rest = text.as_str();
    while !rest.is_empty() {
        let (line, tail) = rest.split_at(rest.len().min(64));
        pem.push_str(line);
        pem.push('\n');
        rest = tail;
    }
    pem.push_str(&format!("-----END {label}-----\n"));
    pem
}

/// Why a text or its bytes are no certificates.
#[derive(Debug, thiserror::Error)]
pub enum InvalidCertificate {
    #[error("no PEM block \"CERTIFICATE\" in it")]
    None,
    #[error("malformed PEM: {reason}")]
    Pem { reason: String },
    #[error("certificate {position} of it: {source}")]
    At { position: usize, source: Box<InvalidCertificate> },
    #[error("malformed certificate: {reason}")]
    Der { reason: String },
}

fn hex(bytes: &[u8]) -> String {
    let digits: String = bytes.iter().map(|byte| format!("{byte:02X}")).collect();
    // DER puts a zero byte before a serial whose top bit is set.
    match digits.strip_prefix("00") {
        Some(rest) if !rest.is_empty() => rest.into(),
        _ => digits,
    }
}

pub(super) fn at(unix: i64) -> SystemTime {
    let distance = Duration::from_secs(unix.unsigned_abs());
    let at = if unix < 0 {
        SystemTime::UNIX_EPOCH.checked_sub(distance)
    } else {
        SystemTime::UNIX_EPOCH.checked_add(distance)
    };
    at.unwrap_or(SystemTime::UNIX_EPOCH)
}
