//! Capture from the outside: what applications see, what the kernel lets in and out.

mod lab;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use lab::{Agent, Lab, Pod, lab};
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
