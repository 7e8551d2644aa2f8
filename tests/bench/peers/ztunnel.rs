//! Istio's ztunnel: its binary and redirect script in, one on each node out.
//!
//! Stands in for what surrounds a ztunnel in a cluster: a file in place of istiod's workloads, a certificate authority of
//! its own making (the binary must have been built with `--features testing`), and the CNI agent that hands it pods.
//! Nothing of ztunnel is kept here.

use std::fs;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use mtls_tests::{Lab, Pod, Running, eventually, http_get};
use prost::Message;
use serde_json::json;
use socket2::{Domain, MsgHdr, SockAddr, Socket, Type};

use super::Peer;
use crate::world::Way;

/// What the command line says.
pub struct Ztunnel {
    binary: PathBuf,
    redirect: PathBuf,
}

/// One on each node, with the pod it serves.
struct Two {
    nodes: [Node; 2],
}

struct Node {
    pod: Arc<Pod>,
    binary: PathBuf,
    dir: PathBuf,
    workloads: PathBuf,
    process: Option<Running>,
}

impl Ztunnel {
    pub fn new(binary: &Path, redirect: &Path) -> Result<Self> {
        Ok(Self { binary: binary.canonicalize()?, redirect: redirect.canonicalize()? })
    }

    pub fn start(self, lab: &Lab, way: &Way) -> Result<Box<dyn Peer>> {
        let dir = lab.dir().join("ztunnel");
        fs::create_dir_all(&dir)?;
        let workloads = dir.join("workloads.yaml");
        let pods = [&way.client, &way.server];
        let list: Vec<_> = pods.into_iter().map(|pod| workload(pod)).collect();
        // JSON is YAML.
        fs::write(&workloads, json!({ "workloads": list }).to_string())?;
        for pod in pods {
            let script = self.redirect.to_string_lossy();
            pod.run("bash", &[&script])?.success().context("ztunnel's redirect script")?;
        }
        let node = |pod: &Arc<Pod>| Node {
            pod: Arc::clone(pod),
            binary: self.binary.clone(),
            dir: dir.clone(),
            workloads: workloads.clone(),
            process: None,
        };
        let mut running = Two { nodes: pods.map(node) };
        running.restart()?;
        Ok(Box::new(running))
    }
}

impl Peer for Two {
    fn restart(&mut self) -> Result<()> {
        self.nodes.iter_mut().for_each(|node| node.process = None);
        self.nodes.iter_mut().try_for_each(Node::start)
    }
}

impl Node {
    fn start(&mut self) -> Result<()> {
        let name = self.pod.name();
        let socket = self.dir.join(format!("{name}.sock"));
        let ready = hand_over(&socket, &self.pod)?;
        let mut command = self.pod.node().command_in("ztunnel", &self.binary);
        command.env_clear().current_dir(&self.dir);
        for (key, value) in [
            ("FAKE_CA", "true"),
            ("XDS_ADDRESS", ""),
            ("PROXY_MODE", "shared"),
            ("NODE_NAME", self.pod.node().name()),
            ("RUST_LOG", "info,access=warn"),
        ] {
            command.env(key, value);
        }
        command.env("LOCAL_XDS_PATH", &self.workloads).env("INPOD_UDS", &socket);
        let log = self.dir.join(format!("{name}.log"));
        let mut process = Running::start_logged(command, &log, &log)?;
        let health = SocketAddr::from((Ipv4Addr::LOCALHOST, 15021));
        let up = eventually(Duration::from_secs(20), || {
            let answer = http_get(self.pod.node().netns(), health, "/healthz/ready");
            let up = ready.load(Ordering::Acquire) && answer.is_ok_and(|answer| answer.status == 200);
            (up || !process.alive()).then_some(up)
        });
        if up != Some(true) {
            bail!("ztunnel is not ready:\n{}", fs::read_to_string(&log).unwrap_or_default());
        }
        self.process = Some(process);
        Ok(())
    }
}

fn workload(pod: &Pod) -> serde_json::Value {
    json!({
        "uid": uid(pod), "name": pod.name(), "namespace": pod.namespace(),
        "serviceAccount": pod.service_account(), "trustDomain": "cluster.local",
        "workloadIps": [pod.ip()], "protocol": "HBONE", "node": pod.node().name(), "network": "", "services": {},
    })
}

fn uid(pod: &Pod) -> String {
    format!("cluster//v1/Pod/{}/{}", pod.namespace(), pod.name())
}

/// Plays the CNI agent for one ztunnel: tells it of one pod and hands over the pod's namespace. True once it has both.
fn hand_over(path: &Path, pod: &Pod) -> Result<Arc<AtomicBool>> {
    if path.exists() {
        fs::remove_file(path)?;
    }
    let listener = Socket::new(Domain::UNIX, Type::SEQPACKET, None)?;
    listener.bind(&SockAddr::unix(path)?).with_context(|| format!("bind {}", path.display()))?;
    listener.listen(1)?;
    let add = zds::Request {
        payload: Some(zds::Payload::Add(zds::Add {
            uid: uid(pod),
            info: Some(zds::Info {
                name: pod.name().into(),
                namespace: pod.namespace().into(),
                service_account: pod.service_account().into(),
            }),
        })),
    };
    let netns = pod.netns().fd();
    let ready = Arc::new(AtomicBool::new(false));
    let done = Arc::clone(&ready);
    // Ends when the ztunnel goes.
    thread::spawn(move || {
        if let Err(error) = converse(&listener, &add, &netns, &done) {
            eprintln!("ztunnel's CNI agent: {error:#}");
        }
    });
    Ok(ready)
}

fn converse(listener: &Socket, add: &zds::Request, netns: &OwnedFd, done: &AtomicBool) -> Result<()> {
    let (connection, _) = listener.accept()?;
    let mut buffer = [MaybeUninit::uninit(); 1024];
    let mut acknowledged = |what: &str| {
        let n = connection.recv(&mut buffer)?;
        ensure!(n > 0, "it hung up instead of acknowledging {what}");
        Ok::<_, anyhow::Error>(())
    };
    acknowledged("a greeting")?;
    let message = add.encode_to_vec();
    let rights = rights(netns);
    connection.sendmsg(&MsgHdr::new().with_buffers(&[IoSlice::new(&message)]).with_control(&rights), 0)?;
    acknowledged("a pod")?;
    let all = zds::Request { payload: Some(zds::Payload::SnapshotSent(zds::SnapshotSent {})) };
    connection.send(&all.encode_to_vec())?;
    acknowledged("the end of the list")?;
    done.store(true, Ordering::Release);
    let mut rest = [MaybeUninit::uninit(); 64];
    while connection.recv(&mut rest).is_ok_and(|n| n > 0) {}
    Ok(())
}

/// A control message that carries one descriptor: length, level, type, descriptor, padded to the length's size.
fn rights(fd: &OwnedFd) -> Vec<u8> {
    let header = size_of::<libc::cmsghdr>();
    let mut bytes = (header + size_of::<i32>()).to_ne_bytes().to_vec();
    for number in [libc::SOL_SOCKET, libc::SCM_RIGHTS, fd.as_raw_fd()] {
        bytes.extend(number.to_ne_bytes());
    }
    bytes.resize(bytes.len().next_multiple_of(size_of::<usize>()), 0);
    bytes
}

/// The messages of the CNI agent's protocol that are needed here.
mod zds {
    #[derive(prost::Message)]
    pub struct Request {
        #[prost(oneof = "Payload", tags = "1, 3")]
        pub payload: Option<Payload>,
    }

    #[derive(prost::Oneof)]
    pub enum Payload {
        #[prost(message, tag = "1")]
        Add(Add),
        #[prost(message, tag = "3")]
        SnapshotSent(SnapshotSent),
    }

    #[derive(prost::Message)]
    pub struct Add {
        #[prost(string, tag = "1")]
        pub uid: String,
        #[prost(message, optional, tag = "2")]
        pub info: Option<Info>,
    }

    #[derive(prost::Message)]
    pub struct Info {
        #[prost(string, tag = "1")]
        pub name: String,
        #[prost(string, tag = "2")]
        pub namespace: String,
        #[prost(string, tag = "3")]
        pub service_account: String,
    }

    #[derive(prost::Message)]
    pub struct SnapshotSent {}
}
