//! Who the peer is: certificate chains in, a [`Subject`] out, or the [`HandshakeFailure`] that says why not.
//!
//! A peer is whoever the bundle's roots vouch for under exactly one SPIFFE ID of our trust domain. Names and addresses
//! prove nothing here. The verifiers answer rustls during the handshake; [`Subject::read`] and [`Subject::expect`]
//! answer for the connection afterwards, which covers resumed sessions too.

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    AlertDescription, CertificateError, DigitallySignedStruct, DistinguishedName, PeerIncompatible,
    SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, TrustAnchor, UnixTime};
use webpki::{EndEntityCert, KeyUsage};

use crate::identity::{Certificate, Revocations, SpiffeId, TrustBundle, TrustDomain};

use super::order::Role;

/// Why a handshake produced no authenticated peer, for both ends: the refused side learns it from the alert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HandshakeFailure {
    /// No root of the bundle vouches for the certificate.
    UnknownCa,
    /// Outside its validity.
    Expired,
    /// Not one SPIFFE ID, or not the one that was expected.
    WrongIdentity,
    WrongTrustDomain,
    NoCertificate,
    /// The certificate, or an intermediate above it, stands in a revocation list.
    Revoked,
    /// Not TLS 1.3, not `mtls/1`, or not understood.
    Protocol,
    Timeout,
    /// The connection broke before the handshake ended.
    Io,
}

impl HandshakeFailure {
    /// The metrics label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::UnknownCa => "unknown_ca",
            Self::Expired => "expired",
            Self::WrongIdentity => "wrong_identity",
            Self::WrongTrustDomain => "wrong_trust_domain",
            Self::NoCertificate => "no_certificate",
            Self::Revoked => "revoked",
            Self::Protocol => "protocol",
            Self::Timeout => "timeout",
            Self::Io => "io",
        }
    }

    pub(crate) fn of(error: &rustls::Error) -> Self {
        use CertificateError::*;
        match error {
            rustls::Error::AlertReceived(alert) => Self::of_alert(*alert),
            rustls::Error::NoCertificatesPresented => Self::NoCertificate,
            rustls::Error::InvalidCertificate(error) => match error {
                UnknownIssuer | BadSignature => Self::UnknownCa,
                Expired | ExpiredContext { .. } | NotValidYet | NotValidYetContext { .. } => Self::Expired,
                ApplicationVerificationFailure => Self::WrongTrustDomain,
                Revoked => Self::Revoked,
                _ => Self::WrongIdentity,
            },
            _ => Self::Protocol,
        }
    }

    /// What the peer's alert says it found wrong with us.
    pub(crate) fn of_alert(alert: AlertDescription) -> Self {
        match alert {
            AlertDescription::UnknownCA | AlertDescription::DecryptError => Self::UnknownCa,
            AlertDescription::CertificateExpired => Self::Expired,
            AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateUnknown => Self::WrongIdentity,
            AlertDescription::AccessDenied => Self::WrongTrustDomain,
            AlertDescription::CertificateRequired => Self::NoCertificate,
            AlertDescription::CertificateRevoked => Self::Revoked,
            _ => Self::Protocol,
        }
    }

    /// The alert that tells the peer.
    pub(crate) fn alert(self) -> u8 {
        u8::from(match self {
            Self::UnknownCa => AlertDescription::UnknownCA,
            Self::Expired => AlertDescription::CertificateExpired,
            Self::WrongIdentity => AlertDescription::BadCertificate,
            Self::WrongTrustDomain => AlertDescription::AccessDenied,
            Self::NoCertificate => AlertDescription::CertificateRequired,
            Self::Revoked => AlertDescription::CertificateRevoked,
            Self::Protocol | Self::Timeout | Self::Io => AlertDescription::UnexpectedMessage,
        })
    }
}

impl fmt::Display for HandshakeFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::UnknownCa => "certificate from an unknown authority",
            Self::Expired => "certificate outside its validity",
            Self::WrongIdentity => "wrong SPIFFE identity",
            Self::WrongTrustDomain => "wrong trust domain",
            Self::NoCertificate => "no certificate",
            Self::Revoked => "revoked certificate",
            Self::Protocol => "TLS protocol failure",
            Self::Timeout => "no answer in time",
            Self::Io => "the connection broke",
        })
    }
}

/// What a peer's leaf says of it.
#[derive(Debug, Clone)]
pub(crate) struct Subject {
    pub id: SpiffeId,
    pub not_after: SystemTime,
}

impl Subject {
    /// Reads the peer's identity after the handshake. A resumed session skipped the verifiers, so the leaf's validity
    /// is looked at again: a ticket must not outlive its certificate.
    pub fn read(
        leaf: &CertificateDer<'_>,
        ours: &TrustDomain,
        now: SystemTime,
    ) -> Result<Self, HandshakeFailure> {
        let id = spiffe_id(leaf).ok_or(HandshakeFailure::WrongIdentity)?;
        if id.trust_domain() != ours {
            return Err(HandshakeFailure::WrongTrustDomain);
        }
        let certificate = Certificate::parse(leaf).map_err(|_| HandshakeFailure::WrongIdentity)?;
        let Certificate { not_before, not_after, .. } = certificate;
        if now < not_before || not_after < now {
            return Err(HandshakeFailure::Expired);
        }
        Ok(Self { id, not_after })
    }

    /// Demands that the peer is the workload that was dialled.
    pub fn expect(&self, expected: &SpiffeId) -> Result<Expected, HandshakeFailure> {
        if self.id == *expected { Ok(Expected(())) } else { Err(HandshakeFailure::WrongIdentity) }
    }
}

/// Proof that the server is the workload the client dialled: without it no OPEN can be sent.
#[derive(Debug)]
pub(crate) struct Expected(());

/// Checks chains for both roles against one bundle and one trust domain.
pub(crate) struct Verifier {
    roots: Vec<TrustAnchor<'static>>,
    revocations: Arc<Revocations>,
    ours: TrustDomain,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Verifier {
    /// Fails on a root that is no certificate.
    pub fn new(
        bundle: &TrustBundle,
        ours: TrustDomain,
        algorithms: WebPkiSupportedAlgorithms,
    ) -> Result<Self, webpki::Error> {
        let roots = bundle
            .roots
            .iter()
            .map(|root| Ok(webpki::anchor_from_trusted_cert(root)?.to_owned()))
            .collect::<Result<_, webpki::Error>>()?;
        Ok(Self { roots, revocations: bundle.revocations.clone(), ours, algorithms })
    }

    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        usage: KeyUsage,
    ) -> Result<(), CertificateError> {
        EndEntityCert::try_from(leaf)
            .and_then(|cert| {
                cert.verify_for_usage(
                    self.algorithms.all,
                    &self.roots,
                    intermediates,
                    now,
                    usage,
                    None,
                    Some(&|path| self.revocations.check(path)),
                )
                .map(|_| ())
            })
            .map_err(certificate_error)?;
        let id = spiffe_id(leaf).ok_or(CertificateError::NotValidForName)?;
        if *id.trust_domain() != self.ours {
            return Err(CertificateError::ApplicationVerificationFailure);
        }
        Ok(())
    }
}

impl Verifier {
    /// Judges a chain that was accepted before, as of the time it was accepted.
    pub fn judge(
        &self,
        chain: &[CertificateDer<'_>],
        accepted: UnixTime,
        role: Role,
    ) -> Result<(), HandshakeFailure> {
        let (leaf, intermediates) = chain.split_first().ok_or(HandshakeFailure::NoCertificate)?;
        let usage = match role {
            Role::Client => KeyUsage::client_auth(),
            Role::Server => KeyUsage::server_auth(),
        };
        self.verify(leaf, intermediates, accepted, usage)
            .map_err(|error| HandshakeFailure::of(&rustls::Error::InvalidCertificate(error)))
    }
}

/// The one URI name, if it is a SPIFFE ID. Several URIs are none (X.509-SVID, section 2).
fn spiffe_id(leaf: &CertificateDer<'_>) -> Option<SpiffeId> {
    let cert = EndEntityCert::try_from(leaf).ok()?;
    let mut uris = cert.valid_uri_names();
    let id = uris.next()?.parse().ok()?;
    uris.next().is_none().then_some(id)
}

fn certificate_error(error: webpki::Error) -> CertificateError {
    match error {
        webpki::Error::CertExpired { time, not_after } => {
            CertificateError::ExpiredContext { time, not_after }
        }
        webpki::Error::CertNotValidYet { time, not_before } => {
            CertificateError::NotValidYetContext { time, not_before }
        }
        webpki::Error::InvalidCertValidity => CertificateError::Expired,
        webpki::Error::CertRevoked => CertificateError::Revoked,
        webpki::Error::UnknownIssuer => CertificateError::UnknownIssuer,
        webpki::Error::InvalidSignatureForPublicKey => CertificateError::BadSignature,
        webpki::Error::RequiredEkuNotFoundContext(_) => CertificateError::InvalidPurpose,
        _ => CertificateError::BadEncoding,
    }
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Verifier({}, {} roots)", self.ours, self.roots.len())
    }
}

// TLS 1.2 is not offered, so its signatures are never asked for; answering "no" keeps it so.
const NOT_TLS13: rustls::Error = rustls::Error::PeerIncompatible(PeerIncompatible::Tls13RequiredForQuic);

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.verify(leaf, intermediates, now, KeyUsage::server_auth())?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(NOT_TLS13)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // A client of the mesh has one certificate; hints would only make the flight longer.
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.verify(leaf, intermediates, now, KeyUsage::client_auth())?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(NOT_TLS13)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
