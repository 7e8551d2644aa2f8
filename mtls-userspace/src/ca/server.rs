//! The authority's listener: TCP connections in, TLS 1.3 with the authority's own certificate, gRPC out.
//!
//! Bounded in connections and in time for each; a caller without a token can cost no more than a handshake.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use rustls::sign::SingleCertAndKey;
use rustls_pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

use super::client_certificate::AnyCertificate;
use super::trust::Announcer;
use super::{Error, InForce, Service};
use crate::identity::certified;
use crate::identity::trust_wire::trust_service_server::TrustServiceServer;
use crate::identity::wire::istio_certificate_service_server::IstioCertificateServiceServer;

/// Each agent has one all the time, by which it follows roots and revocation lists, and others for a moment.
const CONNECTIONS: usize = 16 * 1024;
const HANDSHAKE: Duration = Duration::from_secs(5);
const REQUEST: Duration = Duration::from_secs(10);
/// Agents make a connection for each certificate, and a new one to follow on: an old one is idle, and holds a place.
const CONNECTION_AGE: Duration = Duration::from_secs(300);
const GRACE: Duration = Duration::from_secs(5);
/// After the authority could not certify itself.
const RENEW_AGAIN: Duration = Duration::from_secs(10);
const MAX_REQUEST: usize = 64 * 1024;

/// Serves until `shutdown` completes; requests under way are answered. `names` are the DNS names and IP addresses
/// under which agents reach the listener.
pub async fn serve(
    listener: TcpListener,
    names: Vec<String>,
    service: Service,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), Error> {
    let (connections, accepted) = mpsc::channel(16);
    let front = Front { authority: service.authority.clone(), names, connections };
    let (stop, stopped) = watch::channel(false);
    let announcer = Announcer { service: service.clone(), stopped: stopped.clone() };
    let trust = TrustServiceServer::new(announcer).max_decoding_message_size(MAX_REQUEST);
    let service = IstioCertificateServiceServer::new(service).max_decoding_message_size(MAX_REQUEST);
    let server = tonic::transport::Server::builder()
        .timeout(REQUEST)
        .max_connection_age(CONNECTION_AGE)
        .max_connection_age_grace(GRACE)
        .max_concurrent_streams(64)
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .add_service(service)
        .add_service(trust)
        .serve_with_incoming_shutdown(ReceiverStream::new(accepted), until(stopped.clone()));
    let accepting = async {
        tokio::select! {
            accepted = front.accept(listener) => return accepted,
            () = until(stopped) => {}
        }
        // The port is free, and what was accepted gets its answers.
        std::future::pending().await
    };
    let end = async {
        shutdown.await;
        stop.send_replace(true);
        tokio::time::sleep(GRACE).await;
    };
    tokio::select! {
        served = server => Ok(served?),
        accepted = accepting => accepted,
        () = end => Ok(()),
    }
}

/// Closed is as good as told.
pub(super) async fn until(mut stopped: watch::Receiver<bool>) {
    let _ = stopped.wait_for(|stopped| *stopped).await;
}

struct Front {
    authority: Arc<InForce>,
    names: Vec<String>,
    connections: mpsc::Sender<io::Result<Connection>>,
}

impl Front {
    /// Returns only when the authority can't certify itself at the start.
    async fn accept(self, listener: TcpListener) -> Result<(), Error> {
        let places = Arc::new(Semaphore::new(CONNECTIONS));
        let mut handshakes = JoinSet::new();
        let mut changes = self.authority.subscribe();
        let (mut tls, mut renewal) = self.tls()?;
        loop {
            let Ok(place) = places.clone().acquire_owned().await else { return Ok(()) };
            let accepted = loop {
                tokio::select! {
                    accepted = listener.accept() => break accepted,
                    () = sleep_until(renewal) => self.renew(&mut tls, &mut renewal),
                    // The other end of it lives as long as `self`.
                    Ok(()) = changes.changed() => self.renew(&mut tls, &mut renewal),
                    Some(_) = handshakes.join_next() => {}
                }
            };
            match accepted {
                Ok((tcp, peer)) => {
                    handshakes.spawn(handshake(tls.clone(), tcp, peer, place, self.connections.clone()));
                }
                Err(error) => {
                    // Out of file descriptors, mostly: give connections time to end.
                    tracing::warn!(%error, "cannot accept connections to the certificate service");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    /// A failure may pass: the operator can replace an authority that has run out.
    fn renew(&self, tls: &mut TlsAcceptor, renewal: &mut SystemTime) {
        match self.tls() {
            Ok(renewed) => (*tls, *renewal) = renewed,
            Err(error) => {
                tracing::error!(%error, "the authority cannot renew its own certificate");
                *renewal = SystemTime::now() + RENEW_AGAIN;
            }
        }
    }

    /// The listener's TLS with a new certificate, and when to make the next.
    fn tls(&self) -> Result<(TlsAcceptor, SystemTime), Error> {
        let certificate = self.authority.current().sign_server(&self.names)?;
        let now = SystemTime::now();
        let left = certificate.not_after.duration_since(now).unwrap_or_default();
        let certified = certified(certificate.chain, certificate.key.into())?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(AnyCertificate::new())
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(certified)));
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok((TlsAcceptor::from(Arc::new(config)), now + (left / 2).max(Duration::from_secs(1))))
    }
}

async fn handshake(
    tls: TlsAcceptor,
    tcp: TcpStream,
    peer: SocketAddr,
    place: OwnedSemaphorePermit,
    connections: mpsc::Sender<io::Result<Connection>>,
) {
    // Answers are one small write; nothing waits for a second.
    let _ = tcp.set_nodelay(true);
    match tokio::time::timeout(HANDSHAKE, tls.accept(tcp)).await {
        Ok(Ok(stream)) => {
            // Fails when the server is stopping, and then the connection may go.
            let _ = connections.send(Ok(Connection { stream, peer, _place: place })).await;
        }
        Ok(Err(error)) => tracing::debug!(%peer, %error, "TLS handshake with a caller failed"),
        Err(_) => tracing::debug!(%peer, "TLS handshake with a caller took too long"),
    }
}

async fn sleep_until(at: SystemTime) {
    // By the wall clock, in steps: the monotonic clock stands still while a machine is suspended.
    while let Ok(left) = at.duration_since(SystemTime::now()) {
        tokio::time::sleep(left.min(Duration::from_secs(60))).await;
    }
}

/// A TLS connection in its place among the permitted ones.
struct Connection {
    stream: TlsStream<TcpStream>,
    peer: SocketAddr,
    _place: OwnedSemaphorePermit,
}

/// Where a request came from.
#[derive(Clone)]
pub(super) struct Origin {
    pub address: SocketAddr,
    /// Leaf first; the caller has the leaf's key, nothing else is checked yet.
    pub certificates: Option<Arc<[CertificateDer<'static>]>>,
}

impl Connected for Connection {
    type ConnectInfo = Origin;

    fn connect_info(&self) -> Origin {
        let certificates = self.stream.get_ref().1.peer_certificates();
        Origin { address: self.peer, certificates: certificates.map(Into::into) }
    }
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}
