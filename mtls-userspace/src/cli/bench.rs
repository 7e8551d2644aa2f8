//! `mtls bench`: the load client and server.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, ensure};
use clap::Subcommand;

use crate::bench::{self, Load, MAX_SIZE, Workload};

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
        }
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
