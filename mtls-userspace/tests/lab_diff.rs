//! `mtls lab diff`, asked as the command line asks.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};

fn record(path: &str, metric: &str, higher_is_better: bool, values: [f64; 3]) -> Value {
    let [min, median, max] = values;
    json!({
        "path": path, "workload": "bulk", "metric": metric, "unit": "u", "higher_is_better": higher_is_better,
        "median": median, "min": min, "max": max, "values": values, "baseline": null, "ratio": null,
        "disturbance": 0.0, "machine": "m", "kernel": "6.1", "congestion_control": "cubic", "date": "d",
        "version": "mtls 0.1.0",
    })
}

fn write(dir: &Path, name: &str, content: &Value) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, content.to_string()).unwrap();
    path
}

fn diff(args: &[&Path], more: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mtls")).args(["lab", "diff"]).args(args).args(more).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn each_figure_gets_the_verdict_its_spread_allows() {
    let dir = tempfile::tempdir().unwrap();
    let cases = [
        // Metric, whether more is better, before, after, verdict.
        ("faster", true, [9.0, 10.0, 11.0], [19.0, 20.0, 21.0], "better"),
        ("slower", true, [9.0, 10.0, 11.0], [4.0, 5.0, 6.0], "worse"),
        ("within", true, [9.0, 10.0, 11.0], [10.5, 12.0, 13.0], "same"),
        ("less latency", false, [9.0, 10.0, 11.0], [4.0, 5.0, 6.0], "better"),
        ("more latency", false, [9.0, 10.0, 11.0], [19.0, 20.0, 21.0], "worse"),
    ];
    let side = |after: bool| -> Vec<Value> {
        cases
            .iter()
            .map(|(name, higher, a, b, _)| record("p", name, *higher, if after { *b } else { *a }))
            .collect()
    };
    // One as the comparison writes it, one as the benchmark does.
    let missing = json!([{ "path": "kernel", "why": "no CONFIG_TLS" }]);
    let before = write(dir.path(), "a.json", &json!({ "records": side(false), "missing": missing }));
    let after = write(dir.path(), "b.json", &Value::from(side(true)));

    let answer = diff(&[&before, &after], &["-o", "json"]);
    let found: Vec<Value> = serde_json::from_slice(&answer.stdout).unwrap();
    for ((name, _, a, b, verdict), found) in cases.iter().zip(&found) {
        assert_eq!((&found["metric"], &found["verdict"]), (&json!(name), &json!(verdict)));
        assert_eq!(found["ratio"], json!(b[1] / a[1]));
    }
    assert_eq!(found.len(), cases.len());

    let said = text(&diff(&[&before, &after], &[]).stdout);
    assert!(said.contains("A: Linux 6.1, m, mtls 0.1.0") && said.contains("WORSE"), "{said}");
    assert!(said.contains("not measured in A: kernel: no CONFIG_TLS"), "{said}");
    let said = text(&diff(&[&before, &after], &["--changed"]).stdout);
    assert!(!said.contains("within") && said.contains("slower"), "{said}");
}

#[test]
fn a_figure_that_only_one_file_has_is_shown_as_such() {
    let dir = tempfile::tempdir().unwrap();
    let (old, new) = (record("old", "x", true, [1.0; 3]), record("new", "x", true, [2.0; 3]));
    let before = write(dir.path(), "a.json", &json!([old]));
    let after = write(dir.path(), "b.json", &json!([new]));
    let said = text(&diff(&[&before, &after], &[]).stdout);
    assert!(said.contains("only in A") && said.contains("only in B"), "{said}");
}

#[test]
fn a_file_that_holds_no_results_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let good = write(dir.path(), "good.json", &json!([record("p", "x", true, [1.0; 3])]));
    for (name, content, expected) in [
        ("empty.json", json!([]), "holds no records"),
        ("other.json", json!({ "name": "something" }), "holds no results"),
    ] {
        let bad = write(dir.path(), name, &content);
        let answer = diff(&[&good, &bad], &[]);
        let said = text(&answer.stderr);
        assert!(!answer.status.success() && said.contains(name) && said.contains(expected), "{said}");
    }
    let answer = diff(&[&good, Path::new("/nowhere.json")], &[]);
    assert!(!answer.status.success() && text(&answer.stderr).contains("/nowhere.json"));
}
