//! A node's containerd, and kubelet's part in front of it: pods in, real sandboxes, containers and cgroups out.
//!
//! The manifest appears as the API server would show the pod: bound to its node, then with its address. Nothing in it
//! says where the pod lives.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tonic::transport::{Channel, Endpoint};

use crate::network::plan;
use crate::process::{self, Running};
use crate::{Lab, Node, eventually, image, requirements};

mod wire {
    tonic::include_proto!("runtime.v1");
}

use wire::image_service_client::ImageServiceClient;
use wire::runtime_service_client::RuntimeServiceClient;

/// Where Debian keeps CNI plugins.
const PLUGINS: &str = "/usr/lib/cni";
/// First address for pods of the runtime; the lab's own come before.
const FIRST_ADDRESS: u8 = 100;

/// A node's directories for CNI.
#[derive(Clone, Debug)]
pub struct Cni {
    pub bin_dir: PathBuf,
    pub conf_dir: PathBuf,
}

impl Cni {
    pub(crate) fn of(lab: &Path, node: &Node) -> Self {
        let dir = lab.join(format!("{}-cni", node.name()));
        Self { bin_dir: dir.join("bin"), conf_dir: dir.join("net.d") }
    }

    /// Installs Debian's plugins and a network that uses the node's bridge, as a cluster's network plugin does.
    pub fn install(lab: &Lab, node: &Node) -> Result<Self> {
        let cni = Self::of(lab.dir(), node);
        fs::create_dir_all(&cni.bin_dir)?;
        fs::create_dir_all(&cni.conf_dir)?;
        for entry in
            fs::read_dir(PLUGINS).context("CNI plugins (Debian package containernetworking-plugins)")?
        {
            let entry = entry?;
            std::os::unix::fs::symlink(entry.path(), cni.bin_dir.join(entry.file_name()))?;
        }
        cni.write_configuration(lab, node)?;
        Ok(cni)
    }

    /// Writes the network's configuration, as its plugin's installer does, without a look at what is there.
    pub fn write_configuration(&self, lab: &Lab, node: &Node) -> Result<()> {
        let at = |last| plan::pod(node.index(), last).to_string();
        let network = json!({
            "cniVersion": "0.4.0", "name": "lab", "plugins": [{
                "type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true,
                "ipam": {
                    "type": "host-local", "dataDir": lab.dir().join(format!("{}-ipam", node.name())),
                    "ranges": [[{
                        "subnet": format!("{}/24", at(0)), "rangeStart": at(FIRST_ADDRESS), "rangeEnd": at(200),
                        "gateway": at(1),
                    }]],
                    "routes": [{ "dst": "0.0.0.0/0" }],
                },
            }],
        });
        let new = self.conf_dir.join("10-lab.conflist.new");
        fs::write(&new, network.to_string())?;
        Ok(fs::rename(new, self.conf_dir.join("10-lab.conflist"))?)
    }

    /// Names of the plugins in the network's configuration.
    pub fn plugins(&self) -> Vec<String> {
        let text = fs::read_to_string(self.conf_dir.join("10-lab.conflist")).unwrap_or_default();
        let config: Value = serde_json::from_str(&text).unwrap_or_default();
        let plugins = config["plugins"].as_array().into_iter().flatten();
        plugins.map(|plugin| plugin["type"].as_str().unwrap_or_default().to_owned()).collect()
    }
}

/// containerd on a node, and what kubelet knows. Its pods end with it.
pub struct Kubelet {
    node: Arc<Node>,
    dir: PathBuf,
    /// The lab's cgroup, seen from the root of a hierarchy.
    cgroup: String,
    channel: Channel,
    tokio: tokio::runtime::Runtime,
    sandboxes: std::sync::Mutex<Vec<String>>,
    // Dropped last: the end of its pods needs it.
    containerd: Option<Running>,
}

/// What a pod shall be.
#[derive(Clone, Debug)]
pub struct RealPodSpec {
    pub namespace: String,
    pub name: String,
    pub labels: Value,
    pub host_network: bool,
    /// Arguments of `lab-app` in the pod's only container.
    pub args: Vec<String>,
}

impl RealPodSpec {
    pub fn new(name: &str, args: &[&str]) -> Self {
        Self {
            namespace: "shop".into(),
            name: name.into(),
            labels: json!({ "app": name }),
            host_network: false,
            args: args.iter().map(|arg| (*arg).to_owned()).collect(),
        }
    }

    pub fn namespace(self, namespace: &str) -> Self {
        Self { namespace: namespace.into(), ..self }
    }

    pub fn host_network(self) -> Self {
        Self { host_network: true, ..self }
    }
}

/// A pod that the API knows: bound to a node, and perhaps running.
#[derive(Clone, Debug)]
pub struct RealPod {
    pub spec: RealPodSpec,
    pub uid: String,
    pub ip: Option<IpAddr>,
    node: Arc<Node>,
    sandbox: String,
    container: String,
    logs: PathBuf,
}

impl Kubelet {
    /// What it needs besides a lab's needs.
    pub const NEEDS: [&str; 6] = ["containerd", "ctr", "runc", "ldd", "tar", "sha256sum"];

    /// Starts containerd on a node whose network is configured already.
    pub fn start(lab: &Lab, node: &Arc<Node>, cni: &Cni) -> Result<Self> {
        let dir = lab.dir().join(format!("{}-containerd", node.name()));
        fs::create_dir_all(&dir)?;
        let socket = dir.join("c.sock");
        let config = dir.join("config.toml");
        fs::write(&config, configuration(&dir, &socket, cni))?;
        node.part("runtime")?;
        let containerd = requirements::find("containerd").context("containerd is not installed")?;
        let mut command = node.command_in("runtime", containerd);
        command.arg("--config").arg(&config);
        let log = lab.dir().join(format!("{}-containerd.log", node.name()));
        let containerd = Running::start_logged(command, &log, &log)?.stopped_by(Signal::SIGTERM);
        eventually(Duration::from_secs(20), || std::os::unix::net::UnixStream::connect(&socket).ok())
            .with_context(|| {
                format!("containerd does not answer:\n{}", fs::read_to_string(&log).unwrap_or_default())
            })?;
        let tokio = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display()))?;
        let channel = tokio.block_on(async { endpoint.connect_lazy() });
        let kubelet = Self {
            node: Arc::clone(node),
            dir,
            cgroup: format!("/{}/{}", lab.id(), node.name()),
            channel,
            tokio,
            sandboxes: std::sync::Mutex::default(),
            containerd: Some(containerd),
        };
        kubelet.import(&socket, &image::archive(lab.dir())?)?;
        Ok(kubelet)
    }

    fn import(&self, socket: &Path, archive: &Path) -> Result<()> {
        let mut ctr = Command::new(requirements::find("ctr").context("ctr is not installed")?);
        ctr.arg("-a").arg(socket).args(["-n", "k8s.io", "images", "import"]).arg(archive);
        Running::start(ctr)?.finish()?.success().context("import the image")?;
        // The part of containerd that speaks to kubelet hears of it a little later.
        let known = eventually(Duration::from_secs(10), || {
            let spec = Some(wire::ImageSpec { image: image::NAME.into() });
            let mut images = ImageServiceClient::new(self.channel.clone());
            let status = self.tokio.block_on(images.image_status(wire::ImageStatusRequest { image: spec }));
            status.ok()?.into_inner().image
        });
        known.map(drop).context("containerd does not know the image")
    }

    /// A pod appears in the API, bound to this node.
    pub fn bind(&self, lab: &Lab, spec: RealPodSpec) -> Result<RealPod> {
        static NUMBER: AtomicU32 = AtomicU32::new(1);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let pod = RealPod {
            uid: format!("{:08x}-0000-4000-8000-{number:012x}", std::process::id()),
            ip: None,
            node: Arc::clone(&self.node),
            sandbox: String::new(),
            container: String::new(),
            logs: self.dir.join(format!("logs-{}", spec.name)),
            spec,
        };
        fs::create_dir_all(&pod.logs)?;
        pod.show(lab)?;
        Ok(pod)
    }

    /// Makes a bound pod's cgroup and sandbox: its network is there, and nothing runs in it.
    ///
    /// The error is what the runtime said, which kubelet shows as an event and tries again.
    pub fn sandbox(&self, mut pod: RealPod) -> Result<RealPod> {
        crate::cgroup::create(&pod.cgroup())?;
        let config = Some(self.sandbox_config(&pod));
        let mut runtime = RuntimeServiceClient::new(self.channel.clone());
        let request = wire::RunPodSandboxRequest { config };
        let answer = self.tokio.block_on(runtime.run_pod_sandbox(request));
        let answer = answer.map_err(|status| anyhow::anyhow!("{}", status.message()))?;
        pod.sandbox = answer.into_inner().pod_sandbox_id;
        self.lock().push(pod.sandbox.clone());
        let request = wire::PodSandboxStatusRequest { pod_sandbox_id: pod.sandbox.clone() };
        let status = self.tokio.block_on(runtime.pod_sandbox_status(request))?.into_inner();
        let network = status.status.and_then(|status| status.network).unwrap_or_default();
        pod.ip = if pod.spec.host_network { Some(self.node.ip()) } else { network.ip.parse().ok() };
        Ok(pod)
    }

    /// Starts the pod's container, and tells the API the pod's address.
    pub fn launch(&self, lab: &Lab, mut pod: RealPod) -> Result<RealPod> {
        let network =
            if pod.spec.host_network { wire::NamespaceMode::Node } else { wire::NamespaceMode::Pod };
        let options =
            wire::NamespaceOption { network: network.into(), pid: wire::NamespaceMode::Container.into() };
        let config = wire::ContainerConfig {
            metadata: Some(wire::ContainerMetadata { name: "main".into(), attempt: 0 }),
            image: Some(wire::ImageSpec { image: image::NAME.into() }),
            command: vec!["/lab-app".into()],
            args: pod.spec.args.clone(),
            log_path: "main.log".into(),
            linux: Some(wire::LinuxContainerConfig {
                security_context: Some(wire::LinuxContainerSecurityContext {
                    namespace_options: Some(options),
                }),
            }),
        };
        let mut runtime = RuntimeServiceClient::new(self.channel.clone());
        let request = wire::CreateContainerRequest {
            pod_sandbox_id: pod.sandbox.clone(),
            config: Some(config),
            sandbox_config: Some(self.sandbox_config(&pod)),
        };
        let created = self.tokio.block_on(runtime.create_container(request))?.into_inner();
        pod.container = created.container_id;
        let request = wire::StartContainerRequest { container_id: pod.container.clone() };
        self.tokio.block_on(runtime.start_container(request))?;
        pod.show(lab)?;
        Ok(pod)
    }

    /// All of it.
    pub fn run(&self, lab: &Lab, spec: RealPodSpec) -> Result<RealPod> {
        let pod = self.bind(lab, spec)?;
        self.launch(lab, self.sandbox(pod)?)
    }

    fn sandbox_config(&self, pod: &RealPod) -> wire::PodSandboxConfig {
        let network =
            if pod.spec.host_network { wire::NamespaceMode::Node } else { wire::NamespaceMode::Pod };
        let options =
            wire::NamespaceOption { network: network.into(), pid: wire::NamespaceMode::Container.into() };
        wire::PodSandboxConfig {
            metadata: Some(wire::PodSandboxMetadata {
                name: pod.spec.name.clone(),
                uid: pod.uid.clone(),
                namespace: pod.spec.namespace.clone(),
                attempt: 0,
            }),
            hostname: if pod.spec.host_network { String::new() } else { pod.spec.name.clone() },
            log_directory: pod.logs.display().to_string(),
            linux: Some(wire::LinuxPodSandboxConfig {
                cgroup_parent: format!("{}/kubepods/burstable/pod{}", self.cgroup, pod.uid),
                security_context: Some(wire::LinuxSandboxSecurityContext {
                    namespace_options: Some(options),
                }),
            }),
        }
    }

    /// Ends a pod's processes and network, as after its deletion.
    pub fn remove(&self, pod: &RealPod) -> Result<()> {
        self.lock().retain(|sandbox| *sandbox != pod.sandbox);
        self.remove_sandbox(&pod.sandbox)
    }

    fn remove_sandbox(&self, id: &str) -> Result<()> {
        let mut runtime = RuntimeServiceClient::new(self.channel.clone());
        self.tokio.block_on(async {
            runtime.stop_pod_sandbox(wire::StopPodSandboxRequest { pod_sandbox_id: id.into() }).await?;
            runtime.remove_pod_sandbox(wire::RemovePodSandboxRequest { pod_sandbox_id: id.into() }).await?;
            Ok(())
        })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<String>> {
        self.sandboxes.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        let sandboxes = std::mem::take(&mut *self.lock());
        for sandbox in sandboxes {
            if let Err(error) = self.remove_sandbox(&sandbox) {
                eprintln!("sandbox {sandbox}: {error:#}");
            }
        }
        self.containerd = None;
    }
}

impl RealPod {
    /// Writes what the API says of the pod now.
    pub fn show(&self, lab: &Lab) -> Result<()> {
        let RealPodSpec { namespace, name, labels, host_network, .. } = &self.spec;
        let mut manifest = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": { "name": name, "namespace": namespace, "uid": self.uid, "labels": labels },
            "spec": {
                "nodeName": self.node.name(), "serviceAccountName": name, "hostNetwork": host_network,
                "containers": [{ "name": "main" }],
            },
        });
        if let (Some(ip), false) = (self.ip, self.container.is_empty()) {
            manifest["status"] = json!({ "phase": "Running", "podIP": ip, "podIPs": [{ "ip": ip }] });
        }
        lab.write_text(&self.file(), &serde_yaml_ng::to_string(&manifest)?)
    }

    /// The name of its manifest.
    pub fn file(&self) -> String {
        format!("pod-{}-{}.yaml", self.spec.namespace, self.spec.name)
    }

    pub fn addr(&self, port: u16) -> Result<SocketAddr> {
        Ok(SocketAddr::new(self.ip.context("the pod has no address")?, port))
    }

    /// The directory that kubelet makes for it.
    fn cgroup(&self) -> PathBuf {
        self.node.cgroup().join("kubepods/burstable").join(format!("pod{}", self.uid))
    }

    /// What its container printed: JSON objects, one a line.
    pub fn printed(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.logs.join("main.log")).unwrap_or_default();
        // Each line has a time stamp, the stream's name and a tag in front.
        let lines = text.lines().filter_map(|line| line.splitn(4, ' ').nth(3));
        lines.filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Waits for a line with the given key.
    pub fn printed_with(&self, key: &str) -> Result<Value> {
        let found = eventually(Duration::from_secs(20), || {
            self.printed().into_iter().find(|line| line.get(key).is_some())
        });
        found.with_context(|| format!("{} printed no {key:?}: {:?}", self.spec.name, self.printed()))
    }

    /// Runs `lab-app` as a further process of the pod's container, and returns its last line.
    pub fn app(&self, args: &[&str]) -> Result<Value> {
        self.command(args)?.finish()?.success()?.json()
    }

    /// The same, while it runs.
    pub fn start_app(&self, args: &[&str]) -> Result<Running> {
        self.command(args)
    }

    fn command(&self, args: &[&str]) -> Result<Running> {
        let cgroup = self.cgroup().join(&self.container);
        let procs = fs::read_to_string(cgroup.join("cgroup.procs"))?;
        let Some(process) = procs.lines().next() else { bail!("nothing runs in {}", self.spec.name) };
        let netns = fs::File::open(format!("/proc/{process}/ns/net"))?;
        let mut command = process::command(requirements::lab_app()?, Arc::new(netns.into()), &cgroup);
        command.args(args).stdin(std::process::Stdio::piped());
        Running::start(command)
    }

    /// Runs a program of the node's as kubelet runs a probe.
    pub fn probe(&self, kind: &str, port: u16) -> Result<Value> {
        self.node.app(&["probe", kind, &self.addr(port)?.to_string()])
    }
}

fn configuration(dir: &Path, socket: &Path, cni: &Cni) -> String {
    let (dir, socket) = (dir.display(), socket.display());
    let (bin_dir, conf_dir) = (cni.bin_dir.display(), cni.conf_dir.display());
    let image = image::NAME;
    format!(
        r#"version = 2
root = "{dir}/root"
state = "{dir}/state"
[grpc]
address = "{socket}"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{image}"
restrict_oom_score_adj = true
netns_mounts_under_state_dir = true
stream_server_address = "127.0.0.1"
stream_server_port = "0"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{bin_dir}"
conf_dir = "{conf_dir}"
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "overlayfs"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
"#
    )
}
