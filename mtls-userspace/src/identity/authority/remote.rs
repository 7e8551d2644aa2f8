//! An authority across the network: `istio.v1.auth.IstioCertificateService/CreateCertificate`, as `mtls ca` and
//! istiod serve it.
//!
//! Root, token and node certificate files are read again for every attempt, so that a rotation of any needs no restart.
//! A workload's private key never passes here.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use prost_types::{Struct, Value, value::Kind};
use rustls::sign::SingleCertAndKey;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint};
use zeroize::Zeroizing;

use super::root_file::{RootFile, read};
use super::wire::{
    IMPERSONATED_IDENTITY, IstioCertificateRequest,
    istio_certificate_service_client::IstioCertificateServiceClient,
};
use super::{Authority, Issued, News, take_apart, trust};
use crate::identity::{Csr, Error, InvalidCertificate, SpiffeId, certified, pem_certificates};

/// Istio's port for this service, when the address names none.
const DEFAULT_PORT: u16 = 15012;
const KEEP_ALIVE: Duration = Duration::from_secs(15);

pub struct RemoteAuthority {
    /// As the operator wrote it, for errors.
    pub(super) address: String,
    host: String,
    port: u16,
    server_name: ServerName<'static>,
    root_file: RootFile,
    pub(super) credential: Credential,
}

/// What proves this node to the authority.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Credential {
    /// A file with a bearer token: a join token, or the pod's ServiceAccount token.
    Token(PathBuf),
    /// PEM files of the node's own certificate (leaf first) and its key; may be one file.
    Certificate { certificate: PathBuf, key: PathBuf },
}

impl RemoteAuthority {
    /// `address` is `https://HOST[:PORT]`; the authority proves itself as HOST with a root in `root_file` (PEM), and
    /// we to it with the credential.
    ///
    /// # Errors
    ///
    /// [`Error::Address`]. The files are not looked at yet: they may be mounted, or written by the CA, later.
    pub fn new(address: &str, root_file: PathBuf, credential: Credential) -> Result<Self, Error> {
        let invalid = || Error::Address { address: address.into() };
        let uri: http::Uri = address.parse().map_err(|_| invalid())?;
        if uri.scheme_str() != Some("https") || !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(invalid());
        }
        let authority = uri.authority().ok_or_else(invalid)?;
        if authority.as_str().contains('@') {
            return Err(invalid());
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        let server_name = ServerName::try_from(host.clone()).map_err(|_| invalid())?;
        Ok(Self {
            address: address.into(),
            port: authority.port_u16().unwrap_or(DEFAULT_PORT),
            host,
            server_name,
            root_file: RootFile::new(root_file),
            credential,
        })
    }

    pub(super) async fn connect(&self, roots: &[CertificateDer<'static>]) -> Result<Channel, Error> {
        let address = || self.address.clone();
        let tls = self.credential.client_config(trusted(roots).map_err(|error| Error::RootFile {
            path: self.root_file.path().into(),
            source: InvalidCertificate::Der { reason: error.to_string() },
        })?);
        let tls = tls.await?;
        let tcp = TcpStream::connect((self.host.as_str(), self.port))
            .await
            .map_err(|source| Error::Unreachable { address: address(), source })?;
        let stream = TlsConnector::from(Arc::new(tls)).connect(self.server_name.clone(), tcp).await.map_err(
            |source| Error::Handshake { address: address(), root: self.root_file.path().into(), source },
        )?;
        self.channel(stream).await.map_err(|source| Error::Transport { address: address(), source })
    }

    /// HTTP/2 on a connection that is there already, so that its errors were ours to name.
    async fn channel(&self, stream: TlsStream<TcpStream>) -> Result<Channel, tonic::transport::Error> {
        let authority = match &self.server_name {
            ServerName::IpAddress(rustls_pki_types::IpAddr::V6(_)) => {
                format!("[{}]:{}", self.host, self.port)
            }
            _ => format!("{}:{}", self.host, self.port),
        };
        // tonic refuses "https" where it doesn't make the TLS itself; the request's own origin still says it.
        let endpoint = Endpoint::from_shared(format!("http://{authority}"))?;
        let endpoint = match format!("https://{authority}").parse() {
            Ok(origin) => endpoint.origin(origin),
            Err(_) => endpoint,
        };
        // A watch says nothing for days: a peer that is gone must show all the same.
        let endpoint = endpoint
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .keep_alive_while_idle(true);
        let mut stream = Some(TokioIo::new(stream));
        endpoint
            .connect_with_connector(tower::service_fn(move |_| {
                let stream = stream.take().ok_or_else(|| io::Error::from(io::ErrorKind::ConnectionReset));
                std::future::ready(stream)
            }))
            .await
    }

    pub(super) async fn roots(&self) -> Result<Vec<CertificateDer<'static>>, Error> {
        self.root_file.read().await
    }
}

impl Credential {
    /// The request, with the token if that is what proves us.
    pub(super) async fn send<T>(&self, message: T) -> Result<tonic::Request<T>, Error> {
        let mut request = tonic::Request::new(message);
        if let Some(bearer) = self.bearer().await? {
            request.metadata_mut().insert("authorization", bearer);
        }
        Ok(request)
    }

    async fn bearer(&self) -> Result<Option<MetadataValue<Ascii>>, Error> {
        let Self::Token(path) = self else { return Ok(None) };
        let unusable = || Error::Token { path: path.clone() };
        let content = read("the token file", path).await?;
        let token = std::str::from_utf8(&content).map_err(|_| unusable())?.trim();
        if token.is_empty() {
            return Err(unusable());
        }
        let mut bearer: MetadataValue<Ascii> =
            Zeroizing::new(format!("Bearer {token}")).parse().map_err(|_| unusable())?;
        bearer.set_sensitive(true);
        Ok(Some(bearer))
    }

    async fn client_config(&self, roots: rustls::RootCertStore) -> Result<rustls::ClientConfig, Error> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(Error::Tls)?
            .with_root_certificates(roots);
        let mut config = match self {
            Self::Token(_) => config.with_no_client_auth(),
            Self::Certificate { certificate, key: path } => {
                let pem = read("the node's certificate", certificate).await?;
                let chain = pem_certificates(&pem)
                    .map_err(|source| Error::NodeCertificate { path: certificate.clone(), source })?;
                let unusable = |reason: String| Error::NodeKey { path: path.clone(), reason };
                let pem = read("the node's key", path).await?;
                let key = PrivateKeyDer::from_pem_slice(&pem).map_err(|error| unusable(error.to_string()))?;
                // Says so when it is another certificate's key.
                let certified = certified(chain, key).map_err(|error| unusable(error.to_string()))?;
                config.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(certified)))
            }
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(config)
    }
}

#[tonic::async_trait]
impl Authority for RemoteAuthority {
    async fn sign(&self, id: &SpiffeId, csr: Csr, lifetime: Duration) -> Result<Issued, Error> {
        let roots = self.roots().await?;
        let mut client = IstioCertificateServiceClient::new(self.connect(&roots).await?);

        let impersonated = Value { kind: Some(Kind::StringValue(id.uri().into())) };
        let request = IstioCertificateRequest {
            csr: csr.pem().into(),
            // Up, because zero would leave the choice to the authority.
            validity_duration: i64::try_from(lifetime.as_millis().div_ceil(1000)).unwrap_or(i64::MAX),
            metadata: Some(Struct { fields: [(IMPERSONATED_IDENTITY.into(), impersonated)].into() }),
        };
        let answer =
            client.create_certificate(self.credential.send(request).await?).await.map_err(|status| {
                Error::Refused {
                    address: self.address.clone(),
                    id: id.clone(),
                    code: status.code(),
                    message: status.message().into(),
                }
            })?;
        take_apart(answer.get_ref().cert_chain.iter().map(String::as_bytes), roots)
            .map_err(|source| Error::Answer { id: id.clone(), source })
    }

    async fn follow(&self, news: &mpsc::Sender<News>) {
        tokio::join!(self.root_file.follow(news), trust::follow(self, news));
    }
}

fn trusted(roots: &[CertificateDer<'static>]) -> Result<rustls::RootCertStore, rustls::Error> {
    let mut store = rustls::RootCertStore::empty();
    for root in roots {
        store.add(root.clone())?;
    }
    Ok(store)
}
