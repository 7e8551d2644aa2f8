//! `mtls workloads`: the pods of the mesh, as this node's agent knows them.

use std::io::{self, Write};

use super::agent::{Ask, Error, Page, Which, block_on, write_cut};
use super::words::Names;
use super::{Align, Table};
use crate::observe::{Enrolment, Listing, ModesRow, WorkloadRow};

#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(flatten)]
    which: Which,
    #[command(flatten)]
    page: Page,
    #[command(flatten)]
    ask: Ask,
}

/// Runs `mtls workloads` to its end.
pub fn main(args: &Args) -> anyhow::Result<()> {
    Ok(block_on(run(args, &mut io::stdout()))?)
}

async fn run(args: &Args, out: &mut (dyn Write + Send)) -> Result<(), Error> {
    let resource = args.page.add_to(args.which.query()).of("/workloads");
    let listing: Listing<WorkloadRow> = args.ask.get(&resource, out).await?;
    if args.ask.is_for_people() && (listing.total > 0 || args.which.name.is_none()) {
        match listing.total {
            0 => writeln!(out, "no pod")?,
            _ => write!(out, "{}", table(&listing.items))?,
        }
        write_cut(out, &listing)?;
    }
    args.which.found("pod", &listing)
}

fn table(rows: &[WorkloadRow]) -> Table {
    let names = Names::new(rows.iter().filter_map(|row| row.identity.as_deref()));
    let columns =
        ["NAMESPACE", "NAME", "WORKLOAD", "NODE", "ADDRESSES", "PROTOCOL", "MODE", "IDENTITY", "STATE"];
    let mut table = Table::new(&columns.map(|name| (name, Align::Left)));
    for row in rows {
        table.row([
            row.namespace.clone(),
            row.name.clone(),
            row.controller.clone(),
            row.node.clone().unwrap_or_default(),
            row.addresses.join(","),
            if row.protocol == "mtls" { "mTLS" } else { "none" }.to_owned(),
            row.modes.as_ref().map(modes).unwrap_or_default(),
            row.identity.as_deref().map(|identity| names.short(identity)).unwrap_or_default(),
            state(row),
        ]);
    }
    table
}

/// `STRICT, 8080 PERMISSIVE, authorized`.
fn modes(row: &ModesRow) -> String {
    let ports = row.ports.iter().map(|(port, mode)| format!("{port} {mode}"));
    let authorized = row.authorization.then(|| "authorized".to_owned());
    let dry_run = row.dry_run.as_ref().map(|modes| format!("dry run: {modes}"));
    let all: Vec<String> =
        [row.default.clone()].into_iter().chain(ports).chain(authorized).chain(dry_run).collect();
    all.join(", ")
}

fn state(row: &WorkloadRow) -> String {
    let place = if row.local { "local" } else { "remote" };
    match &row.enrolment {
        _ if !row.enrolled => format!("{place}, not enrolled"),
        None => place.to_owned(),
        Some(Enrolment::Enrolled) => format!("{place}, enrolled"),
        Some(Enrolment::Pending) => format!("{place}, pending"),
        Some(Enrolment::Failed { reason }) => format!("{place}, FAILED: {reason}"),
    }
}
