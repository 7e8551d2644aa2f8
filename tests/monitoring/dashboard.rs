//! The dashboard: every query parses, asks for what agents have, and shows labels that its result has.

use std::collections::BTreeSet;
use std::fmt::Write;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::promql::Query;
use crate::scene::{Scene, unknown};
use crate::{needs, promtool, read};

/// A query of the dashboard, with Grafana's variables filled in as Grafana would.
struct Asked {
    of: String,
    expression: String,
    legend: String,
}

fn dashboard() -> Result<Value> {
    Ok(serde_json::from_str(&read("dashboard.json")?)?)
}

fn panels(dashboard: &Value) -> Result<&Vec<Value>> {
    dashboard["panels"].as_array().context("no panels")
}

fn asked(dashboard: &Value) -> Result<Vec<Asked>> {
    let mut all = Vec::new();
    let mut add = |of: &Value, expression: &Value, legend: &Value| {
        let expression = expression.as_str().with_context(|| format!("{of} has no expr"))?;
        let expression = expression
            .replace("$__rate_interval", "5m")
            .replace("$__range", "1h")
            .replace("$__interval", "1m")
            .replace("$instance", ".*")
            .replace("$namespace", ".*");
        let legend = legend.as_str().unwrap_or_default().to_owned();
        all.push(Asked { of: of.to_string(), expression, legend });
        Ok::<_, anyhow::Error>(())
    };
    for panel in panels(dashboard)? {
        for target in panel["targets"].as_array().into_iter().flatten() {
            add(&panel["title"], &target["expr"], &target["legendFormat"])?;
        }
    }
    for annotation in dashboard["annotations"]["list"].as_array().context("no annotations")? {
        add(&annotation["name"], &annotation["expr"], &annotation["textFormat"])?;
    }
    Ok(all)
}

/// The labels that stand in double braces.
fn shown(legend: &str) -> BTreeSet<String> {
    let parts = legend.split("{{").skip(1).filter_map(|part| part.split_once("}}"));
    parts.map(|(label, _)| label.trim().to_owned()).collect()
}

#[test]
fn every_query_is_promql() -> Result<()> {
    needs!("promtool");
    let mut rules = String::from("groups:\n- name: dashboard\n  rules:\n");
    let asked = asked(&dashboard()?)?;
    assert!(asked.len() > 30, "only {} queries", asked.len());
    for (at, Asked { expression, .. }) in asked.iter().enumerate() {
        assert!(!expression.contains('$'), "a variable that the test does not know: {expression}");
        writeln!(rules, "  - record: query:{at}\n    expr: {}", serde_json::to_string(expression)?)?;
    }
    let file = std::env::temp_dir().join(format!("mtls-dashboard-{}.yaml", std::process::id()));
    std::fs::write(&file, rules)?;
    let checked = promtool(&["check", "rules"], &file);
    std::fs::write(&file, "groups: [{name: x, rules: [{record: a, expr: 'sum by (a'}]}]")?;
    let broken = promtool(&["check", "rules"], &file);
    std::fs::remove_file(&file)?;
    checked?.success()?;
    assert!(broken?.success().is_err(), "promtool takes anything");
    Ok(())
}

#[test]
fn every_query_asks_for_what_agents_have() -> Result<()> {
    needs!("ip");
    let mut scene = Scene::new()?;
    scene.everything_happens()?;
    let agents = scene.metrics()?;
    let dashboard = dashboard()?;
    for Asked { of, expression, legend } in asked(&dashboard)? {
        assert_eq!(unknown(&agents, &Query::read(&expression), &shown(&legend)), None, "{of}: {expression}");
    }
    let variables = dashboard["templating"]["list"].as_array().context("no variables")?;
    let values = variables.iter().filter_map(|variable| variable["definition"].as_str());
    let mut found = 0;
    for value in values {
        let inside = value.strip_prefix("label_values(").and_then(|rest| rest.strip_suffix(')'));
        let (metric, label) = inside.and_then(|it| it.split_once(", ")).with_context(|| value.to_owned())?;
        assert_eq!(unknown(&agents, &Query::read(metric), &[label.to_owned()].into()), None, "{value}");
        found += 1;
    }
    assert_eq!(found, 2, "the variables that list labels' values");
    Ok(())
}

#[test]
fn panels_are_explained_and_lie_beside_each_other() -> Result<()> {
    let dashboard = dashboard()?;
    let mut ids = BTreeSet::new();
    let mut taken = BTreeSet::new();
    for panel in panels(&dashboard)? {
        let title =
            panel["title"].as_str().filter(|title| !title.is_empty()).context("a panel without a title")?;
        assert!(ids.insert(panel["id"].as_u64()), "{title}: its id is taken");
        let place = |key: &str| panel["gridPos"][key].as_u64().with_context(|| format!("{title}: no {key}"));
        let (x, y, w, h) = (place("x")?, place("y")?, place("w")?, place("h")?);
        assert!(w > 0 && h > 0 && x + w <= 24, "{title} sticks out");
        for (x, y) in (x..x + w).flat_map(|x| (y..y + h).map(move |y| (x, y))) {
            assert!(taken.insert((x, y)), "{title} lies on another");
        }
        if panel["type"] == "row" {
            continue;
        }
        assert!(
            panel["description"].as_str().is_some_and(|text| text.len() > 10),
            "{title} is not explained"
        );
        assert!(
            panel["targets"].as_array().is_some_and(|targets| !targets.is_empty()),
            "{title} asks nothing"
        );
        // Grafana fills it in; a fixed one would be somebody else's.
        assert_eq!(panel["datasource"]["uid"], "${datasource}", "{title}");
    }
    Ok(())
}
