//! The peers of open tunnels: who they proved to be, and whether what proved it still counts.
//!
//! A handshake judges a peer once; a tunnel may live for weeks after it. What a peer proved itself with is kept, once
//! for all tunnels to the same peer, and judged again by the same verifier whenever roots or revocation lists change.
//! Time alone ends no stream: who was proven when it began stays proven, and renewal leaves established connections
//! alone. But a certificate that has run out begins no new stream, so its idle tunnels are not used again.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::SystemTime;

use aws_lc_rs::digest;
use rustls_pki_types::{CertificateDer, UnixTime};
use tokio::sync::Notify;

use crate::identity::{Identity, SpiffeId, TrustBundle};

use super::order::Role;
use super::pool::Pool;
use super::sweep::Sweep;
use super::verify::{Expected, HandshakeFailure, Subject, Verifier};

/// An authenticated peer: made only here, and only out of a certificate that the handshake proved.
#[derive(Debug, Clone)]
pub struct Peer(Arc<Proven>);

#[derive(Debug)]
struct Proven {
    subject: Subject,
    /// Who we were to it.
    ours: SpiffeId,
    role: Role,
    chain: Vec<CertificateDer<'static>>,
    accepted: UnixTime,
    distrusted: OnceLock<HandshakeFailure>,
    told: Notify,
}

impl Peer {
    pub fn id(&self) -> &SpiffeId {
        &self.0.subject.id
    }

    /// Demands that the peer is the workload that was dialled.
    pub(crate) fn expect(&self, expected: &SpiffeId) -> Result<Expected, HandshakeFailure> {
        self.0.subject.expect(expected)
    }

    /// Why the peer's proof no longer counts, whatever its tunnel is doing.
    pub fn distrusted(&self) -> Option<HandshakeFailure> {
        self.0.distrusted.get().copied()
    }

    /// Resolves when the peer's proof no longer counts; pending until then. Cancel-safe.
    pub async fn until_distrusted(&self) -> HandshakeFailure {
        loop {
            let mut told = std::pin::pin!(self.0.told.notified());
            // Registered before the check, so that a judgement in between is not missed.
            told.as_mut().enable();
            if let Some(failure) = self.distrusted() {
                return failure;
            }
            told.await;
        }
    }

    /// Why no stream may begin with this peer now.
    pub(crate) fn unfit(&self) -> Option<HandshakeFailure> {
        let expired = || (self.0.subject.not_after < SystemTime::now()).then_some(HandshakeFailure::Expired);
        self.distrusted().or_else(expired)
    }

    pub(crate) fn not_after(&self) -> SystemTime {
        self.0.subject.not_after
    }

    fn judge(&self, verifier: &Verifier) {
        let Proven { chain, accepted, role, .. } = &*self.0;
        match verifier.judge(chain, *accepted, *role) {
            // Time is judged when a stream begins.
            Ok(()) | Err(HandshakeFailure::Expired) => {}
            Err(failure) => self.distrust(failure),
        }
    }

    fn distrust(&self, failure: HandshakeFailure) {
        if self.0.distrusted.set(failure).is_ok() {
            tracing::warn!(peer = %self.id(), ours = %self.0.ours, %failure, "a peer is no longer trusted; its tunnels are reset");
            self.0.told.notify_waiters();
        }
    }
}

/// Every peer with an open tunnel on this node, and the idle tunnels that lead to them.
#[derive(Debug, Default)]
pub struct Peers {
    known: Mutex<Known>,
    /// What each of our identities judged by last.
    judged: Mutex<HashMap<SpiffeId, Arc<TrustBundle>>>,
    pools: Mutex<Vec<Weak<Pool>>>,
}

#[derive(Debug, Default)]
struct Known {
    /// By what each proved itself with, and to whom.
    proven: HashMap<Digest, Weak<Proven>>,
    /// Drops those without a tunnel.
    sweep: Sweep,
}

type Digest = [u8; digest::SHA256_OUTPUT_LEN];

impl Peers {
    /// A peer whose handshake with `identity` has just succeeded, its role being `role`.
    pub(super) fn admit(
        &self,
        identity: &Identity,
        role: Role,
        subject: Subject,
        chain: &[CertificateDer<'_>],
    ) -> Peer {
        let ours = &identity.svid.id;
        let digest = digest_of(ours, role, chain);
        let Known { proven, sweep } = &mut *lock(&self.known);
        let before = proven.get(&digest).and_then(Weak::upgrade).map(Peer);
        // A certificate that is trusted again, as after a hold, starts anew.
        if let Some(peer) = before.filter(|peer| peer.distrusted().is_none()) {
            return peer;
        }
        sweep.before_insert(proven, |peer| peer.strong_count() > 0);
        let peer = Arc::new(Proven {
            subject,
            ours: ours.clone(),
            role,
            chain: chain.iter().map(|certificate| certificate.clone().into_owned()).collect(),
            accepted: UnixTime::now(),
            distrusted: OnceLock::new(),
            told: Notify::new(),
        });
        proven.insert(digest, Arc::downgrade(&peer));
        Peer(peer)
    }

    /// Judges `peer` by a verifier that is newer than the one of its handshake.
    pub(super) fn judge(&self, peer: &Peer, verifier: &Verifier) {
        peer.judge(verifier);
    }

    /// Judges every peer of this identity again, if its bundle is another than before; resets idle tunnels to those
    /// that are no longer trusted. Streams in use end by [`Peer::until_distrusted`].
    pub(super) fn judge_all(&self, identity: &Identity, verifier: &Verifier) {
        let ours = &identity.svid.id;
        {
            let mut judged = lock(&self.judged);
            let before = judged.insert(ours.clone(), identity.bundle.clone());
            if before.is_some_and(|bundle| bundle == identity.bundle) {
                return;
            }
            // Of identities that this node no longer speaks for.
            judged.retain(|id, bundle| id == ours || Arc::strong_count(bundle) > 1);
        }
        let peers: Vec<_> = lock(&self.known).proven.values().filter_map(Weak::upgrade).map(Peer).collect();
        peers.iter().filter(|peer| peer.0.ours == *ours).for_each(|peer| peer.judge(verifier));
        lock(&self.pools).retain(|pool| match pool.upgrade() {
            Some(pool) => {
                pool.drop_distrusted();
                true
            }
            None => false,
        });
    }

    pub(super) fn serve(&self, pool: &Arc<Pool>) {
        lock(&self.pools).push(Arc::downgrade(pool));
    }
}

fn digest_of(ours: &SpiffeId, role: Role, chain: &[CertificateDer<'_>]) -> Digest {
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(ours.uri().as_bytes());
    context.update(&[0, role as u8]);
    // Certificates say how long they are.
    chain.iter().for_each(|certificate| context.update(certificate));
    let mut digest = Digest::default();
    digest.copy_from_slice(context.finish().as_ref());
    digest
}

/// What these locks guard is valid at every step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
