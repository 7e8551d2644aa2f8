//! The signing half: a checked request in, a chain out. Asks nobody who is calling.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType, SerialNumber,
    SignatureAlgorithm,
};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer, UnixTime};
use zeroize::Zeroize;

use super::directory::{self, Contents, Stored};
use super::{Error, request::Request};
use crate::identity::{Certificate, Revocations, SpiffeId, TrustDomain, to_pem};

/// Certificates are dated back by this much, for peers whose clocks are behind.
const DATED_BACK: Duration = Duration::from_secs(60);
const ROOT_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
const SERVER_LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// A signing key with its certificate, the way up to the roots, and the roots.
pub struct CertificateAuthority {
    trust_domain: TrustDomain,
    signer: CertificateDer<'static>,
    issuer: Issuer<'static, SigningKey>,
    /// From the signing certificate towards the root, roots left out; empty when a root signs.
    intermediates: Vec<CertificateDer<'static>>,
    roots: Vec<CertificateDer<'static>>,
    revocations: Arc<Revocations>,
    /// The earliest end among signing certificate and intermediates.
    not_after: SystemTime,
    leaf_lifetime: Duration,
}

impl CertificateAuthority {
    /// Makes a root that ends with this process.
    pub fn in_memory(trust_domain: TrustDomain, leaf_lifetime: Duration) -> Result<Self, Error> {
        let (root, key) = make_root(&trust_domain)?;
        Self::new(trust_domain, leaf_lifetime, Stored::root(root, key))
    }

    /// Reads the authority from a directory laid out as Istio's `cacerts`; makes a root there if it has none of the
    /// files.
    ///
    /// # Errors
    ///
    /// An incomplete, mismatched, expired or unreadable directory, each named with its file. Never makes a root then.
    pub fn at(dir: &Path, trust_domain: TrustDomain, leaf_lifetime: Duration) -> Result<Self, Error> {
        let stored = match directory::read(dir)? {
            Some(stored) => stored,
            None => {
                let (root, key) = make_root(&trust_domain)?;
                directory::write(dir, &Contents::root(&root, &key))?;
                tracing::info!(dir = %dir.display(), "made a root, because the directory had none");
                Stored::root(root, key)
            }
        };
        Self::proven(dir, trust_domain, leaf_lifetime, stored)
    }

    /// Reads a directory that was an authority's before.
    ///
    /// # Errors
    ///
    /// As [`Self::at`], but a directory without any of the files is an error too.
    pub(super) fn again(
        dir: &Path,
        trust_domain: TrustDomain,
        leaf_lifetime: Duration,
    ) -> Result<Self, Error> {
        let stored = directory::read(dir)?.ok_or_else(|| Error::Emptied { dir: dir.into() })?;
        Self::proven(dir, trust_domain, leaf_lifetime, stored)
    }

    /// The files of a root made now.
    pub(super) fn new_root(trust_domain: &TrustDomain) -> Result<Contents, Error> {
        let (root, key) = make_root(trust_domain)?;
        Ok(Contents::root(&root, &key))
    }

    /// An authority of files that are kept anywhere; `dir` names the place in errors.
    pub(super) fn proven(
        dir: &Path,
        trust_domain: TrustDomain,
        leaf_lifetime: Duration,
        stored: Stored,
    ) -> Result<Self, Error> {
        let authority = Self::new(trust_domain, leaf_lifetime, stored)?;
        authority.prove().map_err(|fault| match fault {
            Unproven::Chain(source) => Error::Chain { dir: dir.into(), source },
            Unproven::Own(error) => error,
        })?;
        Ok(authority)
    }

    fn new(trust_domain: TrustDomain, leaf_lifetime: Duration, stored: Stored) -> Result<Self, Error> {
        let Stored { signer, key, intermediates, roots, revocations } = stored;
        let issuer = Issuer::from_ca_cert_der(&signer, key)
            .map_err(|source| Error::Make { what: "an issuer of the signing certificate", source })?;
        let not_after = std::iter::once(&signer)
            .chain(&intermediates)
            .filter_map(|certificate| Certificate::parse(certificate).ok())
            .map(|certificate| certificate.not_after)
            .min()
            .unwrap_or(SystemTime::UNIX_EPOCH);
        let revocations = Arc::new(revocations);
        Ok(Self { trust_domain, signer, issuer, intermediates, roots, revocations, not_after, leaf_lifetime })
    }

    /// Whether both sign with the same certificate, vouch by the same chain and roots, and revoke the same.
    pub(super) fn same_as(&self, other: &Self) -> bool {
        self.signer == other.signer
            && self.intermediates == other.intermediates
            && self.roots == other.roots
            && self.revocations == other.revocations
    }

    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    pub fn revocations(&self) -> &Revocations {
        &self.revocations
    }

    /// What agents need to trust this authority.
    pub fn root_bundle(&self) -> String {
        to_pem(&self.roots)
    }

    /// When this authority can sign no more.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// SHA-256 of the first root, as `openssl x509 -fingerprint -sha256` prints it.
    pub fn root_fingerprint(&self) -> String {
        let root = self.roots.first().map(AsRef::as_ref).unwrap_or_default();
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, root);
        digest.as_ref().iter().map(|byte| format!("{byte:02X}")).collect::<Vec<_>>().join(":")
    }

    /// Signs for a workload; the answer is leaf, intermediates, roots. `lifetime` zero means as long as is given.
    pub(super) fn sign(&self, request: &Request, lifetime: Duration) -> Result<Signed, Error> {
        let lifetime = if lifetime.is_zero() { self.leaf_lifetime } else { lifetime.min(self.leaf_lifetime) };
        let name = request
            .identity
            .uri()
            .try_into()
            .map_err(|source| Error::Make { what: "a certificate's name", source })?;
        let (leaf, not_after) = self.leaf(
            &request.public_key,
            vec![SanType::URI(name)],
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth],
            lifetime,
        )?;
        let mut chain = vec![leaf];
        chain.extend(self.intermediates.iter().cloned());
        chain.extend(self.roots.iter().cloned());
        Ok(Signed { chain, not_after })
    }

    /// The certificate of this authority's own address, with a new key. Fit for nothing but serving.
    pub(super) fn sign_server(&self, names: &[String]) -> Result<ServerCertificate, Error> {
        let make = |source| Error::Make { what: "the authority's server key", source };
        let key = SigningKey::new().map_err(make)?;
        let names = names.iter().map(|name| {
            Ok(match name.parse() {
                Ok(ip) => SanType::IpAddress(ip),
                Err(_) => SanType::DnsName(
                    name.as_str().try_into().map_err(|_| Error::Name { name: name.clone() })?,
                ),
            })
        });
        let names = names.collect::<Result<_, Error>>()?;
        let usage = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let (leaf, not_after) = self.leaf(&key, names, usage, SERVER_LIFETIME)?;
        let mut chain = vec![leaf];
        chain.extend(self.intermediates.iter().cloned());
        Ok(ServerCertificate { chain, key: key.0.serialized_der().to_vec().into(), not_after })
    }

    fn leaf(
        &self,
        public_key: &impl PublicKeyData,
        names: Vec<SanType>,
        usages: Vec<ExtendedKeyUsagePurpose>,
        lifetime: Duration,
    ) -> Result<(CertificateDer<'static>, SystemTime), Error> {
        let now = SystemTime::now();
        if self.not_after <= now {
            return Err(Error::Expired { not_after: self.not_after });
        }
        // Certificates count whole seconds; up, or a lifetime of seconds would lose most of one.
        let not_after = ceil(now + lifetime).min(self.not_after);
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = names;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = usages;
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(serial());
        params.not_before = date(now - DATED_BACK);
        params.not_after = date(not_after);
        let certificate = params
            .signed_by(public_key, &self.issuer)
            .map_err(|source| Error::Make { what: "a certificate", source })?;
        Ok((certificate.into(), not_after))
    }

    /// Signs a trial certificate and verifies it as a peer would: key, chain, dates and constraints in one.
    fn prove(&self) -> Result<(), Unproven> {
        let make = |source| Unproven::Own(Error::Make { what: "a trial certificate", source });
        let key = SigningKey::new().map_err(make)?;
        let identity = SpiffeId::new(&self.trust_domain, "trial", "trial")
            .map_err(|_| make(rcgen::Error::CouldNotParseCertificate))?;
        let name = identity.uri().try_into().map_err(make)?;
        let usage = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let (leaf, _) = self
            .leaf(&key, vec![SanType::URI(name)], usage, Duration::from_secs(60))
            .map_err(Unproven::Own)?;
        // A peer's verifier may not look at a root's dates, OpenSSL does: count only roots that are valid now.
        let now = SystemTime::now();
        let valid = self.roots.iter().filter(|root| {
            Certificate::parse(root).is_ok_and(|root| root.not_before <= now && now < root.not_after)
        });
        let anchors = valid
            .map(webpki::anchor_from_trusted_cert)
            .collect::<Result<Vec<_>, _>>()
            .map_err(Unproven::Chain)?;
        webpki::EndEntityCert::try_from(&leaf)
            .and_then(|leaf| {
                leaf.verify_for_usage(
                    webpki::ALL_VERIFICATION_ALGS,
                    &anchors,
                    &self.intermediates,
                    UnixTime::now(),
                    webpki::KeyUsage::client_auth(),
                    None,
                    Some(&|path| self.revocations.check(path)),
                )
                .map(|_| ())
            })
            .map_err(Unproven::Chain)
    }
}

/// A workload's certificate with the way up.
pub(super) struct Signed {
    pub chain: Vec<CertificateDer<'static>>,
    pub not_after: SystemTime,
}

/// The authority's own.
pub(super) struct ServerCertificate {
    pub chain: Vec<CertificateDer<'static>>,
    pub key: PrivatePkcs8KeyDer<'static>,
    pub not_after: SystemTime,
}

enum Unproven {
    Chain(webpki::Error),
    Own(Error),
}

/// A private key that signs; overwritten when dropped.
pub(super) struct SigningKey(pub(super) KeyPair);

impl SigningKey {
    fn new() -> Result<Self, rcgen::Error> {
        KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map(Self)
    }
}

impl PublicKeyData for SigningKey {
    fn der_bytes(&self) -> &[u8] {
        self.0.der_bytes()
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        PublicKeyData::algorithm(&self.0)
    }
}

impl rcgen::SigningKey for SigningKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        self.0.sign(message)
    }
}

impl Drop for SigningKey {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

fn make_root(trust_domain: &TrustDomain) -> Result<(CertificateDer<'static>, SigningKey), Error> {
    let make = |source| Error::Make { what: "a root", source };
    let key = SigningKey::new().map_err(make)?;
    let now = SystemTime::now();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, trust_domain.as_str());
    params.distinguished_name.push(DnType::CommonName, "mtls root");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.serial_number = Some(serial());
    params.not_before = date(now - DATED_BACK);
    params.not_after = date(now + ROOT_LIFETIME);
    let root = params.self_signed(&key).map_err(make)?;
    Ok((root.into(), key))
}

/// RFC 5280, section 4.1.2.2: positive, at most 20 octets; here 126 random bits.
fn serial() -> SerialNumber {
    let mut bytes: [u8; 16] = rand::random();
    bytes[0] = bytes[0] & 0x3f | 0x40;
    SerialNumber::from_slice(&bytes)
}

fn ceil(at: SystemTime) -> SystemTime {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let seconds = since.as_secs() + u64::from(since.subsec_nanos() > 0);
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

fn date(at: SystemTime) -> time::OffsetDateTime {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let seconds = i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
    time::OffsetDateTime::from_unix_timestamp(seconds).unwrap_or(time::OffsetDateTime::UNIX_EPOCH)
}
