//! What the admin socket answers by an inspector's help: pages, connections of a pair, errors in its own words.

use std::sync::Arc;

use mtls::observe::{
    CertificateRow, Direction, Ending, Filter, Flow, Inspector, Judged, Listing, Pair, PolicyRow, Refusal,
    ServiceRow, Settings, Unverifiable, Verification, WorkloadRow,
};
use mtls::policy::Reason;
use serde_json::json;

use crate::agent::Agent;
use crate::flows::{denied, pod, stranger_to_db, web_to_db};

/// Knows as many workloads as it is told, and no pair.
struct Known(usize);

impl Inspector for Known {
    fn workloads(&self, filter: &Filter) -> Listing<WorkloadRow> {
        let names: Vec<String> = (0..self.0).map(|number| format!("pod-{number:05}")).collect();
        filter.page(names.into_iter().filter(|name| filter.wants("shop", name)).collect(), workload)
    }

    fn certificates(&self, filter: &Filter) -> Listing<CertificateRow> {
        filter.page(Vec::new(), |row: CertificateRow| row)
    }

    fn services(&self, filter: &Filter) -> Listing<ServiceRow> {
        filter.page(Vec::new(), |row: ServiceRow| row)
    }

    fn policies(&self, filter: &Filter) -> Listing<PolicyRow> {
        filter.page(Vec::new(), |row: PolicyRow| row)
    }

    fn judged(&self, _: &Flow) -> Judged {
        Judged { mode: Some("STRICT".to_owned()), policy: Some("data/members".into()) }
    }

    fn verify(&self, pair: &Pair) -> Result<Verification, Unverifiable> {
        Err(Unverifiable::UnknownPod { pod: pair.from.clone() })
    }
}

fn workload(name: String) -> WorkloadRow {
    WorkloadRow {
        namespace: "shop".to_owned(),
        controller: name.clone(),
        name,
        service_account: "default".to_owned(),
        node: None,
        local: false,
        addresses: Vec::new(),
        enrolled: false,
        identity: None,
        protocol: "none".to_owned(),
        modes: None,
        enrolment: None,
    }
}

fn agent_that_knows(workloads: usize) -> Agent {
    let agent = Agent::start();
    agent.observer.set_inspector(Arc::new(Known(workloads)));
    agent
}

#[test]
fn a_list_is_never_longer_than_asked_and_says_how_much_there_is() {
    let agent = agent_that_knows(25_000);
    for (query, first, shown, total) in [
        ("", "pod-00000", 1000, 25_000),
        ("?limit=10", "pod-00000", 10, 25_000),
        ("?limit=1000000", "pod-00000", 10_000, 25_000),
        ("?limit=10000&offset=20000", "pod-20000", 5000, 25_000),
        ("?name=pod-00007", "pod-00007", 1, 1),
        ("?namespace=shop&limit=1", "pod-00000", 1, 25_000),
    ] {
        let answer = agent.local(&format!("/workloads{query}")).json();
        let items = answer["items"].as_array().unwrap();
        assert_eq!((items.len(), &answer["total"]), (shown, &json!(total)), "{query}");
        assert_eq!(items[0]["name"], first, "{query}");
    }
    assert_eq!(agent.local("/workloads?namespace=other").json(), json!({ "total": 0, "items": [] }));
    assert_eq!(agent.local("/workloads?limit=2&offset=99999").json()["items"], json!([]));
    for wrong in ["/workloads?limit=many", "/services?nmae=x", "/policies?offset=-1"] {
        assert_eq!(agent.local(wrong).status, 400, "{wrong}");
    }
}

#[test]
fn an_agent_that_is_still_starting_says_so() {
    let agent = Agent::start();
    for path in ["/workloads", "/certs", "/services", "/policies"] {
        assert_eq!(agent.local(path).status, 503, "{path}");
    }
    let verify = agent.local("/verify?from=shop/web&to=data/db&port=80");
    assert_eq!((verify.status, verify.body.contains("starting")), (503, true), "{}", verify.body);
}

#[test]
fn open_connections_say_what_lets_them_in_and_are_found_by_either_end() {
    let agent = agent_that_knows(0);
    let open = [agent.observer.open(web_to_db(Direction::Inbound)), agent.observer.open(stranger_to_db())];
    let rows = agent.local("/connections").json();
    let [stranger, web] = [&rows["newest"][0], &rows["newest"][1]];
    assert_eq!((&web["tls"], &web["cipher"]), (&json!("TLSv1.3"), &json!("TLS13_AES_128_GCM_SHA256")));
    assert_eq!((&stranger["tls"], &stranger["cipher"]), (&json!(null), &json!(null)));
    assert_eq!((&web["mode"], &web["policy"]), (&json!("STRICT"), &json!("data/members")));
    for (query, found) in [
        ("namespace=shop", 1),
        ("namespace=data", 2),
        ("name=db-0", 2),
        ("namespace=shop&name=db-0", 0),
        ("namespace=other", 0),
    ] {
        let rows = agent.local(&format!("/connections?{query}")).json();
        assert_eq!(rows["matching"], found, "{query}");
        assert_eq!(rows["newest"].as_array().unwrap().len(), found, "{query}");
    }
    let second = agent.local("/connections?limit=1&offset=1").json();
    assert_eq!((&second["matching"], &second["newest"][0]["id"]), (&json!(2), &web["id"]));
    drop(open);
}

#[test]
fn what_ended_is_remembered_newest_first_and_not_for_ever() {
    let agent = Agent::start();
    let first = agent.observer.open(web_to_db(Direction::Outbound));
    first.progress().add_sent(7);
    first.close(Ending::ResetBySource);
    agent.observer.refused(web_to_db(Direction::Inbound), denied(Reason::DenyPolicy, Some("data/none")));
    let ended = agent.local("/connections/ended").json();
    assert_eq!(ended["total"], 2, "{ended}");
    let [refused, reset] = [&ended["items"][0], &ended["items"][1]];
    assert_eq!((&reset["ending"], &reset["bytes_sent"]), (&json!("reset_by_source"), &json!(7)));
    assert_eq!(refused["ending"], "refused", "{refused}");
    assert!(refused["reason"].as_str().unwrap().contains("data/none"), "{refused}");

    for _ in 0..2000 {
        agent.observer.refused(stranger_to_db(), Refusal::NoEndpoint);
    }
    // A scan pushes out what was refused before, and nothing that was served.
    let ended = agent.local("/connections/ended").json();
    assert_eq!(ended["total"], 257, "{ended}");
    assert_eq!(agent.local("/connections/ended?namespace=shop").json()["items"], json!([reset]));
    for _ in 0..1100 {
        agent.observer.open(stranger_to_db()).close(Ending::Clean);
    }
    assert_eq!(agent.local("/connections/ended?limit=1").json()["total"], 1024 + 256);
    assert_eq!(agent.local("/connections/ended?namespace=shop").json()["total"], 0);
}

#[test]
fn the_memory_of_what_ended_keeps_no_label_set_alive() {
    let label_idle = std::time::Duration::from_millis(50);
    let agent = Agent::with(Settings { label_idle, ..Settings::new("node-a") });
    let mut flow = web_to_db(Direction::Outbound);
    flow.source.workload = Some(pod("shop", "gone", &[]));
    agent.observer.open(flow).close(Ending::Clean);
    assert_eq!(agent.scrape().of("istio_tcp_connections_opened_total", &[]).len(), 1);
    std::thread::sleep(label_idle * 4);
    agent.scrape().none("istio_tcp_connections_opened_total", &[]);
    assert_eq!(agent.local("/connections/ended").json()["total"], 1);
}

#[test]
fn an_unknown_pod_is_named() {
    let agent = agent_that_knows(0);
    let answer = agent.local("/verify?from=shop/nobody&to=data/db-0&port=80");
    assert_eq!((answer.status, answer.body.contains("shop/nobody")), (404, true), "{}", answer.body);
    for wrong in ["/verify?from=shop/a&to=shop/b", "/verify?from=shop/a&to=shop/b&port=70000"] {
        assert_eq!(agent.local(wrong).status, 400, "{wrong}");
    }
}

#[test]
fn none_of_it_is_on_tcp() {
    let agent = agent_that_knows(1);
    for path in ["/workloads", "/certs", "/services", "/policies", "/connections", "/connections/ended"] {
        assert_eq!(agent.get(path).status, 404, "{path}");
        assert_eq!(agent.local(path).status, 200, "{path}");
    }
    assert_eq!(agent.get("/verify?from=shop/a&to=shop/b&port=1").status, 404);
}
