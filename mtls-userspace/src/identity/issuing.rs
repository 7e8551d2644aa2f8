//! One issuance: a SPIFFE ID and an authority in, a checked certificate with its key out.
//!
//! The key is made here, in memory, and shown to nobody. What the authority answers is not believed: identity,
//! key, validity and chain are checked, so that a misconfigured authority shows in the renewal's error and not in
//! every peer's handshake.

use std::time::{Duration, SystemTime};

use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer, UnixTime};
use zeroize::Zeroize;

use super::{Authority, Certificate, Error, Fault, Issued, SpiffeId, Svid, TrustBundle};

/// Obtains a certificate for a new key.
pub(super) async fn issue(
    authority: &dyn Authority,
    id: &SpiffeId,
    lifetime: Duration,
) -> Result<(Svid, TrustBundle), Error> {
    let key = Key::new().map_err(|source| Error::Request { id: id.clone(), source })?;
    let csr = key.csr(id).map_err(|source| Error::Request { id: id.clone(), source })?;
    let issued = authority.sign(id, csr, lifetime).await?;
    accept(id, issued, key.to_pkcs8(), |certificate| key.certified_by(certificate))
}

/// A certificate signing request (PKCS #10) for one identity.
#[derive(Clone, Debug)]
pub struct Csr {
    pem: String,
}

impl Csr {
    pub fn new(request: &rcgen::CertificateSigningRequest) -> Result<Self, rcgen::Error> {
        Ok(Self { pem: request.pem()? })
    }

    pub fn pem(&self) -> &str {
        &self.pem
    }
}

/// A private key on its way to a certificate; overwritten when dropped.
struct Key(KeyPair);

impl Key {
    fn new() -> Result<Self, rcgen::Error> {
        KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map(Self)
    }

    fn csr(&self, id: &SpiffeId) -> Result<Csr, rcgen::Error> {
        let mut params = CertificateParams::default();
        // SPIFFE: the URI is the name, the subject says nothing.
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(id.uri().try_into()?)];
        Csr::new(&params.serialize_request(&self.0)?)
    }

    fn certified_by(&self, certificate: &Certificate) -> bool {
        use rcgen::PublicKeyData;
        self.0.subject_public_key_info() == certificate.public_key
    }

    fn to_pkcs8(&self) -> PrivatePkcs8KeyDer<'static> {
        self.0.serialized_der().to_vec().into()
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

/// Checks an authority's answer for this identity. `certified` says whether the key is the certificate's.
pub(super) fn accept(
    id: &SpiffeId,
    issued: Issued,
    mut key: PrivatePkcs8KeyDer<'static>,
    certified: impl FnOnce(&Certificate) -> bool,
) -> Result<(Svid, TrustBundle), Error> {
    let bundle = TrustBundle::new(issued.roots);
    match judge(id, &issued.chain, &bundle, certified) {
        Ok(Certificate { serial, not_before, not_after, .. }) => {
            Ok((Svid { id: id.clone(), chain: issued.chain, key, serial, not_before, not_after }, bundle))
        }
        Err(error) => {
            key.zeroize();
            Err(error)
        }
    }
}

fn judge(
    id: &SpiffeId,
    chain: &[CertificateDer<'_>],
    bundle: &TrustBundle,
    certified: impl FnOnce(&Certificate) -> bool,
) -> Result<Certificate, Error> {
    let unusable = |fault| Error::Unusable { id: id.clone(), fault };
    let Some((leaf, intermediates)) = chain.split_first() else {
        return Err(Error::Answer { id: id.clone(), source: super::InvalidCertificate::None });
    };
    let certificate = Certificate::parse(leaf).map_err(|source| Error::Answer { id: id.clone(), source })?;
    if certificate.uris != [id.uri()] {
        return Err(unusable(Fault::Identity { found: certificate.uris }));
    }
    if !certified(&certificate) {
        return Err(unusable(Fault::Key));
    }
    let (not_before, not_after) = (certificate.not_before, certificate.not_after);
    let now = SystemTime::now();
    if now < not_before || not_after <= now {
        return Err(unusable(Fault::Validity { not_before, not_after }));
    }
    verify(leaf, intermediates, bundle).map_err(|error| unusable(Fault::Chain(error)))?;
    Ok(certificate)
}

/// A peer's view of the chain, in both directions that peers can meet us.
pub(super) fn verify(
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    bundle: &TrustBundle,
) -> Result<(), webpki::Error> {
    let TrustBundle { roots, revocations } = bundle;
    let anchors = roots.iter().map(webpki::anchor_from_trusted_cert).collect::<Result<Vec<_>, _>>()?;
    let leaf = webpki::EndEntityCert::try_from(leaf)?;
    for usage in [webpki::KeyUsage::client_auth(), webpki::KeyUsage::server_auth()] {
        leaf.verify_for_usage(
            webpki::ALL_VERIFICATION_ALGS,
            &anchors,
            intermediates,
            UnixTime::now(),
            usage,
            None,
            Some(&|path| revocations.check(path)),
        )?;
    }
    Ok(())
}
