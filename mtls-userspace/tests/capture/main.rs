//! Capture from the outside: what applications see, what the kernel lets in and out.

#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]

mod fence;
mod lab;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use lab::{Agent, Lab, Pod, lab};
use mtls::addr::OriginalSrc;
use mtls::capture::{Capture, LocalPod};
use mtls::policy::{Mode, PortModes};

fn all(mode: Mode) -> PortModes {
    PortModes { default: mode, ..PortModes::default() }
}

fn prefixes() -> Vec<ipnet::IpNet> {
    vec!["10.77.0.0/24".parse().unwrap(), "fd77::/64".parse().unwrap()]
}

/// Two enrolled pods, client and server; the server is STRICT, so that only what is captured reaches it.
struct Pair {
    capture: Capture,
    agent: Agent,
    client: Pod,
    server: Pod,
    local: Arc<LocalPod>,
    client_local: Arc<LocalPod>,
}

impl Pair {
    fn new(lab: &Lab) -> Self {
        let (client, server) = (lab.pod("client"), lab.pod("server"));
        let capture = lab.start().unwrap();
        capture.set_captured(&prefixes()).unwrap();
        let enrolled = server.enrol(&capture, &all(Mode::Strict));
        let captured = client.enrol(&capture, &all(Mode::Strict));
        let client_local = captured.pod.clone();
        let agent = Agent::run(captured, &[(&server, &enrolled.pod)]);
        Self { capture, agent, client, server, local: enrolled.pod, client_local }
    }

    fn counter(&self, name: &str) -> u64 {
        counter(&self.capture, name)
    }
}

fn counter(capture: &Capture, name: &str) -> u64 {
    let counters = capture.counters().unwrap();
    counters.iter().find(|(counter, _)| *counter == name).unwrap_or_else(|| panic!("no counter {name}")).1
}

fn at(ip: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(ip, port)
}

#[test]
fn clients_of_every_kind_are_captured_and_cannot_tell() {
    let Some(lab) = lab() else { return };
    let pair = Pair::new(&lab);
    let _server = pair.server.serve(&["v4:8080", "dual:8081"]);
    let (own4, own6) = (pair.client.v4, pair.client.v6);
    let v4 = at(pair.server.v4, 8080);
    let mut captured = 0;
    for (how, detail) in [
        ("plain", String::new()),
        ("nonblocking", String::new()),
        ("bound", own4.to_string()),
        ("bound-port", own4.to_string()),
        ("device", "eth0".into()),
        ("mark", "5".into()),
        ("io_uring", String::new()),
        ("fastopen", String::new()),
        ("fastopen", String::new()),
        ("fastopen-connect", String::new()),
        ("mptcp", String::new()),
    ] {
        eprintln!("{how} {detail}");
        pair.client.dial_with(how, v4, &detail).is_transparent(own4, v4);
        captured += 1;
        assert_eq!(pair.agent.delivered(), captured, "{how} was not captured");
    }
    let v6 = at(pair.server.v6, 8081);
    for (how, detail) in [
        ("plain", String::new()),
        ("nonblocking", String::new()),
        ("bound", own6.to_string()),
        ("device", "eth0".into()),
        ("io_uring", String::new()),
        ("fastopen", String::new()),
        ("mptcp", String::new()),
    ] {
        eprintln!("v6 {how} {detail}");
        pair.client.dial_with(how, v6, &detail).is_transparent(own6, v6);
        captured += 1;
        assert_eq!(pair.agent.delivered(), captured, "{how} over IPv6 was not captured");
    }
}

#[test]
fn servers_of_every_kind_see_the_real_client() {
    let Some(lab) = lab() else { return };
    let pair = Pair::new(&lab);
    let _server = pair.server.serve(&["v4:8080", "dual:8081", "v6only:8082", "mptcp:8083"]);
    for port in [8080, 8081, 8083] {
        let to = at(pair.server.v4, port);
        pair.client.dial("plain", to).is_transparent(pair.client.v4, to);
    }
    for port in [8081, 8082, 8083] {
        let to = at(pair.server.v6, port);
        pair.client.dial("plain", to).is_transparent(pair.client.v6, to);
    }
    assert_eq!(pair.agent.delivered(), 6);
    assert_eq!(pair.counter("delivered"), 6);
}

#[test]
fn a_v4_mapped_destination_is_the_v4_one() {
    let Some(lab) = lab() else { return };
    let pair = Pair::new(&lab);
    let _server = pair.server.serve(&["v4:8080"]);
    let IpAddr::V4(v4) = pair.server.v4 else { panic!("no IPv4 address") };
    let mapped = at(v4.to_ipv6_mapped().into(), 8080);
    for how in ["plain", "nonblocking", "mptcp"] {
        pair.client.dial(how, mapped).is_transparent(pair.client.v4, at(pair.server.v4, 8080));
    }
    let own = format!("::ffff:{}", pair.client.v4);
    pair.client.dial_with("bound", mapped, &own).is_transparent(pair.client.v4, at(pair.server.v4, 8080));
    assert_eq!(pair.agent.delivered(), 4);
    // A socket that may not speak IPv4 can't be let out by it either.
    assert!(!pair.client.dial("v6only", mapped).is_ok());
    assert_eq!(pair.agent.delivered(), 4);
}

#[test]
fn what_is_not_ours_is_left_alone() {
    let Some(lab) = lab() else { return };
    let pair = Pair::new(&lab);
    let outside = lab.pod("outside");
    let _outside = outside.serve(&["v4:8080", "udp:8090"]);
    let _server = pair.server.serve(&["v4:8080", "udp:8090"]);
    let _own = pair.client.serve(&["v4:8080"]);
    pair.capture.set_captured(&["10.77.0.2/32".parse().unwrap(), "10.77.0.3/32".parse().unwrap()]).unwrap();

    let to = at(outside.v4, 8080);
    pair.client.dial("plain", to).is_transparent(pair.client.v4, to);
    assert_eq!(pair.counter("passed"), 1, "outside the mesh");

    let own = at(pair.client.v4, 8080);
    pair.client.dial("plain", own).is_transparent(pair.client.v4, own);
    let loopback: SocketAddr = "127.0.0.1:8080".parse().unwrap();
    pair.client.dial("plain", loopback).is_transparent(loopback.ip(), loopback);

    let udp = pair.client.dial("udp", at(pair.server.v4, 8090));
    assert_eq!(udp.server("peer"), udp.local(), "UDP is not captured");

    // Not enrolled: its sockets are its own, whoever it dials.
    pair.capture.set_captured(&prefixes()).unwrap();
    let back = outside.dial("plain", at(outside.v4, 8080));
    back.is_transparent(outside.v4, at(outside.v4, 8080));
    let captured = pair.counter("captured");
    assert_eq!(outside.dial("plain", at(pair.server.v4, 8080)).error(), "ECONNREFUSED");
    assert_eq!(pair.counter("captured"), captured);
    assert_eq!(pair.agent.delivered(), 0);
}

#[test]
fn a_prefix_that_is_added_is_captured_and_one_that_is_removed_is_not() {
    let Some(lab) = lab() else { return };
    let pair = Pair::new(&lab);
    let _server = pair.server.serve(&["v4:8080", "dual:8081"]);
    pair.capture.set_modes(&pair.local, &all(Mode::Permissive)).unwrap();
    for (prefixes, captured4, captured6) in [
        (vec![], false, false),
        (vec!["10.77.0.3/32"], true, false),
        (vec!["fd77::/64"], false, true),
        (vec!["10.0.0.0/8", "fd77::3/128"], true, true),
        (vec!["10.77.0.4/32", "fd77::4/128"], false, false),
        (vec!["::ffff:10.77.0.0/120"], true, false),
    ] {
        let nets: Vec<_> = prefixes.iter().map(|prefix| prefix.parse().unwrap()).collect();
        pair.capture.set_captured(&nets).unwrap();
        for (ip, own, port, expected) in [
            (pair.server.v4, pair.client.v4, 8080, captured4),
            (pair.server.v6, pair.client.v6, 8081, captured6),
        ] {
            let before = pair.counter("captured");
            pair.client.dial("plain", at(ip, port)).is_transparent(own, at(ip, port));
            assert_eq!(pair.counter("captured") - before, u64::from(expected), "{ip} with {prefixes:?}");
        }
    }
}

#[test]
fn the_agents_own_sockets_are_not_captured_and_no_other_process_is_exempt() {
    let Some(lab) = lab() else { return };
    let pair = Pair::new(&lab);
    let _server = pair.server.serve(&["v4:8080"]);
    let to = at(pair.server.v4, 8080);
    pair.capture.set_modes(&pair.local, &all(Mode::Permissive)).unwrap();
    let dial = || {
        let socket = pair.client_local.socket(to).unwrap();
        socket.connect_timeout(&to.into(), std::time::Duration::from_secs(5)).unwrap();
        let stream = std::net::TcpStream::from(socket);
        stream.set_nonblocking(false).unwrap();
        let mut line = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(&stream), &mut line).unwrap();
        (stream.peer_addr().unwrap(), stream.local_addr().unwrap(), line)
    };
    let (peer, local, line) = dial();
    assert_eq!((peer, local.ip()), (to, pair.client.v4));
    assert!(line.contains(&pair.client.v4.to_string()), "{line}");
    assert_eq!((pair.counter("agent_passed"), pair.agent.delivered()), (1, 0));

    // In the agent's cgroup, but another process.
    let impostor = Pod { cgroup: pair.client.cgroup.with_file_name("agent"), ..lab::clone(&pair.client) };
    impostor.dial("plain", to).is_transparent(pair.client.v4, to);
    assert_eq!(pair.agent.delivered(), 1);

    // Once it says goodbye, the agent is a process of the pod like any other.
    pair.capture.shutdown_unregister();
    dial();
    assert_eq!(pair.counter("agent_passed"), 1);
    assert_eq!(pair.agent.delivered(), 2);
}

#[test]
fn a_socket_that_dials_again_forgets_what_it_dialled() {
    let Some(lab) = lab() else { return };
    let pair = Pair::new(&lab);
    let _server = pair.server.serve(&["v4:8080"]);
    let seen = pair.client.dial("reconnect", at(pair.server.v4, 8080));
    assert_eq!(pair.agent.delivered(), 1);
    assert!(seen.peer().ip().is_loopback(), "{seen:?}");
}

#[test]
fn a_client_that_dials_the_listener_itself_gets_nowhere() {
    let Some(lab) = lab() else { return };
    let pair = Pair::new(&lab);
    let _server = pair.server.serve(&["v4:8080"]);
    pair.client
        .dial("plain", at(pair.server.v4, 8080))
        .is_transparent(pair.client.v4, at(pair.server.v4, 8080));
    for to in [at(pair.client.v4, 15001), "127.0.0.1:15001".parse().unwrap(), at(pair.client.v4, 15006)] {
        assert!(!pair.client.dial("plain", to).is_ok(), "{to}");
    }
    assert_eq!(pair.agent.delivered(), 1);
}

#[test]
fn loopback_legs_do_not_pace() {
    let Some(lab) = lab() else { return };
    let pair = Pair::new(&lab);
    let _server = pair.server.serve(&["v4:8080"]);
    let outside = lab.pod("outside");
    let _outside = outside.serve(&["v4:8080"]);
    let usual = outside.dial("plain", at(outside.v4, 8080));
    // Something that is nobody's default, to see that it was set.
    let config = mtls::capture::Config { congestion: Some("reno".into()), ..lab.config() };
    let next = lab.on_node(move || Capture::start(config)).unwrap();
    let seen = pair.client.dial("plain", at(pair.server.v4, 8080));
    assert_eq!(pair.agent.delivered(), 1);
    assert_eq!(seen.congestion(), ("reno", "reno"), "captured");
    assert_eq!(outside.dial("plain", at(outside.v4, 8080)).congestion(), usual.congestion(), "anyone else's");
    assert_ne!(usual.congestion(), ("reno", "reno"), "the comparison means nothing");
    drop(next);
}

#[test]
fn ports_to_dial_from_do_not_run_out() {
    let Some(lab) = lab() else { return };
    let pair = Pair::new(&lab);
    let _server = pair.server.serve(&["v4:8080"]);
    for pod in [&pair.client, &pair.server] {
        lab.limit_ports(pod, "40000 40099");
    }
    let to = at(pair.server.v4, 8080);
    pair.client.dial_with("many", to, "500").is_transparent(pair.client.v4, to);
    assert_eq!(pair.agent.delivered(), 501);
}

#[test]
fn what_was_announced_for_one_connection_never_names_another() {
    let Some(lab) = lab() else { return };
    let pair = Pair::new(&lab);
    let to = at(pair.server.v4, 8080);
    let announced = OriginalSrc::new("192.0.2.1:7".parse().unwrap());

    // Refused: nobody listens yet.
    let socket = pair.local.socket(to).unwrap();
    pair.local.announce_source(&socket, to, announced).unwrap();
    let _ = socket.connect(&to.into());
    let refused = socket.local_addr().unwrap().as_socket().unwrap();
    assert_ne!(refused.port(), 0);
    drop(socket);
    let _server = pair.server.serve(&["v4:8080"]);
    let seen = pair.server.dial_with("bound-exactly", to, &refused.to_string());
    assert_eq!(seen.server("accept"), refused, "after a refusal: {seen:?}");

    // Taken: the next connection from the same address.
    let stream = lab::deliver(&pair.local, to, announced).unwrap();
    stream.set_nonblocking(false).unwrap();
    let from = stream.local_addr().unwrap();
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(&stream), &mut line).unwrap();
    assert!(line.contains("192.0.2.1"), "{line}");
    socket2::SockRef::from(&stream).set_linger(Some(std::time::Duration::ZERO)).unwrap();
    drop(stream);
    let seen = pair.server.dial_with("bound-exactly", to, &from.to_string());
    assert_eq!(seen.server("accept"), from, "after a delivery: {seen:?}");
}

#[test]
fn what_the_kernel_half_complains_about_reaches_the_log() {
    let Some(lab) = lab() else { return };
    let log = lab::log();
    let pair = Pair::new(&lab);
    let mut events = pair.capture.events().unwrap();
    let IpAddr::V4(v4) = pair.server.v4 else { panic!("no IPv4 address") };
    // Can't be bound to the pod's IPv4 address, so that its connect is refused.
    assert!(!pair.client.dial("v6only", at(v4.to_ipv6_mapped().into(), 8080)).is_ok());
    assert_eq!(pair.counter("refused"), 1);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let wait = std::time::Duration::from_millis(500);
    runtime.block_on(async { tokio::time::timeout(wait, events.next()).await }).expect_err("no event");
    let log = String::from_utf8(log.lock().unwrap().clone()).unwrap();
    assert!(log.contains("binding a captured socket to its pod's address failed (-22)"), "{log}");
}
