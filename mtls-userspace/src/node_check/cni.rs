//! Which CNI the node has, and what in its chain, or beside it in the kernel, does things to sockets.
//!
//! Sources: `/etc/cni/net.d`, of which container runtimes take the first file; names of the programs that Cilium and Calico
//! attach to cgroups for Services.

use std::fs;

use serde::Deserialize;

use super::{Finding, Node, Verdict, inside};

const DIRECTORIES: [&str; 3] =
    ["/etc/cni/net.d", "/var/lib/rancher/k3s/agent/etc/cni/net.d", "/etc/cni/multus/net.d"];
/// Our own name in a chain.
const OURS: &str = "mtls-cni";

/// A network configuration, or a list of them that are called one after another.
#[derive(Deserialize)]
struct Configuration {
    #[serde(default)]
    name: String,
    #[serde(rename = "type")]
    kind: Option<String>,
    #[serde(default)]
    plugins: Vec<Plugin>,
}

#[derive(Deserialize)]
struct Plugin {
    #[serde(rename = "type")]
    kind: String,
}

/// What the node's network is made by, and whom it gets on with.
pub fn look(node: &Node) -> Vec<Finding> {
    let mut findings = Vec::new();
    match first(node) {
        Ok(Some((directory, file, configuration))) => {
            let kinds = configuration.kinds();
            findings.push(network(directory, &file, &configuration, &kinds));
            findings.extend(kinds.iter().filter_map(|kind| neighbour(kind)));
        }
        Ok(None) => {
            let because =
                "kubelet has no network here yet; the plugin is put into the configuration when there is one";
            let verdict = Verdict::Known { because: because.into() };
            findings.push(Finding { what: "CNI", seen: format!("nothing in {}", DIRECTORIES[0]), verdict });
        }
        Err((file, reason)) => {
            let because = format!("container runtimes can't read it either: {reason}");
            findings.push(Finding { what: "CNI", seen: file, verdict: Verdict::Conflict { because } });
        }
    }
    findings.extend(balancer(node.hooks.as_deref()));
    findings
}

impl Configuration {
    fn kinds(&self) -> Vec<&str> {
        self.kind.iter().chain(self.plugins.iter().map(|plugin| &plugin.kind)).map(String::as_str).collect()
    }
}

type First = Result<Option<(&'static str, String, Configuration)>, (String, String)>;

/// The file that a container runtime takes: the first by name.
fn first(node: &Node) -> First {
    for directory in DIRECTORIES {
        let path = inside(&node.root, directory);
        let mut names: Vec<String> = fs::read_dir(&path)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| [".conf", ".conflist", ".json"].iter().any(|end| name.ends_with(end)))
            .collect();
        names.sort();
        let Some(name) = names.into_iter().next() else { continue };
        let file = format!("{directory}/{name}");
        let text = fs::read_to_string(path.join(&name)).map_err(|error| (file.clone(), error.to_string()))?;
        let read = serde_json::from_str(&text).map_err(|error| (file.clone(), error.to_string()))?;
        return Ok(Some((directory, file, read)));
    }
    Ok(None)
}

/// Networks by their plugin's type, or by the list's name where the plugin is anybody's.
const NETWORKS: [(&str, &str); 9] = [
    ("cilium-cni", "Cilium"),
    ("calico", "Calico"),
    ("kindnet", "kindnet"),
    ("flannel", "Flannel"),
    ("aws-cni", "Amazon VPC"),
    ("azure-vnet", "Azure"),
    ("antrea", "Antrea"),
    ("weave-net", "Weave Net"),
    ("bridge", "bridge"),
];

fn network(directory: &str, file: &str, configuration: &Configuration, kinds: &[&str]) -> Finding {
    let called = |key: &str| kinds.contains(&key) || configuration.name == key;
    let name = NETWORKS.iter().find(|(key, _)| called(key)).map(|(_, name)| *name);
    let seen = format!("{} ({file}: {})", name.unwrap_or("unknown"), kinds.join(", "));
    let is_list = !configuration.plugins.is_empty();
    let verdict = match name {
        _ if !is_list => Verdict::Conflict {
            because: "the plugin needs a list (.conflist) to be put into; without it, pods start before they are enrolled"
                .into(),
        },
        _ if directory != DIRECTORIES[0] => Verdict::Set { value: "node.paths.cniConf", to: directory.into() },
        Some("Cilium") => Verdict::Known {
            because: "set cni.exclusive=false in Cilium, which otherwise removes what others put beside it".into(),
        },
        Some(_) => Verdict::Good,
        None => Verdict::Known { because: "tried with none like it; any that gives pods a network namespace works".into() },
    };
    Finding { what: "CNI", seen, verdict }
}

/// Others in the chain that redirect pods' connections.
fn neighbour(kind: &str) -> Option<Finding> {
    let (seen, verdict) = match kind {
        "istio-cni" => (
            "Istio's CNI plugin",
            Verdict::Conflict {
                because: "Istio redirects the same pods: leave namespaces with istio.io/dataplane-mode to one of the two, \
                          and remove the other (istioctl uninstall, or don't install this)"
                    .into(),
            },
        ),
        "linkerd-cni" => (
            "Linkerd's CNI plugin",
            Verdict::Known {
                because: "pods with Linkerd's proxy must not be enrolled: label them istio.io/dataplane-mode=none".into(),
            },
        ),
        "kuma-cni" => (
            "Kuma's CNI plugin",
            Verdict::Known {
                because: "pods with Kuma's proxy must not be enrolled: label them istio.io/dataplane-mode=none".into(),
            },
        ),
        OURS => ("mtls", Verdict::Known { because: "installed already".into() }),
        _ => return None,
    };
    Some(Finding { what: "in the CNI's chain", seen: seen.into(), verdict })
}

/// Programs that replace a Service's address when a socket connects, by the start of their names.
const BALANCERS: [(&str, &str); 4] = [
    ("cil_sock", "Cilium"),
    ("sock4_connect", "Cilium"),
    ("sock6_connect", "Cilium"),
    ("calico_connect", "Calico"),
];

fn balancer(hooks: Option<&[String]>) -> Option<Finding> {
    const WHAT: &str = "Services' addresses";
    let Some(hooks) = hooks else {
        let because = "programs at the hooks could not be listed; being root on the node is needed".into();
        return Some(Finding { what: WHAT, seen: "not known".into(), verdict: Verdict::Known { because } });
    };
    let whose = BALANCERS.iter().find(|(start, _)| hooks.iter().any(|name| name.starts_with(start)));
    let finding = match whose {
        Some((_, whose)) => Finding {
            what: WHAT,
            seen: format!("replaced at connect by {whose}'s socket load balancer"),
            verdict: Verdict::Known {
                because: "then connections are seen with the pod's address, which is in the mesh as well"
                    .into(),
            },
        },
        None => Finding {
            what: WHAT,
            seen: "replaced on the way (kube-proxy or the like)".into(),
            verdict: Verdict::Good,
        },
    };
    Some(finding)
}
