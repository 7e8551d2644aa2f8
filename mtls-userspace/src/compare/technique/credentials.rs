//! Identities for two relays, from an authority made on the spot and forgotten.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Result;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair, SanType,
};
use rustls_pki_types::PrivatePkcs8KeyDer;

use crate::identity::{Identity, SpiffeId, Svid, TrustBundle};

pub(in crate::compare) struct Credentials {
    pub near: Arc<Identity>,
    pub far: Arc<Identity>,
}

impl Credentials {
    pub fn make() -> Result<Self> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        let identity = |version, id: &str| -> Result<Arc<Identity>> {
            let mut params = CertificateParams::new(Vec::new())?;
            params.subject_alt_names = vec![SanType::URI(id.try_into()?)];
            params.extended_key_usages =
                vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
            let key = KeyPair::generate()?;
            let id: SpiffeId = id.parse()?;
            Ok(Arc::new(Identity {
                version,
                svid: Arc::new(Svid {
                    id,
                    chain: vec![params.signed_by(&key, &authority)?.der().clone()],
                    key: PrivatePkcs8KeyDer::from(key.serialize_der()),
                    serial: "1".into(),
                    not_before: SystemTime::now(),
                    not_after: SystemTime::now() + Duration::from_secs(24 * 3600),
                }),
                bundle: Arc::new(TrustBundle::new(vec![authority.der().clone()])),
            }))
        };
        Ok(Self {
            near: identity(1, "spiffe://cluster.local/ns/lab/sa/near")?,
            far: identity(2, "spiffe://cluster.local/ns/lab/sa/far")?,
        })
    }
}
