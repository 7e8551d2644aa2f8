//! The tests' world: a certificate authority made on the spot, and two agents that relay between applications over
//! loopback.

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use mtls::addr::OriginalSrc;
use mtls::identity::{Identity, Revocations, SpiffeId, Svid, TrustBundle};
use mtls::relay::{Progress, Report, prepare, tunnelled};
use mtls::tunnel::{
    Acceptor, Config, Connector, Error, Open, RejectReason, Rejection, ServerTunnel, Stream, Target,
};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer,
    ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, RevokedCertParams, SanType, SerialNumber,
};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc};

pub const CLIENT: &str = "spiffe://cluster.local/ns/shop/sa/cart";
pub const SERVER: &str = "spiffe://cluster.local/ns/shop/sa/db";

static VERSION: AtomicU64 = AtomicU64::new(1);

pub struct Ca {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

/// What a test wants different about a certificate.
#[derive(Default, Clone, Copy)]
pub struct Leaf {
    pub expired: bool,
    pub second_uri: bool,
    pub wrong_usage: bool,
    /// Life from now on; an hour if zero.
    pub seconds: u64,
}

impl Ca {
    pub fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self { issuer: CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap() }
    }

    pub fn root(&self) -> CertificateDer<'static> {
        self.issuer.der().clone()
    }

    pub fn identity(&self, id: &str) -> Arc<Identity> {
        self.identity_with(id, Leaf::default(), &[self])
    }

    /// A leaf of this authority for `id`, in an identity that trusts `trusted`.
    pub fn identity_with(&self, id: &str, leaf: Leaf, trusted: &[&Ca]) -> Arc<Identity> {
        let (cert, key) = self.leaf(id, leaf);
        let life = Duration::from_secs(if leaf.seconds == 0 { 3600 } else { leaf.seconds });
        Arc::new(Identity {
            version: VERSION.fetch_add(1, Ordering::Relaxed),
            svid: Arc::new(Svid {
                id: id.parse().unwrap(),
                chain: vec![cert],
                key,
                serial: "01".into(),
                not_before: SystemTime::UNIX_EPOCH,
                not_after: SystemTime::now() + life,
            }),
            bundle: Arc::new(TrustBundle::new(trusted.iter().map(|ca| ca.root()).collect())),
        })
    }

    pub fn leaf(&self, id: &str, leaf: Leaf) -> (CertificateDer<'static>, PrivatePkcs8KeyDer<'static>) {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.subject_alt_names = vec![SanType::URI(id.try_into().unwrap())];
        if leaf.second_uri {
            params
                .subject_alt_names
                .push(SanType::URI("spiffe://cluster.local/ns/a/sa/b".try_into().unwrap()));
        }
        params.extended_key_usages = if leaf.wrong_usage {
            vec![ExtendedKeyUsagePurpose::CodeSigning]
        } else {
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth]
        };
        if leaf.expired {
            params.not_before = rcgen::date_time_ymd(2020, 1, 1);
            params.not_after = rcgen::date_time_ymd(2021, 1, 1);
        }
        if leaf.seconds > 0 {
            params.not_after = time::OffsetDateTime::now_utc() + Duration::from_secs(leaf.seconds);
        }
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        (cert.der().clone(), PrivatePkcs8KeyDer::from(key.serialize_der()))
    }
}

impl Ca {
    /// This authority's list, with the leaf of each of these identities in it.
    pub fn revoking(&self, revoked: &[&Arc<Identity>]) -> Revocations {
        let now = time::OffsetDateTime::now_utc();
        let entry = |identity: &&Arc<Identity>| {
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
            next_update: now + Duration::from_secs(3600),
            crl_number: SerialNumber::from(1u64),
            issuing_distribution_point: None,
            revoked_certs: revoked.iter().map(entry).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let pem = list.signed_by(&self.issuer).unwrap().pem().unwrap();
        Revocations::from_pem(pem.as_bytes(), &[self.root()]).unwrap()
    }
}

/// The same certificate in an identity that judges peers by this bundle.
pub fn judging(identity: &Identity, trusted: &[&Ca], revocations: Revocations) -> Arc<Identity> {
    let mut bundle = TrustBundle::new(trusted.iter().map(|ca| ca.root()).collect());
    bundle.revocations = Arc::new(revocations);
    Arc::new(Identity {
        version: VERSION.fetch_add(1, Ordering::Relaxed),
        svid: identity.svid.clone(),
        bundle: Arc::new(bundle),
    })
}

pub async fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

pub fn dial() -> std::io::Result<socket2::Socket> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// Two agents and the application listener behind the second.
pub struct Agents {
    pub outbound: SocketAddr,
    pub inbound: SocketAddr,
    pub connector: Connector,
    pub client_config: Arc<Config>,
    pub server_config: Arc<Config>,
    pub application: TcpListener,
    pub handshakes: Arc<AtomicUsize>,
    pub resumptions: Arc<AtomicUsize>,
    pub client_reports: mpsc::UnboundedReceiver<Report>,
    pub server_reports: mpsc::UnboundedReceiver<Report>,
    /// Revokes every connection on the server's side.
    pub revoke: Arc<Notify>,
    /// Closes the server's idle tunnels.
    pub drain: Arc<Notify>,
}

/// What the server agent answers to a request for this port: a refusal, instead of dialling.
pub const DENIED_PORT: u16 = 9;

impl Agents {
    pub async fn start(client: Arc<Identity>, server: Arc<Identity>) -> Self {
        Self::start_with(client, server, Config::default(), Config::default()).await
    }

    pub async fn start_with(
        client: Arc<Identity>,
        server: Arc<Identity>,
        client_config: Config,
        server_config: Config,
    ) -> Self {
        let (application, destination) = listen().await;
        let (tunnels, inbound) = listen().await;
        let (captured, outbound) = listen().await;
        prepare(&socket2::SockRef::from(&captured)).unwrap();
        let (client_config, server_config) = (Arc::new(client_config), Arc::new(server_config));
        let connector = Connector::new(client_config.clone());
        let acceptor = Acceptor::new(server_config.clone());
        let (handshakes, resumptions) = <(Arc<AtomicUsize>, Arc<AtomicUsize>)>::default();
        let (client_tx, client_reports) = mpsc::unbounded_channel();
        let (server_tx, server_reports) = mpsc::unbounded_channel();
        let (revoke, drain) = <(Arc<Notify>, Arc<Notify>)>::default();

        let (counted, resumed, revoked, drained) =
            (handshakes.clone(), resumptions.clone(), revoke.clone(), drain.clone());
        tokio::spawn(async move {
            loop {
                let (tcp, _) = tunnels.accept().await.unwrap();
                let (acceptor, server, reports) = (acceptor.clone(), server.clone(), server_tx.clone());
                let (counted, resumed) = (counted.clone(), resumed.clone());
                let (revoked, drained) = (revoked.clone(), drained.clone());
                tokio::spawn(async move {
                    let Ok(tunnel) = acceptor.accept(tcp, &server).await else { return };
                    counted.fetch_add(1, Ordering::Relaxed);
                    resumed.fetch_add(usize::from(tunnel.resumed()), Ordering::Relaxed);
                    serve(tunnel, &reports, &revoked, &drained).await;
                });
            }
        });

        let connecting = connector.clone();
        tokio::spawn(async move {
            loop {
                let (app, source) = captured.accept().await.unwrap();
                let (connector, client, reports) = (connecting.clone(), client.clone(), client_tx.clone());
                tokio::spawn(async move {
                    let open = Open::new(destination, OriginalSrc::new(source));
                    let Ok(mut stream) = open_stream(&connector, &client, inbound, open).await else {
                        return app.set_zero_linger().unwrap();
                    };
                    let peer = stream.proof();
                    let stop = pin!(async { _ = peer.until_distrusted().await });
                    let report = tunnelled(&app, &mut stream, &Progress::default(), stop).await;
                    drop((app, stream));
                    let _ = reports.send(report);
                });
            }
        });
        Self {
            outbound,
            inbound,
            connector,
            client_config,
            server_config,
            application,
            handshakes,
            resumptions,
            client_reports,
            server_reports,
            revoke,
            drain,
        }
    }

    /// An application's connection: its own socket and the one the serving application accepted.
    pub async fn connect(&self) -> (TcpStream, TcpStream) {
        let near = TcpStream::connect(self.outbound).await.unwrap();
        let (far, _) = self.application.accept().await.unwrap();
        (near, far)
    }

    pub fn destination(&self) -> SocketAddr {
        self.application.local_addr().unwrap()
    }

    pub fn handshakes(&self) -> usize {
        self.handshakes.load(Ordering::Relaxed)
    }

    /// Waits until the connector keeps this many idle tunnels.
    pub async fn idle(&self, count: usize) {
        eventually(|| self.connector.idle() == count).await;
    }
}

pub async fn open_stream(
    connector: &Connector,
    client: &Arc<Identity>,
    address: SocketAddr,
    open: Open,
) -> Result<Stream, Error> {
    let expected: SpiffeId = SERVER.parse().unwrap();
    connector.open(Target { identity: client, expected: &expected, address, open }, dial).await
}

async fn dial_application(to: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = dial()?;
    prepare(&socket)?;
    tokio::net::TcpSocket::from_std_stream(socket.into()).connect(to).await
}

async fn serve(
    mut tunnel: ServerTunnel,
    reports: &mpsc::UnboundedSender<Report>,
    revoked: &Notify,
    drained: &Notify,
) {
    loop {
        let request = tokio::select! {
            request = tunnel.next() => request,
            () = drained.notified() => return tunnel.close(),
        };
        let Ok(Some(request)) = request else { return };
        let destination = request.open().destination;
        if destination.port() == DENIED_PORT {
            request.reject(&Rejection::new(RejectReason::Denied, "shop/only-front")).await.unwrap();
            continue;
        }
        match dial_application(destination).await {
            Ok(app) => {
                let (_, stream) = request.accept();
                let peer = stream.proof();
                let stop = pin!(async {
                    tokio::select! {
                        () = revoked.notified() => {}
                        _ = peer.until_distrusted() => {}
                    }
                });
                let report = tunnelled(&app, stream, &Progress::default(), stop).await;
                drop(app);
                let clean = matches!(report.end, mtls::relay::End::Clean);
                let _ = reports.send(report);
                if !clean {
                    return;
                }
            }
            Err(_) => {
                let rejection = Rejection::new(RejectReason::ConnectionRefused, "port closed");
                request.reject(&rejection).await.unwrap();
            }
        }
    }
}

pub async fn eventually(mut condition: impl FnMut() -> bool) {
    for _ in 0..500 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("a condition did not come true within five seconds");
}

/// Fails the test instead of hanging it.
pub async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), future).await.expect("nothing happened for twenty seconds")
}
