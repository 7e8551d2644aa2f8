//! A SPIRE agent, as far as the product can see one: a SPIFFE Workload API on a unix socket that says what a test wants.

use std::convert::Infallible;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result};
use prost::Message;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, SanType,
};
use tokio::sync::{oneshot, watch};
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::body::Body;
use tonic::codegen::{Service, http};
use tonic::{Request, Response, Status};

#[derive(Clone, PartialEq, Message)]
struct SvidRequest {}

/// `X509SVIDResponse` of SPIFFE's workload.proto.
#[derive(Clone, PartialEq, Message)]
pub struct Answer {
    #[prost(message, repeated, tag = "1")]
    pub svids: Vec<Svid>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Svid {
    #[prost(string, tag = "1")]
    pub spiffe_id: String,
    #[prost(bytes = "vec", tag = "2")]
    pub x509_svid: Vec<u8>,
    #[prost(bytes = "vec", tag = "3")]
    pub x509_svid_key: Vec<u8>,
    #[prost(bytes = "vec", tag = "4")]
    pub bundle: Vec<u8>,
}

/// What the API says: these identities, or that the caller is registered for nothing.
pub type Said = Option<Vec<Svid>>;

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
                    let now = match now {
                        Some(svids) => Ok(Answer { svids }),
                        None => Err(Status::permission_denied("no identity issued")),
                    };
                    if answers.send(now).await.is_err() || said.changed().await.is_err() {
                        return;
                    }
                }
            });
            Ok(Response::new(Box::pin(ReceiverStream::new(stream)) as Answers))
        })
    }
}

impl Service<http::Request<Body>> for Api {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
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

/// Serves on a thread of its own until it is stopped or dropped.
pub struct Spire {
    socket: PathBuf,
    says: watch::Sender<Said>,
    serving: Option<(oneshot::Sender<()>, JoinHandle<()>)>,
}

impl Spire {
    pub fn start(socket: PathBuf, said: Said) -> Result<Self> {
        let mut spire = Self { socket, says: watch::Sender::new(said), serving: None };
        spire.restart()?;
        Ok(spire)
    }

    /// Tells everybody who listens.
    pub fn say(&self, said: Said) {
        let _ = self.says.send_replace(said);
    }

    /// What it says now.
    pub fn said(&self) -> Said {
        self.says.borrow().clone()
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    pub fn stop(&mut self) {
        if let Some((stop, thread)) = self.serving.take() {
            let _ = stop.send(());
            let _ = thread.join();
        }
    }

    pub fn restart(&mut self) -> Result<()> {
        self.stop();
        let _ = std::fs::remove_file(&self.socket);
        let listener =
            std::os::unix::net::UnixListener::bind(&self.socket).context("the socket of the Workload API")?;
        listener.set_nonblocking(true)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let api = Api(self.says.subscribe());
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::spawn(move || {
            runtime.block_on(async {
                let Ok(listener) = tokio::net::UnixListener::from_std(listener) else { return };
                let incoming = UnixListenerStream::new(listener);
                let server =
                    tonic::transport::Server::builder().add_service(api).serve_with_incoming(incoming);
                tokio::select! {
                    _ = server => {}
                    _ = stopped => {}
                }
            });
        });
        self.serving = Some((stop, thread));
        Ok(())
    }
}

impl Drop for Spire {
    fn drop(&mut self) {
        self.stop();
        let _ = std::fs::remove_file(&self.socket);
    }
}

/// What signs behind a SPIRE agent.
pub struct SpireAuthority(CertifiedIssuer<'static, KeyPair>);

impl SpireAuthority {
    pub fn new(name: &str) -> Result<Self> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.subject_alt_names = vec![SanType::URI("spiffe://cluster.local".try_into()?)];
        Ok(Self(CertifiedIssuer::self_signed(params, KeyPair::generate()?)?))
    }

    pub fn root(&self) -> Vec<u8> {
        self.0.der().to_vec()
    }

    /// An identity with a new key, and these roots to judge others by.
    pub fn svid(&self, id: &str, life: Duration, roots: &[&Self]) -> Result<Svid> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.subject_alt_names = vec![SanType::URI(id.try_into()?)];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.not_after = time::OffsetDateTime::now_utc() + life;
        Ok(Svid {
            spiffe_id: id.into(),
            x509_svid: params.signed_by(&key, &self.0)?.der().to_vec(),
            x509_svid_key: key.serialize_der(),
            bundle: roots.iter().flat_map(|root| root.root()).collect(),
        })
    }
}
