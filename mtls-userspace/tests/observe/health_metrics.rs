//! The `mtls_*` metrics: handshakes, tunnels, certificates, pods, configuration, kernel; and `promtool`'s opinion.

use std::io::Write;
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;

use jiff::Timestamp;
use mtls::observe::{
    Direction, Ending, Enrolment, IdentityRow, IssuerRole, IssuerRow, MeshRow, Plaintext, PodRow,
    RevocationRow,
};
use mtls::policy::Reason;
use mtls::tunnel::HandshakeFailure;

use crate::agent::{Agent, ask};
use crate::exposition::Samples;
use crate::flows::{denied, pod, stranger_to_db, strict, web_to_db};

#[test]
fn handshakes_and_tunnels_are_counted_by_what_came_of_them() {
    let agent = Agent::start();
    agent.observer.handshake_done(Direction::Outbound, false);
    agent.observer.handshake_done(Direction::Outbound, true);
    agent.observer.handshake_done(Direction::Outbound, true);
    agent.observer.handshake_failed(Direction::Inbound, HandshakeFailure::NoCertificate);
    agent.observer.tunnel_opened(Direction::Outbound);
    agent.observer.tunnel_reused(Direction::Outbound);
    agent.observer.tunnel_reused(Direction::Outbound);
    let samples = agent.scrape();
    let handshakes = "mtls_handshakes_total";
    assert_eq!(samples.one(handshakes, &[("direction", "outbound"), ("kind", "full")]), 1.0);
    assert_eq!(samples.one(handshakes, &[("direction", "outbound"), ("kind", "resumed")]), 2.0);
    samples.none(handshakes, &[("direction", "inbound")]);
    let failures = "mtls_handshake_failures_total";
    assert_eq!(samples.one(failures, &[("direction", "inbound"), ("reason", "no_certificate")]), 1.0);
    assert_eq!(samples.sum(failures, &[]), 1.0);
    assert_eq!(samples.one("mtls_tunnels_opened_total", &[("direction", "outbound")]), 1.0);
    assert_eq!(samples.one("mtls_tunnels_reused_total", &[("direction", "outbound")]), 2.0);
}

#[test]
fn plaintext_is_counted_per_destination_and_port_and_tunnelled_connections_are_not() {
    let agent = Agent::start();
    agent.observer.open(web_to_db(Direction::Inbound)).close(Ending::Clean);
    agent.scrape().none("mtls_plaintext_connections_total", &[]);
    agent.observer.open(stranger_to_db()).close(Ending::Clean);
    agent.observer.refused(stranger_to_db(), strict());
    // What the kernel refused by itself.
    let db = pod("data", "db-1", &[("statefulset.kubernetes.io/pod-name", "db-1")]);
    agent.observer.plaintext(None, &db, 5432, Plaintext::Refused);
    agent.observer.plaintext(None, &db, 22, Plaintext::Refused);
    let samples = agent.scrape();
    let count = |port, outcome| {
        let labels = [
            ("destination_workload", "db"),
            ("destination_workload_namespace", "data"),
            ("destination_port", port),
            ("outcome", outcome),
        ];
        samples.one("mtls_plaintext_connections_total", &labels)
    };
    assert_eq!(
        (count("5432", "accepted"), count("5432", "refused"), count("22", "refused")),
        (1.0, 2.0, 1.0)
    );
}

#[test]
fn a_scan_of_all_ports_does_not_grow_the_metrics_without_bound() {
    let agent = Agent::start();
    let db = pod("data", "db-0", &[]);
    for port in 0..=u16::MAX {
        agent.observer.plaintext(None, &db, port, Plaintext::Refused);
    }
    let samples = agent.scrape();
    assert_eq!(samples.of("mtls_plaintext_connections_total", &[]).len(), 2001);
    assert_eq!(samples.sum("mtls_plaintext_connections_total", &[]), 65536.0);
    let overflow = [("destination_port", "overflow"), ("outcome", "refused")];
    assert_eq!(samples.one("mtls_plaintext_connections_total", &overflow), 63536.0);
}

pub fn identity_row() -> IdentityRow {
    let at = |second| Timestamp::from_second(second).unwrap();
    let root = |serial: &str, end| IssuerRow {
        role: IssuerRole::Root,
        subject: "O=mesh".to_owned(),
        serial: serial.to_owned(),
        not_after: at(end),
    };
    IdentityRow {
        identity: "spiffe://cluster.local/ns/shop/sa/web".to_owned(),
        serial: Some("0A0B".to_owned()),
        not_before: Some(at(1_000)),
        not_after: Some(at(4_102_444_800)),
        next_renewal: Some(at(2_000)),
        last_error: None,
        renewals: 4,
        failures: 2,
        failures_by_reason: [("timeout".to_owned(), 1), ("refused".to_owned(), 1)].into(),
        revocation_lists: vec![RevocationRow {
            issuer: "O=mesh".to_owned(),
            revoked: 3,
            next_update: Some(at(6_000_000_000)),
        }],
        issuers: vec![root("01", 9_000_000_000), root("02", 5_000_000_000), root("03", 7_000_000_000)],
    }
}

pub fn pod_row(name: &str, enrolment: Enrolment) -> PodRow {
    PodRow {
        namespace: "shop".to_owned(),
        name: name.to_owned(),
        identity: "spiffe://cluster.local/ns/shop/sa/web".to_owned(),
        addresses: vec!["10.0.1.2".to_owned()],
        enrolment,
        mode: Some("STRICT".to_owned()),
    }
}

fn connect_rooms(agent: &Agent) {
    agent.observer.set_identities(Arc::new(|| vec![identity_row()]));
    let failed = Enrolment::Failed { reason: "no such cgroup".to_owned() };
    agent.observer.set_pods(Arc::new(move || {
        vec![pod_row("web-1", Enrolment::Enrolled), pod_row("web-2", failed.clone())]
    }));
    let last_error = Some("pods.yaml: document 2: spec.nodeName: expected a string".to_owned());
    let mesh = MeshRow { generation: 7, workloads: 12, last_error, errors: 3 };
    agent.observer.set_mesh(Arc::new(move || mesh.clone()));
    agent.observer.set_kernel_counters(Arc::new(|| vec![("connect4_redirect", 10), ("sk_lookup_drop", 0)]));
}

#[test]
fn rooms_are_asked_at_scrape_time() {
    let agent = Agent::start();
    let before = agent.scrape();
    for name in ["mtls_mesh_generation", "mtls_pod_enrolled", "mtls_certificate_renewals_total"] {
        before.none(name, &[]);
    }
    connect_rooms(&agent);
    let samples = agent.scrape();
    let expiry = "mtls_certificate_expiry_timestamp_seconds";
    let web = ("identity", "spiffe://cluster.local/ns/shop/sa/web");
    assert_eq!(samples.one(expiry, &[web, ("role", "leaf")]), 4_102_444_800.0);
    // Several roots of one name during a rotation: one sample, the earlier end.
    assert_eq!(samples.one(expiry, &[web, ("role", "root"), ("subject", "O=mesh")]), 5_000_000_000.0);
    assert_eq!(samples.one("mtls_certificate_renewals_total", &[web]), 4.0);
    let due = "mtls_revocation_list_next_update_timestamp_seconds";
    assert_eq!(samples.one(due, &[("issuer", "O=mesh")]), 6_000_000_000.0);
    let failures = "mtls_certificate_renewal_failures_total";
    assert_eq!(samples.one(failures, &[web, ("reason", "timeout")]), 1.0);
    assert_eq!(samples.sum(failures, &[web]), 2.0);
    assert_eq!(samples.one("mtls_pod_enrolled", &[("namespace", "shop"), ("pod", "web-1")]), 1.0);
    assert_eq!(samples.one("mtls_pod_enrolled", &[("namespace", "shop"), ("pod", "web-2")]), 0.0);
    assert_eq!(samples.one("mtls_mesh_generation", &[]), 7.0);
    assert_eq!(samples.one("mtls_mesh_workloads", &[]), 12.0);
    assert_eq!(samples.one("mtls_config_valid", &[]), 0.0);
    assert_eq!(samples.one("mtls_config_errors_total", &[]), 3.0);
    assert_eq!(samples.one("mtls_kernel_events_total", &[("counter", "connect4_redirect")]), 10.0);
    assert_eq!(samples.one("mtls_kernel_events_total", &[("counter", "sk_lookup_drop")]), 0.0);
}

#[test]
fn the_process_and_its_version_are_there() {
    let agent = Agent::start();
    let samples = agent.scrape();
    assert_eq!(samples.one("mtls_build_info", &[("version", env!("CARGO_PKG_VERSION"))]), 1.0);
    assert!(samples.one("process_resident_memory_bytes", &[]) > 1e6);
    assert!(samples.one("process_cpu_seconds_total", &[]) > 0.0);
    assert!(samples.one("process_open_fds", &[]) > 3.0);
    let now = Timestamp::now().as_second() as f64;
    assert!((now - samples.one("process_start_time_seconds", &[])).abs() < 60.0);
}

/// Every family the agent has.
fn scrape_of_everything(agent: &Agent) -> String {
    connect_rooms(agent);
    agent.observer.open(web_to_db(Direction::Outbound)).close(Ending::Clean);
    agent.observer.open(stranger_to_db()).close(Ending::ResetBySource);
    agent.observer.refused(web_to_db(Direction::Inbound), denied(Reason::NoAllowMatched, None));
    agent.observer.handshake_done(Direction::Outbound, false);
    agent.observer.handshake_failed(Direction::Inbound, HandshakeFailure::Expired);
    agent.observer.tunnel_opened(Direction::Outbound);
    agent.observer.tunnel_reused(Direction::Outbound);
    let answer = ask(TcpStream::connect(agent.tcp).unwrap(), "/metrics", "Accept: text/plain\r\n");
    assert!(answer.head.contains("content-type: text/plain; version=0.0.4"), "{}", answer.head);
    answer.body
}

#[test]
fn who_does_not_ask_for_open_metrics_gets_the_older_format_with_the_same_samples() {
    let agent = Agent::start();
    let text = Samples::parse_text(&scrape_of_everything(&agent));
    assert_eq!(text.one("istio_tcp_connections_opened_total", &[("reporter", "source")]), 1.0);
    assert_eq!(text.one("mtls_pod_enrolled", &[("pod", "web-1")]), 1.0);
    let accept = "Accept: application/openmetrics-text;version=1.0.0,text/plain;q=0.5\r\n";
    let answer = ask(TcpStream::connect(agent.tcp).unwrap(), "/metrics", accept);
    assert!(answer.head.contains("content-type: application/openmetrics-text"), "{}", answer.head);
    let open_metrics = Samples::parse_open_metrics(&answer.body);
    assert_eq!(open_metrics.one("istio_tcp_connections_opened_total", &[("reporter", "source")]), 1.0);
}

/// As `cargo xtask setup` leaves it in target/tools, seen from target/debug/deps; else on the path.
fn promtool() -> PathBuf {
    let exe = std::env::current_exe().unwrap();
    let tools = exe.ancestors().nth(3).map(|target| target.join("tools/promtool"));
    tools.filter(|path| path.is_file()).unwrap_or_else(|| "promtool".into())
}

#[test]
fn promtool_finds_nothing_wrong() {
    let agent = Agent::start();
    let text = scrape_of_everything(&agent);
    let run = |text: &str| {
        let mut promtool = Command::new(promtool())
            .args(["check", "metrics"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .ok()?;
        promtool.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        let output = promtool.wait_with_output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        Some((output.status.success(), String::from_utf8_lossy(&said).into_owned()))
    };
    let Some((fine, said)) = run(&text) else {
        assert!(
            std::env::var("CI").as_deref() != Ok("true"),
            "promtool is not installed (cargo xtask setup)"
        );
        let _ = writeln!(std::io::stdout(), "skipped: not installed: promtool (cargo xtask setup)");
        return;
    };
    assert!(fine, "{said}");
    let (fine, _) = run("# TYPE bad counter\nbad{x=\"1\"} not-a-number\n").unwrap();
    assert!(!fine, "promtool accepts anything");
}
