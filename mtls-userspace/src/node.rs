//! The node agent's wiring: builds the rooms, starts the two kinds of runtime, stops them in order.
//!
//! Control (mesh source, identities, admin, enrolment) runs on a runtime of its own, so that a heavy scrape or a
//! slow authority never stalls traffic; data threads are in [`crate::worker`].

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use arc_swap::ArcSwap;
use rustls::CipherSuite;
use tokio::signal::unix::{SignalKind, signal};

use crate::capture::{self, Capture};
use crate::config::{Config, IdentitySource, KernelTls, MeshSource, SameNode};
use crate::direct::Direct;
use crate::drain::Drain;
use crate::enrolment::Enrolment;
use crate::explain;
use crate::features::{Choice, Chosen};
use crate::identity::{self, Identities};
use crate::inspect::Inspection;
use crate::kubernetes::Cluster;
use crate::mesh::{self, Mesh};
use crate::observe::{self, Admin, IdentityRow, MeshRow, Observer, Plaintext, PodRow, Readiness};
use crate::plaintext;
use crate::policy::{Peer, Request};
use crate::tunnel;
use crate::worker::{self, LocalPods, Worker};

/// Runs until SIGTERM or SIGINT, then drains. Kernel state stays: STRICT holds while nobody runs.
pub async fn run(config: Config) -> anyhow::Result<()> {
    let config = Arc::new(config);
    let settings = mesh::Settings {
        trust_domain: config.trust_domain.clone(),
        root_namespace: config.root_namespace.clone(),
    };
    let source = match &config.mesh {
        MeshSource::Directory(directory) => {
            mesh::Source::directory(directory.clone(), settings).context("manifests")?
        }
        MeshSource::Kubernetes { kubeconfig, annotations } => {
            let cluster = Cluster::open(kubeconfig.as_deref()).await?;
            let scope = mesh::Scope::Traffic { annotations: *annotations };
            mesh::Source::kubernetes(cluster, settings, scope).await
        }
    };
    // Before the kernel half: an agent that cannot stay must not replace the programs of the one that runs.
    let admin = Admin::bind(Some(config.admin), Some(&config.admin_socket)).await.context("admin API")?;
    let chosen = Chosen::at_start(&config.features)?;
    tracing::info!("this kernel: {chosen}");
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
    let identities = identities(&config)?;
    let observer = Observer::new(observe::Settings {
        access_log: config.access_log,
        ..observe::Settings::new(config.node.clone())
    });
    let readiness = Readiness::default();

    let drain = Drain::new();
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
    let kernel = kernel_carried(config.kernel_tls, &chosen)?;
    let usual = tunnel::Config::default();
    let tunnel = Arc::new(tunnel::Config {
        retransmit: usual.retransmit.filter(|_| chosen.uses(Choice::TcpRtoMax)),
        raw_after: (!kernel.is_empty()).then_some(config.kernel_tls_after),
        kernel,
        ..usual
    });
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
            };
            let working = drain.working().context("draining already")?;
            worker::start(index, Arc::new(worker), working).context("data thread")
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    let enrolment = Enrolment::new(
        config.node.clone(),
        capture.clone(),
        workers,
        local.clone(),
        config.mesh_prefixes.clone(),
    );

    let (stop, stopping) = tokio::sync::watch::channel(false);
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
    let admin = tokio::spawn(admin.serve(observer.clone(), readiness.clone(), stopped()));
    if let Some(events) = capture.events() {
        tokio::spawn(watch_kernel(events, source.clone(), observer.clone(), inbox, watch.clone()));
    }
    tokio::spawn(watch.run(stopped()));
    if let Some(endings) = capture.endings() {
        tokio::spawn(direct.clone().follow(endings));
    }
    let mut draining = drain.working().context("draining already")?;
    tokio::spawn(direct.clone().run(async move { draining.stopping().await }));
    let control = Control {
        config: config.clone(),
        source,
        identities,
        enrolment,
        observer: observer.clone(),
        direct: direct.clone(),
        pods,
    };
    tokio::spawn(control.run(readiness));

    tracing::info!(node = %config.node, workers = config.workers, "agent runs");
    wait_for_signal().await?;
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
    let _ = tokio::time::timeout(Duration::from_secs(2), admin).await;
    observer.flush_access_log(Duration::from_secs(1));
    Ok(())
}

/// The suites whose records go to the kernel on long streams; says so once, with the reason.
fn kernel_carried(wish: KernelTls, chosen: &Chosen) -> anyhow::Result<Vec<CipherSuite>> {
    let suites = [
        (Choice::KtlsAes128Gcm, CipherSuite::TLS13_AES_128_GCM_SHA256),
        (Choice::KtlsAes256Gcm, CipherSuite::TLS13_AES_256_GCM_SHA384),
        (Choice::KtlsChacha20Poly1305, CipherSuite::TLS13_CHACHA20_POLY1305_SHA256),
    ];
    let works = suites.into_iter().filter(|(choice, _)| chosen.uses(*choice)).map(|(_, suite)| suite);
    let works: Vec<CipherSuite> = works.collect();
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

fn identities(config: &Config) -> anyhow::Result<Arc<Identities>> {
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

/// Follows the mesh and the certificates; the only place where enrolment changes.
struct Control {
    config: Arc<Config>,
    source: mesh::Source,
    identities: Arc<Identities>,
    enrolment: Enrolment,
    observer: Observer,
    direct: Arc<Direct>,
    /// What the admin API shows of this node's pods.
    pods: Arc<ArcSwap<Vec<PodRow>>>,
}

impl Control {
    async fn run(mut self, readiness: Readiness) {
        let pods_ready = readiness.condition("pods");
        let identities_ready = readiness.condition("identities");
        let mut mesh_changes = self.source.subscribe();
        let mut identity_changes = self.identities.subscribe();
        loop {
            mesh_changes.mark_unchanged();
            identity_changes.mark_unchanged();
            let mesh = self.source.current();
            let wanted: HashSet<_> = mesh.identities_on(&self.config.node).cloned().collect();
            self.identities.want(wanted.clone());
            self.enrolment.reconcile(&mesh).await;
            self.revoke(&mesh);
            self.pods.store(Arc::new(self.enrolment.rows(&mesh)));

            match self.enrolment.failed().iter().next() {
                None => pods_ready.set_ready(),
                Some((name, reason)) => pods_ready.not_ready(format!("{name}: {reason}")),
            }
            match wanted.iter().find(|id| self.identities.current(id).is_none()) {
                None => identities_ready.set_ready(),
                Some(id) => identities_ready.not_ready(format!("no certificate for {id} yet")),
            }
            // Pods that could not be enrolled are tried again soon; a namespace replaced under its path is noticed.
            let again = if self.enrolment.failed().is_empty() {
                Duration::from_secs(5)
            } else {
                Duration::from_secs(1)
            };
            tokio::select! {
                changed = mesh_changes.changed() => if changed.is_err() { return },
                changed = identity_changes.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(again) => {}
            }
        }
    }
}

impl Control {
    /// Ends open connections that the mesh in force refuses: those that this agent carries end themselves.
    fn revoke(&self, mesh: &Mesh) {
        tokio::task::block_in_place(|| self.direct.refresh());
        self.observer.revoke(&|flow| self.direct.unwanted(flow).or_else(|| refused_now(mesh, flow)));
        tokio::task::block_in_place(|| self.direct.enforce(mesh));
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

/// Whether an open connection would be refused under this snapshot, and by what.
fn refused_now(mesh: &Mesh, flow: &observe::Flow) -> Option<Arc<str>> {
    let destination = flow.destination.workload.as_ref()?;
    // The workload as it is now: its labels may have changed.
    let Some(now) = mesh.workload(flow.address.ip()).filter(|now| now.key() == destination.key()) else {
        return Some("the destination pod is gone".into());
    };
    let judged_here = flow.direction == observe::Direction::Inbound || flow.path.is_within_node();
    if !judged_here {
        return None;
    }
    let peer = match &flow.source.identity {
        Some(identity) => Peer::Verified(identity),
        None => Peer::Plaintext,
    };
    let request =
        Request { destination: now, address: flow.address, source_ip: flow.original_src.ip(), peer };
    mesh.policies.authorize(&request).err().map(|denied| denied.to_string().into())
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
