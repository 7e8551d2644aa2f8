//! Identities from a SPIFFE Workload API: one made here, on a unix socket, that says what a test wants.

use std::collections::HashSet;
use std::convert::Infallible;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use mtls::identity::{Identities, Identity, SpiffeId, WorkloadApi};
use prost::Message;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, SanType,
};
use tokio::sync::watch;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::{Request, Response, Status};

use crate::bench::*;

#[derive(Clone, PartialEq, Message)]
struct SvidRequest {}

/// `X509SVIDResponse` of SPIFFE's workload.proto.
#[derive(Clone, PartialEq, Message)]
struct Answer {
    #[prost(message, repeated, tag = "1")]
    svids: Vec<Svid>,
}

#[derive(Clone, PartialEq, Message)]
struct Svid {
    #[prost(string, tag = "1")]
    spiffe_id: String,
    #[prost(bytes = "vec", tag = "2")]
    x509_svid: Vec<u8>,
    #[prost(bytes = "vec", tag = "3")]
    x509_svid_key: Vec<u8>,
    #[prost(bytes = "vec", tag = "4")]
    bundle: Vec<u8>,
}

/// What the API says: an answer, or that the caller is registered for nothing.
type Said = Result<Answer, ()>;

#[derive(Clone)]
struct Api(watch::Receiver<Said>);

type Answers = Pin<Box<dyn tokio_stream::Stream<Item = Result<Answer, Status>> + Send>>;

impl tonic::server::ServerStreamingService<SvidRequest> for Api {
    type Response = Answer;
    type ResponseStream = Answers;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Answers>, Status>> + Send>>;

    fn call(&mut self, request: Request<SvidRequest>) -> Self::Future {
        let mut said = self.0.clone();
        Box::pin(async move {
            // SPIFFE_Workload_Endpoint, section 6.1: without this header a request may be forged by a browser.
            if request.metadata().get("workload.spiffe.io").is_none_or(|value| value != "true") {
                return Err(Status::invalid_argument("security header missing from request"));
            }
            let (answers, stream) = tokio::sync::mpsc::channel(1);
            tokio::spawn(async move {
                loop {
                    let now = said.borrow_and_update().clone();
                    let now = now.map_err(|()| Status::permission_denied("no identity issued"));
                    if answers.send(now).await.is_err() || said.changed().await.is_err() {
                        return;
                    }
                }
            });
            Ok(Response::new(Box::pin(ReceiverStream::new(stream)) as Answers))
        })
    }
}

impl tower::Service<http::Request<tonic::body::Body>> for Api {
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        assert_eq!(request.uri().path(), "/SpiffeWorkloadAPI/FetchX509SVID");
        let api = self.clone();
        Box::pin(async move {
            let mut grpc = tonic::server::Grpc::new(tonic_prost::ProstCodec::default());
            Ok(grpc.server_streaming(api, request).await)
        })
    }
}

impl tonic::server::NamedService for Api {
    const NAME: &'static str = "SpiffeWorkloadAPI";
}

/// A SPIRE agent, as far as this agent can see one.
struct Spire {
    dir: tempfile::TempDir,
    says: watch::Sender<Said>,
    serving: Option<tokio::task::JoinHandle<()>>,
}

impl Spire {
    fn saying(said: Said) -> Self {
        let mut spire =
            Self { dir: tempfile::tempdir().unwrap(), says: watch::Sender::new(said), serving: None };
        spire.start();
        spire
    }

    fn say(&self, said: Said) {
        let _ = self.says.send_replace(said);
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("agent.sock")
    }

    fn start(&mut self) {
        let _ = std::fs::remove_file(self.socket());
        let listener = tokio::net::UnixListener::bind(self.socket()).unwrap();
        let api = Api(self.says.subscribe());
        self.serving = Some(tokio::spawn(async move {
            let incoming = UnixListenerStream::new(listener);
            tonic::transport::Server::builder().add_service(api).serve_with_incoming(incoming).await.unwrap();
        }));
    }

    async fn stop(&mut self) {
        let serving = self.serving.take().unwrap();
        serving.abort();
        let _ = serving.await;
    }

    /// This node's agent, which wants `shop/cart`.
    fn agent(&self) -> Arc<Identities> {
        let api = WorkloadApi::new(&format!("unix://{}", self.socket().display())).unwrap();
        let identities = Identities::from_workload_api(api, quick());
        identities.want(HashSet::from([cart()]));
        tokio::spawn(identities.clone().run(std::future::pending()));
        identities
    }
}

struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.subject_alt_names = vec![SanType::URI("spiffe://cluster.local".try_into().unwrap())];
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn root(&self) -> Vec<u8> {
        self.0.der().to_vec()
    }

    fn svid(&self, id: &SpiffeId, life: Duration, roots: &[&Self]) -> Svid {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.subject_alt_names = vec![SanType::URI(id.uri().try_into().unwrap())];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.not_after = time::OffsetDateTime::now_utc() + life;
        Svid {
            spiffe_id: id.uri().into(),
            x509_svid: params.signed_by(&key, &self.0).unwrap().der().to_vec(),
            x509_svid_key: key.serialize_der(),
            bundle: roots.iter().flat_map(|root| root.root()).collect(),
        }
    }
}

fn answer(svids: impl IntoIterator<Item = Svid>) -> Said {
    Ok(Answer { svids: svids.into_iter().collect() })
}

async fn until(what: &str, mut reached: impl FnMut() -> bool) {
    let started = Instant::now();
    while !reached() {
        assert!(started.elapsed() < Duration::from_secs(20), "never came: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn serial(identity: &Identity) -> &str {
    &identity.svid.serial
}

#[tokio::test]
async fn of_several_identities_the_nodes_own_are_taken_and_followed() {
    let (old, new) = (Authority::new("old"), Authority::new("new"));
    let others = || [old.svid(&db(), DAY, &[&old])];
    let spire = Spire::saying(answer(others().into_iter().chain([old.svid(&cart(), DAY, &[&old])])));
    let identities = spire.agent();
    let first = identities.ready(&cart(), Duration::from_secs(10)).await.unwrap();
    assert!(first.verify().is_ok() && first.bundle.roots.len() == 1);
    assert!(identities.current(&db()).is_none(), "nobody here is the other identity");

    // The same again is no change; a new certificate is one, and so is a root beside the old.
    let now = spire.says.borrow().clone();
    spire.say(now);
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(identities.current(&cart()).unwrap().version, first.version);
    spire.say(answer([old.svid(&cart(), DAY, &[&old, &new])]));
    let current = || identities.current(&cart()).expect("an identity at every moment");
    until("the renewed certificate", || serial(&current()) != serial(&first)).await;
    assert_eq!(current().bundle.roots.len(), 2);
    let renewed = current();
    let mut same = spire.says.borrow().clone().unwrap();
    same.svids[0].bundle = old.root();
    spire.say(Ok(same));
    until("the root's removal", || current().bundle.roots.len() == 1).await;
    assert_eq!(serial(&current()), serial(&renewed));
    assert!(current().version > renewed.version, "whoever judged by the old bundle judges again");
}

#[tokio::test]
async fn a_certificate_is_used_to_its_end_while_the_api_is_away_and_the_return_is_noticed() {
    let authority = Authority::new("authority");
    let brief = || answer([authority.svid(&cart(), Duration::from_secs(4), &[&authority])]);
    let mut spire = Spire::saying(brief());
    let identities = spire.agent();
    let first = identities.ready(&cart(), Duration::from_secs(10)).await.unwrap();
    spire.stop().await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(identities.current(&cart()).unwrap().version, first.version);
    until("its end", || identities.current(&cart()).is_none()).await;
    assert!(left(first.svid.not_after).is_zero());

    spire.say(answer([authority.svid(&cart(), DAY, &[&authority])]));
    spire.start();
    let second = identities.ready(&cart(), Duration::from_secs(10)).await.unwrap();
    assert!(second.version > first.version);
}

#[tokio::test]
async fn an_identity_that_is_not_given_is_not_served_and_one_taken_away_ends_at_once() {
    let authority = Authority::new("authority");
    let spire = Spire::saying(answer([authority.svid(&db(), DAY, &[&authority])]));
    let identities = spire.agent();
    let refused = identities.ready(&cart(), Duration::from_millis(700)).await.unwrap_err().to_string();
    for part in
        ["agent.sock", "gives this agent no spiffe://cluster.local/ns/shop/sa/cart", "sa/db", "register"]
    {
        assert!(refused.contains(part), "{part}: {refused}");
    }
    spire.say(answer([authority.svid(&cart(), DAY, &[&authority])]));
    identities.ready(&cart(), Duration::from_secs(10)).await.unwrap();
    spire.say(answer([authority.svid(&db(), DAY, &[&authority])]));
    until("the withdrawal", || identities.current(&cart()).is_none()).await;

    spire.say(answer([authority.svid(&cart(), DAY, &[&authority])]));
    identities.ready(&cart(), Duration::from_secs(10)).await.unwrap();
    spire.say(Err(()));
    until("the refusal of all", || identities.current(&cart()).is_none()).await;
    let refused = identities.ready(&cart(), Duration::from_millis(100)).await.unwrap_err().to_string();
    assert!(refused.contains("no identity at all"), "{refused}");
}

#[tokio::test]
async fn what_cannot_be_used_is_refused_in_words() {
    let (authority, stranger) = (Authority::new("authority"), Authority::new("stranger"));
    let good = || authority.svid(&cart(), DAY, &[&authority]);
    let other_key = Svid { x509_svid_key: KeyPair::generate().unwrap().serialize_der(), ..good() };
    for (svid, expected) in [
        (other_key, "another key"),
        (authority.svid(&cart(), DAY, &[&stranger]), "leads to no root"),
        (authority.svid(&cart(), Duration::ZERO, &[&authority]), "compare the clocks"),
        (Svid { x509_svid: vec![1, 2, 3], ..good() }, "failed to parse X.509 SVID"),
    ] {
        let spire = Spire::saying(answer([svid]));
        let identities = spire.agent();
        let refused = identities.ready(&cart(), Duration::from_millis(700)).await.unwrap_err().to_string();
        assert!(refused.contains(expected), "{expected}: {refused}");
        spire.say(answer([good()]));
        identities.ready(&cart(), Duration::from_secs(10)).await.expect("what is good is taken");
    }
    let nobody = Path::new("/nonexistent/agent.sock");
    let api = WorkloadApi::new(nobody.to_str().unwrap()).unwrap();
    let identities = Identities::from_workload_api(api, quick());
    identities.want(HashSet::from([cart()]));
    tokio::spawn(identities.clone().run(std::future::pending()));
    let away = identities.ready(&cart(), Duration::from_millis(700)).await.unwrap_err().to_string();
    assert!(away.contains("/nonexistent/agent.sock") && away.contains("No such file"), "{away}");
    for wrong in ["agent.sock", "tcp://127.0.0.1:1", "http://x", ""] {
        assert!(WorkloadApi::new(wrong).is_err(), "{wrong:?}");
    }
}
