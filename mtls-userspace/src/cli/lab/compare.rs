//! `mtls lab compare`: every path this kernel can carry, measured in turns, as a table, JSON and a page.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use crate::compare::{self, Found, Plan};
use crate::results::{Environment, Missing, Page, Recorded, table};

#[derive(clap::Args, Debug)]
pub struct Args {
    /// Directory for compare.json and compare.html
    #[arg(long, value_name = "DIR", default_value = "compare-out")]
    out: PathBuf,
    /// One short repetition: tells whether a path works, not how fast it is
    #[arg(long)]
    quick: bool,
    /// Repetitions, of which medians are taken [default: 3, with --quick 1]
    #[arg(long)]
    repetitions: Option<usize>,
    /// Seconds of one measurement [default: 2, with --quick 0.15]
    #[arg(long)]
    seconds: Option<f64>,
    /// Connections whose memory is weighed [default: 1000, with --quick 100]
    #[arg(long, value_name = "COUNT")]
    idle: Option<usize>,
    /// Only paths whose name contains one of these
    #[arg(long, value_delimiter = ';', value_name = "NAME")]
    path: Vec<String>,
    /// Name the paths there are, and measure nothing
    #[arg(long)]
    list: bool,
}

pub fn run(args: &Args) -> Result<()> {
    if args.list {
        for (name, about) in compare::paths() {
            println!("{name:42} {about}");
        }
        return Ok(());
    }
    let usual = if args.quick { (1, 0.15, 100) } else { (3, 2.0, 1000) };
    let plan = Plan {
        paths: args.path.clone(),
        repetitions: args.repetitions.unwrap_or(usual.0),
        seconds: args.seconds.unwrap_or(usual.1),
        idle: args.idle.unwrap_or(usual.2),
    };
    ensure!((1..=100).contains(&plan.repetitions), "--repetitions must be between 1 and 100");
    ensure!((0.05..=600.0).contains(&plan.seconds), "--seconds must be between 0.05 and 600");
    ensure!((1..=100_000).contains(&plan.idle), "--idle must be between 1 and 100000");
    crate::cli::allow_open_files()?;
    fs::create_dir_all(&args.out).with_context(|| format!("make {}", args.out.display()))?;
    compare::listen_for_stop()?;
    report(args, compare::run(&plan)?)
}

fn report(args: &Args, found: Found) -> Result<()> {
    let Found { results, environment } = found;
    let records = results.records(&environment);
    println!("\n{}", table(&records));
    let Environment { machine, kernel, congestion_control, version, .. } = &environment;
    println!(
        "{machine}, Linux {kernel}, {congestion_control}, {version}; medians, ± how far the repetitions lie from them at \
         most, in parentheses the ratio to plain TCP. Load client, server and whatever carries share this machine."
    );
    for Missing { path, why } in &results.missing {
        println!("not measured: {path}: {why}");
    }
    let page = Page {
        title: "Ways to carry a connection",
        note: "Load client, server and whatever carries share this machine. Bars are medians, thin lines reach from the \
               least to the most; ratios are to plain TCP.",
        keys: &compare::KEYS,
        records: &records,
        missing: &results.missing,
        environment: &environment,
    };
    let (json, html) = (args.out.join("compare.json"), args.out.join("compare.html"));
    let write = |path: &PathBuf, text: String| {
        fs::write(path, text).with_context(|| format!("write {}", path.display()))
    };
    write(&html, page.html())?;
    let recorded = Recorded::Compared { records, missing: results.missing };
    write(&json, serde_json::to_string_pretty(&recorded)?)?;
    println!("{} and {}", json.display(), html.display());
    ensure!(!recorded.records().is_empty(), "nothing was measured");
    Ok(())
}
