//! Data threads: listeners in, one task per connection out.
//!
//! Each thread runs a single-threaded runtime with listeners of its own in every enrolled pod and its own idle
//! tunnels, so that the data path shares nothing but immutable snapshots. Connections that turn out to move much go on on
//! a second thread.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Builder;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use crate::capture::{self, Listeners, LocalPod};
use crate::config::SameNode;
use crate::connection;
use crate::direct::Direct;
use crate::drain::Working;
use crate::identity::Identities;
use crate::locate::Place;
use crate::mesh::{self, Workload};
use crate::observe::{Direction, Observer};
use crate::plaintext;
use crate::relay;
use crate::tunnel;

mod bulk_thread;

pub use bulk_thread::BulkThread;

/// What every connection on one data thread can reach.
pub struct Worker {
    pub node: Arc<str>,
    pub mesh: mesh::Source,
    pub identities: Arc<Identities>,
    pub local: Arc<LocalPods>,
    pub connector: tunnel::Connector,
    pub acceptor: tunnel::Acceptor,
    pub observer: Observer,
    /// Where plaintext that was let in is reported.
    pub plaintext: Arc<plaintext::Inbox>,
    pub same_node: SameNode,
    pub direct: Arc<Direct>,
    /// Congestion control of loopback legs; `None` leaves the host's.
    pub congestion: Option<String>,
    /// Where connections go on that move much.
    pub bulk: BulkThread,
}

/// An enrolled pod on this node, as connections see it.
pub struct Pod {
    pub socket: Arc<LocalPod>,
    /// Replaced when the pod's manifest changes.
    pub workload: ArcSwap<Workload>,
    /// Where it lives: replaced when the process that showed it is gone.
    pub place: ArcSwap<Place>,
}

/// The enrolled pods of this node by address; replaced whole, read without a lock.
#[derive(Default)]
pub struct LocalPods(ArcSwap<HashMap<IpAddr, Arc<Pod>>>);

impl LocalPods {
    pub fn at(&self, address: IpAddr) -> Option<Arc<Pod>> {
        self.0.load().get(&address).cloned()
    }

    /// The pod that an address leads to; also by one that its manifest does not name.
    pub fn owner(&self, address: IpAddr) -> Option<Arc<Pod>> {
        self.at(address).or_else(|| self.all().into_iter().find(|pod| pod.socket.has_address(address)))
    }

    /// Every pod, once.
    pub fn all(&self) -> Vec<Arc<Pod>> {
        let pods: HashMap<u64, Arc<Pod>> =
            self.0.load().values().map(|pod| (pod.socket.netns_cookie(), pod.clone())).collect();
        pods.into_values().collect()
    }

    pub fn replace(&self, pods: impl Iterator<Item = Arc<Pod>>) {
        let by_address = pods.flat_map(|pod| {
            let addresses = pod.workload.load().addresses.clone();
            addresses.into_iter().map(move |address| (address, pod.clone()))
        });
        self.0.store(Arc::new(by_address.collect()));
    }
}

impl Worker {
    /// The destination pod, if it lives on this node and same-node connections may go without TLS.
    pub fn neighbour(&self, workload: &Workload) -> Option<Arc<Pod>> {
        match self.same_node {
            SameNode::Encrypt => None,
            SameNode::Relay | SameNode::Direct => workload.addresses.iter().find_map(|ip| self.local.at(*ip)),
        }
    }

    /// Runs a connection that moves much where it is in nobody's way.
    pub fn hand_over_bulk(
        &self,
        direction: Direction,
        connection: impl Future<Output = ()> + Send + 'static,
    ) {
        self.observer.became_bulk(direction);
        self.bulk.spawn(connection);
    }

    /// Prepares a socket towards an application, or a listener for all that it accepts.
    pub fn prepare_leg(&self, socket: &socket2::Socket) -> io::Result<()> {
        capture::loopback_leg(socket, self.congestion.as_deref());
        relay::prepare(socket)
    }

    /// Counts a tunnel that could not be had, where its handshake is to blame.
    pub fn count_failure(&self, direction: Direction, error: &tunnel::Error) {
        if let Some(failure) = error.handshake_failure() {
            self.observer.handshake_failed(direction, failure);
        }
    }

    /// Counts a stream's tunnel: one that carried a stream before, or a new one with its handshake.
    pub fn count_tunnel(&self, direction: Direction, reused: bool, resumed: bool) {
        if reused {
            self.observer.tunnel_reused(direction);
        } else {
            self.observer.handshake_done(direction, resumed);
            self.observer.tunnel_opened(direction);
        }
    }
}

/// What the control side tells a data thread.
pub enum Command {
    Serve {
        pod: Arc<Pod>,
        listeners: Listeners,
    },
    /// Stop listening in the pod with this name; open connections go on.
    Release {
        name: String,
    },
}

/// The control side's end of a data thread.
#[derive(Clone)]
pub struct Handle(mpsc::Sender<Command>);

impl Handle {
    /// Nothing to report when the thread is gone: the process is on its way out.
    pub async fn tell(&self, command: Command) {
        let _ = self.0.send(command).await;
    }
}

/// Starts a data thread. It ends when `working` is told to stop and its last connection is over.
pub fn start(index: usize, worker: Arc<Worker>, working: Working) -> io::Result<Handle> {
    let (commands, received) = mpsc::channel(64);
    let runtime = Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new()
        .name(format!("data-{index}"))
        .spawn(move || runtime.block_on(serve(worker, received, working)))?;
    Ok(Handle(commands))
}

async fn serve(worker: Arc<Worker>, mut commands: mpsc::Receiver<Command>, mut working: Working) {
    let mut listening: HashMap<String, Vec<AbortHandle>> = HashMap::new();
    let share = working.clone();
    loop {
        let command = tokio::select! {
            command = commands.recv() => command,
            () = working.stopping() => None,
        };
        match command {
            Some(Command::Serve { pod, listeners }) => {
                let name = pod.socket.name().to_owned();
                stop(listening.insert(name, listen(&worker, pod, listeners, &share)));
            }
            Some(Command::Release { name }) => stop(listening.remove(&name)),
            None => break,
        }
    }
    listening.into_values().for_each(|tasks| stop(Some(tasks)));
    worker.connector.close_idle();
    // Every connection holds a share of its own; the thread lives for them until the process ends.
    drop((working, share));
    std::future::pending().await
}

fn stop(tasks: Option<Vec<AbortHandle>>) {
    tasks.into_iter().flatten().for_each(|task| task.abort());
}

fn listen(worker: &Arc<Worker>, pod: Arc<Pod>, listeners: Listeners, working: &Working) -> Vec<AbortHandle> {
    let Listeners { outbound, inbound, plaintext } = listeners;
    // Accepted sockets inherit these, which spares system calls on every connection.
    let outbound = socket2::Socket::from(outbound);
    let prepared =
        worker.prepare_leg(&outbound).and_then(|()| SockRef::from(&plaintext).set_tcp_nodelay(true));
    if let Err(error) = prepared {
        tracing::warn!(pod = pod.socket.name(), %error, "listeners could not be tuned");
    }
    let outbound = outbound.into();
    [
        accept(worker, &pod, outbound, working, connection::outbound),
        accept(worker, &pod, inbound, working, connection::inbound),
        accept(worker, &pod, plaintext, working, connection::plaintext),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Accepts until aborted. Each connection is a task with a share in the drain.
fn accept<F>(
    worker: &Arc<Worker>,
    pod: &Arc<Pod>,
    listener: std::net::TcpListener,
    working: &Working,
    connection: impl Fn(Arc<Worker>, Arc<Pod>, Working, TcpStream) -> F + Send + 'static,
) -> Option<AbortHandle>
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = match TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(pod = pod.socket.name(), %error, "cannot listen in this pod: its connections are refused");
            return None;
        }
    };
    let (worker, pod, working) = (worker.clone(), pod.clone(), working.clone());
    let accepting = async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    tokio::spawn(connection(worker.clone(), pod.clone(), working.clone(), stream));
                }
                // The peer gave up while queued, or the process is out of descriptors: neither ends the listener.
                Err(error) => {
                    tracing::warn!(pod = pod.socket.name(), %error, "accept failed");
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
        }
    };
    Some(tokio::spawn(accepting).abort_handle())
}
