//! The command line: flags in, what to measure and for how long out.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::{Parser, ValueEnum};

/// Measure mtls beside plain TCP, and beside others, in the same lab
///
/// Two nodes made of network namespaces on this machine; client, server and agents share its cores. Every repetition
/// takes every path in turn. Ends with a table, and with bench.json and bench.html below --out.
#[derive(Parser, Debug)]
#[command(bin_name = "cargo xtask bench", args_override_self = true)]
pub struct Args {
    /// Directory for bench.json and bench.html
    #[arg(long, value_name = "DIR", default_value = "bench-out")]
    pub out: PathBuf,
    /// Short measurements: about five minutes for everything without peers
    #[arg(long)]
    pub quick: bool,
    /// Repetitions, of which medians are taken
    #[arg(long, default_value_t = 3)]
    pub repetitions: usize,
    /// Seconds of one measurement [default: 4, with --quick 1]
    #[arg(long)]
    pub seconds: Option<f64>,
    /// Only these kinds of measurement
    #[arg(long, value_delimiter = ',')]
    pub only: Vec<Kind>,
    /// Only paths whose name contains one of these; `=NAME` is the path of just that name
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    pub path: Vec<String>,
    /// Numbers of idle connections whose memory is weighed
    #[arg(long, value_delimiter = ',', value_name = "COUNT", default_values_t = [1000, 10_000])]
    pub idle: Vec<usize>,
    /// Congestion control of every namespace [default: this machine's]
    #[arg(long, value_name = "NAME")]
    pub congestion_control: Option<String>,
    /// Congestion control of our tunnels alone [default: as above]
    #[arg(long, value_name = "NAME")]
    pub tunnel_congestion: Option<String>,
    /// A further flag of our agents, as `--agent-flag=--share-tunnels=off`; may be given several times
    #[arg(long, value_name = "FLAG", allow_hyphen_values = true)]
    pub agent_flag: Vec<String>,
    /// Another mTLS proxy to measure beside ours, as a pair; may be given several times
    #[arg(long)]
    pub peer: Vec<PeerName>,
    /// Envoy's binary, for `--peer envoy` [default: `envoy` in PATH]
    #[arg(long, value_name = "BINARY")]
    pub envoy: Option<PathBuf>,
    /// Istio's ztunnel as a peer: its binary, built with `--features testing`
    #[arg(long, value_name = "BINARY", requires = "ztunnel_redirect")]
    pub ztunnel: Option<PathBuf>,
    /// ztunnel's own scripts/ztunnel-redirect-inpod.sh
    #[arg(long, value_name = "SCRIPT", requires = "ztunnel")]
    pub ztunnel_redirect: Option<PathBuf>,
    /// Real applications too: iperf3, pgbench, redis-benchmark, wrk on nginx
    #[arg(long)]
    pub applications: bool,
    /// Measure again, up to twice, when processes that aren't ours used more CPUs than this meanwhile; never with --quick
    #[arg(long, value_name = "CPUS", default_value_t = 0.2)]
    pub max_disturbance: f64,
    /// Instead of all this: what a mesh costs as it grows to so many workloads [default: 1000,10000,100000]
    #[arg(long, value_delimiter = ',', value_name = "WORKLOADS", num_args = 0..,
          default_missing_values = ["1000", "10000", "100000"])]
    pub scale: Option<Vec<usize>>,
    /// Instead of all this: what following a Kubernetes cluster of so many pods costs an agent [default: 10000]
    #[arg(long, value_delimiter = ',', value_name = "PODS", num_args = 0.., default_missing_values = ["10000"],
          conflicts_with = "scale")]
    pub cluster: Option<Vec<usize>>,
}

/// Kinds of measurement.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Kind {
    /// Throughput, 1 and 8 streams, both directions
    Bulk,
    /// Requests on 1 and 64 connections
    Request,
    /// Requests at 1000 and 3200 a second on 16 connections
    Paced,
    /// New connections, 1 and 16 at a time
    Connect,
    /// Memory per idle connection
    Memory,
    /// Time to the first byte between pods that never spoke
    Cold,
    /// Time in the kernel half's programs per connection
    Kernel,
    /// Latency beside another pod's bulk stream and idle connections
    Fairness,
}

/// Peers that come as packages.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum PeerName {
    Haproxy,
    Stunnel,
    Envoy,
}

impl Args {
    pub fn check(&self) -> Result<()> {
        ensure!((1..=100).contains(&self.repetitions), "--repetitions must be between 1 and 100");
        ensure!((0.1..=600.0).contains(&self.seconds()), "--seconds must be between 0.1 and 600");
        Ok(())
    }

    pub fn seconds(&self) -> f64 {
        self.seconds.unwrap_or(if self.quick { 1.0 } else { 4.0 })
    }

    pub fn wants(&self, kind: Kind) -> bool {
        self.only.is_empty() || self.only.contains(&kind)
    }

    pub fn wants_path(&self, name: &str) -> bool {
        self.path.is_empty()
            || self.path.iter().any(|part| match part.strip_prefix('=') {
                Some(whole) => name == whole,
                None => name.contains(part.as_str()),
            })
    }

    /// How often a disturbed measurement is tried.
    pub fn attempts(&self) -> usize {
        if self.quick { 1 } else { 3 }
    }
}
