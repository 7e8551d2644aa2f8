//! `mtls certs`: this node's certificates, whether they prove what they should, and since when and for how long.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};
use std::process::ExitCode;

use jiff::Timestamp;

use super::agent::{Ask, Error, Which, block_on, write_cut};
use super::words::{Names, duration, seconds_between};
use super::{Align, Table};
use crate::observe::{CertificateRow, ChainRow, Listing, RevocationRow};

const NOT_VERIFIED: u8 = 1;
const UNKNOWN: u8 = 2;

/// As many as the agent gives: one that was not looked at could be the one that does not verify.
const ALL: &str = "10000";

#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(flatten)]
    which: Which,
    #[command(flatten)]
    ask: Ask,
}

/// Runs `mtls certs` to its end.
pub fn main(args: &Args) -> ExitCode {
    match block_on(run(args, &mut io::stdout())) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(NOT_VERIFIED),
        Err(error) => {
            eprintln!("mtls: {error}");
            ExitCode::from(UNKNOWN)
        }
    }
}

/// Asks and prints. Returns whether every certificate verifies.
async fn run(args: &Args, out: &mut (dyn Write + Send)) -> Result<bool, Error> {
    let resource = args.which.query().with("limit", Some(ALL)).of("/certs");
    let listing: Listing<CertificateRow> = args.ask.get(&resource, out).await?;
    args.which.found("identity of a pod or service account on this node called", &listing)?;
    if args.ask.is_for_people() {
        write_people(out, &listing, Timestamp::now())?;
    }
    Ok(listing.items.len() == listing.total && listing.items.iter().all(|row| row.verifies))
}

fn write_people(out: &mut dyn Write, listing: &Listing<CertificateRow>, now: Timestamp) -> io::Result<()> {
    if listing.total == 0 {
        return writeln!(out, "no identity: no pod of this node is enrolled");
    }
    let rows = &listing.items;
    let names = Names::new(rows.iter().map(|row| row.identity.as_str()));
    write!(out, "{}", leaves(rows, now))?;
    write_cut(out, listing)?;
    for row in rows.iter().filter(|row| !row.verifies) {
        writeln!(
            out,
            "  {} DOES NOT VERIFY: {}",
            names.short(&row.identity),
            super::printable(&row.verdict)
        )?;
    }
    writeln!(out, "\nISSUERS")?;
    write!(out, "{}", issuers(rows, now))
}

fn leaves(rows: &[CertificateRow], now: Timestamp) -> Table {
    let columns =
        ["SPIFFE ID", "SERIAL", "NOT BEFORE", "NOT AFTER", "TIME LEFT", "RENEWS IN", "VERIFIES", "PODS"];
    let mut table = Table::new(&columns.map(|name| (name, Align::Left)));
    for row in rows {
        let renews = row.next_renewal.map(|at| duration(seconds_between(now, at)));
        table.row([
            row.identity.clone(),
            row.serial.clone().unwrap_or_default(),
            row.not_before.map(|at| at.to_string()).unwrap_or_default(),
            row.not_after.map(|at| at.to_string()).unwrap_or_default(),
            row.seconds_left.map_or_else(|| "NO CERTIFICATE".to_owned(), duration),
            renews.unwrap_or_default(),
            if row.verifies { "yes" } else { "NO" }.to_owned(),
            row.workloads.join(","),
        ]);
    }
    table
}

/// Intermediates, roots and revocation lists, each once.
fn issuers(rows: &[CertificateRow], now: Timestamp) -> Table {
    let mut seen: BTreeMap<(&str, &str, &str), (&ChainRow, usize)> = BTreeMap::new();
    for row in rows {
        let intermediates = row.chain.iter().skip(1).map(|row| ("intermediate", row));
        for (role, issuer) in intermediates.chain(row.roots.iter().map(|row| ("root", row))) {
            let counted = seen.entry((role, &issuer.subject, &issuer.serial)).or_insert((issuer, 0));
            counted.1 += 1;
        }
    }
    let columns = ["ROLE", "SUBJECT", "SERIAL", "NOT AFTER", "TIME LEFT", "IDENTITIES"];
    let mut table = Table::new(&columns.map(|name| (name, Align::Left)));
    for ((role, subject, serial), (issuer, identities)) in seen {
        let left = match issuer.not_after {
            end if end <= now => "EXPIRED".to_owned(),
            end => duration(seconds_between(now, end)),
        };
        table.row([
            role.to_owned(),
            subject.to_owned(),
            serial.to_owned(),
            issuer.not_after.to_string(),
            left,
            identities.to_string(),
        ]);
    }
    let lists: BTreeSet<&RevocationRow> = rows.iter().flat_map(|row| &row.revocation_lists).collect();
    for list in lists {
        let left = match list.next_update {
            Some(next) if next <= now => "OVERDUE".to_owned(),
            next => next.map(|next| duration(seconds_between(now, next))).unwrap_or_default(),
        };
        table.row([
            "revocations".to_owned(),
            list.issuer.clone(),
            format!("{} revoked", list.revoked),
            list.next_update.map(|next| next.to_string()).unwrap_or_default(),
            left,
            rows.iter().filter(|row| row.revocation_lists.contains(list)).count().to_string(),
        ]);
    }
    table
}
