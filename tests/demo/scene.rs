//! Who takes part in the demo: nodes, pods, agents and applications.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use mtls_tests::apps::{Files, Grpc, MariaDb, Nginx, Postgres, Redis, Session};
use mtls_tests::{Lab, Level, Mesh, Mode, Pod, PodSpec, eventually};

use crate::progress;

pub const NEEDS: [&str; 16] = [
    "ip",
    "setpriv",
    "sha256sum",
    "nginx",
    "wrk",
    "curl",
    "postgres",
    "initdb",
    "psql",
    "pgbench",
    "redis-server",
    "redis-benchmark",
    "mariadbd",
    "mariadb-install-db",
    "mariadb",
    "mariadb-slap",
];

pub struct Scene {
    // Fields are dropped in this order: processes before the lab they run in.
    pub mesh: Mesh,
    pub far: Arc<Pod>,
    pub near: Arc<Pod>,
    pub web: Arc<Pod>,
    pub intruder: Arc<Pod>,
    pub lab: Lab,
}

/// What a client does with an application.
pub type Visit = Box<dyn Fn(&Pod) -> Result<Session>>;

/// A server that runs, and what a client does with it.
pub struct Application {
    pub name: &'static str,
    pub server: Arc<Pod>,
    pub session: Visit,
}

impl Scene {
    /// Nodes, pods, the authority, the agents, and STRICT for everybody.
    pub fn set() -> Result<Self> {
        let lab = Lab::two_nodes()?;
        progress(&format!("node-a and node-b (look with: ip netns list | grep {})", lab.id()));
        let far = lab.pod("node-a", "client-a")?;
        let near = lab.pod("node-b", "client-b")?;
        let web = lab.add(PodSpec::new("node-b", "web").port("http", Nginx::PORT))?;
        let intruder = lab.outsider("node-a", "intruder")?;
        progress("pods: client-a on node-a; client-b and the servers on node-b; an intruder on node-a");
        lab.peer_authentication(Level::Mesh, Mode::Strict)?;
        let mesh = Mesh::start(&lab)?;
        progress(
            "a certificate authority, an agent on each node, PeerAuthentication STRICT for the whole mesh",
        );
        Ok(Self { mesh, far, near, web, intruder, lab })
    }

    /// Starts every application in a pod of its own.
    pub fn applications(&mut self) -> Result<Vec<Application>> {
        let nginx = Arc::new(Nginx::start(&self.lab, &self.web)?);
        let pod = |name: &str, port: u16| self.lab.add(PodSpec::new("node-b", name).port("main", port));
        let db = pod("postgres", Postgres::PORT)?;
        let cache = pod("redis", Redis::PORT)?;
        let sql = pod("mariadb", MariaDb::PORT)?;
        let chat = pod("chat", Grpc::PORT)?;
        let store = pod("store", Files::PORT)?;
        let postgres = Postgres::start(&self.lab, &db)?;
        let redis = Redis::start(&self.lab, &cache)?;
        let mariadb = MariaDb::start(&self.lab, &sql)?;
        let grpc = Grpc::start(&chat)?;
        let files = Files::start(&store)?;
        for name in ["postgres", "redis", "mariadb", "chat", "store"] {
            self.await_enrolled(name)?;
        }
        progress("nginx, PostgreSQL, Redis, MariaDB, a gRPC server and a file store, unmodified\n");
        let (short, large) = (Arc::clone(&nginx), Arc::clone(&nginx));
        Ok(vec![
            application("nginx", &self.web, move |client| nginx.keep_alive(client)),
            application("nginx", &self.web, move |client| short.short_connections(client)),
            application("nginx", &self.web, move |client| large.large_file(client, 64)),
            application("PostgreSQL", &db, move |client| postgres.transactions(client)),
            application("Redis", &cache, move |client| redis.benchmark(client)),
            application("MariaDB", &sql, move |client| mariadb.queries(client)),
            application("gRPC", &chat, move |client| grpc.talk(client)),
            application("file store", &store, move |client| files.send(client, 500_000_000)),
        ])
    }

    /// Pods that appeared after the agent started are enrolled when its metrics say so.
    fn await_enrolled(&mut self, name: &str) -> Result<()> {
        let enrolled = eventually(Duration::from_secs(20), || {
            let metrics = self.mesh.agent("node-b").metrics().ok()?;
            (metrics.sum("mtls_pod_enrolled", &[("pod", name)]) == 1.0).then_some(())
        });
        enrolled.with_context(|| format!("{name} is not enrolled:\n{}", self.mesh.agent("node-b").log()))
    }
}

fn application(
    name: &'static str,
    server: &Arc<Pod>,
    session: impl Fn(&Pod) -> Result<Session> + 'static,
) -> Application {
    Application { name, server: Arc::clone(server), session: Box::new(session) }
}
