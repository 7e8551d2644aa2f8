//! The tests' world: a certificate authority made on the spot, and two agents that relay between applications over
//! loopback.

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use mtls::addr::OriginalSrc;
use mtls::identity::{Identity, Revocations, SpiffeId, Svid, TrustBundle};
use mtls::relay::{App, Growing, Laned, Progress, Relayed, Report, laned, prepare, tunnelled_while_light};
use mtls::tunnel::{Acceptor, Carried, Config, Connector, Error, Open, Stream, Target};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer,
    ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, RevokedCertParams, SanType, SerialNumber,
};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc};

use crate::serving::Serving;
use crate::wandering::Wandering;

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
    /// Where the next stream is to go, if not to the application.
    elsewhere: Arc<Mutex<Option<SocketAddr>>>,
    refusing: Arc<AtomicBool>,
    wandering: Arc<Wandering>,
}

/// A client whose streams have tunnels of their own.
pub fn alone() -> Config {
    Config { share: false, ..Config::default() }
}

/// What the server agent answers to a request for this port: a refusal, instead of dialling.
pub const DENIED_PORT: u16 = 9;

impl Agents {
    pub async fn start(client: Arc<Identity>, server: Arc<Identity>) -> Self {
        Self::start_with(client, server, alone(), Config::default()).await
    }

    /// Two that trust each other, with tunnels like this.
    pub async fn with(client_config: Config) -> Self {
        let ca = Ca::new();
        Self::start_with(ca.identity(CLIENT), ca.identity(SERVER), client_config, Config::default()).await
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

        let elsewhere = Arc::<Mutex<Option<SocketAddr>>>::default();
        let refusing = Arc::new(AtomicBool::new(false));
        let wandering = Arc::<Wandering>::default();
        let refuses = refusing.clone();
        let (counted, resumed) = (handshakes.clone(), resumptions.clone());
        let serving = Serving {
            acceptor: acceptor.clone(),
            id: server.svid.id.clone(),
            reports: server_tx,
            revoked: revoke.clone(),
            drained: drain.clone(),
            wandering: wandering.clone(),
        };
        tokio::spawn(async move {
            loop {
                let (tcp, _) = tunnels.accept().await.unwrap();
                if refuses.load(Ordering::Relaxed) {
                    continue;
                }
                let (acceptor, server, serving) = (acceptor.clone(), server.clone(), serving.clone());
                let (counted, resumed) = (counted.clone(), resumed.clone());
                tokio::spawn(async move {
                    let Ok(tunnel) = acceptor.accept(tcp, &server).await else { return };
                    counted.fetch_add(1, Ordering::Relaxed);
                    resumed.fetch_add(usize::from(tunnel.resumed()), Ordering::Relaxed);
                    serving.tunnel(tunnel, None).await;
                });
            }
        });

        let (connecting, diverted, wanders) = (connector.clone(), elsewhere.clone(), wandering.clone());
        tokio::spawn(async move {
            loop {
                let (app, source) = captured.accept().await.unwrap();
                let destination = diverted.lock().unwrap().take().unwrap_or(destination);
                let (connector, client, reports) = (connecting.clone(), client.clone(), client_tx.clone());
                let wanders = wanders.clone();
                tokio::spawn(async move {
                    let open = Open::new(destination, OriginalSrc::new(source));
                    if let Some(report) = send_off(&connector, &client, inbound, open, app, &wanders).await {
                        let _ = reports.send(report);
                    }
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
            elsewhere,
            refusing,
            wandering,
        }
    }

    /// Streams that begin from here on do not stay where they are.
    pub fn wander(&self) {
        self.wandering.wanted.store(true, Ordering::Relaxed);
    }

    /// How often streams left their event loop, at the client's and the server's end.
    pub fn departures(&self) -> [usize; 2] {
        [0, 1].map(|end| self.wandering.departures[end].load(Ordering::Relaxed))
    }

    /// An application's connection to this port of the server's, where nobody may be.
    pub async fn ask_for(&self, port: u16) -> TcpStream {
        *self.elsewhere.lock().unwrap() = Some(([127, 0, 0, 1], port).into());
        TcpStream::connect(self.outbound).await.unwrap()
    }

    /// From here on the server takes no more tunnels.
    pub fn refuse_tunnels(&self) {
        self.refusing.store(true, Ordering::Relaxed);
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
    let target = Target { identity: client, expected: &expected, netns: 0, address };
    connector.open(target, open, dial).await
}

/// The client agent's half of a connection, wherever it runs; `None` if it could not begin.
async fn send_off(
    connector: &Connector,
    client: &Arc<Identity>,
    address: SocketAddr,
    open: Open,
    app: TcpStream,
    wandering: &Wandering,
) -> Option<Report> {
    let expected: SpiffeId = SERVER.parse().unwrap();
    let target = Target { identity: client, expected: &expected, netns: 0, address };
    let progress = Arc::new(Progress::default());
    let (app, stream) = match connector.carry(target, open, dial).await {
        Ok(Carried::Alone(stream)) => (App::new(app, progress.clone(), true), stream),
        Ok(Carried::Shared(lane)) => {
            let app = App::new(app, progress.clone(), true);
            let peer = lane.proof();
            let stop = pin!(async { _ = peer.until_distrusted().await });
            let place = lane.place();
            let grow = || Some(Box::pin(connector.adopt(target, place, dial)) as Growing<'_>);
            match laned(&app, &lane, grow, stop).await {
                Laned::Ended(report) => return Some(report),
                Laned::Moved(stream) => (app, stream),
            }
        }
        Err(_) => {
            app.set_zero_linger().unwrap();
            return None;
        }
    };
    let mut stream = stream;
    let peer = stream.proof();
    let mut stop = pin!(async { _ = peer.until_distrusted().await });
    let _driven = wandering.drive(&progress);
    let report = loop {
        match tunnelled_while_light(&app.socket, &mut stream, &progress, &mut stop).await {
            Relayed::Ended(report) => break report,
            Relayed::Bulk => {
                wandering.departs(0);
                stream = stream.depart().unwrap().arrive().unwrap();
            }
        }
    };
    drop((app, stream));
    Some(report)
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
