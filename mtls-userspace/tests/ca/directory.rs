//! The authority's directory: made, kept, brought by an operator, and broken in every way.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use mtls::ca::{CertificateAuthority, Error};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use time::{Duration as Days, OffsetDateTime};

use crate::bench::*;

const FILES: [&str; 4] = ["ca-cert.pem", "ca-key.pem", "cert-chain.pem", "root-cert.pem"];

#[test]
fn a_root_is_made_once_and_kept() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("made/by/it");
    let first = open(&dir).unwrap();
    let second = open(&dir).unwrap();
    assert_eq!(first.root_bundle(), second.root_bundle());
    let mode = |name| std::fs::metadata(dir.join(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!(FILES.map(mode), [0o644, 0o600, 0o644, 0o644]);
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), FILES.len(), "nothing else is left there");
    let printed = openssl(&["x509", "-in", "root-cert.pem", "-noout", "-fingerprint", "-sha256"], &dir);
    let printed = String::from_utf8(printed.stdout).unwrap();
    assert!(printed.contains(&first.root_fingerprint()), "{printed}");
    let other = CertificateAuthority::in_memory(trust_domain(), DAY).unwrap();
    assert_ne!(first.root_fingerprint(), other.root_fingerprint());
}

#[tokio::test]
async fn an_operators_intermediate_signs_and_its_chain_goes_along() {
    for key in ["pkcs8", "sec1", "rsa"] {
        let dir = tempfile::tempdir().unwrap();
        Operator::new().store(dir.path());
        match key {
            "sec1" => convert_key_to_sec1(dir.path()),
            "rsa" => rsa_operator(dir.path()),
            _ => {}
        }
        let bench = Bench::with(open(dir.path()).unwrap()).await;
        let (identities, _task) = bench.agent(quick());
        let identity = identities.ready(&cart(), Duration::from_secs(10)).await.unwrap();
        let [leaf, intermediate] = &identity.svid.chain[..] else { panic!("{:?}", identity.svid) };
        assert_eq!(identity.bundle.roots, bench.authority.roots());
        std::fs::write(bench.path("leaf.pem"), pem([leaf])).unwrap();
        std::fs::write(bench.path("intermediate.pem"), pem([intermediate])).unwrap();
        let with = ["verify", "-CAfile", "root.pem", "-untrusted", "intermediate.pem", "leaf.pem"];
        let verified = openssl(&with, bench.dir.path());
        assert!(verified.status.success(), "{key}: {verified:?}");
        let without = openssl(&["verify", "-CAfile", "root.pem", "leaf.pem"], bench.dir.path());
        assert!(!without.status.success(), "{key}: {without:?}");
    }
}

#[test]
fn each_missing_file_is_named_and_nothing_is_made_instead() {
    for missing in FILES {
        let dir = tempfile::tempdir().unwrap();
        Operator::new().store(dir.path());
        std::fs::remove_file(dir.path().join(missing)).unwrap();
        let error = open(dir.path()).err().unwrap();
        assert!(matches!(&error, Error::Incomplete { missing: m, .. } if m[..] == [missing]), "{error:?}");
        assert!(error.to_string().contains(missing));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), FILES.len() - 1);
    }
}

#[test]
fn each_mismatch_is_named() {
    type Break = fn(&mut Operator, &Path);
    type Expected = fn(&Error) -> bool;
    let cases: Vec<(&str, Break, Expected)> = vec![
        (
            "another key",
            |_, dir| {
                std::fs::write(dir.join("ca-key.pem"), KeyPair::generate().unwrap().serialize_pem()).unwrap()
            },
            |e| matches!(e, Error::KeyMismatch { .. }),
        ),
        (
            "no key",
            |_, dir| std::fs::write(dir.join("ca-key.pem"), "").unwrap(),
            |e| matches!(e, Error::Key { path, .. } if path.ends_with("ca-key.pem")),
        ),
        (
            "rubbish",
            |_, dir| std::fs::write(dir.join("ca-cert.pem"), "rubbish").unwrap(),
            |e| matches!(e, Error::Certificates { path, .. } if path.ends_with("ca-cert.pem")),
        ),
        (
            "a broken certificate in the roots",
            |_, dir| {
                std::fs::write(
                    dir.join("root-cert.pem"),
                    "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
                )
                .unwrap()
            },
            |e| matches!(e, Error::Certificates { path, .. } if path.ends_with("root-cert.pem")),
        ),
        (
            "two signers",
            |_, dir| append(dir, "ca-cert.pem", "root-cert.pem"),
            |e| matches!(e, Error::SeveralSigners { count: 2, .. }),
        ),
        (
            "an intermediate among the roots",
            |_, dir| append(dir, "root-cert.pem", "ca-cert.pem"),
            |e| matches!(e, Error::NotARoot { .. }),
        ),
        (
            "a stranger's root",
            |_, dir| {
                let stranger = Operator::new();
                std::fs::write(dir.join("root-cert.pem"), stranger.root.pem()).unwrap();
            },
            |e| matches!(e, Error::Chain { .. }),
        ),
        (
            "a leaf as authority",
            |o, dir| {
                o.intermediate.is_ca = IsCa::NoCa;
                o.store(dir);
            },
            |e| matches!(e, Error::NotAnAuthority { path, .. } if path.ends_with("ca-cert.pem")),
        ),
        (
            "no right to sign",
            |o, dir| {
                o.intermediate.key_usages = vec![KeyUsagePurpose::DigitalSignature];
                o.store(dir);
            },
            |e| matches!(e, Error::NotAnAuthority { path, .. } if path.ends_with("ca-cert.pem")),
        ),
        (
            "expired",
            |o, dir| {
                o.intermediate.not_after = OffsetDateTime::now_utc() - Days::days(1);
                o.store(dir);
            },
            |e| matches!(e, Error::Validity { path, .. } if path.ends_with("ca-cert.pem")),
        ),
        (
            "not valid yet",
            |o, dir| {
                o.intermediate.not_before = OffsetDateTime::now_utc() + Days::days(1);
                o.store(dir);
            },
            |e| matches!(e, Error::Validity { path, .. } if path.ends_with("ca-cert.pem")),
        ),
        (
            "a root expired",
            |o, dir| {
                o.root_params.not_after = OffsetDateTime::now_utc() - Days::days(1);
                o.remake_root();
                o.store(dir);
            },
            |e| matches!(e, Error::Validity { path, .. } if path.ends_with("root-cert.pem")),
        ),
        (
            "a path too long",
            |o, dir| {
                let last = IsCa::Ca(BasicConstraints::Constrained(0));
                o.store_with_two_intermediates(dir, last);
            },
            |e| matches!(e, Error::Chain { .. }),
        ),
    ];
    for (what, break_it, expected) in cases {
        let dir = tempfile::tempdir().unwrap();
        let mut operator = Operator::new();
        operator.store(dir.path());
        assert!(open(dir.path()).is_ok());
        break_it(&mut operator, dir.path());
        let error = open(dir.path()).err().unwrap_or_else(|| panic!("{what}: accepted"));
        assert!(expected(&error), "{what}: {error:?}");
        let named = FILES.iter().any(|name| error.to_string().contains(name));
        assert!(named, "{what}: names no file: {error}");
    }
}

#[test]
fn a_longer_chain_and_an_old_root_beside_the_new_are_good() {
    let dir = tempfile::tempdir().unwrap();
    let operator = Operator::new();
    operator.store_with_two_intermediates(dir.path(), IsCa::Ca(BasicConstraints::Constrained(1)));
    open(dir.path()).unwrap();

    let mut old = Operator::new();
    old.root_params.not_after = OffsetDateTime::now_utc() - Days::days(1);
    old.remake_root();
    operator.store(dir.path());
    let both = format!("{}{}", old.root.pem(), operator.root.pem());
    std::fs::write(dir.path().join("root-cert.pem"), both).unwrap();
    assert_eq!(open(dir.path()).unwrap().roots().len(), 2);
}

#[tokio::test]
async fn no_leaf_outlives_its_authority() {
    let dir = tempfile::tempdir().unwrap();
    let mut operator = Operator::new();
    operator.intermediate.not_after = OffsetDateTime::now_utc() + Days::minutes(10);
    operator.store(dir.path());
    let bench = Bench::with(open(dir.path()).unwrap()).await;
    let (identities, _task) = bench.agent(quick());
    let identity = identities.ready(&cart(), Duration::from_secs(10)).await.unwrap();
    assert_eq!(identity.svid.not_after, bench.authority.not_after());
    assert!(left(identity.svid.not_after) <= Duration::from_secs(600));
}

/// An operator's own PKI: a root kept elsewhere and an intermediate for this mesh.
struct Operator {
    root_key: KeyPair,
    root_params: CertificateParams,
    root: rcgen::Certificate,
    key: KeyPair,
    intermediate: CertificateParams,
}

impl Operator {
    fn new() -> Self {
        let root_key = KeyPair::generate().unwrap();
        let root_params = authority("operator's root");
        let root = root_params.self_signed(&root_key).unwrap();
        let key = KeyPair::generate().unwrap();
        Self { root_key, root_params, root, key, intermediate: authority("mesh intermediate") }
    }

    fn remake_root(&mut self) {
        self.root = self.root_params.self_signed(&self.root_key).unwrap();
    }

    /// As Istio's own tools write it: the chain repeats the signing certificate and the root.
    fn store(&self, dir: &Path) {
        let issuer = Issuer::from_params(&self.root_params, &self.root_key);
        let signer = self.intermediate.signed_by(&self.key, &issuer).unwrap();
        let chain = format!("{}{}", signer.pem(), self.root.pem());
        self.files(dir, &signer.pem(), &chain);
    }

    fn store_with_two_intermediates(&self, dir: &Path, upper: IsCa) {
        let mut policy = authority("policy intermediate");
        policy.is_ca = upper;
        let policy_key = KeyPair::generate().unwrap();
        let root = Issuer::from_params(&self.root_params, &self.root_key);
        let middle = policy.signed_by(&policy_key, &root).unwrap();
        let signer =
            self.intermediate.signed_by(&self.key, &Issuer::from_params(&policy, &policy_key)).unwrap();
        self.files(dir, &signer.pem(), &middle.pem());
    }

    fn files(&self, dir: &Path, signer: &str, chain: &str) {
        let contents = [signer, &self.key.serialize_pem(), chain, &self.root.pem()];
        for (name, content) in FILES.iter().zip(contents) {
            std::fs::write(dir.join(name), content).unwrap();
        }
    }
}

fn open(dir: &Path) -> Result<CertificateAuthority, Error> {
    CertificateAuthority::at(dir, trust_domain(), DAY)
}

fn authority(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_before = OffsetDateTime::now_utc() - Days::hours(1);
    params.not_after = OffsetDateTime::now_utc() + Days::days(30);
    params
}

fn append(dir: &Path, to: &str, from: &str) {
    let content = [to, from].map(|name| std::fs::read_to_string(dir.join(name)).unwrap()).concat();
    std::fs::write(dir.join(to), content).unwrap();
}

fn convert_key_to_sec1(dir: &Path) {
    let done = openssl(&["ec", "-in", "ca-key.pem", "-out", "ca-key.pem"], dir);
    assert!(done.status.success(), "{done:?}");
    let key = std::fs::read_to_string(dir.join("ca-key.pem")).unwrap();
    assert!(key.contains("BEGIN EC PRIVATE KEY"), "{done:?}");
}

/// What `openssl req` makes, as in Istio's documentation: RSA, with a root and an intermediate.
fn rsa_operator(dir: &Path) {
    let extensions =
        "basicConstraints=critical,CA:true\nkeyUsage=critical,keyCertSign\nsubjectKeyIdentifier=hash\n";
    std::fs::write(dir.join("extensions"), extensions).unwrap();
    for args in [
        "req -x509 -newkey rsa:2048 -nodes -keyout root-key.pem -out root-cert.pem -days 30 -subj /O=Istio/CN=Root \
         -addext keyUsage=keyCertSign",
        "req -newkey rsa:2048 -nodes -keyout ca-key.pem -out ca.csr -subj /O=Istio/CN=Intermediate/L=cluster1",
        "x509 -req -in ca.csr -CA root-cert.pem -CAkey root-key.pem -CAcreateserial -days 20 -extfile extensions \
         -out ca-cert.pem",
    ] {
        let done = openssl(&args.split_whitespace().collect::<Vec<_>>(), dir);
        assert!(done.status.success(), "{args}: {done:?}");
    }
    std::fs::copy(dir.join("ca-cert.pem"), dir.join("cert-chain.pem")).unwrap();
}
