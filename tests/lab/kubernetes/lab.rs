//! What a cluster gives the product in a lab: ServiceAccounts with the rights of `deploy/`, tokens that kubelet would
//! project, and the volume that it would mount.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::json;

use super::{Rule, User};
use crate::Lab;
use crate::mesh::token_file;

const NAMESPACE: &str = "mtls-system";

/// What an agent's ClusterRole grants, and not a verb more.
pub fn agent_rules() -> Vec<Rule> {
    follows(&[
        "namespaces",
        "nodes",
        "pods",
        "services",
        "endpointslices.discovery.k8s.io",
        "peerauthentications.security.istio.io",
        "authorizationpolicies.security.istio.io",
        "validatingwebhookconfigurations.admissionregistration.k8s.io",
        "mutatingwebhookconfigurations.admissionregistration.k8s.io",
        "customresourcedefinitions.apiextensions.k8s.io",
        "apiservices.apiregistration.k8s.io",
    ])
}

fn follows(resources: &[&'static str]) -> Vec<Rule> {
    const FOLLOW: &[&str] = &["list", "watch"];
    resources.iter().map(|resource| Rule::new(FOLLOW, resource)).collect()
}

/// Makes ServiceAccounts of agents and authority known to the lab's API server, and writes their credentials.
pub(crate) fn give_access(lab: &Lab) -> Result<()> {
    let api = lab.api_server()?;
    let dir = lab.dir();
    let account = |name: &str| format!("system:serviceaccount:{NAMESPACE}:{name}");
    let mut ca = follows(&["namespaces", "pods"]);
    ca.push(Rule::new(&["create"], "tokenreviews.authentication.k8s.io"));
    ca.push(Rule::new(&["get", "create"], "secrets").within(NAMESPACE));
    ca.push(Rule::new(&["get", "create", "update"], "configmaps").within(NAMESPACE));
    for (part, name, rules) in [("agent", "mtls-node", agent_rules()), ("ca", "mtls-ca", ca)] {
        let token = api.user(User { name: account(name), rules, ..User::default() });
        api.kubeconfig(&kubeconfig(dir, part), &token)?;
    }
    for node in lab.nodes() {
        let extra = [("pod-name", "mtls-node-x"), ("node-name", node.name())];
        let token = api.user(User {
            name: account("mtls-node"),
            token: format!("projected.{}.{}", lab.id(), node.name()),
            audiences: vec!["mtls-ca".into()],
            extra: extra
                .map(|(key, value)| (format!("authentication.kubernetes.io/{key}"), value.into()))
                .into(),
            ..User::default()
        });
        std::fs::write(token_file(dir, node), token)?;
    }
    Ok(())
}

pub(crate) fn kubeconfig(dir: &Path, part: &str) -> PathBuf {
    dir.join(format!("{part}.kubeconfig"))
}

/// Does what kubelet does with a mounted ConfigMap: the file is what the object says, once it is there.
pub(crate) fn mount_roots(lab: &Lab, file: &Path) {
    let map = json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "mtls-ca-root",
    "namespace": NAMESPACE } });
    let found = lab.api_server().ok().and_then(|api| api.get(&map));
    if let Some(pem) = found.as_ref().and_then(|map| map["data"]["root-cert.pem"].as_str())
        && std::fs::read_to_string(file).ok().as_deref() != Some(pem)
    {
        let aside = file.with_extension("new");
        let written = std::fs::write(&aside, pem).and_then(|()| std::fs::rename(&aside, file));
        written.expect("the lab's own directory can be written to");
    }
}
