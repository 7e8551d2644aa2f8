//! Identities: SPIFFE IDs in, current certificates, keys and trust bundles out.
//!
//! Keys are made in memory and never leave it. Renewal happens here; established connections never notice.

use std::sync::Arc;
use std::time::SystemTime;

use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer};

mod spiffe;

pub use spiffe::{InvalidSpiffeId, SpiffeId, TrustDomain};

/// One identity's certificate chain (leaf first, intermediates after) and key, as the authority issued it.
#[derive(Debug)]
pub struct Svid {
    pub id: SpiffeId,
    pub chain: Vec<CertificateDer<'static>>,
    pub key: PrivatePkcs8KeyDer<'static>,
    /// Hex, as `openssl x509 -serial` prints it.
    pub serial: String,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
}

/// Roots that vouch for peers. More than one during a rotation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrustBundle {
    pub roots: Vec<CertificateDer<'static>>,
}

/// What the tunnel needs to speak for a workload; replaced whole at each renewal or root change.
#[derive(Debug)]
pub struct Identity {
    /// Rises with every replacement in this process: TLS configurations are cached by it.
    pub version: u64,
    pub svid: Arc<Svid>,
    pub bundle: Arc<TrustBundle>,
}
