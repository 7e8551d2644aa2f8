//! `mtls services`: VIPs, their ports, and who is behind them.

use std::io::{self, Write};

use super::agent::{Ask, Error, Page, Which, block_on, write_cut};
use super::{Align, Table};
use crate::observe::{Listing, ServiceRow};

/// Endpoints that a row of the table names.
const NAMED: usize = 3;

#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(flatten)]
    which: Which,
    #[command(flatten)]
    page: Page,
    #[command(flatten)]
    ask: Ask,
}

/// Runs `mtls services` to its end.
pub fn main(args: &Args) -> anyhow::Result<()> {
    Ok(block_on(run(args, &mut io::stdout()))?)
}

async fn run(args: &Args, out: &mut (dyn Write + Send)) -> Result<(), Error> {
    let resource = args.page.add_to(args.which.query()).of("/services");
    let listing: Listing<ServiceRow> = args.ask.get(&resource, out).await?;
    if args.ask.is_for_people() && (listing.total > 0 || args.which.name.is_none()) {
        match listing.total {
            0 => writeln!(out, "no service with an address")?,
            _ => write!(out, "{}", table(&listing.items))?,
        }
        write_cut(out, &listing)?;
    }
    args.which.found("service with an address", &listing)
}

fn table(rows: &[ServiceRow]) -> Table {
    let left = |name| (name, Align::Left);
    let right = |name| (name, Align::Right);
    let mut table = Table::new(&[
        left("NAMESPACE"),
        left("NAME"),
        left("ADDRESS"),
        right("PORT"),
        left("MESH"),
        right("READY"),
        right("DRAINING"),
        right("NOT READY"),
        right("LOCAL"),
        left("ENDPOINTS IN USE"),
    ]);
    for row in rows {
        let mesh = match row.mesh.as_str() {
            "some" => format!("{} of {}", row.in_use_mesh, row.in_use),
            "no_endpoints" => "NO ENDPOINTS".to_owned(),
            other => other.to_owned(),
        };
        table.row([
            row.namespace.clone(),
            row.name.clone(),
            row.address.clone(),
            row.port.to_string(),
            mesh,
            row.ready.to_string(),
            row.draining.to_string(),
            row.not_ready.to_string(),
            row.in_use_local.to_string(),
            endpoints(row),
        ]);
    }
    table
}

fn endpoints(row: &ServiceRow) -> String {
    let named = row.endpoints.iter().take(NAMED).map(|endpoint| match &endpoint.workload {
        Some(workload) => format!("{workload} {}", endpoint.address),
        None => endpoint.address.clone(),
    });
    let more = row.in_use.saturating_sub(NAMED);
    let more = (more > 0).then(|| format!("and {more} more"));
    named.chain(more).collect::<Vec<_>>().join(", ")
}
