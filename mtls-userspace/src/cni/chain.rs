//! Network configurations as JSON: one in, the same with our plugin at the end of its chain, or without it, out. Pure.

use serde_json::{Map, Value, json};

use super::NAME;

/// Why a configuration cannot have our plugin.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub(super) enum Unusable {
    #[error("it is no JSON: {0}")]
    Json(String),
    #[error("it is no JSON object")]
    NoObject,
    #[error("`plugins` is no list of objects")]
    Plugins,
    #[error("cniVersion {0} is older than 0.3.0, which knows no chains")]
    Version(String),
}

/// The configuration with `entry` at its end; `None` if it has that already. A single plugin's becomes a list.
pub(super) fn with(text: &str, entry: &Value) -> Result<Option<String>, Unusable> {
    let mut config = parse(text)?;
    if !config.contains_key("plugins") {
        config = listed(config);
    }
    let plugins = plugins(&mut config)?;
    let before = plugins.clone();
    plugins.retain(|plugin| !is_ours(plugin));
    plugins.push(entry.clone());
    Ok((*plugins != before).then(|| written(&config)))
}

/// The configuration without our plugin; `None` if it does not have it.
pub(super) fn without(text: &str) -> Result<Option<String>, Unusable> {
    let mut config = parse(text)?;
    if !config.contains_key("plugins") {
        return Ok(None);
    }
    let plugins = plugins(&mut config)?;
    let before = plugins.len();
    plugins.retain(|plugin| !is_ours(plugin));
    Ok((plugins.len() < before).then(|| written(&config)))
}

fn parse(text: &str) -> Result<Map<String, Value>, Unusable> {
    let value: Value = serde_json::from_str(text).map_err(|error| Unusable::Json(error.to_string()))?;
    let Value::Object(config) = value else { return Err(Unusable::NoObject) };
    let version = config.get("cniVersion").and_then(Value::as_str).unwrap_or("0.1.0");
    if version.starts_with("0.1.") || version.starts_with("0.2.") {
        return Err(Unusable::Version(version.to_owned()));
    }
    Ok(config)
}

/// A single plugin's configuration as a list of one.
fn listed(mut plugin: Map<String, Value>) -> Map<String, Value> {
    let mut list = Map::new();
    for key in ["cniVersion", "name", "disableCheck", "disableGC"] {
        if let Some(value) = plugin.remove(key) {
            list.insert(key.to_owned(), value);
        }
    }
    list.insert("plugins".to_owned(), json!([plugin]));
    list
}

fn plugins(config: &mut Map<String, Value>) -> Result<&mut Vec<Value>, Unusable> {
    match config.get_mut("plugins") {
        Some(Value::Array(plugins)) if plugins.iter().all(Value::is_object) => Ok(plugins),
        _ => Err(Unusable::Plugins),
    }
}

fn is_ours(plugin: &Value) -> bool {
    plugin.get("type").and_then(Value::as_str) == Some(NAME)
}

fn written(config: &Map<String, Value>) -> String {
    // An object of JSON values can always be written.
    serde_json::to_string_pretty(config).map(|text| text + "\n").unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> Value {
        json!({ "type": NAME, "agentSocket": "/run/mtls/agent.sock" })
    }

    fn types(text: &str) -> Vec<String> {
        let config: Value = serde_json::from_str(text).unwrap();
        let plugins = config["plugins"].as_array().unwrap();
        plugins.iter().map(|plugin| plugin["type"].as_str().unwrap().to_owned()).collect()
    }

    const LIST: &str = r#"{"cniVersion":"0.3.1","name":"cbr0","plugins":[
        {"type":"flannel","delegate":{"hairpinMode":true}},{"type":"portmap","capabilities":{"portMappings":true}}]}"#;

    #[test]
    fn a_list_gets_our_plugin_last_and_once() {
        let text = with(LIST, &entry()).unwrap().unwrap();
        assert_eq!(types(&text), ["flannel", "portmap", NAME]);
        assert_eq!(with(&text, &entry()), Ok(None));
        // Another put itself behind it; an older agent had other settings.
        let mut config: Value = serde_json::from_str(&text).unwrap();
        config["plugins"].as_array_mut().unwrap().push(json!({ "type": "bandwidth" }));
        let text = with(&config.to_string(), &json!({ "type": NAME, "waitSeconds": 5 })).unwrap().unwrap();
        assert_eq!(types(&text), ["flannel", "portmap", "bandwidth", NAME]);
        let config: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(config["plugins"][3]["waitSeconds"], 5);
        assert_eq!(config["plugins"][0]["delegate"]["hairpinMode"], true);
    }

    #[test]
    fn a_single_plugin_becomes_a_list() {
        let single = r#"{"cniVersion":"1.0.0","name":"k8s-pod-network","type":"calico","ipam":{"type":"calico-ipam"}}"#;
        let text = with(single, &entry()).unwrap().unwrap();
        assert_eq!(types(&text), ["calico", NAME]);
        let config: Value = serde_json::from_str(&text).unwrap();
        assert_eq!((&config["cniVersion"], &config["name"]), (&json!("1.0.0"), &json!("k8s-pod-network")));
        assert!(config["plugins"][0].get("cniVersion").is_none());
    }

    #[test]
    fn without_it_the_list_is_as_it_was() {
        let text = with(LIST, &entry()).unwrap().unwrap();
        let text = without(&text).unwrap().unwrap();
        let (is, was): (Value, Value) =
            (serde_json::from_str(&text).unwrap(), serde_json::from_str(LIST).unwrap());
        assert_eq!(is, was);
        assert_eq!(without(LIST), Ok(None));
        assert_eq!(without(r#"{"cniVersion":"1.0.0","type":"calico"}"#), Ok(None));
    }

    #[test]
    fn what_cannot_be_chained_says_why() {
        for (text, word) in [
            ("{", "JSON"),
            ("[]", "object"),
            (r#"{"cniVersion":"1.0.0","plugins":{}}"#, "plugins"),
            (r#"{"cniVersion":"1.0.0","plugins":[1]}"#, "plugins"),
            (r#"{"cniVersion":"0.2.0","type":"bridge"}"#, "0.2.0"),
            (r#"{"type":"bridge"}"#, "0.1.0"),
        ] {
            let error = with(text, &entry()).unwrap_err().to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
