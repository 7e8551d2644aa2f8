//! A Kubernetes API server for tests: objects, users and mishaps in, the API as clients know it out.
//!
//! Speaks what a client's list-and-watch depends on as the real one does: lists in pages of one consistent state,
//! watches that go on from a resource version, bookmarks, `410 Gone` for versions that are forgotten (in either of its two
//! forms), conflicts, subresources, bearer tokens, RBAC, TokenReview. Knows no admission, no schemas and no controllers:
//! what those would write, the test writes.

mod access;
mod http;
mod kinds;
pub(crate) mod lab;
mod store;
mod watch;

use std::fmt;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use anyhow::{Context, Result};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use tokio::sync::watch as signal;

pub use access::{Rule, User};
pub use lab::agent_rules;

use access::Access;
use store::Store;

/// How often a watch is told how far it has come, where nothing happens.
const BOOKMARKS: Duration = Duration::from_millis(500);

/// A running server. Dropping it ends it, and every connection with it.
pub struct ApiServer {
    shared: Arc<Shared>,
    address: SocketAddr,
    ca: String,
    runtime: Option<tokio::runtime::Runtime>,
}

/// What connections and the test share.
struct Shared {
    store: Mutex<Store>,
    access: Mutex<Access>,
    behaviour: Mutex<Behaviour>,
    /// Wakes watches: the newest resource version.
    newest: signal::Sender<u64>,
    /// Cuts every connection that began before.
    cut: signal::Sender<u64>,
    requests: Mutex<Vec<String>>,
}

/// How the server is, apart from what it holds.
#[derive(Clone, Copy, Debug, Default)]
struct Behaviour {
    away: bool,
    /// A watch from a forgotten version is refused with status 410, instead of an event that says so.
    gone_by_status: bool,
    /// Watches end after this at the latest, whatever the client asked for.
    longest_watch: Option<Duration>,
}

impl ApiServer {
    /// Serves on a listener that is there already, in whatever network namespace that is.
    pub fn start(listener: TcpListener) -> Result<Self> {
        let address = listener.local_addr()?;
        listener.set_nonblocking(true)?;
        let (tls, ca) = access::tls(address.ip())?;
        let shared = Arc::new(Shared {
            store: Mutex::default(),
            access: Mutex::default(),
            behaviour: Mutex::default(),
            newest: signal::Sender::new(0),
            cut: signal::Sender::new(0),
            requests: Mutex::default(),
        });
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("api-server")
            .enable_all()
            .build()
            .context("the API server's runtime")?;
        let serving = shared.clone();
        {
            let _here = runtime.enter();
            let listener = tokio::net::TcpListener::from_std(listener)?;
            runtime.spawn(http::serve(listener, tls, serving));
        }
        Ok(Self { shared, address, ca, runtime: Some(runtime) })
    }

    /// On this machine's loopback.
    pub fn on_loopback() -> Result<Self> {
        Self::start(TcpListener::bind("127.0.0.1:0")?)
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn url(&self) -> String {
        format!("https://{}", self.address)
    }

    /// Lets a user in, with a token, and returns the token.
    pub fn user(&self, user: User) -> String {
        lock(&self.shared.access).add(user)
    }

    /// Takes a user's rules away, or gives others.
    pub fn rules(&self, user: &str, rules: Vec<Rule>) {
        lock(&self.shared.access).rules(user, rules);
    }

    /// Takes a token out of use.
    pub fn revoke(&self, token: &str) {
        lock(&self.shared.access).revoke(token);
    }

    /// Writes a kubeconfig for whoever has this token.
    pub fn kubeconfig(&self, path: &Path, token: &str) -> Result<PathBuf> {
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{ "name": "test", "cluster": {
                "server": self.url(), "certificate-authority-data": STANDARD.encode(&self.ca),
            } }],
            "users": [{ "name": "test", "user": { "token": token } }],
            "contexts": [{ "name": "test", "context": { "cluster": "test", "user": "test",
            "namespace": "mtls-system" } }],
        });
        std::fs::write(path, config.to_string()).with_context(|| format!("write {}", path.display()))?;
        Ok(path.into())
    }

    /// Writes what kubelet gives a pod's container of a ServiceAccount with this token. Such a container finds the server by
    /// its environment.
    pub fn service_account(&self, directory: &Path, token: &str) -> Result<[(&'static str, String); 2]> {
        for (name, text) in [("token", token), ("ca.crt", &self.ca), ("namespace", "mtls-system")] {
            let path = directory.join(name);
            std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        }
        let (host, port) = (self.address.ip().to_string(), self.address.port().to_string());
        Ok([("KUBERNETES_SERVICE_HOST", host), ("KUBERNETES_SERVICE_PORT", port)])
    }

    /// Creates an object, or replaces the one of its name. Returns it as it is then.
    pub fn apply(&self, object: &Value) -> Result<Value> {
        let applied = lock(&self.shared.store).apply(object)?;
        self.shared.wake();
        Ok(applied)
    }

    /// Creates many objects, waking watches once.
    pub fn apply_all(&self, objects: &[Value]) -> Result<()> {
        {
            let mut store = lock(&self.shared.store);
            objects.iter().try_for_each(|object| store.apply(object).map(drop))?;
        }
        self.shared.wake();
        Ok(())
    }

    /// Deletes an object; `object` needs its kind and name only.
    pub fn delete(&self, object: &Value) -> Result<()> {
        lock(&self.shared.store).delete_like(object)?;
        self.shared.wake();
        Ok(())
    }

    /// An object as it is now; `object` needs its kind and name only.
    pub fn get(&self, object: &Value) -> Option<Value> {
        lock(&self.shared.store).get_like(object)
    }

    /// Every object of a kind (in the plural, with its group: `pods`, `endpointslices.discovery.k8s.io`).
    pub fn list(&self, plural: &str) -> Vec<Value> {
        lock(&self.shared.store).all(plural)
    }

    /// Forgets a kind with its objects, as if its definition had never been installed; or makes it known.
    pub fn define(&self, plural: &str, defined: bool) {
        lock(&self.shared.store).define(plural, defined);
    }

    /// Forgets the history: watches and pages from before now are gone. Open watches end, as they do when a server can
    /// no longer follow. `by_status`: say so by the status of the answer, not by an event in it.
    pub fn forget_history(&self, by_status: bool) {
        lock(&self.shared.behaviour).gone_by_status = by_status;
        lock(&self.shared.store).forget_history();
        self.shared.cut_all();
    }

    /// Ends every connection in the middle of whatever it does.
    pub fn cut_connections(&self) {
        self.shared.cut_all();
    }

    /// Ends watches after this at the latest.
    pub fn limit_watches(&self, longest: Duration) {
        lock(&self.shared.behaviour).longest_watch = Some(longest);
    }

    /// Refuses every connection, and cuts those that are open, until [`Self::come_back`].
    pub fn go_away(&self) {
        lock(&self.shared.behaviour).away = true;
        self.shared.cut_all();
    }

    pub fn come_back(&self) {
        lock(&self.shared.behaviour).away = false;
    }

    /// Method and path with query of every request so far that was let in.
    pub fn requests(&self) -> Vec<String> {
        lock(&self.shared.requests).clone()
    }
}

impl fmt::Debug for ApiServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ApiServer").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        // Without waiting: a test may end inside a runtime of its own.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Shared {
    fn wake(&self) {
        self.newest.send_replace(lock(&self.store).revision());
    }

    fn cut_all(&self) {
        self.cut.send_modify(|cuts| *cuts += 1);
    }
}

/// A test that panicked elsewhere must not hide its own reason behind another.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
