//! Rendering: a variant in, the objects that an API server would be sent out.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::Value;

use crate::{deployed, run};

/// By `Kind/name`.
pub type Objects = BTreeMap<String, Value>;

pub fn parse(text: &str) -> Result<Objects> {
    let mut objects = Objects::new();
    for document in serde_yaml_ng::Deserializer::from_str(text) {
        let object = Value::deserialize(document)?;
        if object.is_null() {
            continue;
        }
        let key = format!("{}/{}", text_of(&object, "/kind")?, text_of(&object, "/metadata/name")?);
        ensure!(objects.insert(key.clone(), object).is_none(), "{key} twice");
    }
    Ok(objects)
}

/// As `kubectl apply -k` sends it.
pub fn kustomized(directory: &str) -> Result<String> {
    let path = deployed(directory);
    Ok(run("kubectl", &["kustomize", &path.to_string_lossy()])?.success()?.stdout)
}

/// As `helm install` sends it, with further arguments.
pub fn charted(args: &[&str]) -> Result<String> {
    let chart = deployed("chart");
    let chart = chart.to_string_lossy();
    let usual = ["template", "mtls", &chart, "--namespace", "mtls-system", "--include-crds"];
    Ok(run("helm", &[&usual[..], args].concat())?.success()?.stdout)
}

pub fn text_of<'a>(object: &'a Value, pointer: &str) -> Result<&'a str> {
    object.pointer(pointer).and_then(Value::as_str).with_context(|| format!("no {pointer} in {object}"))
}

/// What a container may do beyond what anybody may.
pub fn capabilities(container: &Value) -> Result<Vec<&str>> {
    let security = &container["securityContext"]["capabilities"];
    if security["add"].is_null() { Ok(Vec::new()) } else { texts(security, "/add") }
}

/// An array of texts.
pub fn texts<'a>(object: &'a Value, pointer: &str) -> Result<Vec<&'a str>> {
    let array = object.pointer(pointer).and_then(Value::as_array);
    let array = array.with_context(|| format!("no {pointer} in {object}"))?;
    array.iter().map(|value| value.as_str().with_context(|| format!("{value} is no text"))).collect()
}
