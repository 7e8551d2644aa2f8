//! Kustomize and Helm install the same.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::rendered::{Objects, charted, kustomized, parse, text_of};
use crate::{VARIANTS, deployed, needs};

/// Of the configuration's two spellings, one: kustomize puts a hash of it into its name, the chart into an annotation.
fn plain(mut objects: Objects) -> Result<Objects> {
    let (key, mut config) = objects
        .iter()
        .find(|(key, _)| key.starts_with("ConfigMap/mtls-node"))
        .map(|(key, config)| (key.clone(), config.clone()))
        .context("no configuration")?;
    objects.remove(&key);
    let name = text_of(&config, "/metadata/name")?.to_owned();
    let settings: Value = serde_yaml_ng::from_str(text_of(&config, "/data/node.config")?)?;
    config["data"]["node.config"] = settings;
    config["metadata"]["name"] = "mtls-node".into();
    objects.insert("ConfigMap/mtls-node".into(), config);

    let agent = objects.get_mut("DaemonSet/mtls-node").context("no agent")?;
    let annotations = agent.pointer_mut("/spec/template/metadata/annotations").context("no annotations")?;
    let checksum =
        annotations.as_object_mut().and_then(|all| all.remove("mtls.dev/config-checksum")).is_some();
    ensure!(checksum || name != "mtls-node", "a changed configuration does not roll out");
    let volumes = agent.pointer_mut("/spec/template/spec/volumes").and_then(Value::as_array_mut);
    let volume = volumes.context("no volumes")?.iter_mut().find(|volume| volume["name"] == "config");
    let used = volume.context("the configuration is not mounted")?;
    ensure!(used["configMap"]["name"] == name.as_str(), "another configuration is mounted: {used}");
    used["configMap"]["name"] = "mtls-node".into();
    Ok(objects)
}

#[test]
fn chart_and_kustomize_install_the_same() -> Result<()> {
    needs!("kubectl", "helm");
    for (directory, values) in VARIANTS {
        let mut args = vec!["--set", "createNamespace=true"];
        let values = values.map(|values| deployed(values).to_string_lossy().into_owned());
        args.extend(values.iter().flat_map(|values| ["--values", values]));
        let (kustomized, charted) =
            (plain(parse(&kustomized(directory)?)?)?, plain(parse(&charted(&args)?)?)?);
        let own_authority = kustomized.contains_key("Deployment/mtls-ca");
        assert_eq!(own_authority, directory != "signer", "{directory}");
        assert!(kustomized.len() > if own_authority { 12 } else { 5 }, "{:?}", kustomized.keys());
        assert_eq!(kustomized.keys().collect::<Vec<_>>(), charted.keys().collect::<Vec<_>>(), "{directory}");
        for (key, object) in kustomized {
            pretty_assert(&format!("{directory}: {key}"), &object, &charted[&key]);
        }
    }
    Ok(())
}

#[test]
fn a_difference_would_be_noticed() -> Result<()> {
    needs!("kubectl", "helm");
    let kustomized = plain(parse(&kustomized("")?)?)?;
    let other = plain(parse(&charted(&["--set", "node.config.drain=31"])?)?)?;
    let differing: Vec<_> =
        kustomized.iter().filter(|(key, object)| other.get(*key) != Some(object)).collect();
    let differing: Vec<&str> = differing.iter().map(|(key, _)| key.as_str()).collect();
    assert_eq!(differing, ["ConfigMap/mtls-node", "DaemonSet/mtls-node", "Namespace/mtls-system"]);
    Ok(())
}

#[track_caller]
fn pretty_assert(what: &str, left: &Value, right: &Value) {
    let pretty = |value: &Value| serde_json::to_string_pretty(value).unwrap_or_default();
    assert!(left == right, "{what} by kustomize:\n{}\nby helm:\n{}", pretty(left), pretty(right));
}
