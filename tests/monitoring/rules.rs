//! Alert rules: they parse, each is tested both ways, and they ask for what agents have.

use std::collections::BTreeSet;

use anyhow::{Context, Result};
use serde_yaml_ng::Value;

use crate::promql::Query;
use crate::scene::{Scene, unknown};
use crate::{deployed, needs, promtool, read};

struct Rule {
    name: String,
    expression: String,
    severity: String,
    annotations: Value,
}

fn rules(text: &str) -> Result<Vec<Rule>> {
    let file: Value = serde_yaml_ng::from_str(text)?;
    let groups = file["groups"].as_sequence().context("no groups")?;
    let rules = groups.iter().flat_map(|group| group["rules"].as_sequence().into_iter().flatten());
    let text =
        |value: &Value, what: &str| value.as_str().map(str::to_owned).with_context(|| format!("no {what}"));
    rules
        .map(|rule| {
            Ok(Rule {
                name: text(&rule["alert"], "alert")?,
                expression: text(&rule["expr"], "expr")?,
                severity: text(&rule["labels"]["severity"], "severity")?,
                annotations: rule["annotations"].clone(),
            })
        })
        .collect()
}

/// Alerts of a test file that are seen to fire, and that are seen not to.
fn tested(text: &str) -> Result<[BTreeSet<String>; 2]> {
    let file: Value = serde_yaml_ng::from_str(text)?;
    let groups = file["tests"].as_sequence().context("no tests")?;
    let cases = groups.iter().flat_map(|group| group["promql_expr_test"].as_sequence().into_iter().flatten());
    let [mut fires, mut silent] = [BTreeSet::new(), BTreeSet::new()];
    for case in cases {
        let expression = case["expr"].as_str().context("no expr")?;
        let (_, rest) = expression.split_once("alertname=\"").context("a case that names no alert")?;
        let (name, _) = rest.split_once('"').context("a name without end")?;
        let samples = case["exp_samples"].as_sequence().context("no exp_samples")?;
        let of = if samples.is_empty() { &mut silent } else { &mut fires };
        of.insert(name.to_owned());
    }
    Ok([fires, silent])
}

#[test]
fn they_fire_and_keep_silent_as_tested() -> Result<()> {
    needs!("promtool");
    promtool(&["check", "config"], &deployed("prometheus.yaml"))?.success()?;
    promtool(&["test", "rules"], &deployed("alerts_test.yaml"))?.success()?;
    Ok(())
}

#[test]
fn a_rule_that_does_otherwise_is_noticed() -> Result<()> {
    needs!("promtool");
    let dir = std::env::temp_dir().join(format!("mtls-rules-{}", std::process::id()));
    std::fs::create_dir_all(&dir)?;
    let never = read("alerts.yaml")?.replace("up{job=\"mtls\"} == 0", "up{job=\"mtls\"} == 2");
    std::fs::write(dir.join("alerts.yaml"), never)?;
    std::fs::copy(deployed("alerts_test.yaml"), dir.join("alerts_test.yaml"))?;
    let tested = promtool(&["test", "rules"], &dir.join("alerts_test.yaml"));
    std::fs::remove_dir_all(&dir)?;
    let failed = tested?.success().expect_err("a rule that never fires passes its test");
    assert!(format!("{failed:#}").contains("MtlsAgentDown"), "{failed:#}");
    Ok(())
}

#[test]
fn each_has_a_case_in_which_it_fires_and_one_in_which_it_does_not() -> Result<()> {
    let names: BTreeSet<String> = rules(&read("alerts.yaml")?)?.into_iter().map(|rule| rule.name).collect();
    let [fires, silent] = tested(&read("alerts_test.yaml")?)?;
    assert!(names.len() > 15, "{names:?}");
    assert_eq!(fires, names, "those that fire in a test");
    assert_eq!(silent, names, "those that keep silent in a test");
    Ok(())
}

#[test]
fn each_says_what_it_means_and_what_to_do() -> Result<()> {
    for Rule { name, severity, annotations, .. } in rules(&read("alerts.yaml")?)? {
        assert!(["info", "warning", "critical"].contains(&severity.as_str()), "{name}: {severity}");
        for key in ["summary", "description", "runbook"] {
            assert!(annotations[key].as_str().is_some_and(|text| text.len() > 20), "{name} has no {key}");
        }
    }
    Ok(())
}

#[test]
fn they_ask_for_what_agents_have() -> Result<()> {
    needs!("ip");
    let mut scene = Scene::new()?;
    scene.everything_happens()?;
    let agents = scene.metrics()?;
    for rule in rules(&read("alerts.yaml")?)? {
        let said = serde_yaml_ng::to_string(&rule.annotations)?;
        let shown = said.split("$labels.").skip(1);
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let shown = shown.map(|rest| rest.chars().take_while(|c| is_name(*c)).collect()).collect();
        assert_eq!(unknown(&agents, &Query::read(&rule.expression), &shown), None, "{}", rule.name);
    }
    // And it would be noticed if they did not.
    let none = BTreeSet::new();
    for (wrong, why) in [
        ("rate(mtls_handshakes[5m])", "no agent has a metric mtls_handshakes"),
        ("mtls_pod_enrolled{name=\"x\"}", "mtls_pod_enrolled has no label name"),
        ("sum by (reason) (mtls_pod_enrolled)", "grouped by reason, which no metric of the query has"),
    ] {
        assert_eq!(unknown(&agents, &Query::read(wrong), &none).as_deref(), Some(why));
    }
    let shown = ["pod".to_owned()].into();
    let gone = unknown(&agents, &Query::read("sum by (namespace) (mtls_pod_enrolled)"), &shown);
    assert_eq!(gone.as_deref(), Some("shows pod, which the result does not have"));
    Ok(())
}
