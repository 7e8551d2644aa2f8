//! `mtls connections`: who speaks to whom right now, by which way, and until when others did.

use std::io::{self, Write};

use super::agent::{Ask, Error, Page, Which, block_on, write_cut};
use super::words::{Names, bytes, duration};
use super::{Align, Table};
use crate::observe::{ConnectionRow, ConnectionRows, EndedRow, Listing, PartyRow};

#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(flatten)]
    which: Which,
    #[command(flatten)]
    page: Page,
    /// The last ones that ended or were refused, instead of those that are open.
    #[arg(long)]
    ended: bool,
    #[command(flatten)]
    ask: Ask,
}

/// Runs `mtls connections` to its end.
pub fn main(args: &Args) -> anyhow::Result<()> {
    let mut out = io::stdout();
    Ok(block_on(async { if args.ended { ended(args, &mut out).await } else { open(args, &mut out).await } })?)
}

async fn open(args: &Args, out: &mut (dyn Write + Send)) -> Result<(), Error> {
    let resource = args.page.add_to(args.which.query()).of("/connections");
    let rows: ConnectionRows = args.ask.get(&resource, out).await?;
    if args.ask.is_for_people() {
        writeln!(
            out,
            "{} open; {} opened and {} refused on this node since the agent's start",
            rows.matching, rows.opened_total, rows.refused_total
        )?;
        let shown = Listing { total: rows.matching, items: rows.newest };
        if !shown.items.is_empty() {
            write!(out, "{}", open_table(&shown.items))?;
        }
        write_cut(out, &shown)?;
    }
    Ok(())
}

async fn ended(args: &Args, out: &mut (dyn Write + Send)) -> Result<(), Error> {
    let resource = args.page.add_to(args.which.query()).of("/connections/ended");
    let rows: Listing<EndedRow> = args.ask.get(&resource, out).await?;
    if args.ask.is_for_people() {
        if rows.total == 0 {
            writeln!(out, "none of the connections that the agent remembers")?;
        } else {
            write!(out, "{}", ended_table(&rows.items))?;
        }
        write_cut(out, &rows)?;
    }
    Ok(())
}

fn end(party: &PartyRow) -> String {
    match &party.workload {
        Some(workload) => format!("{workload} {}", party.address),
        None => party.address.clone(),
    }
}

fn names<'a>(parties: impl Iterator<Item = [&'a PartyRow; 2]>) -> Names {
    Names::new(parties.flatten().filter_map(|party| party.identity.as_deref()))
}

/// Open connections as people read them.
pub(super) fn open_table(rows: &[ConnectionRow]) -> Table {
    let names = names(rows.iter().map(|row| [&row.source, &row.destination]));
    let left = ["WAY", "SOURCE", "IDENTITY", "DESTINATION", "IDENTITY", "TLS", "CIPHER", "RECORDS"];
    let right = ["SENT", "RECEIVED", "AGE"].map(|name| (name, Align::Right));
    let last = ["MODE", "POLICY"].map(|name| (name, Align::Left));
    let mut table = Table::new(&[&left.map(|name| (name, Align::Left))[..], &right, &last].concat());
    for row in rows {
        table.row([
            format!("{} {}", row.direction, row.path),
            end(&row.source),
            names.proven(row.source.identity.as_deref()),
            end(&row.destination),
            names.proven(row.destination.identity.as_deref()),
            row.tls.clone().unwrap_or_default(),
            row.cipher.clone().unwrap_or_default(),
            row.records.clone().unwrap_or_default(),
            bytes(row.bytes_sent),
            bytes(row.bytes_received),
            duration(row.age_seconds as u64),
            row.mode.clone().unwrap_or_default(),
            row.policy.clone().unwrap_or_default(),
        ]);
    }
    table
}

/// Connections that are over, as people read them.
pub(super) fn ended_table(rows: &[EndedRow]) -> Table {
    let names = names(rows.iter().map(|row| [&row.source, &row.destination]));
    let left = ["ENDED", "WAY", "SOURCE", "IDENTITY", "DESTINATION", "IDENTITY", "CIPHER", "RECORDS"];
    let right = ["SENT", "RECEIVED", "LASTED"].map(|name| (name, Align::Right));
    let last = ["HOW", "WHY"].map(|name| (name, Align::Left));
    let mut table = Table::new(&[&left.map(|name| (name, Align::Left))[..], &right, &last].concat());
    for row in rows {
        table.row([
            row.at.round(jiff::Unit::Second).unwrap_or(row.at).to_string(),
            format!("{} {}", row.direction, row.path),
            end(&row.source),
            names.proven(row.source.identity.as_deref()),
            end(&row.destination),
            names.proven(row.destination.identity.as_deref()),
            row.cipher.clone().unwrap_or_default(),
            row.records.clone().unwrap_or_default(),
            bytes(row.bytes_sent),
            bytes(row.bytes_received),
            duration(row.duration_seconds as u64),
            row.ending.clone(),
            row.reason.clone().unwrap_or_default(),
        ]);
    }
    table
}
