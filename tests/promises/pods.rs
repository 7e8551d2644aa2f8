//! Real pods: containerd, runc and CNI plugins driven as kubelet does it, on two nodes. Nothing in a manifest says where
//! a pod lives, and no pod runs before it is protected.

use std::time::Duration;

use anyhow::{Context, Result};
use mtls_tests::{Cni, Kubelet, Lab, Level, MARKER, Mesh, Mode, Options, RealPod, RealPodSpec, eventually};
use serde_json::{Value, json};

use crate::{assert_echoed, assert_refused, needs};

const PORT: u16 = 7000;

/// Two nodes with a container runtime each, and agents that have put their plugin into its configuration.
struct Cluster {
    // Fields are dropped in this order.
    kubelets: Vec<Kubelet>,
    mesh: Mesh,
    cnis: Vec<Cni>,
    lab: Lab,
}

impl Cluster {
    fn with(options: Options) -> Result<Self> {
        let lab = Lab::two_nodes()?;
        let cnis = lab.nodes().iter().map(|node| Cni::install(&lab, node)).collect::<Result<Vec<_>>>()?;
        let flags = ["--cni-wait", "4", "--cni-exclude-namespace", "system"].map(str::to_owned);
        let mesh = Mesh::start_with(&lab, &Options { cni: true, node_flags: flags.into(), ..options })?;
        for cni in &cnis {
            eventually(Duration::from_secs(10), || (cni.plugins() == ["bridge", "mtls-cni"]).then_some(()))
                .with_context(|| format!("the plugin is not installed: {:?}", cni.plugins()))?;
        }
        let pairs = lab.nodes().iter().zip(&cnis);
        let kubelets = pairs.map(|(node, cni)| Kubelet::start(&lab, node, cni)).collect::<Result<_>>()?;
        Ok(Self { kubelets, mesh, cnis, lab })
    }

    fn run(&self, node: usize, spec: RealPodSpec) -> Result<RealPod> {
        self.kubelets[node].run(&self.lab, spec)
    }

    fn serve(&self, node: usize, name: &str) -> Result<RealPod> {
        let listen = format!("[::]:{PORT}");
        let pod = self.run(node, RealPodSpec::new(name, &["serve", "echo", "--listen", &listen]))?;
        pod.printed_with("listening")?;
        Ok(pod)
    }

    /// A sample of the agent of a node about a pod.
    fn metric(&mut self, node: &str, name: &str, pod: &str) -> Result<f64> {
        let metrics = self.mesh.agent(node).metrics()?;
        anyhow::ensure!(metrics.has(name), "no {name}");
        Ok(metrics.sum(name, &[("pod", pod)]))
    }

    #[track_caller]
    fn assert_verified(&mut self, node: &str, pod: &str) {
        let verified = eventually(Duration::from_secs(5), || {
            (self.metric(node, "mtls_pod_verified", pod).ok()? == 1.0).then_some(())
        });
        assert!(
            verified.is_some(),
            "{pod} is not verified: {:?}",
            self.mesh.agent(node).status(&["-o", "json"])
        );
    }
}

/// Waits until the API's news have come to the agent.
fn await_answer(pod: &RealPod, to: &str, ended: &str) -> Result<Value> {
    let answer = eventually(Duration::from_secs(10), || {
        let answer = pod.app(&["dial", "echo", to]).ok()?;
        (answer["ended"] == ended).then_some(answer)
    });
    answer.with_context(|| format!("{} does not end with {ended}: {:?}", to, pod.app(&["dial", "echo", to])))
}

#[test]
fn a_pod_is_protected_before_its_first_process_runs() -> Result<()> {
    needs!(Kubelet::NEEDS);
    let mut cluster = Cluster::with(Options::default())?;
    cluster.lab.peer_authentication(Level::Mesh, Mode::Strict)?;
    let wire = cluster.lab.watch_wire()?;
    let server = cluster.serve(1, "server")?;
    cluster.assert_verified("node-b", "server");
    let to = server.addr(PORT)?.to_string();

    // Its first act is to dial: the earliest that anything of it could leave in plaintext.
    let dial = RealPodSpec::new("client", &["dial", "echo", &to, "--message", MARKER]);
    let client = cluster.kubelets[0].bind(&cluster.lab, dial)?;
    let client = cluster.kubelets[0].sandbox(client)?;
    assert_eq!(cluster.metric("node-a", "mtls_pod_verified", "client")?, 1.0);
    let client = cluster.kubelets[0].launch(&cluster.lab, client)?;
    assert_echoed(&client.printed_with("ended")?);
    let client_that_lasts = cluster.run(0, RealPodSpec::new("lasting", &["pause"]))?;
    let seen = wire.finish()?;
    assert_eq!(seen.markers(), 0, "{seen:?}");
    let tunnels = seen.flows.iter().filter(|flow| flow.server.port() == 15008).count();
    assert!(tunnels > 0, "{seen:?}");
    for (node, pod) in [("node-a", "client"), ("node-b", "server")] {
        assert_eq!(cluster.metric(node, "mtls_pod_unfenced_seconds", pod)?, 0.0, "{pod}");
    }

    // Both agents are replaced, while a pod dials on and on and another is half way through its start.
    let mut again = client_that_lasts.start_app(&["dial", "again", &to, "--limit-ms", "5000"])?;
    let starting = cluster.kubelets[0].bind(&cluster.lab, RealPodSpec::new("starting", &["pause"]))?;
    let starting = cluster.kubelets[0].sandbox(starting)?;
    let mut retired = Vec::new();
    for node in ["node-a", "node-b"] {
        retired.push(cluster.mesh.agent(node).replace()?);
    }
    cluster.assert_verified("node-a", "starting");
    let starting = cluster.kubelets[0].launch(&cluster.lab, starting)?;
    assert_echoed(&starting.app(&["dial", "echo", &to])?);
    let newcomer = cluster.run(0, RealPodSpec::new("newcomer", &["dial", "echo", &to]))?;
    assert_echoed(&newcomer.printed_with("ended")?);
    for pod in ["starting", "newcomer"] {
        assert_eq!(cluster.metric("node-a", "mtls_pod_unfenced_seconds", pod)?, 0.0, "{pod}");
    }
    again.say("stop")?;
    let answer = again.finish()?.success()?.json()?;
    assert!(answer["conversations"].as_u64() > Some(10) && answer["failures"] == json!({}), "{answer}");
    drop(retired);

    // A pod that takes no part starts without delay, and is refused in plaintext.
    let pause = RealPodSpec::new("stranger", &["pause"]);
    for node in [0, 1] {
        let stranger = cluster.run(node, pause.clone().namespace("outside"))?;
        assert_refused(&stranger.app(&["dial", "echo", &to])?);
        cluster.kubelets[node].remove(&stranger)?;
        cluster.lab.remove_file(&stranger.file())?;
    }
    // One on its node's own network has kubelet's namespace, but not its trust.
    let guest = cluster.run(1, RealPodSpec::new("guest", &["pause"]).namespace("outside").host_network())?;
    let refused = eventually(Duration::from_secs(10), || {
        let answer = guest.app(&["dial", "echo", &to]).ok()?;
        answer["echoed"].is_null().then_some(answer)
    });
    assert_refused(&refused.context("a host-network pod gets in")?);
    Ok(())
}

#[test]
fn kubelets_probes_of_all_kinds_reach_a_strict_pod() -> Result<()> {
    needs!(Kubelet::NEEDS);
    let cluster = Cluster::with(Options::default())?;
    cluster.lab.peer_authentication(Level::Mesh, Mode::Strict)?;
    let args = ["probe-serve", "--http", "[::]:8080", "--grpc", "[::]:9090"];
    let pod = cluster.run(1, RealPodSpec::new("probed", &args))?;
    pod.printed_with("listening")?;
    let probes = [("http", 8080), ("tcp", 8080), ("tcp", 9090), ("grpc", 9090)];
    for (kind, port) in probes {
        let answer = pod.probe(kind, port)?;
        assert_eq!(answer["healthy"], true, "{kind} {port}: {answer}");
        // A probe fails that should: nothing listens there, or it speaks something else.
        assert_eq!(pod.probe(kind, 9999)?["healthy"], false, "{kind}");
    }
    assert_eq!(pod.probe("grpc", 8080)?["healthy"], false);
    // From anywhere else the same connection is refused.
    let stranger = cluster.run(1, RealPodSpec::new("stranger", &["pause"]).namespace("outside"))?;
    for (kind, port) in probes {
        let answer = stranger.app(&["probe", kind, &pod.addr(port)?.to_string()])?;
        assert_eq!(answer["healthy"], false, "{kind} {port}: {answer}");
    }
    Ok(())
}

#[test]
fn no_pod_starts_while_the_agent_is_away_and_its_rewritten_configuration_is_mended() -> Result<()> {
    needs!(Kubelet::NEEDS);
    let mut cluster = Cluster::with(Options::default())?;
    cluster.mesh.agent("node-a").kill();
    assert_eq!(cluster.cnis[0].plugins(), ["bridge", "mtls-cni"], "a dead agent's plugin stays");
    let bound = cluster.kubelets[0].bind(&cluster.lab, RealPodSpec::new("early", &["pause"]))?;
    let error = cluster.kubelets[0].sandbox(bound.clone()).expect_err("a pod started unseen").to_string();
    assert!(
        error.contains("shop/early is not started unprotected") && error.contains("no agent answers"),
        "{error}"
    );
    // What the agent needs to start is left out.
    cluster.lab.namespace("system", false)?;
    cluster.run(0, RealPodSpec::new("dns", &["pause"]).namespace("system"))?;

    cluster.mesh.agent("node-a").start()?;
    // kubelet tries again.
    let pod = cluster.kubelets[0].launch(&cluster.lab, cluster.kubelets[0].sandbox(bound)?)?;
    cluster.assert_verified("node-a", "early");
    assert_eq!(cluster.metric("node-a", "mtls_pod_unfenced_seconds", "early")?, 0.0);
    drop(pod);

    // A pod that the API does not know: the sandbox fails, and the reason is told.
    let unknown = cluster.kubelets[0].bind(&cluster.lab, RealPodSpec::new("unknown", &["pause"]))?;
    cluster.lab.remove_file(&unknown.file())?;
    let error = cluster.kubelets[0].sandbox(unknown).expect_err("an unknown pod started").to_string();
    assert!(error.contains("has not heard of the pod"), "{error}");

    // A pod without a certificate.
    cluster.mesh.stop_ca();
    let nobody = cluster.kubelets[0].bind(&cluster.lab, RealPodSpec::new("nobody", &["pause"]))?;
    let error =
        cluster.kubelets[0].sandbox(nobody).expect_err("a pod started without a certificate").to_string();
    assert!(error.contains("no certificate for spiffe://cluster.local/ns/shop/sa/nobody"), "{error}");

    cluster.cnis[0].write_configuration(&cluster.lab, &cluster.lab.nodes()[0])?;
    let mended = eventually(Duration::from_secs(5), || {
        (cluster.cnis[0].plugins() == ["bridge", "mtls-cni"]).then_some(())
    });
    assert!(mended.is_some(), "{:?}", cluster.cnis[0].plugins());
    Ok(())
}

#[test]
fn without_the_plugin_a_pod_is_found_and_a_change_of_label_touches_no_open_connection() -> Result<()> {
    needs!(Kubelet::NEEDS);
    let lab = Lab::two_nodes()?;
    let cnis = lab.nodes().iter().map(|node| Cni::install(&lab, node)).collect::<Result<Vec<_>>>()?;
    let mesh = Mesh::start(&lab)?;
    let pairs = lab.nodes().iter().zip(&cnis);
    let kubelets = pairs.map(|(node, cni)| Kubelet::start(&lab, node, cni)).collect::<Result<_>>()?;
    let mut cluster = Cluster { kubelets, mesh, cnis, lab };

    let server = cluster.serve(1, "server")?;
    cluster.assert_verified("node-b", "server");
    let gap = cluster.metric("node-b", "mtls_pod_unfenced_seconds", "server")?;
    assert!(gap > 0.0 && gap < 20.0, "{gap}");
    assert!(cluster.mesh.agent("node-b").log().contains("ran before it was fenced"));
    cluster.lab.peer_authentication(Level::Mesh, Mode::Strict)?;
    let to = server.addr(PORT)?.to_string();

    // A client that takes no part, until its label says so.
    let mut client = cluster.run(0, RealPodSpec::new("client", &["pause"]).namespace("outside"))?;
    await_answer(&client, &to, "refused")?;
    cluster.lab.peer_authentication(Level::Mesh, Mode::Permissive)?;
    await_answer(&client, &to, "eof")?;
    let mut plain = client.start_app(&["dial", "stream", &to, "--pause-ms", "10"])?;
    plain.json_with("established")?;
    client.spec.labels["istio.io/dataplane-mode"] = "ambient".into();
    client.show(&cluster.lab)?;
    cluster.assert_verified("node-a", "client");
    let mut tunnelled = client.start_app(&["dial", "stream", &to, "--pause-ms", "10"])?;
    tunnelled.json_with("established")?;
    let open = |cluster: &mut Cluster, path: &str| -> Result<f64> {
        let metrics = cluster.mesh.agent("node-a").metrics()?;
        Ok(metrics.sum("mtls_connections_open", &[("direction", "outbound"), ("path", path)]))
    };
    assert_eq!(open(&mut cluster, "tunnel")?, 1.0);

    // Out again: new connections are plain, both old ones go on.
    client.spec.labels["istio.io/dataplane-mode"] = "none".into();
    client.show(&cluster.lab)?;
    let released = eventually(Duration::from_secs(10), || {
        let metrics = cluster.mesh.agent("node-a").metrics().ok()?;
        (metrics.sum("mtls_pod_enrolled", &[("pod", "client")]) == 0.0).then_some(())
    });
    assert!(released.is_some(), "the client is still enrolled");
    assert_echoed(&client.app(&["dial", "echo", &to])?);
    assert_eq!(open(&mut cluster, "tunnel")?, 1.0);
    std::thread::sleep(Duration::from_millis(500));
    for stream in [&mut plain, &mut tunnelled] {
        stream.say("stop")?;
    }
    for stream in [plain, tunnelled] {
        let answer = stream.finish()?.success()?.json()?;
        assert!(answer["ended"] == "eof" && answer["turns"].as_u64() > Some(20), "{answer}");
    }
    Ok(())
}
