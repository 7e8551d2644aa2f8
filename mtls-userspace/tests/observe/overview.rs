//! The status page's document and its data: what is in an edge, what is told, and what is not.

use std::sync::Arc;

use mtls::observe::{Connection, Direction, Ending, Flow, Party, Path, Plaintext, Refusal, Settings};
use mtls::policy::Reason;
use serde_json::{Value, json};

use crate::agent::Agent;
use crate::flows::{denied, pod, spiffe, stranger_to_db, web_to_db};

fn edges(agent: &Agent) -> Vec<Value> {
    agent.get("/overview").json()["edges"].as_array().unwrap().clone()
}

/// The one edge of this protection.
#[track_caller]
fn edge(agent: &Agent, protection: &str) -> Value {
    let mut found: Vec<Value> =
        edges(agent).into_iter().filter(|edge| edge["protection"] == protection).collect();
    assert_eq!(found.len(), 1, "{protection}: {found:#?}");
    found.remove(0)
}

/// Open, opened and refused connections; bytes there and back.
fn totals(edge: &Value) -> [u64; 5] {
    ["open", "opened", "refused", "bytes_from_source", "bytes_to_source"]
        .map(|key| edge[key].as_u64().unwrap())
}

fn same_node() -> Flow {
    Flow { path: Path::SameNode, cipher: None, ..web_to_db(Direction::Outbound) }
}

fn relay(connection: &Connection, sent: usize, received: usize) {
    connection.progress().add_sent(sent);
    connection.progress().add_received(received);
}

#[test]
fn an_edge_is_a_pair_of_workloads_under_one_protection() {
    let agent = Agent::start();
    assert_eq!(edges(&agent), Vec::<Value>::new());
    let open = agent.observer.open(web_to_db(Direction::Outbound));
    relay(&open, 100, 2000);
    let ended = agent.observer.open(web_to_db(Direction::Outbound));
    relay(&ended, 10, 20);
    ended.close(Ending::ResetByDestination);
    let encrypted = edge(&agent, "encrypted");
    assert_eq!(encrypted["source"], json!({ "namespace": "shop", "workload": "web" }));
    assert_eq!(encrypted["destination"], json!({ "namespace": "data", "workload": "db" }));
    assert_eq!((&encrypted["source_here"], &encrypted["destination_here"]), (&json!(true), &json!(false)));
    assert_eq!(totals(&encrypted), [1, 2, 0, 110, 2020]);
    drop(open);
    assert_eq!(totals(&edge(&agent, "encrypted")), [0, 2, 0, 110, 2020]);
}

#[test]
fn a_flow_inside_the_node_is_one_flow() {
    let agent = Agent::start();
    let open = agent.observer.open(same_node());
    relay(&open, 7, 9);
    let near = edge(&agent, "same_node");
    assert_eq!(totals(&near), [1, 1, 0, 7, 9]);
    assert_eq!((&near["source_here"], &near["destination_here"]), (&json!(true), &json!(true)));
    // Encrypted inside the node it is two connections of this agent, and still one of the pods.
    let both = [Direction::Outbound, Direction::Inbound].map(|way| agent.observer.open(web_to_db(way)));
    both.iter().for_each(|open| relay(open, 1, 2));
    assert_eq!(totals(&edge(&agent, "encrypted")), [1, 1, 0, 1, 2]);
}

#[test]
fn plaintext_counts_whether_the_agent_or_the_kernel_decided() {
    let agent = Agent::start();
    let db = pod("data", "db-0", &[("statefulset.kubernetes.io/pod-name", "db-0")]);
    // Judged here, from a pod that the mesh knows.
    let known = Party { workload: Some(pod("outside", "cron", &[])), identity: None };
    agent.observer.open(Flow { source: known, ..stranger_to_db() }).close(Ending::Clean);
    let cron = edge(&agent, "plaintext");
    assert_eq!(cron["source"], json!({ "namespace": "outside", "workload": "cron" }));
    assert_eq!(totals(&cron)[..3], [0, 1, 0]);
    // Decided in the kernel: of the same pod, and from an address that is nobody's.
    let source = pod("outside", "cron", &[]);
    agent.observer.plaintext(Some(&source), &db, 5432, Plaintext::Accepted);
    assert_eq!(totals(&edge(&agent, "plaintext"))[..3], [0, 2, 0]);
    for (port, outcome) in [(5432, Plaintext::Accepted), (5432, Plaintext::Refused), (22, Plaintext::Refused)]
    {
        agent.observer.plaintext(None, &db, port, outcome);
    }
    let nobodys: Vec<Value> = edges(&agent).into_iter().filter(|edge| edge["source"].is_null()).collect();
    assert_eq!(nobodys.len(), 1, "{nobodys:#?}");
    assert_eq!(totals(&nobodys[0]), [0, 1, 2, 0, 0]);
    assert_eq!(nobodys[0]["protection"], "plaintext");
    assert_eq!(edges(&agent).len(), 2);
}

#[test]
fn refusals_are_no_connections() {
    let agent = Agent::start();
    let refusal = denied(Reason::DenyPolicy, Some("data/not-web"));
    agent.observer.refused(web_to_db(Direction::Inbound), refusal.clone());
    assert_eq!(totals(&edge(&agent, "encrypted")), [0, 0, 1, 0, 0]);
    let told = agent.get("/overview").json()["refusals"].clone();
    let expected =
        json!([{ "direction": "inbound", "reason": "deny_policy", "policy": "data/not-web", "count": 1 }]);
    assert_eq!(told, expected);
    // The client's agent had opened it when the far one said no.
    let far = Agent::start();
    let rejected = Refusal::DeniedByPeer { detail: "no".into() };
    far.observer.open(web_to_db(Direction::Outbound)).close(Ending::Rejected(rejected));
    far.observer.open(web_to_db(Direction::Outbound)).close(Ending::Clean);
    assert_eq!(totals(&edge(&far, "encrypted")), [0, 1, 1, 0, 0]);
}

#[test]
fn what_needs_attention_comes_first_and_what_is_too_much_is_said() {
    let agent = Agent::with(Settings { label_sets: 3, ..Settings::new("node-a") });
    agent.observer.open(web_to_db(Direction::Outbound)).close(Ending::Clean);
    agent.observer.open(stranger_to_db()).close(Ending::Clean);
    let order: Vec<Value> = edges(&agent).iter().map(|edge| edge["protection"].clone()).collect();
    assert_eq!(order, ["plaintext", "encrypted"]);
    assert_eq!(agent.get("/overview").json()["overflowed"], 0);
    for name in ["a", "b", "c"] {
        let source = Party { workload: Some(pod("shop", name, &[])), identity: Some(spiffe("shop", name)) };
        agent.observer.open(Flow { source, ..web_to_db(Direction::Outbound) }).close(Ending::Clean);
    }
    let overview = agent.get("/overview").json();
    assert_eq!((&overview["overflowed"], &overview["edges_total"]), (&json!(2), &json!(3)));
}

#[test]
fn the_overview_tells_what_metrics_tell_and_no_more() {
    let agent = Agent::start();
    let missing = agent.readiness.condition("identities");
    missing.not_ready("no certificate for web yet");
    agent.readiness.condition("pods").set_ready();
    let failing = mtls::observe::IdentityRow {
        last_error: Some("https://10.9.9.9:15012 says secret things".into()),
        failures: 3,
        ..crate::health_metrics::identity_row()
    };
    agent.observer.set_identities(Arc::new(move || vec![failing.clone()]));
    let open = agent.observer.open(web_to_db(Direction::Inbound));
    let answer = agent.get("/overview");
    for secret in ["10.0.1.2", "10.0.2.3", "10.9.9.9", "secret things"] {
        assert!(!answer.body.contains(secret), "{}", answer.body);
    }
    assert!(
        answer.head.contains("cache-control: no-store") && answer.head.contains("nosniff"),
        "{}",
        answer.head
    );
    let overview = answer.json();
    let conditions = json!([
        { "name": "identities", "missing": "no certificate for web yet" },
        { "name": "pods", "missing": null },
    ]);
    assert_eq!(overview["conditions"], conditions);
    let certificate = &overview["certificates"][0];
    assert_eq!((&certificate["failing"], &certificate["failures"]), (&json!(true), &json!(3)));
    assert_eq!(certificate["not_after"], "2100-01-01T00:00:00Z");
    assert_eq!((&overview["node"], &overview["open_connections"]), (&json!("node-a"), &json!(1)));
    drop(open);
    // The same as metrics, for alerts.
    let samples = agent.scrape();
    assert_eq!(samples.one("mtls_agent_ready", &[("condition", "identities")]), 0.0);
    assert_eq!(samples.one("mtls_agent_ready", &[("condition", "pods")]), 1.0);
    missing.set_ready();
    assert_eq!(agent.scrape().one("mtls_agent_ready", &[("condition", "identities")]), 1.0);
}

#[test]
fn the_page_needs_nothing_else_and_may_do_nothing_else() {
    let agent = Agent::start();
    let page = agent.get("/");
    assert_eq!(page.status, 200);
    assert!(page.head.contains("content-type: text/html; charset=utf-8"), "{}", page.head);
    let policy = page.head.lines().find_map(|line| line.strip_prefix("content-security-policy: ")).unwrap();
    for part in [
        "default-src 'none'",
        "script-src 'sha256-",
        "style-src 'sha256-",
        "connect-src 'self'",
        "frame-ancestors 'none'",
    ] {
        assert!(policy.contains(part), "no {part} in {policy}");
    }
    assert!(!policy.contains("unsafe"), "{policy}");
    // A namespace's name is no address that anybody asks for.
    let rest = page.body.replace("http://www.w3.org/2000/svg", "");
    for outside in ["http:", "https:", "src=", "@import", "{style}", "{script}", "innerHTML"] {
        assert!(!rest.contains(outside), "{outside} in the page");
    }
    assert_eq!(agent.local("/").status, 200);
}
