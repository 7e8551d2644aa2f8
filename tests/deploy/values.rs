//! The chart's values: each is documented, has a schema, and does something; what can't be meant is refused.

use anyhow::{Context, Result};
use serde_json::Value;

use crate::rendered::charted;
use crate::{needs, read};

/// Every value that is no group of values, as `a.b.c`.
fn leaves(value: &Value, path: &str, found: &mut Vec<String>) {
    match value.as_object().filter(|object| !object.is_empty() && !is_free(path)) {
        Some(object) => {
            for (key, value) in object {
                leaves(value, &format!("{path}{}{key}", if path.is_empty() { "" } else { "." }), found);
            }
        }
        None => found.push(path.to_owned()),
    }
}

/// Groups whose keys are the user's or Kubernetes' own.
fn is_free(path: &str) -> bool {
    ["config", "resources", "nodeSelector"].iter().any(|end| path.ends_with(end))
}

#[test]
fn each_value_has_a_schema_and_a_use() -> Result<()> {
    let values: Value = serde_yaml_ng::from_str(&read("chart/values.yaml")?)?;
    let schema: Value = serde_json::from_str(&read("chart/values.schema.json")?)?;
    let mut templates = String::new();
    for entry in std::fs::read_dir(crate::deployed("chart/templates"))? {
        templates += &std::fs::read_to_string(entry?.path())?;
    }
    let mut found = Vec::new();
    leaves(&values, "", &mut found);
    assert!(found.len() > 20, "{found:?}");
    for path in found {
        let mut at = &schema;
        for part in path.split('.') {
            at = at["properties"].get(part).with_context(|| format!("no schema for {path}"))?;
        }
        assert!(templates.contains(&format!(".Values.{path}")), "no template uses {path}");
    }
    Ok(())
}

#[test]
fn what_cannot_be_meant_is_refused_with_its_name() -> Result<()> {
    needs!("helm");
    for (set, named) in [
        ("ca.replica=3", "replica"),
        ("ca.replicas=0", "replicas"),
        ("image.pullPolicy=Sometimes", "pullPolicy"),
        ("image.digest=sha256:12", "digest"),
        ("trustDomain=Cluster.Local", "trustDomain"),
        ("node.paths.cgroup=sys", "cgroup"),
        ("node.config.drain=soon", "drain"),
        ("node.config.same-node=trust", "same-node"),
        // The chart's own: setting it here would be overruled without a word.
        ("node.config.ca-address=https://elsewhere", "ca-address"),
    ] {
        let refused = charted(&["--set", set]).expect_err(set).to_string();
        assert!(refused.contains(named) && refused.contains("schema"), "{set}: {refused}");
    }
    Ok(())
}

#[test]
fn what_can_be_meant_arrives() -> Result<()> {
    needs!("helm");
    for (set, expected) in [
        ("image.tag=1.2.3", "image: mtls:1.2.3"),
        ("image.repository=r.example/m", "image: r.example/m:0.1.0"),
        ("trustDomain=prod.example", "--trust-domain=prod.example"),
        ("trustDomain=prod.example", "trust-domain: prod.example"),
        ("node.config.drain=90", "terminationGracePeriodSeconds: 105"),
        ("node.config.workers=3", "workers: 3"),
        ("node.paths.cgroup=/mnt/cgroup2", "path: /mnt/cgroup2"),
        ("image.pullSecrets={pull}", "- name: pull"),
        ("ca.leafLifetime=1h", "--leaf-lifetime=1h"),
    ] {
        assert!(charted(&["--set", set])?.contains(expected), "{set} does not give {expected}");
    }
    let digest = format!("sha256:{}", "0".repeat(64));
    let rendered = charted(&["--set", &format!("image.digest={digest}")])?;
    assert_eq!(rendered.matches(&format!("image: mtls@{digest}")).count(), 2);
    assert!(!charted(&["--set", "node.scrape=false"])?.contains("prometheus.io"));
    Ok(())
}
