//! Renewal, the authority's absence and return, and what an agent makes of bad answers.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mtls::ca::CertificateAuthority;
use mtls::identity::{Authority, Config, Credential, Csr, Error, Identities, Issued, SpiffeId};

use crate::bench::*;

#[tokio::test]
async fn renewal_at_half_life_leaves_no_moment_without_an_identity() {
    let bench = Bench::new(Duration::from_secs(4)).await;
    let (identities, _task) = bench.agent(quick());
    let mut current = identities.ready(&cart(), Duration::from_secs(10)).await.unwrap();
    let mut renewed = vec![Instant::now()];
    while renewed.len() < 4 {
        assert!(renewed[0].elapsed() < Duration::from_secs(20), "renewed only at {renewed:?}");
        let now = identities.current(&cart()).expect("an identity at every moment");
        if now.version != current.version {
            assert!(now.version > current.version);
            assert_ne!(now.svid.serial, current.svid.serial);
            assert_ne!(now.svid.key.secret_pkcs8_der(), current.svid.key.secret_pkcs8_der());
            // Neither at once nor at the last moment.
            assert!(renewed.last().unwrap().elapsed() > Duration::from_millis(1700), "{renewed:?}");
            assert!(left(current.svid.not_after) > Duration::from_millis(500), "{current:?}");
            renewed.push(Instant::now());
            current = now;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let [status] = &identities.status()[..] else { panic!("one identity") };
    assert_eq!((status.renewals, status.failures, &status.last_error), (4, 0, &None));
    assert_eq!(status.serial.as_ref(), Some(&current.svid.serial));
}

#[tokio::test]
async fn the_current_certificate_is_used_to_its_end_and_the_authoritys_return_noticed() {
    let mut bench = Bench::new(Duration::from_secs(4)).await;
    let (identities, _task) = bench.agent(quick());
    let first = identities.ready(&cart(), Duration::from_secs(10)).await.unwrap();
    let mut changes = identities.subscribe();
    bench.stop().await;

    while !left(first.svid.not_after).is_zero() {
        // Read the end first: a certificate may run out between the two.
        let alive = left(first.svid.not_after) > Duration::from_millis(20);
        let current = identities.current(&cart());
        assert!(current.is_some() || !alive);
        if let Some(current) = current {
            assert_eq!(current.version, first.version);
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(identities.current(&cart()).is_none());
    tokio::time::timeout(Duration::from_secs(2), changes.changed())
        .await
        .expect("expiry is announced")
        .unwrap();
    let [status] = &identities.status()[..] else { panic!("one identity") };
    assert!(status.failures > 0 && status.serial.is_none() && status.not_after.is_none());
    assert!(status.last_error.as_ref().unwrap().contains("cannot reach"), "{status:?}");

    bench.start().await;
    let second = identities.ready(&cart(), Duration::from_secs(5)).await.unwrap();
    assert!(second.version > first.version);
    assert_eq!(identities.status()[0].last_error, None);
}

#[tokio::test]
async fn a_short_absence_is_not_noticed() {
    let mut bench = Bench::new(Duration::from_secs(6)).await;
    let (identities, _task) = bench.agent(quick());
    let first = identities.ready(&cart(), Duration::from_secs(10)).await.unwrap();
    bench.stop().await;
    while identities.status()[0].failures == 0 {
        assert_eq!(identities.current(&cart()).unwrap().version, first.version);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    bench.start().await;
    loop {
        let current = identities.current(&cart()).expect("the certificate still has half its life");
        if current.version > first.version {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn what_is_no_longer_wanted_is_forgotten_at_once() {
    let bench = Bench::new(DAY).await;
    let (identities, _task) = bench.agent(quick());
    let first = identities.ready(&cart(), Duration::from_secs(10)).await.unwrap();
    let before = *identities.subscribe().borrow();
    identities.want(HashSet::from([cart()]));
    assert_eq!(*identities.subscribe().borrow(), before);
    identities.want(HashSet::new());
    assert!(identities.current(&cart()).is_none());
    assert!(identities.status().is_empty());
    assert!(*identities.subscribe().borrow() > before);

    identities.want(HashSet::from([cart()]));
    let again = identities.ready(&cart(), Duration::from_secs(10)).await.unwrap();
    assert!(again.version > first.version);
}

#[tokio::test]
async fn run_ends_when_told() {
    let bench = Bench::new(DAY).await;
    let identities = Identities::new(Arc::new(bench.remote(TOKEN_A)), quick());
    identities.want(HashSet::from([cart()]));
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let task = tokio::spawn(identities.clone().run(async {
        let _ = stopped.await;
    }));
    identities.ready(&cart(), Duration::from_secs(10)).await.unwrap();
    assert!(!task.is_finished());
    stop.send(()).unwrap();
    tokio::time::timeout(Duration::from_secs(2), task).await.expect("ends").unwrap();
}

#[tokio::test]
async fn roots_of_the_answer_and_of_the_file_are_both_trusted() {
    let bench = Bench::new(DAY).await;
    let coming = CertificateAuthority::in_memory(trust_domain(), DAY).unwrap();
    let both = format!("{}{}", bench.authority.root_bundle(), coming.root_bundle());
    std::fs::write(bench.path("root.pem"), both).unwrap();
    let (identities, _task) = bench.agent(quick());
    let identity = identities.ready(&cart(), Duration::from_secs(10)).await.unwrap();
    assert_eq!(identity.bundle.roots, [bench.authority.roots(), coming.roots()].concat());
    assert_eq!(identity.svid.chain.len(), 1);
}

#[tokio::test]
async fn a_new_root_in_the_file_is_trusted_without_waiting_for_half_life() {
    let bench = Bench::new(DAY).await;
    let old = bench.authority.root_bundle();
    let (identities, _task) = bench.agent(quick());
    let mut current = identities.ready(&cart(), Duration::from_secs(10)).await.unwrap();
    let coming = CertificateAuthority::in_memory(trust_domain(), DAY).unwrap();
    let overlap = [bench.authority.roots(), coming.roots()].concat();
    for (bundle, expected) in [(format!("{old}{}", coming.root_bundle()), &overlap[..]), (old, &overlap[..1])]
    {
        std::fs::write(bench.path("root.pem"), bundle).unwrap();
        let started = Instant::now();
        while current.bundle.roots != expected {
            assert!(started.elapsed() < Duration::from_secs(15), "{:?}", identities.status());
            tokio::time::sleep(Duration::from_millis(10)).await;
            current = identities.current(&cart()).expect("an identity at every moment");
        }
    }
    let settled = identities.status()[0].renewals;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(identities.status()[0].renewals, settled, "an unchanged file renews nothing");
}

#[tokio::test]
async fn missing_files_are_named_and_awaited() {
    let bench = Bench::new(DAY).await;
    let root = std::fs::read(bench.path("root.pem")).unwrap();
    let (identities, _task) = bench.agent(quick());
    identities.ready(&cart(), Duration::from_secs(10)).await.unwrap();
    for (file, content, named) in
        [("root.pem", &root[..], "root.pem"), ("token", TOKEN_A.as_bytes(), "token")]
    {
        identities.want(HashSet::new());
        std::fs::remove_file(bench.path(file)).unwrap();
        identities.want(HashSet::from([cart()]));
        let error = identities.ready(&cart(), Duration::from_millis(300)).await.unwrap_err().to_string();
        assert!(error.contains(named) && error.contains("cannot read"), "{error}");
        std::fs::write(bench.path(file), "\n").unwrap();
        let error = identities.ready(&cart(), Duration::from_millis(600)).await.unwrap_err().to_string();
        assert!(error.contains(named) && !error.contains("cannot read"), "{error}");
        std::fs::write(bench.path(file), content).unwrap();
        identities.ready(&cart(), Duration::from_secs(10)).await.unwrap();
    }
}

#[tokio::test]
async fn an_answer_for_somebody_else_is_not_used() {
    let bench = Bench::new(DAY).await;
    for (lie, expected) in [
        (Lie::AnotherIdentity, "SPIFFE IDs are [\"spiffe://cluster.local/ns/shop/sa/db\"]"),
        (Lie::AnotherKey, "another key"),
        (Lie::AnotherRoot, "leads to no root"),
        (Lie::Nothing, "no PEM block"),
        (Lie::Silence, "did not answer"),
    ] {
        let config = Config { attempt_timeout: Duration::from_millis(200), ..quick() };
        let liar = Liar { lie, a: bench.remote(TOKEN_A), b: bench_b(&bench) };
        let identities = Identities::new(Arc::new(liar), config);
        identities.want(HashSet::from([cart()]));
        let _task = tokio::spawn(identities.clone().run(std::future::pending()));
        let error = identities.ready(&cart(), Duration::from_secs(1)).await.unwrap_err().to_string();
        assert!(error.contains(expected), "{expected:?}: {error}");
    }
}

#[test]
fn an_address_must_be_an_authoritys() {
    let open = |address: &str| {
        mtls::identity::RemoteAuthority::new(address, "root".into(), Credential::Token("token".into()))
    };
    for good in ["https://10.0.0.1:15012", "https://[fd00::1]:15012", "https://ca.mesh", "https://ca.mesh:1/"]
    {
        assert!(open(good).is_ok(), "{good}");
    }
    for bad in [
        "",
        "10.0.0.1:15012",
        "http://10.0.0.1:15012",
        "https://",
        "https://u:p@ca",
        "https://ca/x",
        "https://ca?x",
    ] {
        assert!(matches!(open(bad), Err(Error::Address { .. })), "{bad:?}");
    }
}

enum Lie {
    AnotherIdentity,
    AnotherKey,
    AnotherRoot,
    Nothing,
    Silence,
}

/// Answers with true certificates, but not those asked for.
struct Liar {
    lie: Lie,
    a: mtls::identity::RemoteAuthority,
    b: mtls::identity::RemoteAuthority,
}

#[tonic::async_trait]
impl Authority for Liar {
    async fn sign(&self, id: &SpiffeId, csr: Csr, lifetime: Duration) -> Result<Issued, Error> {
        let somebody_elses = |id: SpiffeId| {
            let mut params = rcgen::CertificateParams::default();
            params.subject_alt_names = vec![rcgen::SanType::URI(id.uri().try_into().unwrap())];
            let csr = params.serialize_request(&rcgen::KeyPair::generate().unwrap()).unwrap();
            Csr::new(&csr).unwrap()
        };
        match self.lie {
            Lie::AnotherIdentity => self.b.sign(&db(), somebody_elses(db()), lifetime).await,
            Lie::AnotherKey => self.a.sign(id, somebody_elses(id.clone()), lifetime).await,
            Lie::AnotherRoot => {
                let stranger = CertificateAuthority::in_memory(trust_domain(), DAY).unwrap();
                let issued = self.a.sign(id, csr, lifetime).await?;
                Ok(Issued { roots: stranger.roots().to_vec(), ..issued })
            }
            Lie::Nothing => Ok(Issued { chain: Vec::new(), roots: Vec::new() }),
            Lie::Silence => std::future::pending().await,
        }
    }
}

fn bench_b(bench: &Bench) -> mtls::identity::RemoteAuthority {
    let token_file = bench.path("token-b");
    std::fs::write(&token_file, TOKEN_B).unwrap();
    let address = format!("https://{}", bench.address);
    mtls::identity::RemoteAuthority::new(&address, bench.path("root.pem"), Credential::Token(token_file))
        .unwrap()
}
