//! What the authority signs, and what it refuses with which words.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use mtls::ca::CertificateAuthority;
use mtls::identity::wire::istio_certificate_service_client::IstioCertificateServiceClient;
use mtls::identity::wire::{IstioCertificateRequest, IstioCertificateResponse};
use mtls::identity::{Error, Identities, SpiffeId};
use prost_types::{Struct, Value, value::Kind};
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ED25519, SanType};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use tonic::{Code, Status};

use crate::bench::*;

#[tokio::test]
async fn openssl_verifies_what_is_issued() {
    let bench = Bench::new(DAY).await;
    let (identities, _task) = bench.agent(quick());
    let identity = identities.ready(&cart(), Duration::from_secs(10)).await.unwrap();
    std::fs::write(bench.path("leaf.pem"), pem(&identity.svid.chain)).unwrap();
    let stranger = CertificateAuthority::in_memory(trust_domain(), DAY).unwrap();
    std::fs::write(bench.path("stranger.pem"), stranger.root_bundle()).unwrap();

    for purpose in ["sslclient", "sslserver"] {
        let args = ["verify", "-x509_strict", "-purpose", purpose, "-CAfile"];
        let good = openssl(&[&args[..], &["root.pem", "leaf.pem"]].concat(), bench.dir.path());
        assert!(good.status.success(), "{good:?}");
        let bad = openssl(&[&args[..], &["stranger.pem", "leaf.pem"]].concat(), bench.dir.path());
        assert!(!bad.status.success(), "{bad:?}");
    }
    let text = openssl(&["x509", "-in", "leaf.pem", "-noout", "-text", "-serial"], bench.dir.path());
    let text = String::from_utf8(text.stdout).unwrap();
    for expected in [
        "X509v3 Subject Alternative Name: critical\n                URI:spiffe://cluster.local/ns/shop/sa/cart\n",
        "X509v3 Key Usage: critical\n                Digital Signature\n",
        "TLS Web Server Authentication, TLS Web Client Authentication\n",
        "CA:FALSE",
        "NIST CURVE: P-256",
        &format!("serial={}\n", identity.svid.serial),
    ] {
        assert!(text.contains(expected), "{expected:?} not in {text}");
    }
    let shown = format!("{identity:?}");
    let key = format!("{:?}", identity.svid.key.secret_pkcs8_der());
    assert!(shown.contains("cart") && !shown.contains(key.trim_matches(['[', ']'])), "{shown}");
}

#[tokio::test]
async fn only_tls_1_3_is_spoken() {
    let bench = Bench::new(DAY).await;
    let address = bench.address.to_string();
    let connect = |version: &'static str| {
        let (address, dir) = (address.clone(), bench.dir.path().to_owned());
        let args = move || {
            openssl(
                &["s_client", version, "-CAfile", "root.pem", "-verify_return_error", "-connect", &address],
                &dir,
            )
        };
        tokio::task::spawn_blocking(args)
    };
    let new = connect("-tls1_3").await.unwrap();
    assert!(new.status.success(), "{new:?}");
    let old = connect("-tls1_2").await.unwrap();
    assert!(!old.status.success(), "{old:?}");
}

#[tokio::test]
async fn a_caller_is_refused_without_a_good_token() {
    let bench = Bench::new(DAY).await;
    for (authorization, expected) in [
        (None, "no bearer token"),
        (Some(""), "no bearer token"),
        (Some("Bearer "), "no bearer token"),
        (Some("Basic dG9rZW4="), "no bearer token"),
        (Some("Bearer token-of-node-a-0123456788"), "not one of this certificate authority's"),
    ] {
        let status = ask(&bench, authorization, request(&csr(cart().uri()), &cart())).await.unwrap_err();
        assert_eq!(status.code(), Code::Unauthenticated, "{authorization:?}: {status:?}");
        assert!(status.message().contains(expected), "{authorization:?}: {status:?}");
    }
    ask(&bench, Some(&format!("bearer {TOKEN_A}")), request(&csr(cart().uri()), &cart())).await.unwrap();
}

#[tokio::test]
async fn a_stolen_token_gets_no_other_nodes_identity() {
    let bench = Bench::new(DAY).await;
    let refused = |id: SpiffeId| {
        let bench = &bench;
        async move {
            let status = ask_as_a(bench, request(&csr(id.uri()), &id)).await.unwrap_err();
            assert_eq!(status.code(), Code::PermissionDenied, "{status:?}");
            assert!(status.message().contains(id.uri()), "{status:?}");
            status.message().to_owned()
        }
    };
    assert!(refused(db()).await.contains("node-a"));
    refused("spiffe://cluster.local/ns/kube-system/sa/admin".parse().unwrap()).await;
    let foreign = refused("spiffe://elsewhere/ns/shop/sa/cart".parse().unwrap()).await;
    assert!(foreign.contains("trust domain, cluster.local"), "{foreign}");

    ask(&bench, Some(&format!("Bearer {TOKEN_B}")), request(&csr(db().uri()), &db())).await.unwrap();
}

#[tokio::test]
async fn an_agent_reports_the_refusal_in_the_authoritys_words() {
    let bench = Bench::new(DAY).await;
    let identities = Identities::new(Arc::new(bench.remote(TOKEN_A)), quick());
    identities.want(HashSet::from([cart(), db()]));
    let _task = tokio::spawn(identities.clone().run(std::future::pending()));
    identities.ready(&cart(), Duration::from_secs(10)).await.unwrap();
    let error = identities.ready(&db(), Duration::from_secs(1)).await.unwrap_err().to_string();
    assert!(error.contains("PermissionDenied") && error.contains("node-a"), "{error}");

    let nobodys = "spiffe://cluster.local/ns/x/sa/y".parse().unwrap();
    let never = identities.ready(&nobodys, Duration::from_millis(50)).await;
    assert!(matches!(never, Err(Error::NotReady { last: None, .. })));
}

#[tokio::test]
async fn a_signing_request_must_say_exactly_what_is_asked() {
    let bench = Bench::new(DAY).await;
    let two = [SanType::URI(uri(cart().uri())), SanType::URI(uri(db().uri()))];
    let mixed = [SanType::URI(uri(cart().uri())), SanType::DnsName(uri("db.shop"))];
    let ed25519 = KeyPair::generate_for(&PKCS_ED25519).unwrap();
    let good = csr(cart().uri());
    for (what, csr, expected) in [
        ("another identity", csr(db().uri()), "names spiffe://cluster.local/ns/shop/sa/db, but"),
        ("two identities", csr_of(&two, &p256()), "exactly one"),
        ("a DNS name too", csr_of(&mixed, &p256()), "exactly one"),
        ("no name", csr_of(&[], &p256()), "exactly one"),
        ("no workload's name", csr("spiffe://cluster.local"), "/ns/<namespace>/sa/<service account>"),
        ("another kind of key", csr_of(&[SanType::URI(uri(cart().uri()))], &ed25519), "P-256 or P-384"),
        ("a broken signature", tampered(&good), "signature"),
        ("text", "please".into(), "CERTIFICATE REQUEST"),
        ("nothing", String::new(), "CERTIFICATE REQUEST"),
        ("rubbish in PEM", good.replace('M', "A"), "malformed"),
        ("too much", format!("{good}{}", " ".repeat(20_000)), "16384 are allowed"),
    ] {
        let status = ask_as_a(&bench, request(&csr, &cart())).await.expect_err(what);
        assert_eq!(status.code(), Code::InvalidArgument, "{what}: {status:?}");
        assert!(status.message().contains(expected), "{what}: {status:?}");
    }
    let mut negative = request(&good, &cart());
    negative.validity_duration = -1;
    assert_eq!(ask_as_a(&bench, negative).await.unwrap_err().code(), Code::InvalidArgument);
    let mut number = request(&good, &cart());
    let fields = &mut number.metadata.as_mut().unwrap().fields;
    fields.insert("ImpersonatedIdentity".into(), Value { kind: Some(Kind::NumberValue(1.0)) });
    assert_eq!(ask_as_a(&bench, number).await.unwrap_err().code(), Code::InvalidArgument);

    ask_as_a(&bench, request(&good, &cart())).await.unwrap();
    let without_metadata = IstioCertificateRequest { metadata: None, ..request(&good, &cart()) };
    ask_as_a(&bench, without_metadata).await.unwrap();
    let theirs = IstioCertificateRequest { metadata: None, ..request(&csr(db().uri()), &db()) };
    assert_eq!(ask_as_a(&bench, theirs).await.unwrap_err().code(), Code::PermissionDenied);
}

#[tokio::test]
async fn a_lifetime_is_the_shorter_of_asked_and_allowed() {
    let bench = Bench::new(Duration::from_secs(3600)).await;
    for (asked, expected) in [(10, 10), (0, 3600), (3600, 3600), (7200, 3600), (i64::MAX, 3600)] {
        let request =
            IstioCertificateRequest { validity_duration: asked, ..request(&csr(cart().uri()), &cart()) };
        let answer = ask_as_a(&bench, request).await.unwrap();
        let seconds = left_of_leaf(&answer);
        assert!((expected - 5..=expected + 1).contains(&seconds), "asked {asked}, got {seconds}");
    }
}

#[tokio::test]
async fn every_serial_is_another() {
    let bench = Bench::new(DAY).await;
    let mut serials = HashSet::new();
    for _ in 0..20 {
        let answer = ask_as_a(&bench, request(&csr(cart().uri()), &cart())).await.unwrap();
        let (_, leaf) = x509_parser::pem::parse_x509_pem(answer.cert_chain[0].as_bytes()).unwrap();
        assert!(serials.insert(leaf.parse_x509().unwrap().raw_serial_as_string()));
    }
}

#[tokio::test]
async fn an_impostor_with_another_root_never_sees_the_token() {
    let bench = Bench::new(DAY).await;
    let stranger = CertificateAuthority::in_memory(trust_domain(), DAY).unwrap();
    std::fs::write(bench.path("root.pem"), stranger.root_bundle()).unwrap();
    let (identities, _task) = bench.agent(quick());
    let error = identities.ready(&cart(), Duration::from_millis(500)).await.unwrap_err().to_string();
    assert!(error.contains("TLS handshake") && error.contains("root.pem"), "{error}");

    // The right root arrives: no restart is needed.
    std::fs::write(bench.path("root.pem"), bench.authority.root_bundle()).unwrap();
    identities.ready(&cart(), Duration::from_secs(10)).await.unwrap();
}

async fn ask_as_a(
    bench: &Bench,
    request: IstioCertificateRequest,
) -> Result<IstioCertificateResponse, Status> {
    ask(bench, Some(&format!("Bearer {TOKEN_A}")), request).await
}

async fn ask(
    bench: &Bench,
    authorization: Option<&str>,
    request: IstioCertificateRequest,
) -> Result<IstioCertificateResponse, Status> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(bench.authority.roots()[0].clone()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    tls.alpn_protocols = vec![b"h2".to_vec()];
    let tcp = tokio::net::TcpStream::connect(bench.address).await.unwrap();
    let name = bench.address.ip().into();
    let stream = tokio_rustls::TlsConnector::from(Arc::new(tls)).connect(name, tcp).await.unwrap();
    let mut stream = Some(hyper_util::rt::TokioIo::new(stream));
    let channel = tonic::transport::Endpoint::from_static("http://ca")
        .connect_with_connector(tower::service_fn(move |_| {
            std::future::ready(stream.take().ok_or(std::io::ErrorKind::ConnectionReset.into()))
                as std::future::Ready<std::io::Result<_>>
        }))
        .await
        .unwrap();
    let mut request = tonic::Request::new(request);
    if let Some(authorization) = authorization {
        request.metadata_mut().insert("authorization", authorization.parse().unwrap());
    }
    let answer = IstioCertificateServiceClient::new(channel).create_certificate(request).await?;
    Ok(answer.into_inner())
}

fn request(csr: &str, id: &SpiffeId) -> IstioCertificateRequest {
    let id = Value { kind: Some(Kind::StringValue(id.to_string())) };
    IstioCertificateRequest {
        csr: csr.into(),
        validity_duration: 3600,
        metadata: Some(Struct { fields: [("ImpersonatedIdentity".into(), id)].into() }),
    }
}

fn csr(id: &str) -> String {
    csr_of(&[SanType::URI(uri(id))], &p256())
}

fn csr_of(names: &[SanType], key: &KeyPair) -> String {
    let mut params = CertificateParams::default();
    params.subject_alt_names = names.to_vec();
    params.serialize_request(key).unwrap().pem().unwrap()
}

fn p256() -> KeyPair {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap()
}

fn uri<T: TryFrom<String, Error: std::fmt::Debug>>(text: &str) -> T {
    text.to_owned().try_into().unwrap()
}

/// The same request with one bit of its signature turned.
fn tampered(csr: &str) -> String {
    use base64::Engine as _;
    let mut der =
        rustls_pki_types::CertificateSigningRequestDer::from_pem_slice(csr.as_bytes()).unwrap().to_vec();
    *der.last_mut().unwrap() ^= 1;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    format!("-----BEGIN CERTIFICATE REQUEST-----\n{text}\n-----END CERTIFICATE REQUEST-----\n")
}

fn left_of_leaf(answer: &IstioCertificateResponse) -> i64 {
    let leaf = CertificateDer::from_pem_slice(answer.cert_chain[0].as_bytes()).unwrap();
    let (_, leaf) = x509_parser::parse_x509_certificate(&leaf).unwrap();
    leaf.validity().time_to_expiration().unwrap().whole_seconds()
}
