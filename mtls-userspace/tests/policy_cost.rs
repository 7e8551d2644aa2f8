//! What a decision costs, and what policies occupy. Figures, not promises: run by hand with
//! `cargo test --release --test policy_cost -- --ignored --nocapture`.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::hint::black_box;
use std::net::SocketAddr;
use std::time::Instant;

use mtls::identity::SpiffeId;
use mtls::mesh::{Mesh, Objects, Settings};
use mtls::policy::{Peer, Request};
use serde_json::{Value, json};

const ROUNDS: u32 = 20_000;

#[test]
#[ignore = "a benchmark"]
fn decision_time_and_memory() {
    println!("policies  where        apply   load      memory    allowed   no match  plaintext");
    for count in [10, 1_000, 10_000] {
        for (place, spread) in [("spread", true), ("one pod", false)] {
            let mut objects = pods();
            objects.extend((0..count).map(|number| policy(number, spread)));
            let text: String = objects.iter().map(|object| format!("{object}\n")).collect();
            let settings = Settings {
                trust_domain: "cluster.local".parse().unwrap(),
                root_namespace: "istio-system".into(),
            };
            let mut objects = Objects::from_yaml("p.json", &text, &settings).unwrap();
            let start = Instant::now();
            let before = allocated();
            let mesh = Mesh::build(&mut objects, &settings, 1).unwrap();
            let load = start.elapsed();
            // Of a hundred pods, the rest is next to nothing.
            let memory = allocated() - before;
            let last = count - 1;
            // In `spread`, policies of the first namespace and selector: every hundredth.
            let known = if spread { last / 100 * 100 } else { last };
            let asked = [Some(format!("client-{known}")), Some("nobody".to_owned()), None];
            let times = asked.map(|account| time(&mesh, account.as_deref()));
            println!(
                "{count:>8}  {place:<11} {:>6}   {load:>7.1?}  {:>6} KiB  {:>6.0} ns {:>6.0} ns {:>6.0} ns",
                if spread { count.div_ceil(100) } else { count },
                memory / 1024,
                times[0],
                times[1],
                times[2],
            );
        }
    }
}

fn pods() -> Vec<Value> {
    (0..100)
        .map(|number| {
            json!({
                "apiVersion": "v1", "kind": "Pod",
                "metadata": {
                    "name": format!("pod-{number}"), "namespace": format!("ns-{}", number % 10),
                    "labels": {
                        "istio.io/dataplane-mode": "ambient", "app": format!("app-{}", number / 10),
                        "tier": "back", "version": "v1", "team": "blue",
                    },
                },
                "status": {"podIP": format!("10.0.0.{number}")},
            })
        })
        .collect()
}

/// Every third denies. Accounts, blocks, ports and prefixes in turn.
fn policy(number: usize, spread: bool) -> Value {
    let (namespace, app) = match spread {
        true => (number % 10, number / 10 % 10),
        false => (0, 0),
    };
    let rule = match number % 4 {
        0 => {
            json!({"from": [{"source": {"ipBlocks": [format!("172.{}.{}.0/24", 16 + number / 256, number % 256)]}}]})
        }
        1 => {
            json!({"from": [{"source": {"namespaces": [format!("team-{number}-*")]}}], "to": [{"operation": {"ports": ["80"]}}]})
        }
        _ => {
            json!({"from": [{"source": {"principals": [format!("cluster.local/ns/x/sa/client-{number}")]}}], "to": [{"operation": {"ports": ["80", "443"]}}]})
        }
    };
    let account =
        json!({"from": [{"source": {"principals": [format!("cluster.local/ns/x/sa/client-{number}")]}}]});
    let deny = number % 3 == 1;
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": format!("policy-{number}"), "namespace": format!("ns-{namespace}")},
        "spec": {
            "selector": {"matchLabels": {"app": format!("app-{app}")}},
            "action": if deny { "DENY" } else { "ALLOW" },
            "rules": if deny { json!([rule]) } else { json!([rule, account]) },
        },
    })
}

fn time(mesh: &Mesh, account: Option<&str>) -> f64 {
    let address: SocketAddr = "10.0.0.0:80".parse().unwrap();
    let id = account.map(|account| SpiffeId::new(&"cluster.local".parse().unwrap(), "x", account).unwrap());
    let request = Request {
        destination: mesh.workload(address.ip()).unwrap(),
        address,
        source_ip: "10.1.2.3".parse().unwrap(),
        peer: id.as_ref().map_or(Peer::Plaintext, Peer::Verified),
    };
    let start = Instant::now();
    for _ in 0..ROUNDS {
        black_box(mesh.policies.authorize(black_box(&request))).ok();
    }
    start.elapsed().as_nanos() as f64 / f64::from(ROUNDS)
}

/// Bytes the C library's allocator has handed out.
fn allocated() -> usize {
    // SAFETY: mallinfo2 takes nothing, returns numbers, and may be called at any time.
    let info = unsafe { libc::mallinfo2() };
    info.uordblks + info.hblkhd
}
