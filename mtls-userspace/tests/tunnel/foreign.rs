//! Peers that are not ours: rustls' own record layer with hand-made frames, for what an honest agent never sends.

use std::net::SocketAddr;
use std::sync::Arc;

use mtls::identity::Identity;
use mtls::tunnel::{ContentType, Sealer};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls13_signature};
use rustls::version::TLS13;
use rustls::{ClientConfig, DigitallySignedStruct, ServerConfig, SignatureScheme, SupportedCipherSuite};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client, server};

pub const DATA: u8 = 2;
pub const FIN: u8 = 3;
pub const RAW: u8 = 5;

/// An OPEN frame for an IPv4 destination, written out by hand.
pub fn open_frame(destination: SocketAddr) -> Vec<u8> {
    let SocketAddr::V4(v4) = destination else { panic!("tests use IPv4") };
    let mut frame = vec![1, 1];
    for (ip, port) in [(v4.ip().octets(), v4.port()), ([10, 0, 0, 9], 4000)] {
        frame.push(4);
        frame.extend(ip);
        frame.extend(port.to_be_bytes());
    }
    frame.push(0);
    frame
}

pub fn data(bytes: &[u8]) -> Vec<u8> {
    [&[DATA], bytes].concat()
}

/// Believes any certificate: the tests look at what the other end believes.
#[derive(Debug)]
struct Credulous(CryptoProvider);

impl ServerCertVerifier for Credulous {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        unreachable!("TLS 1.3 only")
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

fn provider(suite: Option<SupportedCipherSuite>) -> CryptoProvider {
    let mut provider = aws_lc_rs::default_provider();
    if let Some(suite) = suite {
        provider.cipher_suites = vec![suite];
    }
    provider
}

/// How a foreign client behaves.
#[derive(Default, Clone, Copy)]
pub struct Manners {
    pub anonymous: bool,
    pub no_alpn: bool,
    /// The one suite it offers, if not all.
    pub suite: Option<SupportedCipherSuite>,
    /// Speaks `mtls/1.1`, which has RAW.
    pub raw: bool,
    /// Speaks `mtls/1.2`, which has shared tunnels.
    pub shares: bool,
}

pub async fn client(
    address: SocketAddr,
    identity: &Arc<Identity>,
    manners: Manners,
) -> std::io::Result<client::TlsStream<TcpStream>> {
    let provider = provider(manners.suite);
    let builder = ClientConfig::builder_with_provider(Arc::new(provider.clone()))
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Credulous(provider)));
    let mut config = if manners.anonymous {
        builder.with_no_client_auth()
    } else {
        let key = PrivateKeyDer::Pkcs8(identity.svid.key.clone_key());
        builder.with_client_auth_cert(identity.svid.chain.clone(), key).unwrap()
    };
    if !manners.no_alpn {
        let protocol: &[u8] = match manners {
            Manners { shares: true, .. } => b"mtls/1.2",
            Manners { raw: true, .. } => b"mtls/1.1",
            _ => b"mtls/1",
        };
        config.alpn_protocols = vec![protocol.to_vec()];
    }
    config.enable_secret_extraction = true;
    let tcp = TcpStream::connect(address).await?;
    tcp.set_nodelay(true)?;
    let name = ServerName::IpAddress(address.ip().into());
    TlsConnector::from(Arc::new(config)).connect(name, tcp).await
}

/// A client that took its session out of rustls and seals its records by hand, of any type and in any pieces.
pub struct ByHand {
    pub tcp: TcpStream,
    sealer: Sealer,
}

impl ByHand {
    pub async fn client(address: SocketAddr, identity: &Arc<Identity>, manners: Manners) -> Self {
        let (tcp, connection) = client(address, identity, manners).await.unwrap().into_inner();
        let secrets = connection.dangerous_extract_secrets().unwrap();
        Self { tcp, sealer: Sealer::new(secrets.tx.0, &secrets.tx.1).unwrap() }
    }

    pub fn record(&mut self, kind: ContentType, content: &[u8]) -> Vec<u8> {
        let mut record = vec![0; 5 + content.len() + 17];
        record[5..5 + content.len()].copy_from_slice(content);
        self.sealer.seal(&mut record, content.len(), kind).unwrap();
        record
    }

    pub async fn say(&mut self, kind: ContentType, content: &[u8]) {
        let record = self.record(kind, content);
        self.tcp.write_all(&record).await.unwrap();
    }

    pub async fn say_data(&mut self, content: &[u8]) {
        self.say(ContentType::ApplicationData, content).await;
    }
}

/// A foreign server's side of an accepted connection; asks for no client certificate.
pub async fn server(
    tcp: TcpStream,
    identity: &Arc<Identity>,
) -> std::io::Result<server::TlsStream<TcpStream>> {
    let key = PrivateKeyDer::Pkcs8(identity.svid.key.clone_key());
    let mut config = ServerConfig::builder_with_provider(Arc::new(provider(None)))
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(identity.svid.chain.clone(), key)
        .unwrap();
    config.alpn_protocols = vec![b"mtls/1".to_vec()];
    tokio_rustls::TlsAcceptor::from(Arc::new(config)).accept(tcp).await
}
