//! `mtls lab diff`: two files of results side by side.

use std::fs::File;
use std::io::{BufReader, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::cli::{Align, Output, Table};
use crate::results::{Difference, Missing, Recorded, Verdict, differences, number};

#[derive(clap::Args, Debug)]
pub struct Args {
    /// compare.json of one run, or bench.json of the project's benchmark
    #[arg(value_name = "A")]
    before: PathBuf,
    /// The same of another
    #[arg(value_name = "B")]
    after: PathBuf,
    /// Only figures whose repetitions lie apart
    #[arg(long)]
    changed: bool,
    /// Table for people, or JSON for programs
    #[arg(long, short, value_enum, default_value_t = Output::Table)]
    output: Output,
}

pub fn run(args: &Args, out: &mut impl Write) -> Result<()> {
    let (before, after) = (read(&args.before)?, read(&args.after)?);
    let mut found = differences(before.records(), after.records());
    found.retain(|found| !args.changed || found.verdict != Verdict::Same);
    if args.output == Output::Json {
        return Ok(writeln!(out, "{}", serde_json::to_string_pretty(&found)?)?);
    }
    for (name, recorded) in [("A", &before), ("B", &after)] {
        let Some(first) = recorded.records().first() else { continue };
        let place = &first.environment;
        writeln!(
            out,
            "{name}: Linux {}, {}, {}, {}",
            place.kernel, place.machine, place.version, place.date
        )?;
    }
    write!(out, "{}", table(&found))?;
    for (name, recorded) in [("A", &before), ("B", &after)] {
        for Missing { path, why } in recorded.missing() {
            writeln!(out, "not measured in {name}: {path}: {why}")?;
        }
    }
    Ok(())
}

fn read(path: &Path) -> Result<Recorded> {
    let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
    let recorded: Recorded = serde_json::from_reader(BufReader::new(file)).with_context(|| {
        format!("{} holds no results: expected compare.json or bench.json", path.display())
    })?;
    ensure!(!recorded.records().is_empty(), "{} holds no records", path.display());
    Ok(recorded)
}

fn table(found: &[Difference]) -> Table {
    let left = ["WORKLOAD", "PATH", "METRIC", "UNIT"].map(|name| (name, Align::Left));
    let right = ["A", "B", "B/A"].map(|name| (name, Align::Right));
    let mut table = Table::new(&[&left[..], &right, &[("", Align::Left)]].concat());
    for row in found {
        table.row([
            row.workload.clone(),
            row.path.clone(),
            row.metric.clone(),
            row.unit.clone(),
            row.before.map(number).unwrap_or_default(),
            row.after.map(number).unwrap_or_default(),
            row.ratio.map(|ratio| format!("{ratio:.2}")).unwrap_or_default(),
            row.verdict.as_str().to_owned(),
        ]);
    }
    table
}
