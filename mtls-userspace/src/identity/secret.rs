//! Private keys on their way into rustls, which keeps none of their bytes and overwrites none of them either.

use rustls::crypto::aws_lc_rs::sign::any_supported_type;
use rustls::sign::CertifiedKey;
use rustls::{Error, InconsistentKeys};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use zeroize::Zeroize;

/// A chain with its key as rustls uses them; the bytes given are overwritten.
///
/// # Errors
///
/// When the key can't be read, or is not the one that the leaf certifies.
pub(crate) fn certified(
    chain: Vec<CertificateDer<'static>>,
    mut key: PrivateKeyDer<'static>,
) -> Result<CertifiedKey, Error> {
    let signing = any_supported_type(&key);
    key.zeroize();
    let certified = CertifiedKey::new(chain, signing?);
    match certified.keys_match() {
        Ok(()) | Err(Error::InconsistentKeys(InconsistentKeys::Unknown)) => Ok(certified),
        Err(error) => Err(error),
    }
}
