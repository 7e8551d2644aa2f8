//! Agent and node check in a real container: a rendered DaemonSet and a lab's node in, `runc` running what it describes
//! out.
//!
//! As a container runtime would: the image's root file system, read-only; exactly the capabilities, mounts and namespaces
//! of the pod; no new privileges; the profile of system calls that container engines have by default. The lab stands in
//! for what differs from node to node: where host paths are, and where the mesh is described.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;

use anyhow::{Context, Result, ensure};
use mtls_tests::kubernetes::{User, agent_rules};
use mtls_tests::{Finished, Lab, Mesh, Running};
use serde_json::{Value, json};

use crate::rendered::{capabilities, kustomized, parse, text_of, texts};
use crate::{Scratch, image, run};

/// The program, its profile and the tool that unpacks the image.
pub const NEEDS: [&str; 5] = ["ip", "kubectl", "runc", "umoci", PROFILE];
const PROFILE: &str = "/usr/share/containers/seccomp.json";

/// What a container is made of; may be changed before it starts.
pub struct Container {
    id: String,
    cgroup: String,
    /// The lab's cgroup, which is the lab's to remove.
    lab: Option<PathBuf>,
    /// `config.json`, as the OCI runtime specification has it.
    pub config: Value,
    on_node: OnNode,
    scratch: Scratch,
}

/// What a node has where the agent's mounts lead, by the mounts' names. Outlives the agent.
#[derive(Clone)]
pub struct OnNode {
    directories: BTreeMap<&'static str, PathBuf>,
    _scratch: Rc<Scratch>,
}

impl Container {
    /// The agent of a lab's node, as the DaemonSet describes it.
    pub fn agent(lab: &Lab, node: &str) -> Result<Self> {
        Self::agent_on(lab, node, OnNode::new(lab, node)?)
    }

    /// Another agent on the same node.
    pub fn beside(&self, lab: &Lab, node: &str) -> Result<Self> {
        Self::agent_on(lab, node, self.on_node.clone())
    }

    fn agent_on(lab: &Lab, node: &str, on_node: OnNode) -> Result<Self> {
        let (scratch, id) = unpacked()?;
        let spec = pod("", "DaemonSet/mtls-node")?;
        ensure!(spec["hostNetwork"] == true && spec["hostPID"] == true, "this runs it on the node's own");
        let container = spec.pointer("/containers/0").context("no container")?;
        // Below the root of whatever hierarchies there are: beside the lab's own agents.
        let cgroup = format!("/{}/{node}/agent/{id}", lab.id());
        let (args, mut mounts) = (args(container, lab, node)?, mounts(container, &on_node)?);
        // In place of the API server, and of the processes by which pods are found.
        mounts.push(bind(&lab.dir().join("manifests"), "/lab/manifests", true));
        mounts.push(bind(Path::new("/run/netns"), "/run/netns", true));
        let config = config(container, &cgroup, &args, mounts, &[])?;
        Ok(Self { cgroup, lab: Some(lab.cgroup().into()), id, config, on_node, scratch })
    }

    /// The check of a node, this machine, as its DaemonSet describes it, but for staying.
    pub fn check() -> Result<Self> {
        let (scratch, id) = unpacked()?;
        let spec = pod("check", "DaemonSet/mtls-check")?;
        ensure!(
            spec["hostPID"] == true && spec["volumes"].is_null(),
            "this runs it with the node's processes"
        );
        let container = spec.pointer("/containers/0").context("no container")?;
        let args = args_to_end(container, "here")?;
        let cgroup = format!("/{id}");
        let config = config(container, &cgroup, &args, Vec::new(), &["network"])?;
        let on_node = OnNode { directories: BTreeMap::new(), _scratch: Rc::new(Scratch::new("node")?) };
        Ok(Self { cgroup, lab: None, id, config, on_node, scratch })
    }

    /// What takes everything off the node that this agent runs on, as its DaemonSet describes it, but for staying.
    pub fn uninstall(&self, lab: &Lab, node: &str) -> Result<Self> {
        let (scratch, id) = unpacked()?;
        let spec = pod("uninstall", "DaemonSet/mtls-uninstall")?;
        ensure!(
            spec["hostNetwork"] == true && spec["hostPID"].is_null(),
            "this runs it on the node's network"
        );
        let container = spec.pointer("/containers/0").context("no container")?;
        let args = args_to_end(container, node)?;
        let cgroup = format!("/{}/{node}/agent/{id}", lab.id());
        let config = config(container, &cgroup, &args, mounts(container, &self.on_node)?, &["pid"])?;
        let uninstall =
            Self { cgroup, lab: self.lab.clone(), id, config, on_node: self.on_node.clone(), scratch };
        // Where the lab's agents pin.
        uninstall.with_argument("--bpffs", &format!("/sys/fs/bpf/{node}"))
    }

    /// Runs it to its end, whatever that is, by whoever runs a program with arguments.
    pub fn run_by(&self, run: impl FnOnce(&str, &[&str]) -> Result<Finished>) -> Result<Finished> {
        self.scratch.write("config.json", &self.config.to_string())?;
        let (state, bundle) = (self.state(), self.scratch.0.to_string_lossy().into_owned());
        let runc = mtls_tests::find("runc").context("no runc")?;
        let args =
            ["--root", &state.to_string_lossy(), "run", "--bundle", &bundle, "--no-new-keyring", &self.id];
        run(&runc.to_string_lossy(), &args)
    }

    /// In a namespace of its own where the pod has the node's.
    pub fn in_its_own(mut self, namespace: &str) -> Result<Self> {
        let namespaces = self.config["linux"]["namespaces"].as_array_mut().context("no namespaces")?;
        namespaces.push(json!({"type": namespace}));
        Ok(self)
    }

    pub fn without_capability(mut self, name: &str) -> Result<Self> {
        for set in ["bounding", "effective", "permitted"] {
            let list =
                self.config["process"]["capabilities"][set].as_array_mut().context("no capabilities")?;
            let before = list.len();
            list.retain(|capability| *capability != format!("CAP_{name}"));
            ensure!(list.len() + 1 == before, "the agent has no {name}");
        }
        Ok(self)
    }

    pub fn without_mount(mut self, place: &str) -> Result<Self> {
        let mounts = self.config["mounts"].as_array_mut().context("no mounts")?;
        let before = mounts.len();
        mounts.retain(|mount| mount["destination"] != place);
        ensure!(mounts.len() + 1 == before, "nothing is mounted at {place}");
        Ok(self)
    }

    /// Where the node has what is mounted by this name.
    pub fn on_node(&self, mount: &str) -> PathBuf {
        self.on_node.directories.get(mount).cloned().unwrap_or_default()
    }

    pub fn with_more_arguments(mut self, more: &[&str]) -> Result<Self> {
        let args = self.config["process"]["args"].as_array_mut().context("no arguments")?;
        args.extend(more.iter().map(|arg| Value::from(*arg)));
        Ok(self)
    }

    /// With another value for a flag.
    pub fn with_argument(mut self, flag: &str, value: &str) -> Result<Self> {
        let args = self.config["process"]["args"].as_array_mut().context("no arguments")?;
        let is_it = |arg: &&mut Value| arg.as_str().is_some_and(|arg| arg.split('=').next() == Some(flag));
        *args.iter_mut().find(is_it).with_context(|| format!("no {flag}"))? =
            format!("{flag}={value}").into();
        Ok(self)
    }

    /// Living from the lab's API server, by the token that kubelet mounts.
    pub fn in_cluster(mut self, lab: &Lab) -> Result<Self> {
        let api = lab.api_server()?;
        let name = "system:serviceaccount:mtls-system:mtls-node".into();
        let token = api.user(User { name, rules: agent_rules(), ..User::default() });
        let mounted = self.scratch.0.join("api-token");
        std::fs::create_dir(&mounted)?;
        let environment = self.config["process"]["env"].as_array_mut().context("no environment")?;
        for (name, value) in api.service_account(&mounted, &token)? {
            environment.push(format!("{name}={value}").into());
        }
        let args = self.config["process"]["args"].as_array_mut().context("no arguments")?;
        let source = args.iter_mut().find(|arg| *arg == FROM_THE_LAB).context("it has a mesh already")?;
        *source = "--kubernetes".into();
        self.config["mounts"].as_array_mut().context("no mounts")?.push(bind(&mounted, API_TOKEN, true));
        Ok(self)
    }

    /// With a file that kubelet would write for it.
    pub fn with_file(mut self, place: &str, text: &str) -> Result<Self> {
        let file = self.scratch.write(&place.replace('/', "-"), text)?;
        self.config["mounts"].as_array_mut().context("no mounts")?.push(bind(&file, place, true));
        Ok(self)
    }

    /// Starts it in place of the agent that ran on this node until now.
    pub fn launch(&self, lab: &Lab, mesh: &mut Mesh, node: &str) -> Result<()> {
        mesh.agent(node).launch_by(self.command(lab, node)?)
    }

    /// Starts it beside the agent that runs on this node, and waits until that is replaced. Returns the old one.
    pub fn succeed(&self, lab: &Lab, mesh: &mut Mesh, node: &str) -> Result<Running> {
        mesh.agent(node).replace_by(self.command(lab, node)?)
    }

    fn command(&self, lab: &Lab, node: &str) -> Result<Command> {
        self.scratch.write("config.json", &self.config.to_string())?;
        let mut command = lab.node(node)?.command_in("agent", mtls_tests::find("runc").context("no runc")?);
        command.arg("--root").arg(self.state());
        command.arg("run").arg("--bundle").arg(&self.scratch.0).args(["--no-new-keyring", &self.id]);
        Ok(command)
    }

    /// Its first process, as the node numbers it.
    pub fn pid(&self) -> Result<u32> {
        let state = self.runc(&["state", &self.id])?.success()?.stdout;
        let state: Value = serde_json::from_str(&state)?;
        state["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok()).context("no pid")
    }

    fn state(&self) -> PathBuf {
        self.scratch.0.join("runc")
    }

    fn runc(&self, args: &[&str]) -> Result<Finished> {
        let state = self.state();
        run("runc", &[&["--root", &state.to_string_lossy()], args].concat())
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // Nothing is left unless it did not end when it was told to.
        if let Err(error) = self.runc(&["delete", "--force", &self.id]) {
            eprintln!("{}: {error:#}", self.id);
        }
        // runc makes the directories above its own in each hierarchy of version 1, and leaves them.
        for hierarchy in std::fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
            let own = hierarchy.path().join(self.cgroup.trim_start_matches('/'));
            if self.lab.as_ref().is_some_and(|lab| own.starts_with(lab)) {
                continue;
            }
            for directory in own.ancestors().take_while(|directory| *directory != hierarchy.path()) {
                // One that somebody else is in can't be removed.
                let _ = std::fs::remove_dir(directory);
            }
        }
    }
}

/// Where clients look for it.
pub const API_TOKEN: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// In place of the API server.
const FROM_THE_LAB: &str = "--manifests=/lab/manifests";

/// A network configuration as a node has it.
const NETWORK: &str = r#"{"cniVersion": "0.4.0", "name": "lab", "plugins": [{"type": "ptp"}]}"#;

/// The image's root file system as a bundle, and a name for what runs in it.
fn unpacked() -> Result<(Scratch, String)> {
    let scratch = Scratch::new("container")?;
    image::unpack(&scratch.0)?;
    let id = scratch.0.file_name().context("no name")?.to_string_lossy().into_owned();
    Ok((scratch, id))
}

/// As a runtime makes it of a pod's container; `namespaces` are those that it has of its own besides the usual ones.
fn config(
    container: &Value,
    cgroup: &str,
    args: &[String],
    mounts: Vec<Value>,
    namespaces: &[&str],
) -> Result<Value> {
    let security = &container["securityContext"];
    let capabilities: Vec<String> =
        capabilities(container)?.into_iter().map(|name| format!("CAP_{name}")).collect();
    // The file systems that a runtime mounts in every container; then the pod's.
    let mut all = vec![
        json!({"destination": "/proc", "type": "proc", "source": "proc"}),
        json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755"]}),
        json!({"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]}),
        json!({"destination": "/sys/fs/cgroup", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]}),
    ];
    all.extend(mounts);
    // Neither pid nor network, unless asked for: those are the node's.
    let own = ["mount", "ipc", "uts", "cgroup"].iter().chain(namespaces).map(|kind| json!({"type": kind}));
    Ok(json!({
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": security["runAsUser"], "gid": security["runAsGroup"]},
            "args": args,
            "env": ["PATH=/usr/bin", "RUST_LOG=info"],
            "cwd": "/",
            "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
            "noNewPrivileges": security["allowPrivilegeEscalation"] == false,
        },
        "root": {"path": "rootfs", "readonly": security["readOnlyRootFilesystem"]},
        "mounts": all,
        "linux": {
            "cgroupsPath": cgroup,
            "namespaces": own.collect::<Vec<_>>(),
            "maskedPaths": ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_list", "/proc/timer_list",
                "/proc/sched_debug", "/proc/scsi", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
            "seccomp": profile(&capabilities)?,
        },
    }))
}

/// The pod that a workload describes in what a directory installs.
fn pod(directory: &str, key: &str) -> Result<Value> {
    let objects = parse(&kustomized(directory)?)?;
    objects[key].pointer("/spec/template/spec").cloned().context("no pod")
}

/// The container's own, but for those that would keep it from ending.
fn args_to_end(container: &Value, node: &str) -> Result<Vec<String>> {
    let args = texts(container, "/args")?.into_iter().filter(|arg| !arg.starts_with("--stay"));
    let args = args.map(|arg| arg.replace("$(NODE_NAME)", node));
    Ok(std::iter::once("/usr/bin/mtls".to_owned()).chain(args).collect())
}

/// The DaemonSet's own, but for what the lab has instead of a cluster.
fn args(container: &Value, lab: &Lab, node: &str) -> Result<Vec<String>> {
    let mut args = vec!["/usr/bin/mtls".to_owned()];
    for arg in texts(container, "/args")? {
        let arg = arg.replace("$(NODE_NAME)", node).replace("$(HOST_IP)", "127.0.0.1");
        args.push(match arg.split('=').next().unwrap_or_default() {
            "--kubernetes" => FROM_THE_LAB.into(),
            // Where the lab's own agent pinned its state, to be adopted.
            "--bpffs" => format!("--bpffs=/sys/fs/bpf/{node}"),
            "--cgroup-root" => format!("--cgroup-root={}", lab.node(node)?.cgroup().display()),
            "--ca-address" => format!("--ca-address=https://{}:15012", lab.nodes()[0].ip()),
            _ => arg,
        });
    }
    args.push("--drain=1".into());
    args.extend(mtls_tests::MESH_PREFIXES.map(|prefix| format!("--mesh-prefix={prefix}")));
    Ok(args)
}

impl OnNode {
    fn new(lab: &Lab, node: &str) -> Result<Self> {
        let objects = parse(&kustomized("")?)?;
        let (_, settings) =
            objects.iter().find(|(key, _)| key.starts_with("ConfigMap/")).context("no config")?;
        let scratch = Scratch::new("node")?;
        let mut directories = BTreeMap::new();
        for name in ["config", "ca-token", "ca-root", "run", "cni-bin", "cni-conf"] {
            let path = scratch.0.join(name);
            std::fs::create_dir(&path)?;
            directories.insert(name, path);
        }
        std::fs::write(directories["config"].join("node.config"), text_of(settings, "/data/node.config")?)?;
        std::fs::copy(lab.dir().join(format!("{node}.token")), directories["ca-token"].join("token"))?;
        std::fs::copy(lab.dir().join("root-cert.pem"), directories["ca-root"].join("root-cert.pem"))?;
        std::fs::write(directories["cni-conf"].join("10-lab.conflist"), NETWORK)?;
        directories.insert("bpffs", lab.dir().join("bpf"));
        directories.insert("cgroup", lab.node(node)?.cgroup().into());
        Ok(Self { directories, _scratch: Rc::new(scratch) })
    }
}

fn mounts(container: &Value, on_node: &OnNode) -> Result<Vec<Value>> {
    let mut mounts = Vec::new();
    for mount in container["volumeMounts"].as_array().context("no mounts")? {
        let name = text_of(mount, "/name")?;
        if name == "api-token" {
            ensure!(mount["mountPath"] == API_TOKEN, "clients look elsewhere: {mount}");
            continue;
        }
        let source = on_node.directories.get(name);
        let source = source.with_context(|| format!("the lab has nothing for mount {name}"))?;
        // The lab's manifests name cgroups by the paths they have outside, so they are seen there inside, too.
        let place = if name == "cgroup" { source.to_str() } else { mount["mountPath"].as_str() };
        mounts.push(bind(source, place.context("mounted nowhere")?, mount["readOnly"] == true));
    }
    Ok(mounts)
}

fn bind(source: &Path, destination: &str, read_only: bool) -> Value {
    let access = if read_only { "ro" } else { "rw" };
    json!({"destination": destination, "type": "bind", "source": source, "options": ["rbind", "rprivate", access]})
}

/// `RuntimeDefault`: the profile that container engines share, for these capabilities.
fn profile(capabilities: &[String]) -> Result<Value> {
    let written: Value = serde_json::from_str(&std::fs::read_to_string(PROFILE)?)?;
    let arch = |map: &&Value| map["architecture"] == "SCMP_ARCH_X86_64";
    let arches =
        written["archMap"].as_array().and_then(|maps| maps.iter().find(arch)).context("no archMap")?;
    let mut architectures = vec![arches["architecture"].clone()];
    architectures.extend(arches["subArchitectures"].as_array().cloned().unwrap_or_default());
    let has = |value: &Value| value.as_str().is_some_and(|name| capabilities.iter().any(|own| own == name));
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let here = |value: &Value| *value == "amd64";
    let applies = |call: &&Value| {
        let (includes, excludes) = (&call["includes"], &call["excludes"]);
        let arches = list(&includes["arches"]);
        list(&includes["caps"]).iter().all(has)
            && !list(&excludes["caps"]).iter().any(has)
            && (arches.is_empty() || arches.iter().any(here))
            && !list(&excludes["arches"]).iter().any(here)
    };
    let calls = written["syscalls"].as_array().context("no syscalls")?;
    let calls: Vec<Value> = calls.iter().filter(applies).map(plain_call).collect();
    Ok(json!({"defaultAction": written["defaultAction"], "defaultErrnoRet": written["defaultErrnoRet"],
        "architectures": architectures, "syscalls": calls}))
}

/// Without the conditions, which were judged.
fn plain_call(call: &Value) -> Value {
    let mut plain = json!({"names": call["names"], "action": call["action"]});
    if !call["errnoRet"].is_null() {
        plain["errnoRet"] = call["errnoRet"].clone();
    }
    if call["args"].as_array().is_some_and(|args| !args.is_empty()) {
        plain["args"] = call["args"].clone();
    }
    plain
}
