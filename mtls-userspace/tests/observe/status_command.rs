//! `mtls status`, asked of an agent that answers, of none, and of something that is no agent.

use std::io::Write;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;

use clap::Parser;
use mtls::cli::status::{self, Args, Error, Tables};
use mtls::observe::{Direction, Enrolment, MeshRow, Status};

use crate::agent::Agent;
use crate::flows::{stranger_to_db, web_to_db};
use crate::health_metrics::{identity_row, pod_row};

#[derive(Parser)]
struct CommandLine {
    #[command(flatten)]
    status: Args,
}

fn run(socket: &Path, more: &[&str]) -> Result<String, Error> {
    let fixed = ["status", "--admin-socket", socket.to_str().unwrap()];
    let args = CommandLine::parse_from(fixed.iter().chain(more)).status;
    let mut out = Vec::new();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(status::run(&args, &mut out))?;
    Ok(String::from_utf8(out).unwrap())
}

#[test]
fn people_get_tables() {
    let agent = Agent::start();
    agent.readiness.condition("capture").set_ready();
    agent.readiness.condition("identities").not_ready("no answer");
    agent.observer.set_identities(Arc::new(|| vec![identity_row()]));
    let failed = Enrolment::Failed { reason: "no such cgroup".to_owned() };
    agent.observer.set_pods(Arc::new(move || {
        vec![pod_row("web-1", Enrolment::Enrolled), pod_row("web-2", failed.clone())]
    }));
    let last_error = Some("pods.yaml: document 2".to_owned());
    let mesh = MeshRow { generation: 7, workloads: 12, last_error, errors: 1 };
    agent.observer.set_mesh(Arc::new(move || mesh.clone()));
    let tunnel = agent.observer.open(web_to_db(Direction::Outbound));
    tunnel.progress().add_sent(1_500_000);
    let plaintext = agent.observer.open(stranger_to_db());
    let mut status: Status = serde_json::from_value(agent.local("/status").json()).unwrap();
    // What differs from run to run.
    status.agent.pid = 4711;
    status.agent.uptime_seconds = 3 * 3600 + 12 * 60;
    status.agent.resident_bytes = Some(12 << 20);
    status.agent.cpu_seconds = Some(4.25);
    let now = "2099-12-31T21:30:00Z".parse().unwrap();
    let version = env!("CARGO_PKG_VERSION");
    let expected = format!(
        "\
AGENT  node node-a, mtls {version}, pid 4711, up 3h 12m, NOT READY
       waiting for identities: no answer
       memory 12.0 MiB, CPU time 4.2 s
MESH   generation 7, 12 workloads
       trust domain cluster.local
       NEWEST CONFIGURATION REFUSED: pods.yaml: document 2

PODS OF THIS NODE (2)
  POD         ADDRESSES  IDENTITY        MODE    STATE
  shop/web-1  10.0.1.2   ns/shop/sa/web  STRICT  enrolled
  shop/web-2  10.0.1.2   ns/shop/sa/web  STRICT  FAILED: no such cgroup

CERTIFICATES (1)
  IDENTITY        SERIAL  TIME LEFT  RENEWS IN  RENEWALS  FAILURES  LAST ERROR
  ns/shop/sa/web  0A0B       2h 30m         0s         4         2  -

OPEN CONNECTIONS (2; 2 opened and 0 refused since the start)
  1 outbound tunnel
  1 inbound plaintext
  WAY                SOURCE                                   IDENTITY        DESTINATION              IDENTITY       CIPHER                       SENT  RECEIVED  AGE
  inbound plaintext  192.0.2.7:5000                           none            data/db-0 10.0.2.3:5432  none           -                             0 B       0 B   0s
  outbound tunnel    shop/web-7d9f6c5b8-x2x9z 10.0.1.2:41000  ns/shop/sa/web  data/db-0 10.0.2.3:5432  ns/data/sa/db  TLS13_AES_128_GCM_SHA256  1.4 MiB       0 B   0s
"
    );
    for row in &mut status.connections.newest {
        row.age_seconds = 0.0;
    }
    assert_eq!(Tables { status: &status, now }.to_string(), expected);
    let printed = run(&agent.socket, &[]).unwrap();
    assert!(printed.contains(&format!("pid {}", std::process::id())), "{printed}");
    assert!(printed.contains("FAILED: no such cgroup"), "{printed}");
    drop((tunnel, plaintext));
    let printed = run(&agent.socket, &[]).unwrap();
    assert!(printed.contains("OPEN CONNECTIONS (0; 2 opened") && !printed.contains("192.0.2.7"), "{printed}");
}

#[test]
fn identities_of_several_trust_domains_are_written_in_full() {
    let agent = Agent::start();
    let mut row = pod_row("web-1", Enrolment::Pending);
    agent.observer.set_identities(Arc::new(|| vec![identity_row()]));
    row.identity = "spiffe://other.example/ns/shop/sa/web".to_owned();
    agent.observer.set_pods(Arc::new(move || vec![row.clone()]));
    let printed = run(&agent.socket, &[]).unwrap();
    assert!(printed.contains("  other.example/ns/shop/sa/web  "), "{printed}");
    assert!(printed.contains("  cluster.local/ns/shop/sa/web  "), "{printed}");
    assert!(!printed.contains("trust domain"), "{printed}");
}

#[test]
fn a_certificate_that_ran_out_is_not_shown_as_time_left() {
    let agent = Agent::start();
    let expired = || {
        let not_after = Some("2001-01-01T00:00:00Z".parse().unwrap());
        let identity = "spiffe://cluster.local/ns/shop/sa/absent".to_owned();
        let absent = mtls::observe::IdentityRow { not_after: None, serial: None, identity, ..identity_row() };
        vec![mtls::observe::IdentityRow { not_after, ..identity_row() }, absent]
    };
    agent.observer.set_identities(Arc::new(expired));
    let printed = run(&agent.socket, &[]).unwrap();
    let line = |name| printed.lines().find(|line| line.contains(name)).unwrap();
    assert!(line("sa/web").contains("EXPIRED"), "{printed}");
    assert!(line("sa/absent").contains("NO CERTIFICATE"), "{printed}");
}

#[test]
fn programs_get_json() {
    let agent = Agent::start();
    let open = agent.observer.open(web_to_db(Direction::Outbound));
    let printed = run(&agent.socket, &["-o", "json"]).unwrap();
    let status: Status = serde_json::from_str(&printed).unwrap();
    assert_eq!(status.agent.node, "node-a");
    assert_eq!(status.connections.newest.len(), 1);
    drop(open);
}

#[test]
fn no_agent_is_an_error_that_names_the_socket_and_the_remedy() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("admin.sock");
    for _ in 0..2 {
        let error = run(&socket, &[]).unwrap_err();
        assert!(matches!(error, Error::NoAgent { .. }), "{error}");
        let message = error.to_string();
        assert!(message.contains(socket.to_str().unwrap()), "{message}");
        assert!(message.contains("mtls node") && message.contains("--admin-socket"), "{message}");
        // Once without a file, once with one that nobody listens on.
        drop(UnixListener::bind(&socket));
    }
}

#[test]
fn something_else_on_the_socket_is_an_error() {
    for (answer, expected) in [
        ("SSH-2.0-OpenSSH_9.2\r\n", "does not speak HTTP"),
        ("HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n", "answered 404"),
        ("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", "cannot read"),
        ("HTTP/1.1 200 OK\r\ncontent-length: 200\r\n\r\n{}", "does not speak HTTP"),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("admin.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let serving = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 1024];
            assert!(std::io::Read::read(&mut stream, &mut request).unwrap() > 0);
            stream.write_all(answer.as_bytes()).unwrap();
        });
        let error = run(&socket, &[]).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("admin.sock"), "{expected}: {error}");
        serving.join().unwrap();
    }
}
