//! `mtls node-check` over directories that look like nodes: what is seen, what is said, what is to be set.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use mtls::node_check::{Error, Finding, Node, Verdict, look, places};

const CGROUP2: &str = "26 25 0:23 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw";
const BPFFS: &str = "33 25 0:31 / /sys/fs/bpf rw - bpf bpf rw,mode=700";
const ELSEWHERE: &str = "33 25 0:31 / /run/bpf rw - bpf bpf rw";
const HYBRID: &str = "25 30 0:22 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
    26 25 0:23 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
    27 25 0:24 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw";
const UNUSUAL: &str = "27 25 0:24 / /mnt/cgroup2 rw - cgroup2 cgroup2 rw";
const VERSION_1: &str = "26 25 0:23 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory";

const KINDNET: &str = r#"{"cniVersion": "0.3.1", "name": "kindnet", "plugins": [
    {"type": "ptp", "ipMasq": false, "ipam": {"type": "host-local", "dataDir": "/run/cni-ipam-state",
     "routes": [{"dst": "0.0.0.0/0"}], "ranges": [[{"subnet": "10.244.1.0/24"}]]}, "mtu": 1500},
    {"type": "portmap", "capabilities": {"portMappings": true}}]}"#;
const CALICO: &str = r#"{"name": "k8s-pod-network", "cniVersion": "0.3.1", "plugins": [
    {"type": "calico", "log_level": "info", "datastore_type": "kubernetes", "nodename": "node-a",
     "ipam": {"type": "calico-ipam"}, "policy": {"type": "k8s"}},
    {"type": "portmap", "snat": true, "capabilities": {"portMappings": true}},
    {"type": "bandwidth", "capabilities": {"bandwidth": true}}]}"#;
const FLANNEL: &str = r#"{"name": "cbr0", "cniVersion": "0.3.1", "plugins": [
    {"type": "flannel", "delegate": {"hairpinMode": true, "isDefaultGateway": true}},
    {"type": "portmap", "capabilities": {"portMappings": true}}]}"#;
const CILIUM: &str = r#"{"cniVersion": "0.3.1", "name": "cilium", "plugins": [
    {"type": "cilium-cni", "enable-debug": false, "log-file": "/var/run/cilium/cilium-cni.log"}]}"#;
const BRIDGE_ALONE: &str = r#"{"cniVersion": "0.4.0", "name": "crio", "type": "bridge", "bridge": "cni0"}"#;
const ISTIO: &str = r#"{"name": "k8s-pod-network", "cniVersion": "0.3.1", "plugins": [
    {"type": "calico", "nodename": "node-a"},
    {"type": "istio-cni", "ambient_enabled": true, "cni_agent_run_dir": "/var/run/istio-cni"}]}"#;
const LINKERD: &str = r#"{"name": "cbr0", "cniVersion": "0.3.1", "plugins": [{"type": "flannel"},
    {"type": "linkerd-cni", "policy": {"type": "k8s"}}]}"#;
const OURS: &str =
    r#"{"cniVersion": "0.3.1", "name": "kindnet", "plugins": [{"type": "ptp"}, {"type": "mtls-cni"}]}"#;

const HEADING: &str =
    "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n";
/// Listens on 127.0.0.1:15020.
const ADMIN: &str =
    "   0: 0100007F:3AAC 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1\n";
/// Listens on :::15008.
const TUNNEL6: &str = "   0: 00000000000000000000000000000000:3AA0 00000000000000000000000000000000:0000 0A 00000000:00000000 00:0 0 0 0 1\n";
/// A client's port of 15001, connected.
const CLIENT: &str =
    "   1: 0100007F:3A99 0100007F:1F90 01 00000000:00000000 00:00000000 00000000     0        0 2 1\n";

/// A node as a directory.
struct Drawn {
    root: tempfile::TempDir,
    hooks: Option<Vec<String>>,
}

impl Drawn {
    fn new(mounts: &[&str]) -> Self {
        let root = tempfile::tempdir().unwrap();
        let drawn = Self { root, hooks: Some(Vec::new()) };
        drawn.process(1, 1, "", "");
        drawn.file("proc/1/mountinfo", &mounts.join("\n"));
        drawn
    }

    fn usual() -> Self {
        let drawn = Self::new(&[CGROUP2, BPFFS]);
        drawn.directory("sys/fs/cgroup/kubepods.slice/kubepods-burstable.slice");
        drawn
    }

    fn directory(&self, path: &str) {
        fs::create_dir_all(self.root.path().join(path)).unwrap();
    }

    fn file(&self, path: &str, text: &str) {
        let path = self.root.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn cni(self, name: &str, text: &str) -> Self {
        self.file(&format!("etc/cni/net.d/{name}"), text);
        self
    }

    /// A process in a network namespace, where these listen.
    fn process(&self, pid: u32, namespace: u32, tcp: &str, tcp6: &str) {
        self.file(&format!("proc/{pid}/net/tcp"), &format!("{HEADING}{tcp}"));
        self.file(&format!("proc/{pid}/net/tcp6"), &format!("{HEADING}{tcp6}"));
        self.directory(&format!("proc/{pid}/ns"));
        symlink(format!("net:[{namespace}]"), self.root.path().join(format!("proc/{pid}/ns/net"))).unwrap();
    }

    fn hooks(mut self, names: &[&str]) -> Self {
        self.hooks = Some(names.iter().map(|name| (*name).to_owned()).collect());
        self
    }

    fn look(&self) -> Vec<Finding> {
        look(&Node { root: self.root.path().into(), hooks: self.hooks.clone() }).unwrap()
    }

    fn finding(&self, what: &str) -> Finding {
        let found = self.look();
        found
            .iter()
            .find(|finding| finding.what == what)
            .unwrap_or_else(|| panic!("no {what}: {found:?}"))
            .clone()
    }
}

fn set(value: &'static str, to: &str) -> Verdict {
    Verdict::Set { value, to: to.into() }
}

#[test]
fn a_usual_node_is_good_in_every_way() {
    let drawn = Drawn::usual().cni("10-kindnet.conflist", KINDNET);
    for finding in drawn.look() {
        assert_eq!(finding.verdict, Verdict::Good, "{finding:?}");
    }
}

#[test]
fn networks_are_known_by_what_they_write() {
    for (file, text, expected) in [
        ("10-kindnet.conflist", KINDNET, "kindnet"),
        ("10-calico.conflist", CALICO, "Calico"),
        ("10-flannel.conflist", FLANNEL, "Flannel"),
        ("05-cilium.conflist", CILIUM, "Cilium"),
        ("100-crio-bridge.conf", BRIDGE_ALONE, "bridge"),
        ("10-other.conflist", r#"{"name": "x", "plugins": [{"type": "own-cni"}]}"#, "unknown"),
    ] {
        let finding = Drawn::usual().cni(file, text).finding("CNI");
        assert!(finding.seen.starts_with(expected), "{finding:?}");
        assert!(finding.seen.contains(file), "{finding:?}");
    }
}

#[test]
fn the_first_file_by_name_counts_as_for_container_runtimes() {
    let drawn = Drawn::usual()
        .cni("87-podman.conflist", FLANNEL)
        .cni("10-calico.conflist", CALICO)
        .cni("00-notes", "{");
    assert!(drawn.finding("CNI").seen.starts_with("Calico"));
}

#[test]
fn what_stands_in_the_way_is_an_obstacle_and_what_is_only_near_is_not() {
    for (file, text, what, is_obstacle, word) in [
        ("10-calico.conflist", ISTIO, "in the CNI's chain", true, "istioctl"),
        ("10-flannel.conflist", LINKERD, "in the CNI's chain", false, "dataplane-mode=none"),
        ("10-kindnet.conflist", OURS, "in the CNI's chain", false, "installed already"),
        ("05-cilium.conflist", CILIUM, "CNI", false, "cni.exclusive=false"),
        ("100-crio-bridge.conf", BRIDGE_ALONE, "CNI", true, ".conflist"),
        ("10-broken.conflist", "{", "CNI", true, "can't read it"),
    ] {
        let finding = Drawn::usual().cni(file, text).finding(what);
        assert_eq!(finding.verdict.is_obstacle(), is_obstacle, "{finding:?}");
        assert!(finding.verdict.to_string().contains(word), "{finding:?}");
    }
    // Without a network there is nothing to get on with, yet.
    assert!(!Drawn::usual().finding("CNI").verdict.is_obstacle());
}

#[test]
fn k3s_has_its_configuration_elsewhere() {
    let drawn = Drawn::usual();
    drawn.file("var/lib/rancher/k3s/agent/etc/cni/net.d/10-flannel.conflist", FLANNEL);
    let expected = set("node.paths.cniConf", "/var/lib/rancher/k3s/agent/etc/cni/net.d");
    assert_eq!(drawn.finding("CNI").verdict, expected);
}

#[test]
fn cgroups_and_pins_are_found_where_they_are() {
    for (mounts, cgroups) in [
        (&[CGROUP2, BPFFS][..], Verdict::Good),
        (&[HYBRID, BPFFS], Verdict::Good),
        (&[UNUSUAL, BPFFS], set("node.paths.cgroup", "/mnt/cgroup2")),
    ] {
        let drawn = Drawn::new(mounts);
        assert_eq!(drawn.finding("cgroups").verdict, cgroups);
        assert_eq!(drawn.finding("BPF file system").verdict, Verdict::Good);
    }
    for (mounts, what) in [
        (&[VERSION_1, BPFFS][..], "cgroups"),
        (&[BPFFS], "cgroups"),
        (&[CGROUP2], "BPF file system"),
        (&[CGROUP2, ELSEWHERE], "BPF file system"),
    ] {
        let finding = Drawn::new(mounts).finding(what);
        assert!(matches!(&finding.verdict, Verdict::Missing { remedy } if !remedy.is_empty()), "{finding:?}");
    }
    let drawn = Drawn::new(&[HYBRID, BPFFS]);
    let places = places(drawn.root.path()).unwrap();
    assert_eq!(places.cgroup, Some(drawn.root.path().join("sys/fs/cgroup/unified")));
    assert_eq!(places.bpffs, drawn.root.path().join("sys/fs/bpf"));
}

#[test]
fn kubelets_way_of_naming_cgroups_is_seen() {
    for (directory, expected) in [
        ("kubepods.slice", "systemd (kubepods.slice)"),
        ("kubepods", "cgroupfs (kubepods)"),
        ("kubelet/kubepods", "cgroupfs (kubepods)"),
        ("kubelet.slice/kubelet-kubepods.slice", "systemd (kubelet-kubepods.slice)"),
        ("system.slice", "no kubepods"),
    ] {
        let drawn = Drawn::new(&[CGROUP2, BPFFS]);
        drawn.directory(&format!("sys/fs/cgroup/{directory}"));
        assert_eq!(drawn.finding("kubelet's cgroup driver").seen, expected);
    }
}

#[test]
fn socket_load_balancers_are_known_by_their_programs() {
    for (hooks, expected) in [
        (&["cil_sock4_connect", "cil_sock4_sendmsg"][..], "Cilium"),
        (&["sock4_connect"], "Cilium"),
        (&["calico_connect_v4"], "Calico"),
        (&["sd_devices", "connect4"], "kube-proxy"),
        (&[], "kube-proxy"),
    ] {
        let finding = Drawn::usual().hooks(hooks).finding("Services' addresses");
        assert!(finding.seen.contains(expected) && !finding.verdict.is_obstacle(), "{finding:?}");
    }
    let mut blind = Drawn::usual();
    blind.hooks = None;
    assert_eq!(blind.finding("Services' addresses").seen, "not known");
}

#[test]
fn taken_ports_are_seen_in_every_namespace_once() {
    let drawn = Drawn::new(&[CGROUP2, BPFFS]);
    // A pod of two processes with a proxy; one whose client has such a port; one without anything.
    drawn.process(40, 7, "", TUNNEL6);
    drawn.process(41, 7, "", TUNNEL6);
    drawn.process(50, 8, CLIENT, "");
    drawn.process(60, 9, ADMIN, "");
    assert_eq!(drawn.finding("ports 15001, 15006, 15008 in pods").seen, "taken: 15008 in 1");
    // 15020 in a pod is the pod's own.
    assert_eq!(drawn.finding("port 15020 of the node").seen, "free");
    drawn.file("proc/1/net/tcp", &format!("{HEADING}{ADMIN}"));
    assert_eq!(drawn.finding("port 15020 of the node").seen, "taken");
}

#[test]
fn what_cannot_be_looked_at_is_no_good_news() {
    let empty = tempfile::tempdir().unwrap();
    let error = look(&Node { root: empty.path().into(), hooks: None }).unwrap_err();
    let Error::Unreadable { path, .. } = error;
    assert!(path.ends_with("proc/1/mountinfo"));
    assert_eq!(run(empty.path(), &[]).0, 2);
}

/// Exit code and output of the command.
fn run(root: &Path, args: &[&str]) -> (i32, String) {
    let command = Command::new(env!("CARGO_BIN_EXE_mtls"))
        .arg("node-check")
        .arg("--root")
        .arg(root)
        .args(args)
        .output();
    let output = command.unwrap();
    (output.status.code().unwrap(), String::from_utf8(output.stdout).unwrap())
}

#[test]
fn the_command_says_what_to_set_and_its_exit_code_whether_to_install() {
    // What a drawn node's kernel can do is this machine's, without a place to attach to: never ready.
    let (code, table) = run(Drawn::new(&[UNUSUAL, BPFFS]).cni("10-calico.conflist", ISTIO).root.path(), &[]);
    assert_eq!(code, 1);
    for expected in
        ["CONFLICT", "Calico", "--set node.paths.cgroup=/mnt/cgroup2", "helm install mtls deploy/chart"]
    {
        assert!(table.contains(expected), "{expected}:\n{table}");
    }
    let (_, json) = run(Drawn::usual().cni("10-calico.conflist", CALICO).root.path(), &["--output", "json"]);
    let findings: serde_json::Value = serde_json::from_str(&json).unwrap();
    let cni = findings.as_array().unwrap().iter().find(|finding| finding["what"] == "CNI").unwrap();
    assert_eq!(cni["verdict"]["verdict"], "good");
}
