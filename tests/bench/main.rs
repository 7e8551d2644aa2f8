//! The benchmark: flags in; a table, `bench.json` and `bench.html` out.
//!
//! Client, server and all agents share this machine's cores, so ratios say more than absolute numbers. Nothing here
//! passes or fails, but what can't be measured is named at the end, and for our own paths that is an error.

mod applications;
mod args;
mod cluster;
mod cost;
mod fairness;
mod kernel;
mod measure;
mod peers;
mod scale;
mod workloads;
mod world;

use std::fs;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use mtls::results::{
    Compared, Environment, Figures, Key, Missing, Page, Progress, Results, Workload, clock, table,
};

use args::{Args, Kind};
use workloads::WORKLOADS;
use world::{Carrier, Way, World};

/// Who has which colour on the page.
const KEYS: [Key; 4] = [
    Key { class: "plain", name: "plain TCP", is: |path| path.starts_with("plain") },
    Key { class: "ours", name: "mtls, between nodes", is: |path| path == "mtls" },
    Key { class: "near", name: "mtls, same node", is: |path| path.starts_with("mtls") },
    Key { class: "peer", name: "others", is: |_| true },
];

fn main() -> Result<()> {
    let args = Args::parse();
    args.check()?;
    if let Some(reason) = mtls_tests::missing(&["ip"]) {
        anyhow::bail!(reason);
    }
    let files = cost::raise_limits()?;
    fs::create_dir_all(&args.out).with_context(|| format!("make {}", args.out.display()))?;
    let mut results = Results::default();
    let environment = match (&args.scale, &args.cluster) {
        (Some(sizes), _) => scale::run(sizes, &mut results)?,
        (None, Some(sizes)) => cluster::run(sizes, &mut results)?,
        (None, None) => {
            let mut world = World::build(&args, files)?;
            run(&mut world, &args, &mut results)?;
            world::environment(&world.ways.first().context("no paths")?.client)?
        }
    };
    report(&environment, &args, &results)?;
    let ours: Vec<&Missing> =
        results.missing.iter().filter(|missing| missing.path.starts_with("mtls")).collect();
    ensure!(ours.is_empty(), "not measured on our own paths: {ours:?}");
    Ok(())
}

fn run(world: &mut World, args: &Args, results: &mut Results) -> Result<()> {
    for way in &world.ways {
        measure::prove(way).with_context(|| format!("{}: no traffic passes as it should", way.name.path))?;
    }
    let loads = WORKLOADS.iter().filter(|(kind, _)| args.wants(*kind));
    let loads: Vec<&Workload> = loads.map(|(_, workload)| workload).collect();
    let carried = world.ways.iter().filter(|way| !way.agents.is_empty()).count();
    let mut total = loads.len() * world.ways.len() * args.repetitions;
    if args.wants(Kind::Cold) {
        total += world.ways.len() * args.repetitions;
    }
    if args.wants(Kind::Fairness) {
        total += pairs(world).count() * fairness::NEIGHBOURS.len() * args.repetitions;
    }
    if args.wants(Kind::Memory) {
        total += carried;
    }
    if args.wants(Kind::Kernel) {
        total += world.ways.iter().filter(|way| way.is_ours()).count() * args.repetitions;
    }
    if args.applications {
        total += applications::count(world) * args.repetitions;
    }
    println!("{total} measurements on {} paths", world.ways.len());
    let mut progress = Progress::new(total);
    for _ in 0..args.repetitions {
        for workload in &loads {
            // In turns, so that whatever else the machine does hits everybody.
            for way in &world.ways {
                let measured = measure::load(way, workload, args);
                let disturbance = measured.as_ref().map_or(0.0, |measured| measured.disturbance);
                let figures = measured.map(|measured| measured.figures);
                note(results, &mut progress, &way.name, workload.name, figures, disturbance);
            }
            world.check_servers()?;
        }
        if args.wants(Kind::Fairness) {
            neighbours(world, args, results, &mut progress);
        }
        if args.wants(Kind::Kernel) {
            for way in world.ways.iter().filter(|way| way.is_ours()) {
                let figures = world.agents().and_then(|agents| measure::kernel(way, &agents, args));
                note(results, &mut progress, &way.name, "kernel half, new connections", figures, 0.0);
            }
        }
        if args.wants(Kind::Cold) {
            cold(world, results, &mut progress)?;
        }
    }
    if args.wants(Kind::Memory) {
        memory(world, args, results, &mut progress)?;
    }
    if args.applications {
        applications::run(world, args, results, &mut progress)?;
    }
    println!("measured in {}", clock(progress.elapsed()));
    Ok(())
}

/// Keeps figures, or the reason why there are none.
fn note(
    results: &mut Results,
    progress: &mut Progress,
    path: &Compared,
    workload: &str,
    figures: Result<Figures>,
    disturbance: f64,
) {
    progress.step(&path.path, workload, figures.as_ref());
    match figures {
        Ok(figures) => results.add(path, workload, &figures, disturbance),
        Err(error) => {
            let path = format!("{}, {workload}", path.path);
            results.missing.push(Missing { path, why: format!("{error:#}") });
        }
    }
}

/// Ways whose agents serve others beside them, with those. A peer's proxies stand beside one pod each: there it is that
/// pod itself that is greedy.
fn pairs(world: &World) -> impl Iterator<Item = (&Way, &Way)> {
    let neighbours = world.neighbours.iter().filter_map(|greedy| {
        let way = world.ways.iter().find(|way| way.name.path == greedy.name.path)?;
        Some((way, greedy))
    });
    let peers = world.ways.iter().filter(|way| matches!(way.carrier, Carrier::Peer(_)));
    neighbours.chain(peers.map(|way| (way, way)))
}

fn neighbours(world: &World, args: &Args, results: &mut Results, progress: &mut Progress) {
    for neighbour in fairness::NEIGHBOURS {
        for (way, greedy) in pairs(world) {
            let idle = world.idle_counts(greedy, args).into_iter().max().unwrap_or(1000);
            let measured = fairness::beside(way, greedy, neighbour, idle, args);
            let disturbance = measured.as_ref().map_or(0.0, |measured| measured.disturbance);
            let figures = measured.map(|measured| measured.figures);
            note(results, progress, &way.name, &neighbour.workload(idle), figures, disturbance);
        }
    }
}

fn cold(world: &mut World, results: &mut Results, progress: &mut Progress) -> Result<()> {
    let mut restarted: Option<Carrier> = None;
    for index in 0..world.ways.len() {
        let carrier = world.ways[index].carrier;
        // No two of our ways share a pair of pods: one start is enough for all of them.
        if restarted != Some(carrier) {
            world.restart(carrier)?;
            restarted = Some(carrier);
        }
        let way = &world.ways[index];
        note(results, progress, &way.name, "first connection of a pair", measure::first_byte(way), 0.0);
    }
    Ok(())
}

fn memory(world: &mut World, args: &Args, results: &mut Results, progress: &mut Progress) -> Result<()> {
    for index in 0..world.ways.len() {
        if world.ways[index].agents.is_empty() {
            continue;
        }
        world.restart(world.ways[index].carrier)?;
        let way = &world.ways[index];
        match measure::memory(way, &world.idle_counts(way, args)) {
            Ok(measured) => {
                for (count, figures) in &measured {
                    results.add(&way.name, &format!("{count} idle connections"), figures, 0.0);
                }
                let last = measured.last().map(|(_, figures)| figures.clone()).unwrap_or_default();
                progress.step(&way.name.path, "idle connections", Ok(&last));
            }
            Err(error) => {
                note(results, progress, &way.name, "idle connections", Err(error), 0.0);
            }
        }
    }
    Ok(())
}

fn report(environment: &Environment, args: &Args, results: &Results) -> Result<()> {
    let records = results.records(environment);
    ensure!(!records.is_empty(), "nothing was measured: {:?}", results.missing);
    println!("\n{}", table(&records));
    println!(
        "{}, Linux {}, {}, {}; in parentheses the ratio to plain TCP",
        environment.machine, environment.kernel, environment.congestion_control, environment.version
    );
    let worst = records.iter().map(|record| record.disturbance).fold(0.0, f64::max);
    if worst > args.max_disturbance {
        println!(
            "other processes used up to {worst:.2} CPUs during a measurement; `disturbance` in bench.json tells which"
        );
    }
    for Missing { path, why } in &results.missing {
        println!("not measured: {path}: {why}");
    }
    let (json, html) = (args.out.join("bench.json"), args.out.join("bench.html"));
    fs::write(&json, serde_json::to_string_pretty(&records)?)
        .with_context(|| format!("write {}", json.display()))?;
    let page = Page {
        title: "mtls beside plain TCP",
        note: "Client, server and all agents share this machine. Bars are medians, thin lines reach from the least to \
               the most; ratios are to plain TCP on the same way.",
        keys: &KEYS,
        records: &records,
        missing: &results.missing,
        environment,
    };
    fs::write(&html, page.html()).with_context(|| format!("write {}", html.display()))?;
    println!("{} and {}", json.display(), html.display());
    Ok(())
}
