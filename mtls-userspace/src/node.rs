//! The node agent's wiring: builds the rooms, starts the two kinds of runtime, stops them in order.
//!
//! Control (mesh source, identities, admin, enrolment) runs on a runtime of its own, so that a heavy scrape or a
//! slow authority never stalls traffic; data threads are in [`crate::worker`].

use std::pin::pin;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use anyhow::Context;
use arc_swap::ArcSwap;
use rustls::CipherSuite;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::capture::{self, Capture};
use crate::cni::Admissions;
use crate::config::{BulkThreads, Config, IdentitySource, KernelTls, MeshSource, SameNode, ShareTunnels};
use crate::control::Control;
use crate::direct::Direct;
use crate::door::Door;
use crate::drain::{Drain, Working};
use crate::enrolment::Enrolment;
use crate::explain;
use crate::features::{self, Choice, Chosen};
use crate::identity::{self, Identities};
use crate::inspect::Inspection;
use crate::kubernetes::Cluster;
use crate::locate::Locator;
use crate::mesh;
use crate::observe::{self, Admin, IdentityRow, MeshRow, Observer, Plaintext, PodRow, Readiness};
use crate::plaintext;
use crate::succession::{Phase, Predecessor, Reign};
use crate::tenure::{Front, Sockets, Tenure};
use crate::tunnel;
use crate::worker::{self, BulkThread, LocalPods, Worker};

/// Runs until SIGTERM or SIGINT, then drains. Kernel state stays: STRICT holds while nobody runs.
pub async fn run(config: Config) -> anyhow::Result<()> {
    let config = Arc::new(config);
    let predecessor = Predecessor::greet(&config.agent_socket).await.context("agent socket")?;
    // Before the kernel half: an agent that cannot stay must not replace the programs of the one that runs. And before the
    // mesh: while the API server is awaited, a probe must not find the one that runs and take this one for ready.
    let port = Admin::bind(Some(config.admin), None).await.context("admin API")?;
    let observer = Observer::new(observe::Settings {
        access_log: config.access_log,
        ..observe::Settings::new(config.node.clone())
    });
    let readiness = Readiness::default();
    let reign = Arc::new(Reign::default());
    let (stop, stopping) = tokio::sync::watch::channel(false);
    let front = Front {
        config: config.clone(),
        reign: reign.clone(),
        observer: observer.clone(),
        readiness: readiness.clone(),
        stopping: stopping.clone(),
    };
    // Registered before any can be met.
    let knows_mesh = readiness.condition("mesh");
    for name in predecessor.iter().map(|_| "succession").chain(["pods", "identities"]) {
        readiness.condition(name);
    }
    knows_mesh.not_ready("what the mesh consists of is not known yet; the log says what is waited for");
    let port = tokio::spawn(front.clone().keep_port(port));
    let source = follow_mesh(&config).await?;
    knows_mesh.set_ready();
    let sockets = match predecessor {
        Some(_) => None,
        None => Some(Sockets::bind(&config).await.context("admin API")?),
    };
    let chosen = Chosen::at_start(&config.features)?;
    tracing::info!("this kernel: {chosen}");
    // What can't be is said before the kernel half is touched: an agent that ends here changes nothing for the one that runs.
    if config.same_node == SameNode::Direct
        && let Some(why) = features::against_same_node_direct()
    {
        anyhow::bail!("--same-node direct can't work on this kernel: {why}; use relay or encrypt");
    }
    let kernel = kernel_carried(config.kernel_tls, &chosen)?;
    let usual = tunnel::Config::default();
    let tunnel = Arc::new(tunnel::Config {
        retransmit: usual.retransmit.filter(|_| chosen.uses(Choice::TcpRtoMax)),
        raw_after: (!kernel.is_empty()).then_some(config.kernel_tls_after),
        kernel,
        kernel_rekey: chosen.uses(Choice::KtlsRekey),
        congestion: config.tunnel_congestion.clone(),
        share: config.share_tunnels == ShareTunnels::Auto,
        ..usual
    });
    tunnel.check()?;
    let capture = Arc::new(
        Capture::start(capture::Config {
            cgroup_root: config.cgroup_root.clone(),
            bpffs: config.bpffs.clone(),
            workers: config.workers,
            congestion: config.loopback_congestion.clone(),
            destroy: chosen.uses(Choice::SocketDestroy),
        })
        .context("kernel half")?,
    );
    let identities = identities(&config).await?;

    let mut drain = Drain::new();
    let local = Arc::new(LocalPods::default());
    let inbox = Arc::new(plaintext::Inbox::default());
    let watch = plaintext::Watch::new(
        config.node.clone(),
        source.clone(),
        local.clone(),
        capture.clone(),
        inbox.clone(),
    );
    let watch = Arc::new(watch.context("kernel half")?);
    let direct = Direct::new(
        config.node.clone(),
        config.same_node == SameNode::Direct,
        capture.clone(),
        local.clone(),
        source.clone(),
        observer.clone(),
    )
    .context("kernel half")?;
    tokio::spawn(follow_trust(identities.clone(), tunnel.clone()));
    let workers = (0..config.workers)
        .map(|index| {
            let worker = Worker {
                node: config.node.clone(),
                mesh: source.clone(),
                identities: identities.clone(),
                local: local.clone(),
                connector: tunnel::Connector::new(tunnel.clone()),
                acceptor: tunnel::Acceptor::new(tunnel.clone()),
                observer: observer.clone(),
                plaintext: inbox.clone(),
                same_node: config.same_node,
                direct: direct.clone(),
                congestion: config.loopback_congestion.clone(),
                bulk: BulkThread::new(index, config.bulk_threads == BulkThreads::Auto),
            };
            let working = drain.working().context("draining already")?;
            worker::start(index, Arc::new(worker), working).context("data thread")
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    let admissions = Arc::new(Admissions::default());
    let enrolment = Enrolment::new(
        config.node.clone(),
        capture.clone(),
        workers,
        local.clone(),
        config.mesh_prefixes.clone(),
        Locator::new(&config.proc, capture.cgroup_root()),
        admissions.clone(),
    );

    let stopped = || {
        let mut stopping = stopping.clone();
        async move {
            let _ = stopping.wait_for(|stop| *stop).await;
        }
    };
    tokio::spawn(identities.clone().run(stopped()));
    let pods = Arc::new(ArcSwap::default());
    provide(&observer, &capture, &identities, &source, pods.clone());
    observer.set_capabilities(chosen.rows());
    let (asked, counted) = (watch.clone(), watch.clone());
    observer.set_plaintext(Arc::new(move || asked.facts()), Arc::new(move || counted.counts()));
    let shown = direct.clone();
    observer.set_refresh(Arc::new(move || shown.refresh()));
    observer.set_inspector(Arc::new(Inspection {
        node: config.node.clone(),
        mesh: source.clone(),
        identities: identities.clone(),
        capture: capture.clone(),
        local,
        pods: pods.clone(),
        setting: explain::Setting { prefixes: config.mesh_prefixes.clone(), same_node: config.same_node },
    }));
    let row = predecessor.as_ref().map(Predecessor::row).unwrap_or_default();
    let asked = reign.clone();
    observer.set_succession(
        Arc::new(move || row.lock().unwrap_or_else(PoisonError::into_inner).clone()),
        Arc::new(move || asked.phase() >= Phase::Frozen),
    );
    let tenure = Tenure {
        front,
        door: Door {
            admissions: admissions.clone(),
            mesh: source.clone(),
            identities: identities.clone(),
            observer: observer.clone(),
            reign: reign.clone(),
        },
    };
    if let Some(events) = capture.events() {
        tokio::spawn(watch_kernel(events, source.clone(), observer.clone(), inbox, watch.clone()));
    }
    tokio::spawn(watch.run(stopped()));
    if let Some(endings) = capture.endings() {
        tokio::spawn(direct.clone().follow(endings));
    }
    let control = Control {
        config: config.clone(),
        source,
        identities,
        enrolment,
        admissions,
        observer: observer.clone(),
        direct: direct.clone(),
        pods,
        reign: reign.clone(),
        settled: None,
    };
    let draining = drain.working().context("draining already")?;
    let begun = tokio::spawn(begin(tenure, control, predecessor, sockets, readiness, draining));

    tracing::info!(node = %config.node, workers = config.workers, "agent runs");
    let retired = async {
        reign.reaches(|phase| *phase >= Phase::Retired).await;
        // What was on its way to our listeners when the other agent's took over.
        tokio::time::sleep(LAST_ARRIVALS).await;
    };
    let mut signal = pin!(wait_for_signal());
    tokio::select! {
        signal = &mut signal => {
            signal?;
            // An agent that is just taking over will have every pod in a moment.
            let decided = reign.reaches(|phase| !matches!(phase, Phase::Challenged | Phase::Frozen));
            if reign.phase() != Phase::Alone && timeout(TAKING_OVER, decided).await.is_ok() {
                tokio::time::sleep(LAST_ARRIVALS).await;
            }
        }
        () = retired => {
            drain.begin();
            direct.hand_over();
            tokio::select! {
                signal = &mut signal => signal?,
                () = reign.reaches(|phase| *phase == Phase::Orphaned) => {
                    anyhow::bail!("the agent that took this one's place has gone: ending, to be started anew");
                }
            }
        }
    }
    tracing::info!(seconds = config.drain.as_secs(), open = observer.open_connections(), "draining");
    if !drain.run(config.drain).await {
        tracing::warn!(
            open = observer.open_connections(),
            "drain time is over: resetting what is still open"
        );
        observer.revoke(&|flow| (flow.path != observe::Path::Direct).then(|| "agent stopped".into()));
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    direct.hand_over();
    capture.shutdown_unregister();
    stop.send_replace(true);
    let last = async { tokio::join!(port, begun) };
    let _ = tokio::time::timeout(Duration::from_secs(2), last).await;
    observer.flush_access_log(Duration::from_secs(1));
    Ok(())
}

/// The mesh, once it is known.
async fn follow_mesh(config: &Config) -> anyhow::Result<mesh::Source> {
    let settings = mesh::Settings {
        trust_domain: config.trust_domain.clone(),
        root_namespace: config.root_namespace.clone(),
    };
    match &config.mesh {
        MeshSource::Directory(directory) => {
            mesh::Source::directory(directory.clone(), settings).context("manifests")
        }
        MeshSource::Kubernetes { kubeconfig, annotations } => {
            let cluster = Cluster::open(kubeconfig.as_deref()).await?;
            let scope = mesh::Scope::Traffic { annotations: *annotations };
            Ok(mesh::Source::kubernetes(cluster, settings, scope).await)
        }
    }
}

/// How long an agent that is told to end waits for one that is taking its place.
const TAKING_OVER: Duration = Duration::from_secs(10);
/// How long a retired agent accepts what its listeners still hold.
const LAST_ARRIVALS: Duration = Duration::from_secs(2);

/// Takes the node over, at once or from the agent that has it, and goes on until the end.
async fn begin(
    tenure: Tenure,
    mut control: Control,
    predecessor: Option<Predecessor>,
    sockets: Option<Sockets>,
    readiness: Readiness,
    mut draining: Working,
) {
    if let Some(mut predecessor) = predecessor {
        let succession = readiness.condition("succession");
        tokio::select! {
            () = control.await_certificates(&mut predecessor, &succession) => {}
            () = draining.stopping() => return,
        }
        match predecessor.take_over().await {
            Ok(()) => {
                let (settled, all) = oneshot::channel();
                control.settled = Some(settled);
                tokio::spawn(async move {
                    // An agent that ends before it has every pod leaves them to its predecessor.
                    if all.await.is_ok() {
                        succession.set_ready();
                        predecessor.drain().await;
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "nothing is left to take over");
                succession.set_ready();
            }
        }
        control.enrolment.renew();
    }
    let sockets = match sockets {
        Some(sockets) => sockets,
        None => match Sockets::bind(&tenure.front.config).await {
            Ok(sockets) => sockets,
            Err(error) => return tracing::error!(%error, "this agent has no sockets, and enrols nothing"),
        },
    };
    let sockets = tokio::spawn(tenure.keep_sockets(sockets));
    tokio::spawn(control.direct.clone().run(async move { draining.stopping().await }));
    tokio::spawn(control.run(readiness));
    let _ = sockets.await;
}

/// The suites whose records go to the kernel on long streams; says so once, with the reason.
fn kernel_carried(wish: KernelTls, chosen: &Chosen) -> anyhow::Result<Vec<CipherSuite>> {
    let suites = [
        (Choice::KtlsAes128Gcm, CipherSuite::TLS13_AES_128_GCM_SHA256),
        (Choice::KtlsAes256Gcm, CipherSuite::TLS13_AES_256_GCM_SHA384),
        (Choice::KtlsChacha20Poly1305, CipherSuite::TLS13_CHACHA20_POLY1305_SHA256),
    ];
    let works = suites.into_iter().filter(|(choice, _)| chosen.uses(*choice)).map(|(_, suite)| suite);
    // What the kernel seals is moved by splice(2) alone.
    let works: Vec<CipherSuite> = works.filter(|_| chosen.uses(Choice::Splice)).collect();
    let (carried, why) = match wish {
        KernelTls::Off => (Vec::new(), "switched off".to_owned()),
        KernelTls::On if works.is_empty() => {
            anyhow::bail!("--kernel-tls on, but this kernel carries no TLS records: it {chosen}")
        }
        KernelTls::On => (works, "switched on".to_owned()),
        KernelTls::Auto if works.is_empty() => (works, "the kernel carries none".to_owned()),
        KernelTls::Auto => match tunnel::RecordCost::measure() {
            Ok(cost) if cost.kernel <= cost.userspace => (works, cost.to_string()),
            Ok(cost) => (Vec::new(), cost.to_string()),
            Err(error) => (Vec::new(), error.to_string()),
        },
    };
    let carrier = if carried.is_empty() { "userspace" } else { "kernel" };
    tracing::info!(carrier, %why, "records of long streams");
    Ok(carried)
}

async fn identities(config: &Config) -> anyhow::Result<Arc<Identities>> {
    let settings = identity::Config {
        lifetime: config.certificate_lifetime,
        revocation_file: config.crl.clone(),
        ..identity::Config::default()
    };
    Ok(match &config.identities {
        IdentitySource::Authority { address, root, credential } => {
            let authority = identity::RemoteAuthority::new(address, root.clone(), credential.clone())
                .context("certificate authority")?;
            Identities::new(Arc::new(authority), settings)
        }
        IdentitySource::Signer { name, root, kubeconfig } => {
            let cluster = Cluster::open(kubeconfig.as_deref()).await?;
            let signer = identity::Signer::new(&cluster, name.clone(), root.clone());
            let attempt_timeout = identity::Signer::PATIENCE;
            Identities::new(Arc::new(signer), identity::Config { attempt_timeout, ..settings })
        }
        IdentitySource::WorkloadApi { socket } => {
            let api = identity::WorkloadApi::new(socket).context("SPIFFE Workload API")?;
            Identities::from_workload_api(api, settings)
        }
    })
}

/// Judges the peers of open tunnels again whenever roots or revocation lists change.
async fn follow_trust(identities: Arc<Identities>, tunnel: Arc<tunnel::Config>) {
    let mut changes = identities.subscribe();
    loop {
        changes.mark_unchanged();
        let current = || identities.status().into_iter().filter_map(|status| identities.current(&status.id));
        tokio::task::block_in_place(|| {
            for identity in current() {
                if let Err(error) = tunnel.trust(&identity) {
                    tracing::error!(id = %identity.svid.id, %error, "peers cannot be judged by this certificate");
                }
            }
        });
        if changes.changed().await.is_err() {
            return;
        }
    }
}

/// Tells the observer where to ask at scrape time.
fn provide(
    observer: &Observer,
    capture: &Arc<Capture>,
    identities: &Arc<Identities>,
    source: &mesh::Source,
    pods: Arc<ArcSwap<Vec<PodRow>>>,
) {
    let kernel = capture.clone();
    observer.set_kernel_counters(Arc::new(move || {
        kernel.counters().unwrap_or_else(|error| {
            tracing::warn!(%error, "cannot read the kernel's counters");
            Vec::new()
        })
    }));
    let held = identities.clone();
    observer.set_identities(Arc::new(move || {
        let row = |status: &_| IdentityRow::new(status, held.current(&status.id).as_deref());
        held.status().iter().map(row).collect()
    }));
    observer.set_pods(Arc::new(move || pods.load().to_vec()));
    let source = source.clone();
    observer.set_mesh(Arc::new(move || {
        let mesh = source.current();
        MeshRow {
            generation: mesh.generation,
            workloads: mesh.workloads.len() as u64,
            last_error: source.last_error(),
            errors: source.errors(),
        }
    }));
}

async fn wait_for_signal() -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT")?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

/// Counts and reports plaintext that the kernel half decided alone.
async fn watch_kernel(
    mut events: capture::Events,
    source: mesh::Source,
    observer: Observer,
    inbox: Arc<plaintext::Inbox>,
    watch: Arc<plaintext::Watch>,
) {
    loop {
        let event = match events.next().await {
            Ok(event) => event,
            Err(error) => {
                watch.blind(error.to_string());
                return tracing::error!(%error, "the kernel's events can no longer be read: plaintext goes uncounted");
            }
        };
        inbox.put(plaintext::Seen {
            destination: event.local,
            source: event.remote.ip(),
            at: event.at,
            refused: event.kind == capture::EventKind::PlaintextRefused,
        });
        let mesh = source.current();
        let Some(destination) = mesh.workload(event.local.ip()) else { continue };
        let outcome = match event.kind {
            capture::EventKind::PlaintextAccepted => Plaintext::Accepted,
            capture::EventKind::PlaintextRefused => Plaintext::Refused,
        };
        let source = mesh.workload(event.remote.ip()).map(|source| &**source);
        observer.plaintext(source, destination, event.local.port(), outcome);
    }
}
