//! Readiness for STRICT: how much is remembered whatever comes, and what is made of it.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use mtls::mesh::ServerCall;
use mtls::plaintext::{
    Asked, Facts, Limits, Observed, Peer, PortFacts, Report, Row, Sighting, Source, Store, Tally,
};
use mtls::policy::Mode;
use proptest::prelude::*;

const SERVER: &str = "shop/server";

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + second).unwrap()
}

fn address(number: u32) -> IpAddr {
    Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, (number >> 16) as u16, number as u16).into()
}

fn stranger(port: u16, number: u32, second: i64) -> Sighting {
    let source = Source::Address(address(number));
    let peer = Peer { source, by_disable: false };
    Sighting { port, peer, address: address(number), at: at(second), refused: false }
}

fn workload(port: u16, name: &str, second: i64) -> Sighting {
    let peer = Peer { source: Source::Workload(name.into()), by_disable: false };
    Sighting { port, peer, address: address(1), at: at(second), refused: false }
}

fn observing(limits: Limits, pods: &[&str]) -> Store {
    let mut store = Store::new(limits);
    store.observe(pods.iter().zip(1..).map(|(key, netns)| ((*key).to_owned(), netns)), at(0));
    store
}

/// Bytes the C library's allocator has handed out.
fn allocated() -> usize {
    // SAFETY: mallinfo2 takes nothing, returns numbers, and may be called at any time.
    let info = unsafe { libc::mallinfo2() };
    info.uordblks + info.hblkhd
}

#[test]
fn a_scan_of_every_port_from_many_addresses_leaves_memory_bounded_and_real_peers_in_place() {
    let before = allocated();
    let mut store = observing(Limits::default(), &[SERVER, "shop/other"]);
    store.record("shop/other", &workload(7000, "outside/cron", 1));
    for second in 1..=3 {
        store.record(SERVER, &workload(7000, "outside/cron", second));
        store.record(SERVER, &stranger(7000, 9_999_999, second));
    }
    let mut missed = 0;
    for port in 1..=u16::MAX {
        store.record(SERVER, &stranger(port, u32::from(port) % 1000, 10));
        missed += 1;
    }
    // One port from very many.
    for number in 0..10_000 {
        store.record(SERVER, &stranger(7000, 100_000 + number, 11));
        missed += 1;
    }
    store.record(SERVER, &workload(7000, "outside/late", 12));
    let limits = Limits::default();
    let (rows, not_kept) = store.counts();
    assert!(rows <= limits.rows_per_pod + 1, "{rows} rows");
    let occupied = allocated() - before;
    assert!(occupied < 4 << 20, "{occupied} bytes for {rows} rows");

    let pod = store.pod(SERVER).unwrap();
    let port = &pod.ports[&7000];
    let count = |sighting: &Sighting| port.peers.get(&sighting.peer).map(|row| row.connections);
    assert_eq!(count(&workload(7000, "outside/cron", 0)), Some(3));
    assert_eq!(count(&workload(7000, "outside/late", 0)), Some(1));
    assert_eq!(count(&stranger(7000, 9_999_999, 0)), Some(3), "a peer that came again outlives a scan");
    assert_eq!(store.pod("shop/other").unwrap().ports[&7000].peers.len(), 1, "a neighbour is not concerned");
    // Nothing vanished uncounted.
    let kept: u64 = pod.ports.values().flat_map(|port| port.peers.values()).map(|row| row.connections).sum();
    let told: u64 = pod.ports.values().map(|port| port.missed.count).sum::<u64>() + pod.missed.count;
    assert_eq!(kept + told, missed + 3 + 3 + 1);
    assert_eq!(told, not_kept);
}

#[derive(Clone, Debug)]
enum Step {
    Came { pod: usize, port: u16, peer: u32, is_workload: bool },
    Open { pod: usize, port: u16, peer: u32, count: u64 },
    Anew { pod: usize },
    Expire { second: i64 },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        20 => (0..3usize, 0..6u16, 0..12u32, any::<bool>())
            .prop_map(|(pod, port, peer, is_workload)| Step::Came { pod, port, peer, is_workload }),
        2 => (0..3usize, 0..6u16, 0..12u32, 1..5u64)
            .prop_map(|(pod, port, peer, count)| Step::Open { pod, port, peer, count }),
        1 => (0..3usize).prop_map(|pod| Step::Anew { pod }),
        1 => (0..200i64).prop_map(|second| Step::Expire { second }),
    ]
}

proptest! {
    #[test]
    fn the_limits_hold_after_every_step(steps in prop::collection::vec(step(), 0..200)) {
        const PODS: [&str; 3] = ["a/a", "b/b", "c/c"];
        let limits = Limits { workloads_per_port: 3, addresses_per_port: 2, rows_per_pod: 7, rows: 15 };
        let mut store = observing(limits, &PODS);
        let mut netns = [1u64, 2, 3];
        for (second, step) in (1..).zip(&steps) {
            match *step {
                Step::Came { pod, port, peer, is_workload } => {
                    let sighting = match is_workload {
                        true => workload(port, &format!("outside/{peer}"), second),
                        false => stranger(port, peer, second),
                    };
                    store.record(PODS[pod], &sighting);
                }
                Step::Open { pod, port, peer, count } => {
                    store.found_open(PODS[pod], &[(stranger(port, peer, second), count)]);
                }
                Step::Anew { pod } => {
                    netns[pod] += 10;
                    let pods = PODS.iter().zip(netns).map(|(key, netns)| ((*key).to_owned(), netns));
                    prop_assert_eq!(store.observe(pods, at(second)), [PODS[pod]]);
                    prop_assert!(!store.pod(PODS[pod]).unwrap().has_peers());
                }
                Step::Expire { second } => store.expire(at(second)),
            }
            let mut rows = 0;
            for key in PODS {
                let pod = store.pod(key).unwrap();
                let of_pod: usize = pod.ports.values().map(|port| port.peers.len()).sum();
                prop_assert!(of_pod <= limits.rows_per_pod);
                for port in pod.ports.values() {
                    let is_address = |peer: &&Peer| matches!(peer.source, Source::Address(_));
                    let addresses = port.peers.keys().filter(is_address).count();
                    prop_assert!(addresses <= limits.addresses_per_port);
                    prop_assert!(port.peers.len() - addresses <= limits.workloads_per_port);
                    prop_assert!(!port.peers.is_empty());
                    prop_assert!(port.peers.values().all(|row| row.first <= row.last));
                }
                rows += of_pod;
            }
            prop_assert_eq!(rows, store.counts().0);
            prop_assert!(rows <= limits.rows);
        }
    }
}

#[test]
fn an_address_never_takes_a_workloads_place_and_a_workload_takes_an_addresss() {
    let limits = Limits { workloads_per_port: 9, addresses_per_port: 9, rows_per_pod: 2, rows: 9 };
    let mut store = observing(limits, &[SERVER]);
    store.record(SERVER, &workload(80, "a/a", 1));
    store.record(SERVER, &stranger(80, 1, 2));
    store.record(SERVER, &workload(81, "b/b", 3));
    store.record(SERVER, &stranger(82, 2, 4));
    let pod = store.pod(SERVER).unwrap();
    assert_eq!(pod.ports.keys().copied().collect::<Vec<_>>(), [80, 81]);
    assert_eq!(pod.ports[&80].missed, Tally { count: 1, last: Some(at(2)) });
    assert_eq!(pod.missed, Tally { count: 1, last: Some(at(4)) });
}

#[test]
fn a_connection_older_than_the_observation_counts_once_and_stays_recent_while_it_is_open() {
    let mut store = observing(Limits::default(), &[SERVER]);
    for second in [1, 61] {
        store.found_open(SERVER, &[(stranger(7000, 1, second), 2)]);
    }
    let row = |store: &Store| store.pod(SERVER).unwrap().ports[&7000].peers.values().next().unwrap().clone();
    let seen = row(&store);
    assert_eq!((seen.connections, seen.open, seen.first, seen.last), (2, 2, at(1), at(61)));
    store.record(SERVER, &stranger(7000, 1, 62));
    store.found_open(SERVER, &[(stranger(7000, 1, 121), 1)]);
    assert_eq!((row(&store).connections, row(&store).open), (3, 1));
    store.found_open(SERVER, &[]);
    assert_eq!((row(&store).open, row(&store).last), (0, at(121)));
}

#[test]
fn a_peer_that_the_mesh_hears_of_late_gets_its_name_and_an_older_one_keeps_its_address() {
    let mut store = observing(Limits::default(), &[SERVER]);
    let known = Peer { source: Source::Workload("outside/cron".into()), by_disable: false };
    store.record(SERVER, &stranger(7000, 1, 5));
    store.record(SERVER, &stranger(7001, 1, 50));
    store.record(SERVER, &stranger(7002, 1, 51));
    store.record(SERVER, &Sighting { peer: known.clone(), ..stranger(7002, 1, 60) });
    store.record(SERVER, &stranger(7002, 2, 52));
    store.name(SERVER, at(10), |_, ip| if ip == address(1) { known.clone() } else { stranger(0, 2, 0).peer });
    let pod = store.pod(SERVER).unwrap();
    let row = |port: u16, peer: &Peer| {
        pod.ports[&port].peers.get(peer).map(|row| (row.connections, row.first, row.last))
    };
    let nameless = stranger(0, 1, 0).peer;
    assert_eq!((row(7000, &nameless), row(7000, &known)), (Some((1, at(5), at(5))), None));
    assert_eq!((row(7001, &nameless), row(7001, &known)), (None, Some((1, at(50), at(50)))));
    assert_eq!((row(7002, &nameless), row(7002, &known)), (None, Some((2, at(51), at(60)))));
    assert_eq!(row(7002, &stranger(0, 2, 0).peer), Some((1, at(52), at(52))));
    assert_eq!(store.counts(), (4, 0));
}

const DAY: Duration = Duration::from_secs(86400);
const NOW: i64 = 1_000_000;

/// One PERMISSIVE workload, observed for two days, with port 80 and nobody there.
fn facts() -> Facts {
    let port = PortFacts {
        mode: Mode::Permissive,
        set_by: None,
        dry_run: None,
        is_served: true,
        nodes: Default::default(),
        peers: Vec::new(),
        missed: Tally::default(),
        called_by: Vec::new(),
        has_own_mode: false,
    };
    let workload = Observed {
        namespace: "shop".into(),
        name: "server".into(),
        identity: "spiffe://cluster.local/ns/shop/sa/server".into(),
        modes: "PERMISSIVE".into(),
        is_open: true,
        dry_run_tightens: false,
        since: Some(at(NOW - 2 * 86400)),
        ports: BTreeMap::from([(80, port)]),
        missed: Tally::default(),
        unserved: Tally { count: 65534, last: Some(at(NOW)) },
    };
    Facts {
        node: "node-b".into(),
        at: at(NOW),
        lost: Tally::default(),
        blind: None,
        unread_callers: Vec::new(),
        workloads: vec![workload],
    }
}

fn seen(by_disable: bool, seconds_ago: i64) -> (Peer, Row, bool) {
    let peer = Peer { source: Source::Workload("outside/cron".into()), by_disable };
    let last = at(NOW) - SignedDuration::from_secs(seconds_ago);
    (peer, Row { address: address(1), connections: 3, refused: 0, open: 0, first: last, last }, by_disable)
}

fn call(name: &str) -> ServerCall {
    let by = format!("ValidatingWebhookConfiguration {name}").into();
    ServerCall { by, service: "shop/hook".into(), port: 443 }
}

#[test]
fn ready_is_said_only_when_nobody_would_be_cut_off_and_enough_was_seen() {
    type Change = fn(&mut Facts);
    fn first(facts: &mut Facts) -> &mut PortFacts {
        facts.workloads[0].ports.get_mut(&80).unwrap()
    }
    let rows: [(&str, Change, Option<&str>); 22] = [
        ("nobody, for long enough; a scan of ports that nobody serves stands in nobody's way", |_| {}, None),
        (
            "somebody within the window",
            |f| first(f).peers.push(seen(false, 86399)),
            Some("shop/server port 80: 1 peer would be cut off"),
        ),
        ("somebody long ago", |f| first(f).peers.push(seen(false, 86401)), None),
        (
            "somebody who came long ago and is still connected",
            |f| {
                let (peer, row, enrolled) = seen(false, 86401);
                first(f).peers.push((peer, Row { open: 1, ..row }, enrolled));
            },
            Some("shop/server port 80: 1 peer would be cut off"),
        ),
        ("plaintext only because of DISABLE", |f| first(f).peers.push(seen(true, 60)), None),
        (
            "observed for too short a time",
            |f| f.workloads[0].since = Some(at(NOW - 86399)),
            Some("shop/server: observed for 86399 s of 86400 s"),
        ),
        ("observed for exactly the window", |f| f.workloads[0].since = Some(at(NOW - 86400)), None),
        (
            "not enrolled yet",
            |f| f.workloads[0].since = None,
            Some(
                "shop/server: not observed: not enrolled yet, or its sockets cannot be listed; the agent's log says why",
            ),
        ),
        (
            "STRICT already, observed or not",
            |f| {
                f.workloads[0].is_open = false;
                f.workloads[0].since = None;
                f.workloads[0].ports.clear();
            },
            None,
        ),
        (
            "peers at a port without room",
            |f| first(f).missed = Tally { count: 2, last: Some(at(NOW - 60)) },
            Some("shop/server port 80: 2 more plaintext connections, of peers that are not kept"),
        ),
        (
            "peers at any port without room",
            |f| f.workloads[0].missed = Tally { count: 1, last: Some(at(NOW - 60)) },
            Some("shop/server: 1 more plaintext connection, of peers that are not kept"),
        ),
        (
            "no room, but before the window",
            |f| first(f).missed = Tally { count: 2, last: Some(at(NOW - 86401)) },
            None,
        ),
        (
            "events were lost",
            |f| f.lost = Tally { count: 12, last: Some(at(NOW - 60)) },
            Some("12 events of plaintext came faster than could be taken in: peers may be missing"),
        ),
        ("events were lost before the window", |f| f.lost = Tally { count: 12, last: Some(at(0)) }, None),
        (
            "nothing is observed any more",
            |f| f.blind = Some("bad descriptor".into()),
            Some("plaintext is no longer observed: bad descriptor; restart the agent"),
        ),
        ("no workload", |f| f.workloads.clear(), None),
        (
            "the API server has a webhook here, and has not called it yet",
            |f| first(f).called_by.push(call("rules")),
            Some(
                "shop/server port 80: the API server's calls would be cut off (ValidatingWebhookConfiguration rules \
                 through Service shop/hook port 443); keep the port open for them: portLevelMtls {\"80\": {mode: \
                 PERMISSIVE}} in a PeerAuthentication that selects the pod",
            ),
        ),
        (
            "a webhook whose port is kept open",
            |f| {
                first(f).called_by.push(call("rules"));
                first(f).has_own_mode = true;
            },
            None,
        ),
        (
            "a webhook whose port is kept open, and was called",
            |f| {
                let (_, row, _) = seen(false, 60);
                let caller = Peer { source: Source::Address(row.address), by_disable: false };
                first(f).called_by.push(call("rules"));
                first(f).has_own_mode = true;
                first(f).peers.push((caller, row, false));
            },
            None,
        ),
        (
            "a webhook whose port is kept open, and where a workload of the cluster came",
            |f| {
                first(f).called_by.push(call("rules"));
                first(f).has_own_mode = true;
                first(f).peers.push(seen(false, 60));
            },
            Some("shop/server port 80: 1 peer would be cut off"),
        ),
        (
            "a port with a mode of its own that no webhook needs",
            |f| {
                first(f).has_own_mode = true;
                first(f).peers.push(seen(false, 60));
            },
            Some("shop/server port 80: 1 peer would be cut off"),
        ),
        (
            "nobody could say what the API server calls",
            |f| f.unread_callers.push("apiservices.apiregistration.k8s.io"),
            Some(
                "what the API server calls is not known: apiservices.apiregistration.k8s.io can't be read; the agent's \
                 log and `mtls status` say why",
            ),
        ),
    ];
    let asked = Asked { namespace: None, window: DAY, dry_run: false };
    for (case, change, reason) in rows {
        let mut facts = facts();
        change(&mut facts);
        let report = Report::new(facts, &asked);
        assert_eq!(report.reasons, reason.into_iter().collect::<Vec<_>>(), "{case}");
        assert_eq!(report.ready, reason.is_none(), "{case}");
        let of_node = report.reasons.iter().any(|reason| !reason.starts_with("shop/server"));
        let ready = report.workloads.iter().all(|row| row.ready);
        assert_eq!(ready, reason.is_none() || of_node, "{case}");
    }
}

#[test]
fn only_what_is_asked_about_is_judged() {
    let bad = |namespace: &str, dry_run: Option<Mode>| {
        let mut workload = facts().workloads.remove(0);
        workload.namespace = namespace.into();
        workload.dry_run_tightens = dry_run == Some(Mode::Strict);
        let port = workload.ports.get_mut(&80).unwrap();
        port.peers.push(seen(false, 60));
        port.dry_run = dry_run.map(|mode| (mode, Some(format!("{namespace}/trial"))));
        // What keeps it open now would be overruled.
        port.has_own_mode = true;
        workload
    };
    let judged = |namespace: Option<&str>, dry_run: bool, workloads: &[Observed]| {
        let facts = Facts { workloads: workloads.to_vec(), ..facts() };
        let report =
            Report::new(facts, &Asked { namespace: namespace.map(str::to_owned), window: DAY, dry_run });
        report.reasons.iter().map(|reason| reason.split(' ').next().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let [shop, bank] = [bad("shop", Some(Mode::Strict)), bad("bank", None)];
    let both = [shop.clone(), bank.clone()];
    assert_eq!(judged(None, false, &both), ["shop/server", "bank/server"]);
    assert_eq!(judged(Some("bank"), false, &both), ["bank/server"]);
    assert_eq!(judged(Some("elsewhere"), false, &both), [""; 0]);
    assert_eq!(judged(None, true, &both), ["shop/server"]);
    assert_eq!(judged(Some("bank"), true, &both), [""; 0]);
    let mut called = shop;
    let port = called.ports.get_mut(&80).unwrap();
    port.peers.clear();
    port.called_by.push(call("rules"));
    assert_eq!(judged(None, false, &[called.clone()]), [""; 0], "its port is kept open");
    assert_eq!(judged(None, true, &[called]), ["shop/server"], "the dry-run policy would end that");
    // A dry-run policy that does not make the port STRICT cuts nobody off.
    let loosened = bad("shop", Some(Mode::Disable));
    assert_eq!(judged(None, true, &[loosened]), [""; 0]);
    // Of a workload of which only another port would be STRICT, this one is not judged.
    let mut other = bad("shop", None);
    other.dry_run_tightens = true;
    assert_eq!(judged(None, true, &[other]), [""; 0]);
}
