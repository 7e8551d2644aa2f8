//! Whether a chain proves an identity, asked again at any time: what a peer with the same roots would find.

use std::time::SystemTime;

use rustls_pki_types::CertificateDer;

use super::issuing::verify;
use super::{Certificate, Fault, Identity, SpiffeId, TrustBundle};

impl Identity {
    /// Judges the certificate in use against the bundle in force, now.
    ///
    /// # Errors
    ///
    /// What a peer would refuse it for.
    pub fn verify(&self) -> Result<(), Fault> {
        prove(&self.svid.id, &self.svid.chain, &self.bundle)
    }
}

fn prove(id: &SpiffeId, chain: &[CertificateDer<'_>], bundle: &TrustBundle) -> Result<(), Fault> {
    let Some((leaf, intermediates)) = chain.split_first() else {
        return Err(Fault::Malformed(super::InvalidCertificate::None));
    };
    let certificate = Certificate::parse(leaf).map_err(Fault::Malformed)?;
    if certificate.uris != [id.uri()] {
        return Err(Fault::Identity { found: certificate.uris });
    }
    let (not_before, not_after) = (certificate.not_before, certificate.not_after);
    let now = SystemTime::now();
    if now < not_before || not_after <= now {
        return Err(Fault::Validity { not_before, not_after });
    }
    verify(leaf, intermediates, bundle).map_err(Fault::Chain)
}

#[cfg(test)]
mod tests {
    use rcgen::{
        BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType,
    };
    use time::{Duration, OffsetDateTime};

    use super::*;

    const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";

    struct Authority {
        issuer: Issuer<'static, KeyPair>,
        root: CertificateDer<'static>,
    }

    fn authority(name: &str) -> Authority {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::OrganizationName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = params.self_signed(&key).unwrap().der().clone();
        Authority { issuer: Issuer::new(params, key), root }
    }

    fn leaf(authority: &Authority, id: &str, from: i64, to: i64) -> CertificateDer<'static> {
        let mut params = CertificateParams::default();
        let now = OffsetDateTime::now_utc();
        (params.not_before, params.not_after) = (now + Duration::hours(from), now + Duration::hours(to));
        params.subject_alt_names = vec![SanType::URI(id.try_into().unwrap())];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        params.signed_by(&KeyPair::generate().unwrap(), &authority.issuer).unwrap().der().clone()
    }

    #[test]
    fn a_certificate_proves_its_own_identity_in_its_own_time_under_its_own_root() {
        let (ours, foreign) = (authority("ours"), authority("foreign"));
        let id = WEB.parse().unwrap();
        let prove = |chain: &[CertificateDer<'_>], root: &Authority| {
            prove(&id, chain, &TrustBundle::new(vec![root.root.clone()])).map_err(|fault| fault.to_string())
        };
        let good = leaf(&ours, WEB, -1, 1);
        assert_eq!(prove(std::slice::from_ref(&good), &ours), Ok(()));

        let other = leaf(&ours, "spiffe://cluster.local/ns/shop/sa/other", -1, 1);
        let refused = [
            (vec![good], &foreign, "leads to no root"),
            (vec![other], &ours, "sa/other"),
            (vec![leaf(&ours, WEB, -2, -1)], &ours, "compare the clocks"),
            (vec![leaf(&ours, WEB, 1, 2)], &ours, "compare the clocks"),
            (vec![CertificateDer::from(vec![1, 2, 3])], &ours, "malformed"),
            (vec![], &ours, "no PEM block"),
        ];
        for (chain, root, expected) in refused {
            let said = prove(&chain, root).unwrap_err();
            assert!(said.contains(expected), "{expected}: {said}");
        }
    }
}
