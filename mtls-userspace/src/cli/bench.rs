//! `mtls bench`: the load client and server.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, ensure};
use clap::Subcommand;

use crate::bench::{self, Load, Workload};

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
    Client {
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
        #[arg(long, default_value_t = 5)]
        seconds: u64,
    },
}

impl Bench {
    pub fn run(self) -> anyhow::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        match self.end {
            End::Server { listen } => {
                runtime.block_on(bench::serve(listen)).context(format!("serving on {listen}"))
            }
            End::Client { to, workload, connections, size, seconds } => {
                ensure!((1..=1 << 20).contains(&size), "--size must be between 1 and 1048576");
                let load = Load { workload, connections, size, duration: Duration::from_secs(seconds) };
                let report = runtime.block_on(bench::run(to, load)).context(format!("load on {to}"))?;
                println!("{}", serde_json::to_string(&report)?);
                Ok(())
            }
        }
    }
}
