//! Real applications: ways through the lab in, what their own load tools count out.
//!
//! On plain TCP and on our ways; each pod gets its own servers, started when all else is measured.

use std::time::Duration;

use anyhow::{Context, Result};
use mtls::results::{CONNECTIONS, Figures, Progress, QUANTILES, REQUESTS, Results, THROUGHPUT, TRANSACTIONS};
use mtls_tests::apps::{Nginx, Postgres, Redis};
use mtls_tests::{Lab, Running, eventually};
use serde_json::Value;

use crate::args::Args;
use crate::note;
use crate::world::{Carrier, Way, World};

type Load = fn(&Way, &str) -> Result<Figures>;

const LOADS: [(&str, Load); 6] = [
    ("iperf3, 1 stream", |way, seconds| iperf(way, seconds, "1")),
    ("iperf3, 8 streams", |way, seconds| iperf(way, seconds, "8")),
    ("pgbench, select only, 8 clients", pgbench),
    ("redis-benchmark, get, 50 clients", redis),
    ("wrk on nginx, 64 connections", |way, seconds| wrk(way, seconds, false)),
    ("wrk on nginx, a connection each, 16 at a time", |way, seconds| wrk(way, seconds, true)),
];

const IPERF: u16 = 5201;

/// What runs in one server pod.
struct Servers {
    _nginx: Nginx,
    _postgres: Postgres,
    _redis: Redis,
    _iperf: Running,
}

fn takes_part(way: &Way) -> bool {
    matches!(way.carrier, Carrier::Kernel | Carrier::Mtls | Carrier::Direct)
}

/// Measurements of one repetition.
pub fn count(world: &World) -> usize {
    LOADS.len() * world.ways.iter().filter(|way| takes_part(way)).count()
}

pub fn run(world: &World, args: &Args, results: &mut Results, progress: &mut Progress) -> Result<()> {
    let needs = [&Nginx::NEEDS[..], &Postgres::NEEDS, &Redis::NEEDS, &["iperf3"]].concat();
    if let Some(reason) = mtls_tests::missing(&needs) {
        anyhow::bail!("--applications: {reason}, or apt-get install iperf3");
    }
    let ways: Vec<&Way> = world.ways.iter().filter(|way| takes_part(way)).collect();
    let mut servers = Vec::new();
    for way in &ways {
        let lab = if way.carrier == Carrier::Kernel { &world.bare } else { &world.meshed };
        servers.push(start(lab, way).with_context(|| format!("applications of {}", way.name.path))?);
    }
    let seconds = args.seconds().ceil().to_string();
    for _ in 0..args.repetitions {
        for (name, load) in LOADS {
            for way in &ways {
                note(results, progress, &way.name, name, load(way, &seconds), 0.0);
            }
        }
    }
    Ok(())
}

fn start(lab: &Lab, way: &Way) -> Result<Servers> {
    let pod = &way.server;
    let iperf = pod.spawn("iperf3", &["-s", "-p", &IPERF.to_string()])?;
    let up = || pod.netns().within(|| std::net::TcpStream::connect(pod.addr(IPERF))).ok();
    eventually(Duration::from_secs(10), up).context("iperf3 does not listen")?;
    Ok(Servers {
        _nginx: Nginx::start(lab, pod)?,
        _postgres: Postgres::start(lab, pod)?,
        _redis: Redis::start(lab, pod)?,
        _iperf: iperf,
    })
}

fn output(way: &Way, program: &str, args: &[&str]) -> Result<String> {
    Ok(way.client.run(program, args)?.success().with_context(|| program.to_owned())?.stdout)
}

fn iperf(way: &Way, seconds: &str, streams: &str) -> Result<Figures> {
    let (host, port) = (way.server.ip().to_string(), IPERF.to_string());
    let out = output(way, "iperf3", &["-c", &host, "-p", &port, "-t", seconds, "-P", streams, "-J"])?;
    let report: Value = serde_json::from_str(&out)?;
    let rate = report["end"]["sum_received"]["bits_per_second"].as_f64();
    Ok(vec![(THROUGHPUT, rate.with_context(|| format!("iperf3 said {}", report["error"]))? / 1e9)])
}

fn pgbench(way: &Way, seconds: &str) -> Result<Figures> {
    let (host, port) = (way.server.ip().to_string(), Postgres::PORT.to_string());
    let place = ["-h", &host, "-p", &port, "-U", "postgres", "postgres"];
    let load = ["-S", "-n", "-c", "8", "-j", "1", "-T", seconds];
    let out = output(way, "pgbench", &[&load[..], &place].concat())?;
    Ok(vec![(TRANSACTIONS, number_after(&out, "tps = ")?)])
}

fn redis(way: &Way, seconds: &str) -> Result<Figures> {
    let (host, port) = (way.server.ip().to_string(), Redis::PORT.to_string());
    // It counts requests, not time: about as many as plain TCP takes in that time.
    let count = (seconds.parse::<f64>()? * 50_000.0).to_string();
    let args = ["-h", &host, "-p", &port, "-c", "50", "-n", &count, "-d", "256", "-t", "get", "--csv"];
    let out = output(way, "redis-benchmark", &args)?;
    Ok(vec![(REQUESTS, number_after(&out, "\"GET\",\"")?)])
}

fn wrk(way: &Way, seconds: &str, close: bool) -> Result<Figures> {
    let url = format!("http://{}/index.html", way.server.addr(Nginx::PORT));
    let connections = if close { "16" } else { "64" };
    let mut args = vec!["-t", "1", "-c", connections, "-d", seconds, "--latency"];
    if close {
        args.extend(["-H", "Connection: close"]);
    }
    args.push(&url);
    let out = output(way, "wrk", &args)?;
    anyhow::ensure!(!out.contains("Socket errors") && !out.contains("Non-2xx"), "wrk saw errors:\n{out}");
    let rate = if close { CONNECTIONS } else { REQUESTS };
    let mut figures = vec![(rate, number_after(&out, "Requests/sec:")?)];
    for (label, metric) in [("50%", QUANTILES[0]), ("99%", QUANTILES[2])] {
        figures.push((metric, microseconds(&out, label)?));
    }
    Ok(figures)
}

fn number_after(text: &str, label: &str) -> Result<f64> {
    let rest = text.split_once(label).with_context(|| format!("no {label:?} in:\n{text}"))?.1.trim_start();
    let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
    rest[..end].parse().with_context(|| format!("no number after {label:?} in:\n{text}"))
}

/// Of a line such as `99%    1.23ms` in wrk's latency distribution. Other lines have percentages too.
fn microseconds(text: &str, label: &str) -> Result<f64> {
    let line = text.lines().map(str::trim).find(|line| line.starts_with(label));
    let line = line.with_context(|| format!("no line with {label:?} in:\n{text}"))?;
    let unit = if line.ends_with("us") {
        1.0
    } else if line.ends_with("ms") {
        1e3
    } else {
        1e6
    };
    Ok(number_after(line, label)? * unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tools_outputs_are_understood() {
        let pgbench = "latency average = 0.4 ms\ntps = 18123.456789 (without initial connection time)\n";
        assert_eq!(number_after(pgbench, "tps = ").unwrap(), 18123.456789);
        let redis = "\"test\",\"rps\",\"avg\"\n\"GET\",\"61728.40\",\"0.5\"\n";
        assert_eq!(number_after(redis, "\"GET\",\"").unwrap(), 61728.4);
        let wrk = "    Latency     4.24ms  655.13us   8.21ms   75.50%\n  Latency Distribution\n     50%  512.00us\n     99%    2.50ms\nRequests/sec:  12345.67\n";
        assert_eq!(number_after(wrk, "Requests/sec:").unwrap(), 12345.67);
        assert_eq!(microseconds(wrk, "50%").unwrap(), 512.0);
        assert_eq!(microseconds(wrk, "99%").unwrap(), 2500.0);
        assert!(number_after(wrk, "tps = ").is_err() && microseconds(wrk, "90%").is_err());
    }
}
