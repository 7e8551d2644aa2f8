//! `/readiness` and `mtls readiness`: what is asked reaches the judgement, and the answer reaches who asked.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use clap::Parser;
use jiff::Timestamp;
use mtls::cli::readiness::{self, Args};
use mtls::cli::status::Error;
use mtls::mesh::ServerCall;
use mtls::plaintext::{Counts, Facts, Observed, Peer, PortFacts, Report, Row, Source, Tally};
use mtls::policy::Mode;

use crate::agent::Agent;

const NOW: &str = "2026-01-02T03:04:05.678Z";

fn before(seconds: i64) -> Timestamp {
    let now: Timestamp = NOW.parse().unwrap();
    Timestamp::from_second(now.as_second() - seconds).unwrap()
}

/// A day and an hour of observation; two minutes ago somebody came to the port that a dry run would make STRICT.
fn facts() -> Facts {
    let row = Row {
        address: "192.0.2.7".parse().unwrap(),
        connections: 12,
        refused: 1,
        open: 0,
        first: before(3600),
        last: before(120),
    };
    let peer = |by_disable, name: &str| Peer { source: Source::Workload(name.into()), by_disable };
    let unknown = Peer { source: Source::Address(row.address), by_disable: false };
    let earlier = Row { first: before(7200), last: before(600), ..row.clone() };
    let port = |peers, dry_run| PortFacts {
        mode: Mode::Disable,
        set_by: Some("shop/web".into()),
        dry_run,
        is_served: true,
        nodes: Default::default(),
        peers,
        missed: Tally::default(),
        called_by: Vec::new(),
        has_own_mode: false,
    };
    let rules = ServerCall {
        by: "ValidatingWebhookConfiguration rules".into(),
        service: "shop/hook".into(),
        port: 443,
    };
    let strict = Some((Mode::Strict, Some("shop/trial".to_owned())));
    let ports = BTreeMap::from([
        (
            80,
            port(
                vec![(unknown, earlier, false), (peer(false, "outside/\u{1b}cron"), row.clone(), false)],
                strict,
            ),
        ),
        (81, PortFacts { called_by: vec![rules], ..port(vec![(peer(true, "shop/db"), row, true)], None) }),
    ]);
    let web = Observed {
        namespace: "shop".into(),
        name: "web".into(),
        identity: "spiffe://cluster.local/ns/shop/sa/web".into(),
        modes: "DISABLE".into(),
        is_open: true,
        dry_run_tightens: true,
        since: Some(before(25 * 3600)),
        ports,
        missed: Tally::default(),
        unserved: Tally { count: 65533, last: Some(before(60)) },
    };
    let lost = Tally::default();
    Facts {
        node: "node-a".into(),
        at: NOW.parse().unwrap(),
        lost,
        blind: None,
        unread_callers: Vec::new(),
        workloads: vec![web],
    }
}

fn agent() -> Agent {
    let agent = Agent::start();
    let counts = Counts { peers: 3, not_kept: 7, lost: 9 };
    agent.observer.set_plaintext(Arc::new(facts), Arc::new(move || counts));
    agent
}

#[derive(Parser)]
struct CommandLine {
    #[command(flatten)]
    readiness: Args,
}

fn run(socket: &Path, more: &[&str]) -> Result<(bool, String), Error> {
    let fixed = ["readiness", "--admin-socket", socket.to_str().unwrap()];
    let args = CommandLine::parse_from(fixed.iter().chain(more)).readiness;
    let mut out = Vec::new();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let ready = runtime.block_on(readiness::run(&args, &mut out))?;
    Ok((ready, String::from_utf8(out).unwrap()))
}

#[test]
fn what_is_asked_reaches_the_judgement() {
    let agent = agent();
    let report: Report = serde_json::from_value(agent.local("/readiness").json()).unwrap();
    assert_eq!((report.window_seconds, report.ready, report.workloads.len()), (86400, false, 1));
    assert_eq!(report.workloads[0].ports[0].cut_off.len(), 2);
    let minute = agent.local("/readiness?window_seconds=60&dry_run=true").json();
    assert_eq!((&minute["ready"], &minute["window_seconds"]), (&true.into(), &60.into()));
    let elsewhere = agent.local("/readiness?namespace=bank").json();
    assert_eq!((&elsewhere["ready"], &elsewhere["workloads"]), (&true.into(), &serde_json::json!([])));
    let dry_run = agent.local("/readiness?dry_run=true&namespace=shop").json();
    assert_eq!(dry_run["workloads"][0]["ports"].as_array().unwrap().len(), 1);
    for wrong in ["window_seconds=-1", "window_seconds=2592001", "dry_run=perhaps", "namespce=shop"] {
        assert_eq!(agent.local(&format!("/readiness?{wrong}")).status, 400, "{wrong}");
    }
    assert_eq!(agent.get("/readiness").status, 404, "who speaks to whom is not for everybody");
    assert_eq!(Agent::start().local("/readiness").status, 503, "nothing is observed yet");
}

#[test]
fn people_get_tables() {
    let agent = agent();
    let (ready, printed) = run(&agent.socket, &["shop"]).unwrap();
    assert!(!ready);
    let expected = "\
NOT READY FOR STRICT  node node-a, namespace shop, window 1d 0h
  shop/web port 80: 2 peers would be cut off
  shop/web port 81: the API server's calls would be cut off (ValidatingWebhookConfiguration rules through Service \
shop/hook port 443); keep the port open for them: portLevelMtls {\"81\": {mode: PERMISSIVE}} in a PeerAuthentication \
that selects the pod

OBSERVED WORKLOADS (1)
  POD       MODE     OBSERVED SINCE          FOR  PORTS NOT STRICT  READY
  shop/web  DISABLE  2026-01-01T02:04:05Z  1d 1h  80,81             NO
  shop/web: 65533 attempts at ports that nothing listens on

WOULD BE CUT OFF (2)
  DESTINATION  MODE     CLIENT               ADDRESS    CONNECTIONS  OPEN  REFUSED  FIRST SEEN            LAST SEEN
  shop/web:80  DISABLE  outside/\u{fffd}cron        192.0.2.7           12     0        1  2026-01-02T02:04:05Z  2026-01-02T03:02:05Z
  shop/web:80  DISABLE  unknown to the mesh  192.0.2.7           12     0        1  2026-01-02T01:04:05Z  2026-01-02T02:54:05Z

PLAINTEXT BECAUSE OF DISABLE; WOULD USE MTLS (1)
  DESTINATION  MODE     CLIENT              ADDRESS    CONNECTIONS  OPEN  REFUSED  FIRST SEEN            LAST SEEN
  shop/web:81  DISABLE  shop/db (enrolled)  192.0.2.7           12     0        1  2026-01-02T02:04:05Z  2026-01-02T03:02:05Z

CALLED BY THE API SERVER, IN PLAINTEXT (1)
  DESTINATION  MODE     CALLED FOR                            THROUGH SERVICE  WITH STRICT
  shop/web:81  DISABLE  ValidatingWebhookConfiguration rules  shop/hook:443    CUT OFF

WITH THE DRY-RUN POLICIES ENFORCED (1)
  DESTINATION  MODE     WOULD BE  BY          WOULD CUT OFF
  shop/web:80  DISABLE  STRICT    shop/trial  2 peers
";
    assert_eq!(printed, expected, "\n{printed}");
    let (ready, printed) = run(&agent.socket, &["--window", "1m"]).unwrap();
    assert!(!ready, "the API server may call at any time: {printed}");
    assert!(!printed.contains("CUT OFF (") && !printed.contains("BECAUSE OF DISABLE"), "{printed}");
    let (ready, printed) = run(&agent.socket, &["--dry-run", "--window", "1m"]).unwrap();
    assert!(
        ready && printed.starts_with("READY FOR THE DRY-RUN POLICIES  node node-a, window 1m 0s\n"),
        "{printed}"
    );
}

#[test]
fn programs_get_json_and_nobody_gets_an_answer_from_nobody() {
    let agent = agent();
    let (ready, printed) = run(&agent.socket, &["--dry-run", "-o", "json"]).unwrap();
    let report: Report = serde_json::from_str(&printed).unwrap();
    assert_eq!((ready, report.ready, report.dry_run), (false, false, true));
    let directory = tempfile::tempdir().unwrap();
    let error = run(&directory.path().join("admin.sock"), &[]).unwrap_err();
    assert!(matches!(error, Error::NoAgent { .. }), "{error}");
}

#[test]
fn what_is_remembered_is_counted() {
    let samples = agent().scrape();
    assert_eq!(samples.one("mtls_plaintext_peers", &[]), 3.0);
    assert_eq!(samples.one("mtls_plaintext_peers_not_kept_total", &[]), 7.0);
    assert_eq!(samples.one("mtls_plaintext_sightings_lost_total", &[]), 9.0);
    Agent::start().scrape().none("mtls_plaintext_peers", &[]);
}
