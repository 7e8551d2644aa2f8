//! `mtls lab carry`: the two relays of one technique, for `mtls lab compare`.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Result;

use crate::compare::{self, Relays};

#[derive(clap::Args, Debug)]
pub struct Args {
    /// As `mtls lab compare --list` names it, without `relay, `
    technique: String,
    /// The client's network namespace
    #[arg(long)]
    near: PathBuf,
    /// The server's network namespace
    #[arg(long)]
    far: PathBuf,
    /// Where the near relay listens
    #[arg(long)]
    listen: SocketAddr,
    /// Where the far relay listens
    #[arg(long)]
    tunnel: SocketAddr,
    /// What the far relay dials
    #[arg(long)]
    server: SocketAddr,
}

pub fn run(args: &Args) -> Result<()> {
    crate::cli::allow_open_files()?;
    let Args { technique, near, far, listen, tunnel, server } = args;
    let (near, far) = (near.clone(), far.clone());
    compare::carry(technique, &Relays { near, far, listen: *listen, tunnel: *tunnel, server: *server })
}
