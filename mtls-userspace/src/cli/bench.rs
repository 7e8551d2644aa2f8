//! `mtls bench`: the load client and server.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, ensure};
use clap::Subcommand;

use crate::bench::{self, Load, MAX_SIZE, Workload};
use crate::identity::TrustDomain;
use crate::mesh;

/// Flags of `mtls bench`.
#[derive(clap::Args)]
pub struct Bench {
    #[command(subcommand)]
    end: End,
}

#[derive(Subcommand)]
enum End {
    /// Answer load clients
    Server {
        #[arg(long, default_value = "[::]:7000")]
        listen: SocketAddr,
    },
    /// Put load on a server and print one line of JSON
    Client(Client),
    /// Time what deciding about a connection takes in a mesh of manifests, and print one line of JSON
    Decide(Decide),
}

#[derive(clap::Args)]
struct Decide {
    #[arg(long, value_name = "DIR")]
    manifests: PathBuf,
    /// Node of the pod that dials
    #[arg(long)]
    node: String,
    /// Address of the pod that dials
    #[arg(long, value_name = "IP")]
    from: IpAddr,
    /// What it dials
    #[arg(long)]
    to: SocketAddr,
    #[arg(long, default_value_t = 0.3)]
    seconds: f64,
    #[arg(long, default_value = "cluster.local")]
    trust_domain: TrustDomain,
}

#[derive(clap::Args)]
struct Client {
    /// The server's address
    #[arg(long)]
    to: SocketAddr,
    #[arg(long)]
    workload: Workload,
    /// Connections in parallel
    #[arg(long, default_value_t = 1)]
    connections: usize,
    /// Bytes of a request
    #[arg(long, default_value_t = 128)]
    size: usize,
    /// Requests a second over all connections, for `paced`
    #[arg(long, default_value_t = 1000.0)]
    rate: f64,
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
}

impl Bench {
    pub fn run(self) -> anyhow::Result<()> {
        super::allow_open_files()?;
        match self.end {
            End::Server { listen } => bench::serve(listen).context(format!("serving on {listen}")),
            End::Client(client) => client.run(),
            End::Decide(decide) => decide.run(),
        }
    }
}

impl Decide {
    fn run(self) -> anyhow::Result<()> {
        let Self { manifests, node, from, to, seconds, trust_domain } = self;
        let settings = mesh::Settings { trust_domain, root_namespace: "istio-system".into() };
        let duration = Duration::try_from_secs_f64(seconds).context("--seconds")?;
        let decisions = bench::decide(manifests, settings, &node, (SocketAddr::new(from, 0), to), duration)?;
        println!("{}", serde_json::to_string(&decisions)?);
        Ok(())
    }
}

impl Client {
    fn run(self) -> anyhow::Result<()> {
        let Self { to, workload, connections, size, rate, seconds } = self;
        ensure!((1..=MAX_SIZE).contains(&size), "--size must be between 1 and {MAX_SIZE}");
        ensure!((1..=100_000).contains(&connections), "--connections must be between 1 and 100000");
        ensure!((0.1..=1e7).contains(&rate), "--rate must be between 0.1 and 10000000");
        let duration = Duration::try_from_secs_f64(seconds).ok().filter(|duration| !duration.is_zero());
        let duration = duration.context("--seconds must be above 0")?;
        let load = Load { workload, connections, size, rate, duration };
        let report = bench::run(to, load).context(format!("load on {to}"))?;
        println!("{}", serde_json::to_string(&report)?);
        Ok(())
    }
}
