//! Names in the image: a static binary still finds the authority's Service, by the cluster's DNS as kubelet points to it.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use mtls_tests::{Lab, Mesh, Node, eventually, skip};

use crate::container::{Container, NEEDS};

const SERVICE: &str = "mtls-ca.mtls-system.svc.cluster.local";

/// As kubelet writes it for a pod with the policy `ClusterFirstWithHostNet`.
fn resolv_conf(server: IpAddr) -> String {
    format!(
        "search mtls-system.svc.cluster.local svc.cluster.local cluster.local\nnameserver {server}\noptions ndots:5\n"
    )
}

/// A name server on a node that knows one name and one address.
struct Dns {
    asked: Arc<Mutex<Vec<String>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Dns {
    fn start(node: &Node, address: IpAddr) -> Result<Self> {
        let at = SocketAddr::new(node.ip(), 53);
        let socket = node.netns().within(|| UdpSocket::bind(at))?;
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        let (asked, stop) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let (log, stopped) = (Arc::clone(&asked), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            let mut packet = [0; 512];
            while !stopped.load(Ordering::Acquire) {
                let Ok((length, from)) = socket.recv_from(&mut packet) else { continue };
                let Some((answer, name)) = answer(&packet[..length], address) else { continue };
                log.lock().unwrap_or_else(|e| e.into_inner()).push(name);
                let _ = socket.send_to(&answer, from);
            }
        });
        Ok(Self { asked, stop, thread: Some(thread) })
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }
}

impl Drop for Dns {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// An answer to a query of one question (RFC 1035), and the name that was asked for.
fn answer(query: &[u8], address: IpAddr) -> Option<(Vec<u8>, String)> {
    let IpAddr::V4(address) = address else { return None };
    let mut labels = Vec::new();
    let mut at = 12;
    loop {
        let length = usize::from(*query.get(at)?);
        at += 1;
        if length == 0 {
            break;
        }
        labels.push(String::from_utf8_lossy(query.get(at..at + length)?).into_owned());
        at += length;
    }
    let kind = query.get(at..at + 2)?;
    let question = query.get(12..at + 4)?;
    let name = labels.join(".");
    let is_known = name == SERVICE;
    let has_answer = is_known && kind == [0, 1];
    let mut answer = query.get(..2)?.to_vec();
    // A response, authoritative, recursion available; NXDOMAIN for other names. One question, no further sections.
    answer.extend([0x85, if is_known { 0x80 } else { 0x83 }, 0, 1, 0, u8::from(has_answer), 0, 0, 0, 0]);
    answer.extend(question);
    if has_answer {
        // The question's name, A, IN, a minute, four bytes.
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        answer.extend(address.octets());
    }
    Some((answer, name))
}

#[test]
fn the_agent_finds_the_authority_by_its_services_name() -> Result<()> {
    if skip(&NEEDS) {
        return Ok(());
    }
    let lab = Lab::two_nodes()?;
    lab.pod("node-b", "client")?;
    let mut mesh = Mesh::start(&lab)?;
    mesh.agent("node-b").kill();
    // The authority is on node-a, the name server on node-b.
    let (authority, here) = (lab.nodes()[0].ip(), lab.node("node-b")?);
    let start = |mesh: &mut Mesh, expected: &str| -> Result<()> {
        let container = Container::agent(&lab, "node-b")?
            .with_argument("--ca-address", "https://mtls-ca.mtls-system.svc:15012")?
            .with_file("/etc/resolv.conf", &resolv_conf(here.ip()))?;
        let earlier = mesh.agent("node-b").log().len();
        container.launch(&lab, mesh, "node-b")?;
        let agent = mesh.agent("node-b");
        let mut said = String::new();
        let found = eventually(Duration::from_secs(20), || {
            let ready = agent.get("/healthz/ready").map(|answer| answer.body).unwrap_or_default();
            said = agent.log().split_off(earlier) + &ready;
            said.contains(expected).then_some(())
        });
        agent.kill();
        found.with_context(|| format!("it does not say {expected:?}, but: {said}"))
    };
    // Nobody answers.
    start(&mut mesh, "failed to lookup address information")?;
    // Found, reached, and not believed: the lab's authority has a certificate for its address only.
    let dns = Dns::start(&here, authority)?;
    start(&mut mesh, "not valid for name")?;
    assert!(dns.asked().iter().any(|name| name == SERVICE), "{:?}", dns.asked());
    Ok(())
}
