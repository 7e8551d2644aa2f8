//! Istio's standard TCP metrics, as a scraper reads them.

use std::time::Duration;

use mtls::observe::{Connection, Direction, Ending, Flow, Path, Refusal, Settings};
use mtls::policy::Reason;
use mtls::tunnel::HandshakeFailure;

use crate::agent::Agent;
use crate::exposition::Labels;
use crate::flows::{denied, pod, spiffe, stranger_to_db, web_to_db};

const OPENED: &str = "istio_tcp_connections_opened_total";
const CLOSED: &str = "istio_tcp_connections_closed_total";
const FAILED: &str = "istio_tcp_connections_failed_total";
const SENT: &str = "istio_tcp_sent_bytes_total";
const RECEIVED: &str = "istio_tcp_received_bytes_total";

fn relay(connection: &Connection, sent: usize, received: usize) {
    connection.progress().add_sent(sent);
    connection.progress().add_received(received);
}

#[test]
fn a_connection_has_istios_standard_labels() {
    let agent = Agent::start();
    agent.observer.open(web_to_db(Direction::Outbound)).close(Ending::Clean);
    let samples = agent.scrape();
    let expected: Labels = [
        ("reporter", "source"),
        ("source_workload", "web"),
        ("source_workload_namespace", "shop"),
        ("source_principal", "spiffe://cluster.local/ns/shop/sa/web"),
        ("source_app", "web"),
        ("source_version", "v2"),
        ("source_canonical_service", "web"),
        ("source_canonical_revision", "v2"),
        ("source_cluster", "Kubernetes"),
        ("destination_workload", "db"),
        ("destination_workload_namespace", "data"),
        ("destination_principal", "spiffe://cluster.local/ns/data/sa/db"),
        ("destination_app", "db"),
        ("destination_version", "latest"),
        ("destination_canonical_service", "db"),
        ("destination_canonical_revision", "latest"),
        ("destination_cluster", "Kubernetes"),
        ("destination_service", "postgres.data.svc.cluster.local"),
        ("destination_service_name", "postgres"),
        ("destination_service_namespace", "data"),
        ("request_protocol", "tcp"),
        ("response_flags", "-"),
        ("connection_security_policy", "mutual_tls"),
    ]
    .into_iter()
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .collect();
    for name in [OPENED, CLOSED, SENT, RECEIVED] {
        let found = samples.of(name, &[]);
        assert_eq!(found.len(), 1, "{name}");
        assert_eq!(found[0].0, &expected, "{name}");
    }
    assert_eq!(samples.one(OPENED, &[]), 1.0);
    assert_eq!(samples.one(CLOSED, &[]), 1.0);
    samples.none(FAILED, &[]);
}

#[test]
fn received_is_what_the_source_sent_whichever_agent_reports() {
    let agent = Agent::start();
    for direction in [Direction::Outbound, Direction::Inbound] {
        let connection = agent.observer.open(web_to_db(direction));
        relay(&connection, 1000, 7);
        connection.close(Ending::Clean);
    }
    let samples = agent.scrape();
    for reporter in ["source", "destination"] {
        assert_eq!(samples.one(RECEIVED, &[("reporter", reporter)]), 1000.0);
        assert_eq!(samples.one(SENT, &[("reporter", reporter)]), 7.0);
    }
}

#[test]
fn bytes_of_an_open_connection_are_counted_once() {
    let agent = Agent::start();
    let connection = agent.observer.open(web_to_db(Direction::Outbound));
    assert_eq!(agent.scrape().one(RECEIVED, &[]), 0.0);
    relay(&connection, 500, 20);
    let samples = agent.scrape();
    assert_eq!((samples.one(RECEIVED, &[]), samples.one(SENT, &[])), (500.0, 20.0));
    assert_eq!(samples.one(CLOSED, &[]), 0.0);
    assert_eq!(agent.scrape().one(RECEIVED, &[]), 500.0);
    relay(&connection, 1, 1);
    connection.close(Ending::Clean);
    let samples = agent.scrape();
    assert_eq!((samples.one(RECEIVED, &[]), samples.one(SENT, &[])), (501.0, 21.0));
    assert_eq!(samples.one(CLOSED, &[]), 1.0);
}

#[test]
fn nothing_is_counted_twice_when_scrapes_and_workers_meet() {
    let agent = Agent::start();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..50 {
                    let connection = agent.observer.open(web_to_db(Direction::Outbound));
                    for _ in 0..20 {
                        relay(&connection, 3, 2);
                    }
                    connection.close(Ending::Clean);
                }
            });
        }
        for _ in 0..2 {
            scope.spawn(|| (0..20).for_each(|_| drop(agent.scrape())));
        }
    });
    let samples = agent.scrape();
    assert_eq!((samples.one(OPENED, &[]), samples.one(CLOSED, &[])), (200.0, 200.0));
    assert_eq!((samples.one(RECEIVED, &[]), samples.one(SENT, &[])), (12_000.0, 8_000.0));
    assert_eq!(samples.sum("mtls_connections_open", &[]), 0.0);
}

#[test]
fn how_a_connection_ended_shows_in_the_response_flags_of_its_close() {
    let revoked = || Ending::Revoked("data/deny-all".into());
    let table = [
        (Direction::Outbound, Ending::Clean, "-"),
        (Direction::Outbound, Ending::ResetBySource, "DC"),
        (Direction::Inbound, Ending::ResetByDestination, "UC"),
        (Direction::Outbound, Ending::Truncated, "UC"),
        (Direction::Inbound, Ending::Truncated, "DC"),
        (Direction::Inbound, revoked(), "DENY"),
        (Direction::Outbound, Ending::Rejected(Refusal::DeniedByPeer { detail: "policy".into() }), "DENY"),
        (Direction::Outbound, Ending::Rejected(Refusal::ConnectRefused), "CONNECT"),
        (
            Direction::Outbound,
            Ending::Rejected(Refusal::Handshake(HandshakeFailure::UnknownCa)),
            "TLS_FAILURE",
        ),
        (Direction::Outbound, Ending::Error("disk on fire".into()), "LR"),
    ];
    for (direction, ending, flags) in table {
        let agent = Agent::start();
        agent.observer.open(web_to_db(direction)).close(ending.clone());
        let samples = agent.scrape();
        assert_eq!(samples.one(CLOSED, &[("response_flags", flags)]), 1.0, "{ending:?}");
        assert_eq!(samples.sum(CLOSED, &[]), 1.0, "{ending:?}");
        assert_eq!(samples.one(OPENED, &[("response_flags", "-")]), 1.0, "{ending:?}");
        assert_eq!(samples.sum(OPENED, &[]), 1.0, "{ending:?}");
    }
}

#[test]
fn a_refused_connection_was_never_open() {
    let agent = Agent::start();
    let by_policy = denied(Reason::DenyPolicy, Some("data/only-shop"));
    agent.observer.refused(web_to_db(Direction::Inbound), by_policy);
    agent.observer.refused(web_to_db(Direction::Outbound), Refusal::NoEndpoint);
    let samples = agent.scrape();
    assert_eq!(samples.one(FAILED, &[("response_flags", "DENY"), ("reporter", "destination")]), 1.0);
    assert_eq!(samples.one(FAILED, &[("response_flags", "CONNECT"), ("reporter", "source")]), 1.0);
    let by_policy = [("direction", "inbound"), ("reason", "deny_policy"), ("policy", "data/only-shop")];
    assert_eq!(samples.one("mtls_connections_refused_total", &by_policy), 1.0);
    let nowhere = [("direction", "outbound"), ("reason", "no_endpoint"), ("policy", "")];
    assert_eq!(samples.one("mtls_connections_refused_total", &nowhere), 1.0);
    for name in [OPENED, CLOSED, SENT, RECEIVED] {
        samples.none(name, &[]);
    }
}

#[test]
fn what_a_peer_says_is_no_label() {
    let agent = Agent::start();
    let said = Refusal::DeniedByPeer { detail: "said-by-the-peer".into() };
    agent.observer.open(web_to_db(Direction::Outbound)).close(Ending::Rejected(said.clone()));
    agent.observer.refused(web_to_db(Direction::Outbound), said);
    let labels = [("direction", "outbound"), ("reason", "denied_by_peer"), ("policy", "")];
    assert_eq!(agent.scrape().one("mtls_connections_refused_total", &labels), 2.0);
    assert!(!agent.get("/metrics").body.contains("said-by-the-peer"));
}

#[test]
fn a_principal_is_what_was_proven_never_what_the_address_suggests() {
    let agent = Agent::start();
    let mut flow = web_to_db(Direction::Inbound);
    flow.source.identity = None;
    agent.observer.open(flow).close(Ending::Clean);
    agent.observer.open(stranger_to_db()).close(Ending::Clean);
    let samples = agent.scrape();
    let named = [("source_workload", "web"), ("source_principal", "unknown")];
    assert_eq!(samples.one(OPENED, &named), 1.0);
    let stranger = [("source_workload", "unknown"), ("source_principal", "unknown")];
    let stranger = samples.of(OPENED, &stranger)[0].0;
    assert_eq!(stranger["connection_security_policy"], "none");
    assert_eq!(stranger["destination_service"], "unknown");
    assert_eq!(stranger["source_cluster"], "unknown");
    samples.none(OPENED, &[("source_principal", "spiffe://cluster.local/ns/never/sa/looked-up")]);
}

#[test]
fn only_tls_is_called_mutual_tls() {
    let table = [
        (Path::Tunnel, "mutual_tls"),
        (Path::SameNode, "none"),
        (Path::Direct, "none"),
        (Path::Plaintext, "none"),
        (Path::Passthrough, "unknown"),
    ];
    for (path, security) in table {
        let agent = Agent::start();
        let connection = agent.observer.open(Flow { path, ..web_to_db(Direction::Inbound) });
        let samples = agent.scrape();
        let label = [("reporter", "destination"), ("connection_security_policy", security)];
        assert_eq!(samples.one(OPENED, &label), 1.0);
        let open = samples.of("mtls_connections_open", &[]);
        assert_eq!(open.len(), 10, "every way is there, so that a missing one is not mistaken for none");
        let here = [("direction", "inbound"), ("path", path.as_str())];
        assert_eq!(samples.one("mtls_connections_open", &here), 1.0);
        assert_eq!(samples.sum("mtls_connections_open", &[]), 1.0);
        connection.close(Ending::Clean);
        assert_eq!(agent.scrape().sum("mtls_connections_open", &[]), 0.0);
    }
}

#[test]
fn a_connection_within_the_node_is_reported_by_both_ends() {
    let agent = Agent::start();
    for direction in [Direction::Outbound, Direction::Inbound] {
        let connection = agent.observer.open(Flow { path: Path::SameNode, ..web_to_db(direction) });
        relay(&connection, 10, 3);
        connection.close(Ending::Clean);
    }
    let flow = || Flow { path: Path::SameNode, ..web_to_db(Direction::Outbound) };
    agent.observer.open(flow()).close(Ending::ResetBySource);
    agent.observer.refused(flow(), denied(Reason::NoAllowMatched, None));
    let samples = agent.scrape();
    for reporter in ["source", "destination"] {
        let well = [("reporter", reporter), ("response_flags", "-")];
        assert_eq!((samples.one(OPENED, &well), samples.one(CLOSED, &well)), (3.0, 2.0));
        assert_eq!((samples.one(RECEIVED, &well), samples.one(SENT, &well)), (20.0, 6.0));
        assert_eq!(samples.one(CLOSED, &[("reporter", reporter), ("response_flags", "DC")]), 1.0);
        assert_eq!(samples.one(FAILED, &[("reporter", reporter), ("response_flags", "DENY")]), 1.0);
    }
    assert_eq!(samples.sum("mtls_connections_refused_total", &[]), 1.0);
}

#[test]
fn above_the_cap_new_label_sets_are_counted_together() {
    let agent = Agent::with(Settings { label_sets: 3, ..Settings::new("node-a") });
    for number in 0..10 {
        let mut flow = web_to_db(Direction::Outbound);
        flow.source.workload = Some(pod("shop", &format!("pod-{number}"), &[]));
        let connection = agent.observer.open(flow);
        relay(&connection, 10, 0);
        connection.close(Ending::Clean);
    }
    let samples = agent.scrape();
    assert_eq!(samples.of(OPENED, &[]).len(), 4);
    let overflow = [("source_workload", "overflow"), ("destination_principal", "overflow")];
    assert_eq!(samples.one(OPENED, &overflow), 7.0);
    assert_eq!(samples.one(CLOSED, &overflow), 7.0);
    assert_eq!(samples.one(RECEIVED, &overflow), 70.0);
    assert_eq!(samples.one(RECEIVED, &[("source_workload", "pod-0")]), 10.0);
    assert_eq!(samples.one("mtls_label_sets_overflowed_total", &[("family", "istio_tcp")]), 7.0);
    let others = [("family", "mtls_plaintext_connections")];
    assert_eq!(samples.one("mtls_label_sets_overflowed_total", &others), 0.0);
}

#[test]
fn an_idle_label_set_expires_while_one_with_a_connection_stays() {
    let label_idle = Duration::from_millis(50);
    let agent = Agent::with(Settings { label_idle, ..Settings::new("node-a") });
    let open = agent.observer.open(web_to_db(Direction::Outbound));
    agent.observer.open(web_to_db(Direction::Inbound)).close(Ending::Clean);
    assert_eq!(agent.scrape().of(OPENED, &[]).len(), 2);
    std::thread::sleep(label_idle * 4);
    let samples = agent.scrape();
    assert_eq!(samples.one(OPENED, &[]), 1.0);
    assert_eq!(samples.one(OPENED, &[("reporter", "source")]), 1.0);
    relay(&open, 5, 0);
    assert_eq!(agent.scrape().one(RECEIVED, &[]), 5.0);
}

#[test]
fn a_name_cannot_forge_a_label() {
    let agent = Agent::start();
    let name = "a\"} 1\nistio_tcp_sent_bytes_total{x=\"\\";
    let mut flow = web_to_db(Direction::Outbound);
    flow.source.workload = Some(pod("shop", name, &[]));
    flow.source.identity = Some(spiffe("shop", "web"));
    agent.observer.open(flow).close(Ending::Clean);
    assert_eq!(agent.scrape().one(OPENED, &[("source_workload", name)]), 1.0);
}
