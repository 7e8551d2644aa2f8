//! The benchmark measures every path it names and writes what it promises. Nothing here judges a time.

use std::collections::BTreeSet;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use mtls_tests::mtls;
use serde_json::Value;

use crate::needs;

const PATHS: [&str; 6] = [
    "plain",
    "plain, same node",
    "mtls",
    "mtls, same node, relay",
    "mtls, same node, encrypt",
    "mtls, same node, direct",
];

fn bench(args: &[&str]) -> Result<std::process::Output> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bench"));
    command.env("MTLS_BIN", mtls()?).args(["--quick", "--seconds", "0.15", "--repetitions", "1"]).args(args);
    command.output().context("run the benchmark")
}

#[test]
fn a_short_run_leaves_records_and_a_page_for_every_path() -> Result<()> {
    needs!();
    let dir = std::env::temp_dir().join(format!("mtls-bench-test-{}", std::process::id()));
    let out = bench(&["--idle", "20", "--congestion-control", "reno", "--out", &dir.to_string_lossy()])?;
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    ensure!(out.status.success(), "{said}\n{}", String::from_utf8_lossy(&out.stderr));
    let records: Vec<Value> = serde_json::from_slice(&std::fs::read(dir.join("bench.json"))?)?;
    let page = std::fs::read_to_string(dir.join("bench.html"))?;
    std::fs::remove_dir_all(&dir)?;

    for path in PATHS {
        let of_path: Vec<&Value> = records.iter().filter(|record| record["path"] == path).collect();
        let workloads: BTreeSet<&str> = of_path.iter().filter_map(|r| r["workload"].as_str()).collect();
        let plain = path.starts_with("plain");
        // Ten loads and a first connection; memory of idle connections and the kernel half where there are agents;
        // four neighbours between nodes.
        let expected = 11 + 2 * usize::from(!plain) + 4 * usize::from(["plain", "mtls"].contains(&path));
        assert_eq!(workloads.len(), expected, "{path}: {workloads:?}");
        for record in &of_path {
            let number = |key: &str| record[key].as_f64().with_context(|| format!("no {key}: {record}"));
            let (least, median, most) = (number("min")?, number("median")?, number("max")?);
            assert!(least <= median && median <= most && least >= 0.0, "{record}");
            assert_eq!(record["congestion_control"], "reno");
            let compared = !plain
                && !matches!(record["metric"].as_str(), Some("agents' CPU"))
                && !record["unit"]
                    .as_str()
                    .is_some_and(|unit| unit.starts_with("bytes") || unit == "ns/connection");
            assert_eq!(record["ratio"].is_number(), compared, "{record}");
        }
        let agents = of_path.iter().filter(|record| record["metric"] == "agents' CPU").count();
        assert_eq!(agents, if plain { 0 } else { 10 }, "{path}");
        assert!(page.contains(&format!("<td>{path}<td>")), "{path} is not on the page");
    }
    assert!(said.contains("measurements on 6 paths") && page.ends_with("</html>\n"), "{said}");
    Ok(())
}

#[test]
fn what_cannot_be_measured_is_said_before_anything_is() -> Result<()> {
    needs!();
    for (args, expected) in [
        (["--path", "nobody's"], "no path's name contains"),
        (["--congestion-control", "wishful"], "no congestion control wishful"),
        (["--repetitions", "0"], "--repetitions must be"),
    ] {
        let out = bench(&args)?;
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(!out.status.success() && said.contains(expected), "{args:?}: {said}");
    }
    Ok(())
}
