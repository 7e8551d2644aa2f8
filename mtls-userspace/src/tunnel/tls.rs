//! TLS configurations: an identity version in, one rustls client and one server configuration out, built once.
//!
//! A worker looks them up per connection and builds nothing. Sessions can be resumed only within one identity version:
//! tickets and stored sessions belong to a configuration and end with it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use arc_swap::ArcSwap;
use rustls::client::{ClientSessionMemoryCache, Resumption};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::sign::SingleCertAndKey;
use rustls::version::TLS13;
use rustls::{ClientConfig, ServerConfig};
use rustls_pki_types::PrivateKeyDer;

use crate::identity::{Identity, SpiffeId, certified};

use super::Error;
use super::order::Version;
use super::schedule::Ear;
use super::verify::Verifier;

/// What an agent offers, the best first.
const ALPN: [(&[u8], Version); 3] =
    [(b"mtls/1.2", Version::Shared), (b"mtls/1.1", Version::Raw), (b"mtls/1", Version::Plain)];
/// Destinations whose sessions one identity remembers.
const SESSIONS: usize = 1024;

fn offers() -> Vec<Vec<u8>> {
    ALPN.map(|(name, _)| name.to_vec()).to_vec()
}

/// What a name that both ends took means.
pub(crate) fn agreed(name: Option<&[u8]>) -> Option<Version> {
    ALPN.iter().find(|(known, _)| Some(*known) == name).map(|&(_, version)| version)
}

/// Both roles of one identity version.
#[derive(Debug)]
pub(crate) struct Configs {
    pub client: Arc<ClientConfig>,
    pub server: Arc<ServerConfig>,
    pub verifier: Arc<Verifier>,
    version: u64,
    /// When the identity's owner has let go of it, nobody will ask again.
    identity: Weak<Identity>,
}

impl Configs {
    fn build(identity: &Arc<Identity>) -> Result<Self, Error> {
        let id = &identity.svid.id;
        let unusable = |source| Error::Credentials { id: id.clone(), source };
        let provider = Arc::new(provider());
        let verifier = Verifier::new(
            &identity.bundle,
            id.trust_domain().clone(),
            provider.signature_verification_algorithms,
        )
        .map_err(|source| Error::Bundle { id: id.clone(), source })?;
        let verifier = Arc::new(verifier);
        let key = PrivateKeyDer::Pkcs8(identity.svid.key.clone_key());
        let certified = certified(identity.svid.chain.clone(), key).map_err(unusable)?;
        let certified = Arc::new(SingleCertAndKey::from(certified));

        let mut client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])
            .map_err(unusable)?
            .dangerous()
            .with_custom_certificate_verifier(verifier.clone())
            .with_client_cert_resolver(certified.clone());
        client.alpn_protocols = offers();
        client.enable_sni = false;
        client.enable_secret_extraction = true;
        client.key_log = Arc::new(Ear);
        client.resumption = Resumption::store(Arc::new(ClientSessionMemoryCache::new(SESSIONS)));

        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(unusable)?
            .with_client_cert_verifier(verifier.clone())
            .with_cert_resolver(certified);
        server.alpn_protocols = offers();
        server.enable_secret_extraction = true;
        server.key_log = Arc::new(Ear);
        server.ticketer = aws_lc_rs::Ticketer::new().map_err(unusable)?;
        // Each ticket is used once; a tunnel that is reused needs no second.
        server.send_tls13_tickets = 1;

        Ok(Self {
            client: Arc::new(client),
            server: Arc::new(server),
            verifier,
            version: identity.version,
            identity: Arc::downgrade(identity),
        })
    }
}

fn provider() -> CryptoProvider {
    use aws_lc_rs::{cipher_suite::*, kx_group::*};
    let aes = [TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384];
    let cipher_suites = if has_aes() {
        [&aes[..], &[TLS13_CHACHA20_POLY1305_SHA256]].concat()
    } else {
        [&[TLS13_CHACHA20_POLY1305_SHA256], &aes[..]].concat()
    };
    CryptoProvider {
        cipher_suites,
        kx_groups: vec![X25519MLKEM768, X25519, SECP256R1],
        ..aws_lc_rs::default_provider()
    }
}

fn has_aes() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::is_x86_feature_detected!("aes") && std::is_x86_feature_detected!("pclmulqdq");
    #[cfg(target_arch = "aarch64")]
    return std::arch::is_aarch64_feature_detected!("aes");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    return false;
}

/// The current configurations of every identity, shared by all workers.
#[derive(Debug, Default)]
pub struct TlsConfigs {
    current: ArcSwap<HashMap<SpiffeId, Arc<Configs>>>,
    building: Mutex<()>,
}

impl TlsConfigs {
    /// The configurations of a later version of this identity, if they are there.
    pub(super) fn newer(&self, identity: &Identity) -> Option<Arc<Configs>> {
        let newest = self.current.load().get(&identity.svid.id).cloned();
        newest.filter(|newest| newest.version > identity.version)
    }

    /// The configurations of this identity version; built at its first use.
    pub(crate) fn of(&self, identity: &Arc<Identity>) -> Result<Arc<Configs>, Error> {
        let known = |configs: &Arc<Configs>| configs.version == identity.version;
        if let Some(configs) = self.current.load().get(&identity.svid.id).filter(|c| known(c)) {
            return Ok(configs.clone());
        }
        let _building = self.building.lock().unwrap_or_else(PoisonError::into_inner);
        let current = self.current.load();
        let newest = current.get(&identity.svid.id);
        if let Some(configs) = newest.filter(|c| known(c)) {
            return Ok(configs.clone());
        }
        let built = Arc::new(Configs::build(identity)?);
        // Whoever still works with a superseded identity may finish, but doesn't displace its successor.
        if newest.is_none_or(|newest| newest.version < identity.version) {
            let mut next = HashMap::clone(&current);
            next.retain(|_, configs| configs.identity.strong_count() > 0);
            next.insert(identity.svid.id.clone(), built.clone());
            self.current.store(Arc::new(next));
        }
        Ok(built)
    }
}
