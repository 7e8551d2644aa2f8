//! A certificate authority on loopback with two nodes, `node-a` with `shop/cart` and `node-b` with `shop/db`.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mtls::ca::{Callers, CertificateAuthority, InForce, JoinTokens, Service, serve};
use mtls::identity::{Config, Credential, Identities, RemoteAuthority, SpiffeId, TrustDomain};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

pub const TOKEN_A: &str = "token-of-node-a-0123456789";
pub const TOKEN_B: &str = "token-of-node-b-0123456789";
pub const DAY: Duration = Duration::from_secs(24 * 3600);

pub struct Bench {
    pub dir: TempDir,
    pub authority: Arc<CertificateAuthority>,
    pub in_force: Arc<InForce>,
    pub address: SocketAddr,
    /// Join tokens, if not other kinds of proof.
    pub callers: Option<Arc<dyn Callers>>,
    running: Option<(oneshot::Sender<()>, JoinHandle<()>)>,
}

impl Bench {
    pub async fn new(leaf_lifetime: Duration) -> Self {
        let authority = CertificateAuthority::in_memory(trust_domain(), leaf_lifetime).unwrap();
        Self::with(authority).await
    }

    pub async fn with(authority: CertificateAuthority) -> Self {
        Self::of(InForce::fixed(authority)).await
    }

    pub async fn of(in_force: Arc<InForce>) -> Self {
        let authority = in_force.current();
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("tokens.yaml"), format!("node-a: {TOKEN_A}\nnode-b: {TOKEN_B}\n"))
            .unwrap();
        std::fs::write(dir.path().join("root.pem"), authority.root_bundle()).unwrap();
        let address = "127.0.0.1:0".parse().unwrap();
        let mut bench = Self { dir, authority, in_force, address, callers: None, running: None };
        bench.start().await;
        bench
    }

    /// On the port it had before, if any.
    pub async fn start(&mut self) {
        assert!(self.running.is_none());
        let listener = TcpListener::bind(self.address).await.unwrap();
        self.address = listener.local_addr().unwrap();
        let join_tokens = || Arc::new(JoinTokens::open(&self.path("tokens.yaml")).unwrap());
        let service = Service {
            authority: self.in_force.clone(),
            callers: self.callers.clone().unwrap_or_else(|| join_tokens()),
            nodes: Arc::new(|node: &str, id: &SpiffeId| {
                (node == "node-a" && *id == cart()) || (node == "node-b" && *id == db())
            }),
        };
        let (stop, stopped) = oneshot::channel();
        let serving = serve(listener, vec!["127.0.0.1".into()], service, async {
            let _ = stopped.await;
        });
        let task = tokio::spawn(async move { serving.await.unwrap() });
        self.running = Some((stop, task));
    }

    pub async fn stop(&mut self) {
        let (stop, task) = self.running.take().unwrap();
        stop.send(()).unwrap();
        task.await.unwrap();
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The authority as an agent with this token sees it.
    pub fn remote(&self, token: &str) -> RemoteAuthority {
        // A file for each: two agents may live at one time.
        let token_file = self.path(if token == TOKEN_A { "token" } else { "token-b" });
        std::fs::write(&token_file, format!("{token}\n")).unwrap();
        self.remote_with(Credential::Token(token_file))
    }

    pub fn remote_with(&self, credential: Credential) -> RemoteAuthority {
        RemoteAuthority::new(&format!("https://{}", self.address), self.path("root.pem"), credential).unwrap()
    }

    /// node-a's agent, renewing `shop/cart` in the background.
    pub fn agent(&self, config: Config) -> (Arc<Identities>, JoinHandle<()>) {
        let identities = Identities::new(Arc::new(self.remote(TOKEN_A)), config);
        identities.want(HashSet::from([cart()]));
        let task = tokio::spawn(identities.clone().run(std::future::pending()));
        (identities, task)
    }
}

pub fn quick() -> Config {
    Config {
        lifetime: DAY,
        retry_min: Duration::from_millis(20),
        retry_max: Duration::from_millis(200),
        ..Config::default()
    }
}

pub fn trust_domain() -> TrustDomain {
    "cluster.local".parse().unwrap()
}

pub fn cart() -> SpiffeId {
    "spiffe://cluster.local/ns/shop/sa/cart".parse().unwrap()
}

pub fn db() -> SpiffeId {
    "spiffe://cluster.local/ns/shop/sa/db".parse().unwrap()
}

pub fn left(until: SystemTime) -> Duration {
    until.duration_since(SystemTime::now()).unwrap_or_default()
}

pub fn openssl(args: &[&str], dir: &Path) -> Output {
    Command::new("openssl").args(args).current_dir(dir).output().expect("openssl is installed")
}

pub fn pem<'a>(
    certificates: impl IntoIterator<Item = &'a rustls_pki_types::CertificateDer<'static>>,
) -> String {
    use base64::Engine as _;
    certificates
        .into_iter()
        .map(|der| {
            let text = base64::engine::general_purpose::STANDARD.encode(der);
            format!("-----BEGIN CERTIFICATE-----\n{text}\n-----END CERTIFICATE-----\n")
        })
        .collect()
}
