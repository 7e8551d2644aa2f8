//! TLS endpoints with any credentials, right or wrong: what an attacker who can reach port 15008 would try.
//!
//! Trusts everybody on purpose: it is the other side that is being tested.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::ops::DerefMut;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    ClientConfig, ClientConnection, ConnectionCommon, DigitallySignedStruct, DistinguishedName, Error,
    ServerConfig, ServerConnection, SignatureScheme, Stream,
};
use serde_json::{Value, json};

use crate::{ending, report};

#[derive(clap::Args)]
pub struct TlsDial {
    to: SocketAddr,
    /// A certificate chain to present, in PEM.
    #[arg(long, requires = "key")]
    chain: Option<PathBuf>,
    #[arg(long)]
    key: Option<PathBuf>,
    #[arg(long, default_value = "mtls/1")]
    alpn: String,
    /// Bytes to send after the handshake, in hexadecimal; each occurrence is a TLS record of its own.
    #[arg(long)]
    hex: Vec<String>,
    /// Then this many bytes of nonsense.
    #[arg(long, default_value_t = 0)]
    noise: usize,
    /// Send without any TLS.
    #[arg(long)]
    raw: bool,
    /// Close the connection without a word after sending.
    #[arg(long)]
    cut: bool,
    /// How long to wait for an answer or an end.
    #[arg(long, default_value_t = 10_000)]
    limit_ms: u64,
}

#[derive(clap::Args)]
pub struct TlsServe {
    #[arg(long)]
    listen: SocketAddr,
    #[arg(long)]
    chain: PathBuf,
    #[arg(long)]
    key: PathBuf,
    #[arg(long, default_value = "mtls/1")]
    alpn: String,
}

impl TlsDial {
    pub fn run(self) -> Result<()> {
        let mut tcp = TcpStream::connect_timeout(&self.to, Duration::from_secs(10))?;
        tcp.set_read_timeout(Some(Duration::from_millis(self.limit_ms)))?;
        tcp.set_write_timeout(Some(Duration::from_millis(self.limit_ms)))?;
        if self.raw {
            let mut answer = json!({ "handshake": false });
            let mut said = Ok(());
            for bytes in self.pieces()? {
                said = said.and_then(|()| tcp.write_all(&bytes));
            }
            self.end(&mut answer, said, tcp.try_clone()?, &mut tcp);
            return Ok(());
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Anyone(provider)));
        let mut config = match (&self.chain, &self.key) {
            (Some(chain), Some(key)) => {
                let (chain, key) = credentials(chain, key)?;
                builder.with_client_auth_cert(chain, key)?
            }
            _ => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![self.alpn.clone().into_bytes()];
        config.enable_sni = false;
        let name = ServerName::from(self.to.ip());
        let mut tls = ClientConnection::new(Arc::new(config), name)?;
        let handshake = handshake(&mut tls, &mut tcp);
        let mut answer = json!({ "handshake": handshake.is_ok() });
        if let Err(error) = handshake {
            answer["error"] = error.to_string().into();
            report(&answer);
            return Ok(());
        }
        answer["alpn"] = tls.alpn_protocol().map(|alpn| String::from_utf8_lossy(alpn).into_owned()).into();
        answer["server"] = tls.peer_certificates().and_then(|chain| spiffe_id(chain.first()?)).into();
        answer["tls"] = format!("{:?}", tls.protocol_version()).into();
        let mut said = Ok(());
        for bytes in self.pieces()? {
            said =
                said.and_then(|()| tls.writer().write_all(&bytes)).and_then(|()| flush(&mut tls, &mut tcp));
        }
        self.end(&mut answer, said, tcp.try_clone()?, &mut Stream::new(&mut tls, &mut tcp));
        Ok(())
    }

    fn pieces(&self) -> Result<Vec<Vec<u8>>> {
        let mut pieces = self.hex.iter().map(|text| unhex(text)).collect::<Result<Vec<_>>>()?;
        if self.noise > 0 {
            pieces.push((0..self.noise).map(|i| (i as u8).wrapping_mul(167).wrapping_add(13)).collect());
        }
        Ok(pieces)
    }

    /// Closes, or waits for the peer to.
    fn end(&self, answer: &mut Value, said: io::Result<()>, tcp: TcpStream, stream: &mut impl Read) {
        answer["sent"] = said.is_ok().into();
        if self.cut {
            let _ = tcp.shutdown(Shutdown::Both);
            answer["ended"] = "we cut".into();
        } else {
            let (received, end) = read_all(stream);
            answer["received"] = received.into();
            answer["ended"] = end;
        }
        report(answer);
    }
}

impl TlsServe {
    pub fn run(self) -> Result<()> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let (chain, key) = credentials(&self.chain, &self.key)?;
        let mut config = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()?
            .with_client_cert_verifier(Arc::new(Anyone(provider)))
            .with_single_cert(chain, key)?;
        config.alpn_protocols = vec![self.alpn.clone().into_bytes()];
        let config = Arc::new(config);
        let listener =
            TcpListener::bind(self.listen).with_context(|| format!("listen on {}", self.listen))?;
        report(&json!({ "listening": listener.local_addr()? }));
        loop {
            let (mut tcp, peer) = listener.accept()?;
            tcp.set_read_timeout(Some(Duration::from_secs(10)))?;
            let mut tls = ServerConnection::new(Arc::clone(&config))?;
            let handshake = handshake(&mut tls, &mut tcp);
            let mut answer = json!({ "accepted": peer, "handshake": handshake.is_ok() });
            match handshake {
                Ok(()) => {
                    answer["client"] =
                        tls.peer_certificates().and_then(|chain| spiffe_id(chain.first()?)).into();
                    let (received, end) = read_all(&mut Stream::new(&mut tls, &mut tcp));
                    answer["received"] = received.into();
                    answer["ended"] = end;
                }
                Err(error) => answer["error"] = error.to_string().into(),
            }
            report(&answer);
        }
    }
}

fn handshake<S: rustls::SideData>(
    tls: &mut impl DerefMut<Target = ConnectionCommon<S>>,
    tcp: &mut TcpStream,
) -> io::Result<()> {
    while tls.is_handshaking() {
        tls.complete_io(tcp)?;
    }
    flush(tls, tcp)
}

fn flush<S: rustls::SideData>(
    tls: &mut impl DerefMut<Target = ConnectionCommon<S>>,
    tcp: &mut TcpStream,
) -> io::Result<()> {
    while tls.wants_write() {
        tls.write_tls(tcp)?;
    }
    Ok(())
}

fn read_all(stream: &mut impl Read) -> (usize, Value) {
    let mut buffer = vec![0; 64 << 10];
    let mut received = 0;
    loop {
        match stream.read(&mut buffer) {
            Ok(n @ 1..) => received += n,
            Ok(_) => return (received, "closed".into()),
            Err(error) if error.raw_os_error().is_some() => return (received, ending(&Err(error)).into()),
            Err(error) => return (received, error.to_string().into()),
        }
    }
}

fn credentials(chain: &Path, key: &Path) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
    let chain = CertificateDer::pem_slice_iter(&fs::read(chain)?).collect::<Result<Vec<_>, _>>()?;
    Ok((chain, PrivateKeyDer::from_pem_slice(&fs::read(key)?)?))
}

/// The URI in a certificate: an IA5String in the subject's alternative names, found by how it starts.
fn spiffe_id(certificate: &CertificateDer<'_>) -> Option<String> {
    let bytes: &[u8] = certificate;
    let at = bytes.windows(9).position(|window| window == b"spiffe://")?;
    let length = usize::from(*bytes.get(at.checked_sub(1)?)?);
    String::from_utf8(bytes.get(at..at + length)?.to_vec()).ok()
}

fn unhex(text: &str) -> Result<Vec<u8>> {
    let digits: Vec<u32> =
        text.chars().map(|c| c.to_digit(16)).collect::<Option<_>>().context("not hexadecimal")?;
    Ok(digits.chunks(2).map(|pair| pair.iter().fold(0, |byte, digit| byte << 4 | *digit as u8)).collect())
}

/// Believes every certificate, as long as its owner has the key.
#[derive(Debug)]
struct Anyone(Arc<CryptoProvider>);

/// What both verifiers below have in common: signatures are proof of the key, and TLS 1.2 isn't spoken.
macro_rules! tls13_signatures {
    () => {
        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Err(Error::General("TLS 1.2".into()))
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signed: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            rustls::crypto::verify_tls13_signature(
                message,
                certificate,
                signed,
                &self.0.signature_verification_algorithms,
            )
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.0.signature_verification_algorithms.supported_schemes()
        }
    };
}

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    tls13_signatures!();
}

impl ClientCertVerifier for Anyone {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        Ok(ClientCertVerified::assertion())
    }

    tls13_signatures!();
}
