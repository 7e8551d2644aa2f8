//! The admin API: what is public, what is not, what ready means, and who may be in the way.

use std::io::Write;
use std::net::TcpListener;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mtls::observe::{Admin, Connection, Direction, Ending, Enrolment, Error, MeshRow};
use serde_json::json;

use crate::agent::{Agent, mode};
use crate::flows::{stranger_to_db, strict, web_to_db};
use crate::health_metrics::{identity_row, pod_row};

#[test]
fn ready_is_said_only_when_nothing_is_missing() {
    let agent = Agent::start();
    assert_eq!(agent.get("/healthz/ready").status, 503);
    assert_eq!(agent.get("/healthz/live").status, 200);
    let identities = agent.readiness.condition("identities");
    let capture = agent.readiness.condition("capture");
    identities.not_ready("the certificate authority does not answer");
    let answer = agent.get("/healthz/ready");
    assert_eq!(answer.status, 503);
    assert_eq!(answer.body, "identities: the certificate authority does not answer\ncapture: starting\n");
    capture.set_ready();
    assert_eq!(agent.get("/healthz/ready").status, 503);
    identities.set_ready();
    let answer = agent.get("/healthz/ready");
    assert_eq!((answer.status, answer.body.as_str()), (200, "ready\n"));
    agent.readiness.condition("identities").not_ready("expired");
    assert_eq!(agent.get("/healthz/ready").body, "identities: expired\n");
    assert!(!agent.readiness.is_ready());
}

#[test]
fn details_are_on_the_unix_socket_and_not_on_tcp() {
    let agent = Agent::start();
    for path in ["/status", "/connections", "/pods"] {
        assert_eq!(agent.get(path).status, 404, "{path}");
        assert_eq!(agent.local(path).status, 200, "{path}");
    }
    for path in ["/metrics", "/healthz/live"] {
        assert_eq!(agent.get(path).status, 200, "{path}");
        assert_eq!(agent.local(path).status, 200, "{path}");
    }
    assert_eq!(agent.local("/secrets").status, 404);
}

#[test]
fn status_shows_the_agent_its_pods_certificates_and_connections() {
    let agent = Agent::start();
    agent.readiness.condition("identities").set_ready();
    agent.observer.set_identities(Arc::new(|| vec![identity_row()]));
    agent.observer.set_pods(Arc::new(|| vec![pod_row("web-1", Enrolment::Enrolled)]));
    let mesh = MeshRow { generation: 7, workloads: 12, last_error: Some("pods.yaml".into()), errors: 1 };
    agent.observer.set_mesh(Arc::new(move || mesh.clone()));
    agent.observer.open(web_to_db(Direction::Inbound)).close(Ending::Clean);
    agent.observer.refused(stranger_to_db(), strict());
    let open = agent.observer.open(web_to_db(Direction::Outbound));
    open.progress().add_sent(1000);
    let status = agent.local("/status").json();
    assert_eq!(status["agent"]["node"], "node-a");
    assert_eq!(status["agent"]["pid"], std::process::id());
    assert_eq!(status["agent"]["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(status["agent"]["ready"], true);
    let mesh = json!({ "generation": 7, "workloads": 12, "last_error": "pods.yaml", "errors": 1 });
    assert_eq!(status["mesh"], mesh);
    assert_eq!(status["pods"][0]["enrolment"], json!({ "state": "enrolled" }));
    assert_eq!(status["certificates"][0]["not_after"], "2100-01-01T00:00:00Z");
    let connections = &status["connections"];
    let count = json!([{ "direction": "outbound", "path": "tunnel", "count": 1 }]);
    assert_eq!(connections["open"], count);
    assert_eq!((&connections["opened_total"], &connections["refused_total"]), (&json!(2), &json!(1)));
    assert_eq!(connections["newest"].as_array().unwrap().len(), 1);
    let source = json!({
        "address": "10.0.1.2:41000",
        "workload": "shop/web-7d9f6c5b8-x2x9z",
        "identity": "spiffe://cluster.local/ns/shop/sa/web",
    });
    assert_eq!(connections["newest"][0]["source"], source);
    assert_eq!(connections["newest"][0]["bytes_sent"], 1000);
    drop(open);
    assert_eq!(agent.local("/status").json()["connections"]["newest"], json!([]));
    assert_eq!(agent.local("/pods").json(), status["pods"]);
}

#[test]
fn the_list_of_connections_is_limited_and_its_totals_are_not() {
    let agent = Agent::start();
    let open: Vec<_> = (0..150).map(|_| agent.observer.open(web_to_db(Direction::Outbound))).collect();
    let newest = |path| {
        let rows = agent.local(path).json();
        assert_eq!(rows["open"][0]["count"], 150);
        rows["newest"].as_array().unwrap().iter().map(|row| row["id"].as_u64().unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(newest("/connections").len(), 100);
    assert_eq!(newest("/connections?limit=2"), [149, 148]);
    assert_eq!(newest("/connections?limit=500").len(), 150);
    for wrong in ["/connections?limit=many", "/connections?limti=2"] {
        assert_eq!(agent.local(wrong).status, 400, "{wrong}");
    }
    drop(open);
}

#[test]
fn connections_that_policy_no_longer_allows_are_asked_to_stop_and_others_are_not() {
    let agent = Agent::start();
    let tunnelled = agent.observer.open(web_to_db(Direction::Inbound));
    let plaintext = agent.observer.open(stranger_to_db());
    let strict = |flow: &mtls::observe::Flow| flow.source.identity.is_none().then(|| "data/strict".into());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let stopped = |connection: &Connection| {
        let wait = async { tokio::time::timeout(Duration::from_millis(200), connection.stopped()).await };
        runtime.block_on(wait).ok()
    };
    assert_eq!(stopped(&plaintext), None);
    assert_eq!(agent.observer.revoke(&strict), 1);
    assert_eq!(stopped(&plaintext).as_deref(), Some("data/strict"));
    assert_eq!(stopped(&plaintext).as_deref(), Some("data/strict"), "it stays stopped");
    assert_eq!(stopped(&tunnelled), None);
    assert_eq!(agent.observer.revoke(&strict), 0, "it was asked already");
    assert_eq!(agent.scrape().one("mtls_connections_revoked_total", &[]), 1.0);
    drop(plaintext);
    // One that already waits is woken.
    let waiting = agent.observer.open(stranger_to_db());
    let reason = runtime.block_on(async {
        let revoke = async {
            tokio::task::yield_now().await;
            agent.observer.revoke(&strict)
        };
        let both = async { tokio::join!(waiting.stopped(), revoke) };
        tokio::time::timeout(Duration::from_secs(10), both).await.unwrap()
    });
    assert_eq!((&*reason.0, reason.1), ("data/strict", 1));
}

async fn bind(unix: &Path) -> Result<Admin, Error> {
    Admin::bind(None, Some(unix)).await
}

#[tokio::test]
async fn only_a_dead_agents_socket_is_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("admin.sock");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "a listener leaves its file behind");
    let alive = bind(&path).await.unwrap();
    assert_eq!(mode(&path), 0o600);
    let error = bind(&path).await.unwrap_err();
    assert!(matches!(error, Error::SocketTaken { .. }), "{error}");
    assert!(error.to_string().contains("admin.sock"), "{error}");
    UnixStream::connect(&path).unwrap();
    drop(alive);
    assert!(!path.exists());
}

#[tokio::test]
async fn a_file_that_is_no_socket_is_never_removed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("precious");
    std::fs::File::create(&path).unwrap().write_all(b"data").unwrap();
    let error = bind(&path).await.unwrap_err();
    assert!(matches!(error, Error::NotASocket { .. }), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"data");
}

#[tokio::test]
async fn a_stopping_agent_leaves_its_successors_socket_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("admin.sock");
    let old = bind(&path).await.unwrap();
    std::fs::remove_file(&path).unwrap();
    let new = bind(&path).await.unwrap();
    drop(old);
    UnixStream::connect(&path).unwrap();
    drop(new);
}

#[tokio::test]
async fn a_taken_port_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let error = Admin::bind(Some(address), None).await.unwrap_err();
    let message = error.to_string();
    assert!(message.contains(&address.to_string()) && message.contains("--admin"), "{message}");
}

#[test]
fn a_stopped_agent_answers_no_more_and_takes_its_socket_along() {
    let mut agent = Agent::start();
    // An idle keep-alive connection must not hold the agent up.
    let idle = std::net::TcpStream::connect(agent.tcp).unwrap();
    assert!(agent.socket.exists());
    agent.stop();
    assert!(!agent.socket.exists());
    assert!(std::net::TcpStream::connect(agent.tcp).is_err());
    drop(idle);
}
