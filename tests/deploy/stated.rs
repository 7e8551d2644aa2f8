//! What manifests state about the product is true: flags exist, configuration is read, times fit.

use std::collections::BTreeSet;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::rendered::{Objects, capabilities, charted, kustomized, parse, text_of, texts};
use crate::{VARIANTS, needs, read, run};

/// Long flags that a subcommand knows.
fn flags(subcommand: &str) -> Result<BTreeSet<String>> {
    let help = run(mtls_tests::mtls()?, &[subcommand, "--help"])?.success()?.stdout;
    let flags = help.split_whitespace().filter_map(|word| word.strip_prefix("--"));
    Ok(flags.map(|flag| flag.trim_end_matches(|c: char| !c.is_ascii_alphanumeric()).to_owned()).collect())
}

fn container<'a>(objects: &'a Objects, key: &str) -> Result<&'a Value> {
    let pods = objects.get(key).with_context(|| format!("no {key}"))?;
    pods.pointer("/spec/template/spec/containers/0").context("no container")
}

#[test]
fn every_flag_in_them_exists() -> Result<()> {
    needs!("kubectl");
    let are_known = |objects: &Objects, key: &str| -> Result<()> {
        let args = texts(container(objects, key)?, "/args")?;
        let (subcommand, given) = args.split_first().context("no subcommand")?;
        let known = flags(subcommand)?;
        for flag in given {
            let name = flag.trim_start_matches("--").split('=').next().unwrap_or_default();
            assert!(known.contains(name), "mtls {subcommand} has no {flag}");
        }
        Ok(())
    };
    are_known(&parse(&kustomized("check")?)?, "DaemonSet/mtls-check")?;
    are_known(&parse(&kustomized("uninstall")?)?, "DaemonSet/mtls-uninstall")?;
    for (directory, _) in VARIANTS {
        let objects = parse(&kustomized(directory)?)?;
        are_known(&objects, "DaemonSet/mtls-node")?;
        if directory != "signer" {
            are_known(&objects, "Deployment/mtls-ca")?;
        }
        let (_, config) =
            objects.iter().find(|(key, _)| key.starts_with("ConfigMap/")).context("no config")?;
        let config: Value = serde_yaml_ng::from_str(text_of(config, "/data/node.config")?)?;
        let known = flags("node")?;
        for key in config.as_object().context("no map")?.keys() {
            assert!(known.contains(key), "mtls node has no --{key}");
        }
    }
    Ok(())
}

/// First cells, in backticks, of the README's table under this heading, with the rest of their rows.
fn table<'a>(readme: &'a str, heading: &str, occurrence: usize) -> Result<Vec<(&'a str, &'a str)>> {
    let start = format!("| {heading} |");
    let (position, _) =
        readme.match_indices(&start).nth(occurrence).with_context(|| format!("no table {heading}"))?;
    let rows = readme[position..].lines().skip(2).take_while(|line| line.starts_with('|'));
    rows.map(|row| {
        let (name, rest) =
            row.trim_start_matches("| `").split_once('`').with_context(|| format!("no name: {row}"))?;
        Ok((name, rest))
    })
    .collect()
}

fn named<'a>(rows: &[(&'a str, &str)]) -> BTreeSet<&'a str> {
    rows.iter().map(|(name, _)| *name).collect()
}

#[test]
fn each_privilege_is_justified_in_a_line() -> Result<()> {
    needs!("kubectl");
    let readme = read("README.md")?;
    let objects = parse(&kustomized("")?)?;
    for (directory, key, occurrence) in [
        ("", "DaemonSet/mtls-node", 0),
        ("check", "DaemonSet/mtls-check", 1),
        ("uninstall", "DaemonSet/mtls-uninstall", 2),
    ] {
        let objects = parse(&kustomized(directory)?)?;
        let container = container(&objects, key)?;
        let capabilities: BTreeSet<&str> = capabilities(container)?.into_iter().collect();
        // Of that one the README says that it has none.
        let stated = match directory {
            "uninstall" => BTreeSet::new(),
            _ => named(&table(&readme, "capability", occurrence)?),
        };
        assert_eq!(stated, capabilities, "{key}");
        let template = objects[key].pointer("/spec/template").context("no template")?;
        let mut of_node: BTreeSet<&str> = ["hostNetwork", "hostPID", "hostIPC"]
            .into_iter()
            .filter(|flag| template["spec"][*flag] == true)
            .collect();
        of_node.extend(container.pointer("/securityContext/seLinuxOptions/type").and_then(Value::as_str));
        let armour =
            format!("container.apparmor.security.beta.kubernetes.io/{}", text_of(container, "/name")?);
        of_node.extend(template["metadata"]["annotations"][armour].as_str());
        assert_eq!(named(&table(&readme, "of the node", occurrence)?), of_node, "{key}");
    }
    let uninstall = parse(&kustomized("uninstall")?)?;
    for (objects, key, occurrence) in [
        (&objects, "DaemonSet/mtls-node", 0),
        (&objects, "Deployment/mtls-ca", 1),
        (&uninstall, "DaemonSet/mtls-uninstall", 2),
    ] {
        let rows = table(&readme, "mount", occurrence)?;
        let volumes = objects[key].pointer("/spec/template/spec/volumes").and_then(Value::as_array);
        let volumes = volumes.context("no volumes")?;
        let names = volumes.iter().map(|volume| text_of(volume, "/name")).collect::<Result<BTreeSet<_>>>()?;
        assert_eq!(named(&rows), names, "{key}");
        for volume in volumes {
            let (_, row) = rows.iter().find(|(name, _)| volume["name"] == *name).context("no row")?;
            let place = volume.pointer("/hostPath/path").and_then(Value::as_str);
            assert!(
                place.map_or(row.contains("| – |"), |place| row.contains(&format!("`{place}`"))),
                "{volume}"
            );
        }
        let mounts = container(objects, key)?["volumeMounts"].as_array().context("no mounts")?;
        let mounted = mounts.iter().map(|mount| text_of(mount, "/name")).collect::<Result<BTreeSet<_>>>()?;
        assert_eq!(mounted, names, "{key} mounts what it has");
    }
    Ok(())
}

/// By resource: the verbs of every rule that a subject's roles have, with the names they are limited to.
fn rules(objects: &Objects, keys: &[&str]) -> Result<Vec<(String, String)>> {
    let mut found = std::collections::BTreeMap::<String, Vec<String>>::new();
    for key in keys {
        for rule in objects[*key]["rules"].as_array().context("no rules")? {
            let names =
                rule["resourceNames"].as_array().map(|_| texts(rule, "/resourceNames")).transpose()?;
            let names = names.map(|names| format!(" `{}`", names.join("`, `"))).unwrap_or_default();
            for resource in texts(rule, "/resources")? {
                let verbs = format!("{}{names}", texts(rule, "/verbs")?.join(", "));
                found.entry(resource.to_owned()).or_default().push(verbs);
            }
        }
    }
    Ok(found.into_iter().map(|(resource, verbs)| (resource, verbs.join("; "))).collect())
}

#[test]
fn each_verb_is_justified_in_a_line() -> Result<()> {
    needs!("kubectl");
    let readme = read("README.md")?;
    let objects = parse(&kustomized("")?)?;
    for (heading, keys) in [
        ("the agent's API access", &["ClusterRole/mtls-node"][..]),
        ("the authority's API access", &["ClusterRole/mtls-ca", "Role/mtls-ca"]),
    ] {
        let rows = table(&readme, heading, 0)?;
        let granted = rules(&objects, keys)?;
        assert_eq!(rows.len(), granted.len(), "{heading}: {granted:?}");
        for (resource, verbs) in granted {
            let (_, row) =
                rows.iter().find(|(name, _)| *name == resource).with_context(|| format!("no {resource}"))?;
            assert!(row.contains(&format!("| {verbs} |")), "{resource} has {verbs}: {row}");
        }
    }
    Ok(())
}

#[test]
fn an_agent_has_time_to_drain() -> Result<()> {
    needs!("kubectl", "helm");
    for (directory, _) in VARIANTS {
        let objects = parse(&kustomized(directory)?)?;
        let (_, config) =
            objects.iter().find(|(key, _)| key.starts_with("ConfigMap/")).context("no config")?;
        let config: Value = serde_yaml_ng::from_str(text_of(config, "/data/node.config")?)?;
        let grace =
            objects["DaemonSet/mtls-node"].pointer("/spec/template/spec/terminationGracePeriodSeconds");
        let (drain, grace) = (config["drain"].as_u64(), grace.and_then(Value::as_u64));
        assert!(drain.context("no drain")? + 10 <= grace.context("no grace period")?, "{directory}");
    }
    Ok(())
}

#[test]
fn surge_pods_find_room_beside_the_old_ones() -> Result<()> {
    needs!("kubectl");
    let objects = parse(&kustomized("")?)?;
    let agent = &objects["DaemonSet/mtls-node"];
    assert_eq!(agent.pointer("/spec/updateStrategy/rollingUpdate/maxSurge"), Some(&1.into()));
    assert_eq!(agent.pointer("/spec/updateStrategy/rollingUpdate/maxUnavailable"), Some(&0.into()));
    // A declared port on the node's network is a host port, and the scheduler gives each to one pod of a node.
    assert!(container(&objects, "DaemonSet/mtls-node")?["ports"].is_null());
    Ok(())
}

#[test]
fn no_pod_has_more_than_was_asked_for_in_sight() -> Result<()> {
    needs!("kubectl");
    let mut objects = parse(&kustomized("")?)?;
    objects.extend(parse(&kustomized("check")?)?);
    objects.extend(parse(&kustomized("uninstall")?)?);
    for key in
        ["DaemonSet/mtls-node", "Deployment/mtls-ca", "DaemonSet/mtls-check", "DaemonSet/mtls-uninstall"]
    {
        let spec = objects[key].pointer("/spec/template/spec").context("no spec")?;
        assert_eq!(spec["automountServiceAccountToken"], false, "{key}");
        let container = container(&objects, key)?;
        let security = &container["securityContext"];
        assert_eq!(security["readOnlyRootFilesystem"], true, "{key}");
        assert_eq!(security["allowPrivilegeEscalation"], false, "{key}");
        assert_eq!(texts(security, "/capabilities/drop")?, ["ALL"], "{key}");
        let profile = [security, &spec["securityContext"]].map(|context| &context["seccompProfile"]["type"]);
        assert!(profile.contains(&&Value::from("RuntimeDefault")), "{key}");
        assert!(container.pointer("/resources/requests/cpu").is_some(), "{key}");
        assert!(container.pointer("/resources/limits/memory").is_some(), "{key}");
        for volume in spec["volumes"].as_array().into_iter().flatten() {
            for token in volume.pointer("/projected/sources/0/serviceAccountToken").into_iter() {
                assert_eq!(token["expirationSeconds"], 3600, "{key}: {volume}");
            }
        }
        // Those two must push nothing off a node; what protects the others comes before them.
        let Ok(account) = text_of(spec, "/serviceAccountName") else {
            assert!(key.ends_with("-check") || key.ends_with("-uninstall"), "{key}");
            assert_eq!(spec["priorityClassName"], Value::Null);
            continue;
        };
        assert!(spec["priorityClassName"].as_str().is_some_and(|name| name.starts_with("system-")), "{key}");
        assert_eq!(objects[&format!("ServiceAccount/{account}")]["automountServiceAccountToken"], false);
    }
    let authority = objects["Deployment/mtls-ca"].pointer("/spec/template/spec").context("no spec")?;
    assert_eq!(authority["securityContext"]["runAsNonRoot"], true);
    assert!(
        container(&objects, "Deployment/mtls-ca")?.pointer("/securityContext/capabilities/add").is_none()
    );
    assert!(authority["hostNetwork"].is_null() && authority["hostPID"].is_null());
    Ok(())
}

#[test]
fn the_agents_token_for_the_authority_is_good_for_nothing_else() -> Result<()> {
    needs!("kubectl", "helm");
    for text in [kustomized("")?, charted(&[])?] {
        let objects = parse(&text)?;
        let volumes = objects["DaemonSet/mtls-node"].pointer("/spec/template/spec/volumes");
        let tokens: Vec<&Value> = volumes
            .and_then(Value::as_array)
            .context("no volumes")?
            .iter()
            .filter_map(|volume| volume.pointer("/projected/sources/0/serviceAccountToken"))
            .collect();
        let audiences: BTreeSet<Option<&str>> =
            tokens.iter().map(|token| token["audience"].as_str()).collect();
        assert_eq!(
            audiences,
            [None, Some("mtls-ca")].into(),
            "one for the API server, one for the authority"
        );
        let args = texts(container(&objects, "Deployment/mtls-ca")?, "/args")?;
        assert!(args.contains(&"--audience=mtls-ca"), "{args:?}");
    }
    Ok(())
}
