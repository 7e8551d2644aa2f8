//! The API's permissions: with exactly the rules that are installed agents and authority work, every rule is used, and
//! without any part of it the one who lacks it says which. Against the tests' own API server, which knows RBAC.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result};
use mtls_tests::kubernetes::{ApiServer, Rule};
use mtls_tests::{Lab, Mesh, Options, eventually, skip};
use serde_json::{Value, json};

use crate::rendered::{Objects, kustomized, parse, texts};

const NAMESPACE: &str = "mtls-system";
const AGENT: &str = "system:serviceaccount:mtls-system:mtls-node";
const AUTHORITY: &str = "system:serviceaccount:mtls-system:mtls-ca";
const NEEDS: [&str; 2] = ["ip", "kubectl"];

/// One verb on one resource, with its group, as it is granted.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Permission {
    verb: String,
    resource: String,
    is_everywhere: bool,
}

fn granted(objects: &Objects, roles: &[&str]) -> Result<Vec<Permission>> {
    let mut all = Vec::new();
    for role in roles {
        for rule in objects[*role]["rules"].as_array().context("no rules")? {
            let group = texts(rule, "/apiGroups")?.concat();
            for resource in texts(rule, "/resources")? {
                let resource =
                    if group.is_empty() { resource.to_owned() } else { format!("{resource}.{group}") };
                let is_everywhere = role.starts_with("ClusterRole/");
                all.extend(texts(rule, "/verbs")?.into_iter().map(|verb| Permission {
                    verb: verb.into(),
                    resource: resource.clone(),
                    is_everywhere,
                }));
            }
        }
    }
    Ok(all)
}

/// As the API server of the tests wants them.
fn rules<'a>(permissions: impl IntoIterator<Item = &'a Permission>) -> Vec<Rule> {
    let text = |text: &str| -> &'static str { text.to_owned().leak() };
    let rule = |permission: &Permission| {
        let rule = Rule::new(vec![text(&permission.verb)].leak(), text(&permission.resource));
        if permission.is_everywhere { rule } else { rule.within(NAMESPACE) }
    };
    permissions.into_iter().map(rule).collect()
}

/// What a request that was let in made use of: `GET /apis/GROUP/VERSION/[namespaces/NAME/]RESOURCE[/NAME]?…`.
fn used(request: &str) -> Option<(String, String)> {
    let (method, rest) = request.split_once(' ')?;
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let mut parts = path.trim_start_matches('/').split('/').collect::<Vec<_>>();
    let group = match *parts.first()? {
        "api" => String::new(),
        "apis" => format!(".{}", parts.remove(1)),
        _ => return None,
    };
    let mut parts = parts.get(2..)?;
    if parts.len() > 2 && parts[0] == "namespaces" {
        parts = &parts[2..];
    }
    let verb = match (method, parts.len()) {
        ("GET", 1) if query.contains("watch=") => "watch",
        ("GET", 1) => "list",
        ("GET", _) => "get",
        ("POST", _) => "create",
        ("PUT", _) => "update",
        _ => return None,
    };
    Some((verb.into(), format!("{}{group}", parts.first()?)))
}

fn in_cluster() -> Options {
    Options { kubernetes: true, ..Options::default() }
}

/// Gives agents and authority what is installed.
fn grant(api: &ApiServer, agent: &[Permission], authority: &[Permission]) {
    api.rules(AGENT, rules(agent));
    api.rules(AUTHORITY, rules(authority));
}

#[test]
fn with_exactly_the_rules_installed_all_works_and_each_is_used() -> Result<()> {
    if skip(&NEEDS) {
        return Ok(());
    }
    let objects = parse(&kustomized("")?)?;
    let agent = granted(&objects, &["ClusterRole/mtls-node"])?;
    let authority = granted(&objects, &["ClusterRole/mtls-ca", "Role/mtls-ca"])?;
    let lab = Lab::two_nodes()?;
    lab.pod("node-a", "client")?;
    let mut mesh = Mesh::start_with(&lab, &in_cluster())?;
    let api = lab.api_server()?;
    // Everything anew, with these rules: the authority makes its Secret, and agents get certificates from it.
    grant(api, &agent, &authority);
    api.define("clustertrustbundles.certificates.k8s.io", true);
    api.delete(&kept("Secret", "mtls-ca"))?;
    api.delete(&kept("ConfigMap", "mtls-ca-root"))?;
    // So that the lab waits for the new roots, as a volume without its ConfigMap does.
    std::fs::remove_file(lab.dir().join("root-cert.pem"))?;
    let earlier = api.requests().len();
    mesh.restart_ca(&lab, &in_cluster())?;
    for node in ["node-a", "node-b"] {
        mesh.agent(node).kill();
        mesh.agent(node).start()?;
    }
    // Somebody garbles the roots, and the authority puts them right.
    for object in [kept("ConfigMap", "mtls-ca-root"), kept("ClusterTrustBundle", "mtls-ca-root")] {
        let content = |object: Value| (object["data"].clone(), object["spec"].clone());
        let published = || api.get(&object).map(content);
        let right = published().with_context(|| format!("nothing is published as {object}"))?;
        api.apply(&garbled(&object))?;
        let restored = eventually(Duration::from_secs(30), || (published()? == right).then_some(()));
        assert!(restored.is_some(), "it stays garbled: {object}");
    }
    let used: BTreeSet<(String, String)> =
        api.requests()[earlier..].iter().filter_map(|request| used(request)).collect();
    for Permission { verb, resource, .. } in agent.iter().chain(&authority) {
        assert!(
            used.contains(&(verb.clone(), resource.clone())),
            "nobody uses {verb} on {resource}: {used:?}"
        );
    }
    Ok(())
}

#[test]
fn an_agent_that_may_not_follow_a_kind_names_it() -> Result<()> {
    if skip(&NEEDS) {
        return Ok(());
    }
    let objects = parse(&kustomized("")?)?;
    let agent = granted(&objects, &["ClusterRole/mtls-node"])?;
    let lab = Lab::two_nodes()?;
    lab.pod("node-a", "client")?;
    let mut mesh = Mesh::start_with(&lab, &in_cluster())?;
    let api = lab.api_server()?;
    for missing in &agent {
        mesh.agent("node-a").kill();
        api.rules(AGENT, rules(agent.iter().filter(|permission| *permission != missing)));
        let earlier = mesh.agent("node-a").log().len();
        mesh.agent("node-a").launch()?;
        let kind = missing.resource.split('.').next().unwrap_or_default();
        let named = eventually(Duration::from_secs(15), || {
            let said = mesh.agent("node-a").log().split_off(earlier).to_lowercase();
            said.lines().any(|line| line.contains("list and watch") && line.contains(kind)).then_some(())
        });
        assert!(named.is_some(), "{missing:?}: {}", mesh.agent("node-a").log().split_off(earlier));
    }
    mesh.agent("node-a").kill();
    api.rules(AGENT, rules(&agent));
    mesh.agent("node-a").start()
}

#[test]
fn an_authority_that_lacks_a_verb_names_what_it_cannot_do() -> Result<()> {
    if skip(&NEEDS) {
        return Ok(());
    }
    let objects = parse(&kustomized("")?)?;
    let authority = granted(&objects, &["ClusterRole/mtls-ca", "Role/mtls-ca"])?;
    let lab = Lab::two_nodes()?;
    lab.pod("node-a", "client")?;
    lab.api_server()?.define("clustertrustbundles.certificates.k8s.io", true);
    let mut mesh = Mesh::start_with(&lab, &in_cluster())?;
    let api = lab.api_server()?;
    let log = || std::fs::read_to_string(lab.dir().join("ca.log")).unwrap_or_default();
    for missing in &authority {
        let kind = missing.resource.split('.').next().unwrap_or_default();
        let object = match kind {
            "secrets" => Some(kept("Secret", "mtls-ca")),
            "configmaps" => Some(kept("ConfigMap", "mtls-ca-root")),
            "clustertrustbundles" => Some(kept("ClusterTrustBundle", "mtls-ca-root")),
            _ => None,
        };
        match (missing.verb.as_str(), &object) {
            ("create", Some(object)) => api.delete(object)?,
            ("update", Some(object)) => drop(api.apply(&garbled(object))?),
            _ => {}
        }
        api.rules(AUTHORITY, rules(authority.iter().filter(|permission| *permission != missing)));
        let earlier = log().len();
        mesh.relaunch_ca(&lab, &in_cluster())?;
        mesh.agent("node-a").kill();
        mesh.agent("node-a").launch()?;
        let expected = match (kind, missing.verb.as_str()) {
            ("secrets", "get") => "cannot read Secret mtls-system/mtls-ca".into(),
            ("secrets", _) => "cannot make Secret mtls-system/mtls-ca".into(),
            ("configmaps", "get") => "cannot read ConfigMap mtls-system/mtls-ca-root".into(),
            ("configmaps", "create") => "cannot make ConfigMap mtls-system/mtls-ca-root".into(),
            ("configmaps", _) => "cannot update ConfigMap mtls-system/mtls-ca-root".into(),
            ("clustertrustbundles", "get") => "cannot read ClusterTrustBundle mtls-ca-root".into(),
            ("clustertrustbundles", "create") => "cannot make ClusterTrustBundle mtls-ca-root".into(),
            ("clustertrustbundles", _) => "cannot update ClusterTrustBundle mtls-ca-root".into(),
            ("tokenreviews", _) => "TokenReview".into(),
            (followed, _) => format!("list and watch {followed}"),
        };
        // One that never serves is asked nothing by the agent.
        let is_said = |line: &str| {
            line.contains(&expected)
                && (is_trouble(line) || line.contains("the roots are in the ConfigMap only"))
        };
        let named = eventually(Duration::from_secs(20), || {
            log().split_off(earlier).lines().any(is_said).then_some(())
        });
        assert!(named.is_some(), "without {missing:?} not {expected:?}: {}", log().split_off(earlier));
    }
    Ok(())
}

/// What the authority keeps in the cluster.
fn kept(kind: &str, name: &str) -> Value {
    let version = if kind == "ClusterTrustBundle" { "certificates.k8s.io/v1beta1" } else { "v1" };
    let mut object = json!({"apiVersion": version, "kind": kind, "metadata": {"name": name}});
    if version == "v1" {
        object["metadata"]["namespace"] = NAMESPACE.into();
    }
    object
}

/// The same with other roots than the authority's.
fn garbled(object: &Value) -> Value {
    let mut garbled = object.clone();
    match object["kind"].as_str() {
        Some("ClusterTrustBundle") => garbled["spec"] = json!({"trustBundle": "none"}),
        _ => garbled["data"] = json!({"root-cert.pem": "none"}),
    }
    garbled
}

fn is_trouble(line: &str) -> bool {
    ["WARN", "ERROR", "mtls:"].iter().any(|word| line.contains(word))
}

#[test]
fn nothing_but_the_names_it_needs_is_open_to_the_authority() -> Result<()> {
    if skip(&NEEDS) {
        return Ok(());
    }
    // Limits by name, which the API server of the tests does not know.
    let objects = parse(&kustomized("")?)?;
    for rule in objects["Role/mtls-ca"]["rules"].as_array().context("no rules")? {
        let verbs = texts(rule, "/verbs")?;
        let is_named = rule["resourceNames"].as_array().is_some_and(|names| names.len() == 1);
        assert!(verbs == ["create"] || is_named, "{rule}");
        assert!(!verbs.contains(&"list") && !verbs.contains(&"*"), "{rule}");
    }
    let everywhere = objects.iter().filter(|(key, _)| key.starts_with("ClusterRole/"));
    for rule in everywhere.flat_map(|(_, role)| role["rules"].as_array().into_iter().flatten()) {
        let resources = texts(rule, "/resources")?;
        assert!(!resources.contains(&"secrets") && !resources.contains(&"*"), "{rule}");
        let is_read = |verb: &&str| ["list", "watch"].contains(verb);
        let writes: Vec<&str> = texts(rule, "/verbs")?.into_iter().filter(|verb| !is_read(verb)).collect();
        let may_write = ["tokenreviews", "clustertrustbundles"];
        assert!(writes.is_empty() || resources.iter().all(|name| may_write.contains(name)), "{rule}");
    }

    Ok(())
}
