//! One direction's record key: the secret is kept small, its expansion is shared per thread.
//!
//! An expanded AES-GCM key has some 600 bytes, and a connection has two. Those of connections that move bytes stay in
//! a small cache; an idle connection's make room for others and are expanded again, in a few hundred nanoseconds,
//! when it wakes.

use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};

use aws_lc_rs::aead::{
    AES_128_GCM, AES_256_GCM, Algorithm, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey,
};
use rustls::ConnectionTrafficSecrets;
use zeroize::Zeroizing;

use super::record::RecordError;

/// Expanded keys kept per thread: 256 connections' worth.
const KEPT: usize = 512;

static NEXT: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static EXPANDED: RefCell<Vec<Option<Expanded>>> = const { RefCell::new(Vec::new()) };
}

struct Expanded {
    owner: u64,
    key: LessSafeKey,
}

/// A key, its nonce base and its record counter.
pub(super) struct Key {
    /// Never used twice in this process: says whose expansion the cache holds.
    id: u64,
    algorithm: &'static Algorithm,
    secret: Zeroizing<[u8; 32]>,
    pub iv: [u8; 12],
    pub sequence: u64,
    /// Records that may pass under one key (RFC 8446, 5.5).
    pub limit: u64,
}

impl Key {
    pub fn new(sequence: u64, secrets: &ConnectionTrafficSecrets) -> Result<Self, RecordError> {
        // 2^24 full records is AES-GCM's confidentiality limit; ChaCha20-Poly1305 has none before the counter ends.
        let (algorithm, key, iv, limit) = match secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv, 1 << 24),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv, 1 << 24),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (&CHACHA20_POLY1305, key, iv, u64::MAX),
            _ => return Err(RecordError::UnusableKey),
        };
        let mut secret = Zeroizing::new([0; 32]);
        let length = algorithm.key_len();
        let (Some(to), Some(from)) = (secret.get_mut(..length), key.as_ref().get(..length)) else {
            return Err(RecordError::UnusableKey);
        };
        to.copy_from_slice(from);
        let iv = iv.as_ref().try_into().map_err(|_| RecordError::UnusableKey)?;
        Ok(Self { id: NEXT.fetch_add(1, Ordering::Relaxed), algorithm, secret, iv, sequence, limit })
    }

    /// Uses the key with the nonce of the next record; each nonce is given out once.
    pub fn next<R>(&mut self, work: impl FnOnce(&LessSafeKey, Nonce) -> R) -> Result<R, RecordError> {
        if self.sequence >= self.limit {
            return Err(RecordError::KeyExhausted);
        }
        let mut nonce = self.iv;
        for (byte, counter) in nonce[4..].iter_mut().zip(self.sequence.to_be_bytes()) {
            *byte ^= counter;
        }
        let nonce = Nonce::assume_unique_for_key(nonce);
        EXPANDED.with_borrow_mut(|kept| {
            if kept.is_empty() {
                kept.resize_with(KEPT, || None);
            }
            let place = &mut kept[self.id as usize % KEPT];
            let expanded = match place {
                Some(expanded) if expanded.owner == self.id => expanded,
                _ => place.insert(Expanded { owner: self.id, key: self.expand()? }),
            };
            self.sequence += 1;
            Ok(work(&expanded.key, nonce))
        })
    }

    pub fn algorithm(&self) -> &'static Algorithm {
        self.algorithm
    }

    pub fn secret(&self) -> &[u8] {
        self.secret.get(..self.algorithm.key_len()).unwrap_or_default()
    }

    fn expand(&self) -> Result<LessSafeKey, RecordError> {
        let secret = self.secret();
        let unbound = UnboundKey::new(self.algorithm, secret).map_err(|_| RecordError::UnusableKey)?;
        Ok(LessSafeKey::new(unbound))
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        // A connection lives on one thread. The expansion of one that did not is overwritten by the next taker.
        let _ = EXPANDED.try_with(|kept| {
            if let Ok(mut kept) = kept.try_borrow_mut()
                && let Some(place) = kept.get_mut(self.id as usize % KEPT)
                && place.as_ref().is_some_and(|expanded| expanded.owner == self.id)
            {
                *place = None;
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tunnel::{ContentType, Opener, Sealer};
    use rustls::crypto::cipher::{AeadKey, Iv};

    /// More connections than the cache holds, used in turn: each keeps its own key.
    #[test]
    fn connections_that_share_a_place_do_not_share_a_key() {
        let mut ends: Vec<_> = (0..KEPT as u32 + 50)
            .map(|i| {
                let mut key = [0; 32];
                key[..4].copy_from_slice(&i.to_be_bytes());
                let secrets =
                    ConnectionTrafficSecrets::Aes128Gcm { key: AeadKey::from(key), iv: Iv::from([1; 12]) };
                (Sealer::new(0, &secrets).unwrap(), Opener::new(0, &secrets).unwrap())
            })
            .collect();
        for round in 0..3 {
            for (sealer, opener) in &mut ends {
                let mut record = [round; 64];
                let n = sealer.seal(&mut record, 10, ContentType::ApplicationData).unwrap();
                let (_, range) = opener.open(&mut record[..n]).unwrap();
                assert_eq!(record[range], [round; 10]);
            }
        }
        let (first, last) = ends.split_first_mut().unwrap();
        let mut record = [0; 64];
        let n = first.0.seal(&mut record, 10, ContentType::ApplicationData).unwrap();
        assert!(last[0].1.open(&mut record[..n]).is_err());
    }
}
