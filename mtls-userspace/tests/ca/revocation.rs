//! Revocation lists: in the authority's directory and in an agent's own file, live to every agent, and broken ones.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mtls::ca::{CertificateAuthority, Error, InForce};
use mtls::identity::{
    Authority, Config, Csr, Error as IdentityError, Identities, Identity, Issued, SpiffeId,
};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType, IsCa, Issuer, KeyIdMethod,
    KeyPair, KeyUsagePurpose, RevokedCertParams, SerialNumber,
};

use crate::bench::*;

/// An operator's root, whose key is at hand to sign lists.
struct Root {
    key: KeyPair,
    params: CertificateParams,
}

impl Root {
    fn new(usages: &[KeyUsagePurpose]) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "operator");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = usages.to_vec();
        Self { key: KeyPair::generate().unwrap(), params }
    }

    fn store(&self, dir: &Path) {
        let root = self.params.self_signed(&self.key).unwrap().pem();
        for name in ["ca-cert.pem", "cert-chain.pem", "root-cert.pem"] {
            std::fs::write(dir.join(name), &root).unwrap();
        }
        std::fs::write(dir.join("ca-key.pem"), self.key.serialize_pem()).unwrap();
    }

    fn list(&self, number: u64, revoked: &[&Identity]) -> String {
        let now = time::OffsetDateTime::now_utc();
        let entry = |identity: &&Identity| {
            let (_, leaf) = x509_parser::parse_x509_certificate(&identity.svid.chain[0]).unwrap();
            RevokedCertParams {
                serial_number: SerialNumber::from_slice(leaf.raw_serial()),
                revocation_time: now,
                reason_code: None,
                invalidity_date: None,
            }
        };
        let list = CertificateRevocationListParams {
            this_update: now,
            next_update: now + time::Duration::days(1),
            crl_number: SerialNumber::from(number),
            issuing_distribution_point: None,
            revoked_certs: revoked.iter().map(entry).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        // Signs even where it may not.
        let mut params = self.params.clone();
        params.key_usages = MAY_REVOKE.to_vec();
        list.signed_by(&Issuer::from_params(&params, &self.key)).unwrap().pem().unwrap()
    }
}

const MAY_REVOKE: [KeyUsagePurpose; 2] = [KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];

async fn until(what: &str, mut reached: impl FnMut() -> bool) {
    let started = Instant::now();
    while !reached() {
        assert!(started.elapsed() < Duration::from_secs(30), "never came: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn revoked(identity: &Identity) -> bool {
    identity.verify().is_err_and(|fault| fault.to_string().contains("revoked"))
}

/// `identity` as whoever has `judge`'s bundle sees it.
fn seen_by(judge: &Identity, identity: &Identity) -> Identity {
    Identity { version: 0, svid: identity.svid.clone(), bundle: judge.bundle.clone() }
}

#[tokio::test]
async fn a_list_in_the_authoritys_directory_reaches_every_agent_and_its_withdrawal_too() {
    let root = Root::new(&MAY_REVOKE);
    let dir = tempfile::tempdir().unwrap();
    root.store(dir.path());
    let in_force = InForce::directory(dir.path(), trust_domain(), DAY).unwrap();
    let following = in_force.clone();
    tokio::spawn(async move { following.follow().await });
    let bench = Bench::of(in_force.clone()).await;
    let (identities, _task) = bench.agent(quick());
    let other = Identities::new(Arc::new(bench.remote(TOKEN_B)), quick());
    other.want(HashSet::from([db()]));
    tokio::spawn(other.clone().run(std::future::pending()));
    let first = identities.ready(&cart(), Duration::from_secs(10)).await.unwrap();
    let peer = other.ready(&db(), Duration::from_secs(10)).await.unwrap();
    assert!(!revoked(&seen_by(&peer, &first)) && !revoked(&peer));

    let crl = dir.path().join("ca-crl.pem");
    std::fs::write(&crl, root.list(1, &[&first])).unwrap();
    let judge = || other.current(&db()).unwrap();
    until("the other agent to know", || revoked(&seen_by(&judge(), &first))).await;
    assert!(judge().version > peer.version && judge().svid.serial == peer.svid.serial, "no new certificate");
    assert!(!revoked(&judge()), "the other certificate is as good as before");
    // Whose certificate was revoked is still who it is, and gets another.
    until("a new certificate", || identities.current(&cart()).unwrap().svid.serial != first.svid.serial)
        .await;
    assert!(!revoked(&identities.current(&cart()).unwrap()));

    let last_good = in_force.current();
    std::fs::write(&crl, "-----BEGIN X509 CRL-----\nrubbish\n-----END X509 CRL-----\n").unwrap();
    tokio::time::sleep(Duration::from_millis(1600)).await;
    assert!(Arc::ptr_eq(&last_good, &in_force.current()));
    assert!(revoked(&seen_by(&judge(), &first)));

    std::fs::remove_file(&crl).unwrap();
    until("nothing revoked", || judge().bundle.revocations.is_empty()).await;
    assert!(!revoked(&seen_by(&judge(), &first)));
}

#[tokio::test]
async fn a_list_that_is_no_good_is_a_clear_error_at_start() {
    let (root, stranger) = (Root::new(&MAY_REVOKE), Root::new(&MAY_REVOKE));
    let weak = Root::new(&[KeyUsagePurpose::KeyCertSign]);
    let mut other = Root::new(&MAY_REVOKE);
    other.params.distinguished_name.push(DnType::OrganizationName, "elsewhere");
    let first_version = "-----BEGIN X509 CRL-----\n".to_owned() + V1 + "\n-----END X509 CRL-----\n";
    for (whose, list, expected) in [
        (&root, stranger.list(1, &[]), "is not signed by \"CN=operator\""),
        (&root, other.list(1, &[]), "none of the authorities here"),
        (&root, "nothing".into(), "no PEM block \"X509 CRL\""),
        (&root, "-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n".into(), "cannot be read"),
        (&root, "-----BEGIN X509 CRL-----\nAAAA".into(), "malformed PEM"),
        (&root, first_version, "it must be of version 2"),
        (&weak, weak.list(1, &[]), "lacks cRLSign"),
        (&root, format!("{}{}", root.list(1, &[]), stranger.list(2, &[])), "list 2 of it"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        whose.store(dir.path());
        let open = || CertificateAuthority::at(dir.path(), trust_domain(), DAY);
        assert!(open().is_ok());
        std::fs::write(dir.path().join("ca-crl.pem"), list).unwrap();
        let error = open().err().unwrap();
        assert!(
            matches!(&error, Error::Revocations { path, .. } if path.ends_with("ca-crl.pem")),
            "{error:?}"
        );
        assert!(error.to_string().contains(expected), "{expected}: {error}");
    }
}

#[test]
fn a_list_without_an_authority_is_no_reason_to_make_one() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("ca-crl.pem"), Root::new(&MAY_REVOKE).list(1, &[])).unwrap();
    let error = CertificateAuthority::at(dir.path(), trust_domain(), DAY).err().unwrap();
    assert!(matches!(&error, Error::Incomplete { missing, .. } if missing.len() == 4), "{error:?}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

/// Made by `openssl ca -gencrl` without extensions.
const V1: &str = "MIGXMD8wCgYIKoZIzj0EAwIwEzERMA8GA1UEAwwIb3BlcmF0b3IXDTI2MTEyNDE1\n\
    NDUzNloXDTI2MTIyNDE1NDUzNlowCgYIKoZIzj0EAwIDSAAwRQIhAJ0+7GzhBA7I\n\
    vTTqvcI6E8ytOsgAoDNmwQ8V6pdUozkgAiALl6SOTJHeqVZe4Tz1l7G5qv50zGtK\n\
    3AGoNInp2W+YRw==";

#[tokio::test]
async fn an_authority_whose_own_certificate_is_revoked_does_not_start() {
    let root = Root::new(&MAY_REVOKE);
    let key = KeyPair::generate().unwrap();
    let mut intermediate = Root::new(&MAY_REVOKE).params;
    intermediate.distinguished_name.push(DnType::OrganizationName, "intermediate");
    let signer = intermediate.signed_by(&key, &Issuer::from_params(&root.params, &root.key)).unwrap();
    let dir = tempfile::tempdir().unwrap();
    root.store(dir.path());
    for (name, content) in
        [("ca-cert.pem", signer.pem()), ("cert-chain.pem", signer.pem()), ("ca-key.pem", key.serialize_pem())]
    {
        std::fs::write(dir.path().join(name), content).unwrap();
    }
    let open = || CertificateAuthority::at(dir.path(), trust_domain(), DAY);
    open().unwrap();
    let issued = Bench::with(open().unwrap()).await;
    let (identities, _task) = issued.agent(quick());
    let identity = identities.ready(&cart(), Duration::from_secs(10)).await.unwrap();
    // The intermediate in place of the leaf.
    let svid = mtls::identity::Svid {
        id: cart(),
        chain: identity.svid.chain[1..].to_vec(),
        key: identity.svid.key.clone_key(),
        serial: String::new(),
        not_before: identity.svid.not_before,
        not_after: identity.svid.not_after,
    };
    let intermediate = Identity { version: 0, svid: Arc::new(svid), bundle: identity.bundle.clone() };
    std::fs::write(dir.path().join("ca-crl.pem"), root.list(1, &[&intermediate])).unwrap();
    let error = open().err().unwrap();
    assert!(matches!(error, Error::Chain { .. }) && error.to_string().contains("Revoked"), "{error}");
}

#[tokio::test]
async fn an_agents_own_file_counts_too_and_a_broken_one_leaves_the_last_in_force() {
    let root = Root::new(&MAY_REVOKE);
    let dir = tempfile::tempdir().unwrap();
    root.store(dir.path());
    let bench = Bench::of(InForce::directory(dir.path(), trust_domain(), DAY).unwrap()).await;
    let victim = {
        let (identities, _task) = bench.agent(quick());
        identities.ready(&cart(), Duration::from_secs(10)).await.unwrap()
    };
    let file = bench.path("crl.pem");
    let (identities, _task) = bench.agent(Config { revocation_file: Some(file.clone()), ..quick() });
    let mine = identities.ready(&cart(), Duration::from_secs(10)).await.unwrap();
    assert!(!revoked(&seen_by(&mine, &victim)), "a missing file revokes nothing");

    let judge = || identities.current(&cart()).unwrap();
    // As kubelet replaces a ConfigMap's file: another one under the same name.
    let replace = |content: &str| {
        std::fs::write(bench.path("draft"), content).unwrap();
        std::fs::rename(bench.path("draft"), &file).unwrap();
    };
    replace(&root.list(1, &[&victim]));
    until("the list in force", || revoked(&seen_by(&judge(), &victim))).await;
    for broken in ["", "rubbish", &Root::new(&MAY_REVOKE).list(2, &[])] {
        replace(broken);
        tokio::time::sleep(Duration::from_millis(1200)).await;
        assert!(revoked(&seen_by(&judge(), &victim)), "{broken:?}");
    }
    replace(&root.list(2, &[]));
    until("the newer list", || !revoked(&seen_by(&judge(), &victim))).await;
    assert_eq!(identities.revocations().lists().count(), 1);
}

/// Another authority of the same name, as after a root was made anew: its list is not about the first one's leaves.
#[tokio::test]
async fn a_list_says_nothing_of_what_another_authority_of_the_same_name_signed() {
    let (old, new) = (Root::new(&MAY_REVOKE), Root::new(&MAY_REVOKE));
    let dir = tempfile::tempdir().unwrap();
    old.store(dir.path());
    let bench = Bench::of(InForce::directory(dir.path(), trust_domain(), DAY).unwrap()).await;
    let (identities, _task) = bench.agent(quick());
    let identity = identities.ready(&cart(), Duration::from_secs(10)).await.unwrap();
    let judged_by = |pem: &str| {
        let mut bundle = (*identity.bundle).clone();
        bundle.revocations = Arc::new(mtls::identity::Revocations::from_pem(pem.as_bytes(), &[]).unwrap());
        revoked(&Identity { version: 0, svid: identity.svid.clone(), bundle: Arc::new(bundle) })
    };
    assert!(!judged_by(&new.list(1, &[&identity])));
    assert!(judged_by(&old.list(1, &[&identity])));
    // Both together, whichever comes first.
    let (of_new, of_old) = (new.list(1, &[]), old.list(1, &[&identity]));
    assert!(judged_by(&format!("{of_new}{of_old}")) && judged_by(&format!("{of_old}{of_new}")));
}

/// An authority that knows nothing but to sign.
struct OnlySigns(mtls::identity::RemoteAuthority);

#[tonic::async_trait]
impl Authority for OnlySigns {
    async fn sign(&self, id: &SpiffeId, csr: Csr, lifetime: Duration) -> Result<Issued, IdentityError> {
        self.0.sign(id, csr, lifetime).await
    }
}

#[tokio::test]
async fn an_authority_that_tells_of_no_lists_is_as_good_as_before() {
    let bench = Bench::new(Duration::from_secs(3)).await;
    let identities = Identities::new(Arc::new(OnlySigns(bench.remote(TOKEN_A))), quick());
    identities.want(HashSet::from([cart()]));
    tokio::spawn(identities.clone().run(std::future::pending()));
    let first = identities.ready(&cart(), Duration::from_secs(10)).await.unwrap();
    until("a renewal", || identities.current(&cart()).is_some_and(|now| now.version > first.version)).await;
    assert!(identities.revocations().is_empty());
}
