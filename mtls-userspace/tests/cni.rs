//! `mtls cni` as a container runtime calls it, and its place in the node's network configuration.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mtls::cni::{Installation, NAME, Settings, WhenAway, uninstall};
use serde_json::{Value, json};

/// What a runtime says about a pod of kubelet's.
fn call(command: &str, config: &Value) -> Output {
    let mut plugin = Command::new(env!("CARGO_BIN_EXE_mtls"));
    // As it is called on a node: by its own name, without arguments.
    plugin.arg0(NAME).env_clear().env("CNI_COMMAND", command);
    if !matches!(command, "VERSION" | "STATUS" | "GC") {
        plugin.env("CNI_CONTAINERID", "c1").env("CNI_NETNS", "/proc/self/ns/net").env("CNI_IFNAME", "eth0");
        let pod = "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_UID=u1;K8S_POD_INFRA_CONTAINER_ID=c1;IgnoreUnknown=1";
        plugin.env("CNI_ARGS", pod);
    }
    let mut plugin =
        plugin.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    plugin.stdin.take().unwrap().write_all(config.to_string().as_bytes()).unwrap();
    plugin.wait_with_output().unwrap()
}

fn config(socket: &Path, version: &str) -> Value {
    json!({
        "cniVersion": version, "name": "pods", "type": NAME, "agentSocket": socket, "waitSeconds": 1,
        "prevResult": {
            "cniVersion": version,
            "interfaces": [{ "name": "veth1" }, { "name": "eth0", "sandbox": "/run/netns/x" }],
            "ips": [
                { "address": "10.1.2.3/24", "interface": 1 },
                { "address": "fd00::3/64", "interface": 1 },
                { "address": "10.1.2.1/24", "interface": 0 }
            ],
            "dns": {}
        }
    })
}

fn said(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or(Value::Null)
}

/// An agent that gives one answer, and tells what it was asked.
fn agent(socket: &Path, answer: Value) -> JoinHandle<Value> {
    let listener = UnixListener::bind(socket).unwrap();
    std::thread::spawn(move || {
        let (mut caller, _) = listener.accept().unwrap();
        let mut line = String::new();
        BufReader::new(caller.try_clone().unwrap()).read_line(&mut line).unwrap();
        caller.write_all(format!("{answer}\n").as_bytes()).unwrap();
        serde_json::from_str(&line).unwrap()
    })
}

#[test]
fn add_hands_the_result_on_once_the_agent_has_the_pod() {
    for (version, answer) in
        [("0.3.1", "protected"), ("0.4.0", "not_enrolled"), ("1.0.0", "protected"), ("1.1.0", "protected")]
    {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("agent.sock");
        let agent = agent(&socket, json!(answer));
        let config = config(&socket, version);
        let output = call("ADD", &config);
        assert!(output.status.success(), "{output:?}");
        assert_eq!(said(&output), config["prevResult"]);
        let asked = &agent.join().unwrap()["add"];
        assert_eq!(
            (&asked["namespace"], &asked["name"], &asked["uid"]),
            (&json!("shop"), &json!("web"), &json!("u1"))
        );
        // The host's end of the pair is not the pod's.
        assert_eq!(asked["addresses"], json!(["10.1.2.3", "fd00::3"]));
    }
}

#[test]
fn add_fails_with_the_agents_reason() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("agent.sock");
    let agent = agent(&socket, json!({ "failed": { "reason": "no certificate for spiffe://x" } }));
    let output = call("ADD", &config(&socket, "1.0.0"));
    assert_eq!(output.status.code(), Some(1));
    let failure = said(&output);
    assert_eq!((&failure["code"], &failure["cniVersion"]), (&json!(11), &json!("1.0.0")));
    let message = failure["msg"].as_str().unwrap();
    assert!(message.contains("shop/web") && message.contains("no certificate for spiffe://x"), "{message}");
    agent.join().unwrap();
}

#[test]
fn without_an_agent_a_pod_starts_only_where_that_is_allowed() {
    let nowhere = Path::new("/nowhere/agent.sock");
    let output = call("ADD", &config(nowhere, "1.0.0"));
    assert_eq!(output.status.code(), Some(1));
    let failure = said(&output);
    let message = failure["msg"].as_str().unwrap();
    assert!(message.contains("/nowhere/agent.sock") && message.contains("shop/web"), "{message}");
    assert!(failure["details"].as_str().unwrap().contains("mtls-node"), "{failure}");
    let status = call("STATUS", &config(nowhere, "1.1.0"));
    assert_eq!((status.status.code(), &said(&status)["code"]), (Some(1), &json!(50)));

    for allowed in
        [json!({ "whenAgentIsAway": "allow" }), json!({ "excludeNamespaces": ["kube-system", "shop"] })]
    {
        let mut config = config(nowhere, "1.0.0");
        config.as_object_mut().unwrap().extend(allowed.as_object().unwrap().clone());
        let output = call("ADD", &config);
        assert!(output.status.success(), "{output:?}");
        assert_eq!(said(&output), config["prevResult"]);
    }
}

#[test]
fn a_silent_agent_is_as_good_as_none() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("agent.sock");
    let _deaf = UnixListener::bind(&socket).unwrap();
    let output = call("ADD", &config(&socket, "1.0.0"));
    assert_eq!((output.status.code(), &said(&output)["code"]), (Some(1), &json!(11)));
}

#[test]
fn del_and_gc_succeed_whatever_is_there() {
    let nowhere = Path::new("/nowhere/agent.sock");
    for command in ["DEL", "GC"] {
        let output = call(command, &config(nowhere, "1.1.0"));
        assert!(output.status.success() && output.stdout.is_empty(), "{output:?}");
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("agent.sock");
        let agent = agent(&socket, json!("done"));
        let mut config = config(&socket, "1.1.0");
        config["cni.dev/valid-attachments"] = json!([{ "containerID": "c7", "ifname": "eth0" }]);
        assert!(call(command, &config).status.success());
        let expected = match command {
            "DEL" => json!({ "del": { "container": "c1" } }),
            _ => json!({ "gc": { "containers": ["c7"] } }),
        };
        assert_eq!(agent.join().unwrap(), expected);
    }
}

#[test]
fn check_asks_and_version_tells() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("agent.sock");
    let asked = agent(&socket, json!({ "failed": { "reason": "fence: gone" } }));
    let output = call("CHECK", &config(&socket, "0.4.0"));
    assert!(said(&output)["msg"].as_str().unwrap().contains("fence: gone"), "{output:?}");
    assert_eq!(asked.join().unwrap()["check"]["container"], "c1");
    let output = call("VERSION", &json!({ "cniVersion": "1.0.0" }));
    let versions = said(&output);
    for version in ["0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        assert!(versions["supportedVersions"].as_array().unwrap().contains(&json!(version)), "{versions}");
    }
}

#[test]
fn mistakes_of_the_runtime_are_named() {
    let nowhere = Path::new("/nowhere/agent.sock");
    let mut first = config(nowhere, "1.0.0");
    first.as_object_mut().unwrap().remove("prevResult");
    for (command, config, code) in [
        ("ADD", first, 7),
        ("ADD", config(nowhere, "0.1.0"), 1),
        ("ADD", json!("text"), 6),
        ("DANCE", config(nowhere, "1.0.0"), 4),
    ] {
        let output = call(command, &config);
        assert_eq!(
            (output.status.code(), &said(&output)["code"]),
            (Some(1), &json!(code)),
            "{command} {config}"
        );
    }
}

/// A node's directories for CNI, and the plugin kept in them.
struct Node {
    dir: tempfile::TempDir,
    _installation: Option<Installation>,
}

impl Node {
    fn with(name: &str, content: &Value) -> Self {
        let node = Self { dir: tempfile::tempdir().unwrap(), _installation: None };
        fs::create_dir(node.conf_dir()).unwrap();
        node.write(name, content);
        Self { _installation: Some(Installation::begin(node.settings()).unwrap()), ..node }
    }

    fn settings(&self) -> Settings {
        Settings {
            bin_dir: self.dir.path().join("bin"),
            conf_dir: self.conf_dir(),
            agent_socket: "/run/mtls/agent.sock".into(),
            wait: Duration::from_secs(20),
            when_agent_is_away: WhenAway::Refuse,
            exclude_namespaces: vec!["kube-system".into()],
        }
    }

    fn conf_dir(&self) -> PathBuf {
        self.dir.path().join("net.d")
    }

    /// As other plugins' installers do it: a new file under the old name.
    fn write(&self, name: &str, content: &Value) {
        let new = self.dir.path().join("new");
        fs::write(&new, content.to_string()).unwrap();
        fs::set_permissions(&new, fs::Permissions::from_mode(0o600)).unwrap();
        fs::rename(new, self.conf_dir().join(name)).unwrap();
    }

    fn read(&self, name: &str) -> Value {
        let text = fs::read_to_string(self.conf_dir().join(name)).unwrap_or_default();
        serde_json::from_str(&text).unwrap_or_default()
    }

    fn types(&self, name: &str) -> Vec<String> {
        let config = self.read(name);
        let plugins = config["plugins"].as_array().into_iter().flatten();
        plugins.map(|plugin| plugin["type"].as_str().unwrap_or_default().to_owned()).collect()
    }

    /// Waits for the plugins that the file shall have.
    #[track_caller]
    fn await_types(&self, name: &str, expected: &[&str]) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.types(name) != expected {
            assert!(Instant::now() < deadline, "{name} has {:?}, not {expected:?}", self.types(name));
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn list(version: &str, plugins: &[&str]) -> Value {
    let plugins: Vec<Value> = plugins.iter().map(|name| json!({ "type": name })).collect();
    json!({ "cniVersion": version, "name": "pods", "plugins": plugins })
}

#[test]
fn the_plugin_is_put_at_the_end_and_put_back_after_rewrites() {
    let node = Node::with("10-kindnet.conflist", &list("0.3.1", &["ptp", "portmap"]));
    node.await_types("10-kindnet.conflist", &["ptp", "portmap", NAME]);
    let entry = &node.read("10-kindnet.conflist")["plugins"][2];
    assert_eq!(entry["agentSocket"], "/run/mtls/agent.sock");
    assert_eq!(
        (&entry["whenAgentIsAway"], &entry["excludeNamespaces"]),
        (&json!("refuse"), &json!(["kube-system"]))
    );
    let mode = fs::metadata(node.conf_dir().join("10-kindnet.conflist")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let binary = fs::metadata(node.dir.path().join("bin").join(NAME)).unwrap();
    assert_eq!(binary.permissions().mode() & 0o777, 0o755);

    // Another installer rewrites its configuration; another plugin's comes first.
    node.write("10-kindnet.conflist", &list("0.3.1", &["ptp", "portmap", "bandwidth"]));
    node.await_types("10-kindnet.conflist", &["ptp", "portmap", "bandwidth", NAME]);
    node.write("05-cilium.conflist", &list("1.0.0", &["cilium-cni"]));
    node.await_types("05-cilium.conflist", &["cilium-cni", NAME]);

    // Nothing half written is left for a runtime to read.
    let names = fs::read_dir(node.conf_dir()).unwrap().map(|entry| entry.unwrap().file_name());
    assert_eq!(names.count(), 2);
}

#[test]
fn a_single_plugins_file_becomes_a_list_and_comes_back() {
    let single =
        json!({ "cniVersion": "1.0.0", "name": "pods", "type": "calico", "ipam": { "type": "host-local" } });
    let node = Node::with("10-calico.conf", &single);
    node.await_types("10-calico.conflist", &["calico", NAME]);
    assert!(!node.conf_dir().join("10-calico.conf").exists());
    // Its owner writes it again.
    let mut newer = single.clone();
    newer["mtu"] = json!(1400);
    node.write("10-calico.conf", &newer);
    let deadline = Instant::now() + Duration::from_secs(10);
    while node.read("10-calico.conflist")["plugins"][0]["mtu"] != 1400
        || node.conf_dir().join("10-calico.conf").exists()
    {
        assert!(Instant::now() < deadline, "{}", node.read("10-calico.conflist"));
        std::thread::sleep(Duration::from_millis(10));
    }
    let settings = node.settings();
    let dir = node.dir;
    drop(node._installation);
    uninstall(&settings.bin_dir, &settings.conf_dir).unwrap();
    let left: Vec<_> =
        fs::read_dir(&settings.conf_dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["10-calico.conf"]);
    let text = fs::read_to_string(settings.conf_dir.join("10-calico.conf")).unwrap();
    assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), newer);
    assert!(!dir.path().join("bin").join(NAME).exists());
}

#[test]
fn an_agents_end_leaves_the_plugin_and_uninstalling_takes_it_away() {
    let before = list("1.0.0", &["flannel"]);
    let mut node = Node::with("10-flannel.conflist", &before);
    node.await_types("10-flannel.conflist", &["flannel", NAME]);
    node._installation = None;
    assert_eq!(node.types("10-flannel.conflist"), ["flannel", NAME]);
    let uninstall = || {
        let mut mtls = Command::new(env!("CARGO_BIN_EXE_mtls"));
        mtls.args(["cni", "uninstall", "--cni-bin-dir"]).arg(node.dir.path().join("bin"));
        mtls.arg("--cni-conf-dir").arg(node.conf_dir()).output().unwrap()
    };
    let output = uninstall();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(node.read("10-flannel.conflist"), before);
    assert!(!node.dir.path().join("bin").join(NAME).exists());
    let output = uninstall();
    assert!(
        output.status.success() && String::from_utf8_lossy(&output.stdout).contains("not installed"),
        "{output:?}"
    );
}

#[test]
fn a_configuration_that_comes_later_is_chained_then() {
    let node = Node::with("README.txt", &json!("no configuration"));
    node.write("10-late.conflist", &list("1.0.0", &["bridge"]));
    node.await_types("10-late.conflist", &["bridge", NAME]);
}
