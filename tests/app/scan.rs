//! A port scan: an address in; how many ports answered, and how many refused, out.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::Result;
use serde_json::json;

use crate::report;
use crate::socket::Kind;

#[derive(clap::Args)]
pub struct Scan {
    to: IpAddr,
    /// Addresses to come from, in turn.
    #[arg(long = "from")]
    from: Vec<IpAddr>,
}

impl Scan {
    pub fn run(self) -> Result<()> {
        let (mut open, mut refused, mut failed) = (0u32, 0u32, 0u32);
        let mut from = self.from.iter().cycle();
        for port in 1..=u16::MAX {
            let bind = from.next().map(|ip| SocketAddr::new(*ip, 0));
            let kind = Kind { bind, ..Kind::default() };
            match kind.connect(SocketAddr::new(self.to, port), Duration::from_secs(1)) {
                Ok(_) => open += 1,
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => refused += 1,
                Err(_) => failed += 1,
            }
        }
        report(&json!({ "open": open, "refused": refused, "failed": failed }));
        Ok(())
    }
}
