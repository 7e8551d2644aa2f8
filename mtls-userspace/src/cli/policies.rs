//! `mtls policy list`: the policies that this node's agent has read, and what each does.

use std::io::{self, Write};

use super::agent::{Ask, Error, Page, Which, block_on, write_cut};
use super::{Align, Table, printable};
use crate::observe::{Listing, PolicyRow};

#[derive(clap::Args, Debug)]
pub(super) struct ListArgs {
    #[command(flatten)]
    which: Which,
    #[command(flatten)]
    page: Page,
    #[command(flatten)]
    ask: Ask,
}

pub(super) fn main(args: &ListArgs) -> anyhow::Result<()> {
    Ok(block_on(run(args, &mut io::stdout()))?)
}

async fn run(args: &ListArgs, out: &mut (dyn Write + Send)) -> Result<(), Error> {
    let resource = args.page.add_to(args.which.query()).of("/policies");
    let listing: Listing<PolicyRow> = args.ask.get(&resource, out).await?;
    if args.ask.is_for_people() {
        if listing.total == 0 && args.which.name.is_none() {
            writeln!(out, "no policy: every port is PERMISSIVE and everybody is allowed")?;
        } else if listing.total > 0 {
            write!(out, "{}", table(&listing.items))?;
            write_cut(out, &listing)?;
            write_warnings(out, &listing.items)?;
        }
    }
    args.which.found("policy", &listing)
}

fn table(rows: &[PolicyRow]) -> Table {
    let left = |name| (name, Align::Left);
    let mut table = Table::new(&[
        left("KIND"),
        left("NAMESPACE"),
        left("NAME"),
        left("SCOPE"),
        left("SAYS"),
        left("STATE"),
        ("PODS", Align::Right),
        ("LOCAL", Align::Right),
    ]);
    for row in rows {
        let labels = row.selector.iter().map(|(key, value)| format!("{key}={value}"));
        let selector = labels.collect::<Vec<_>>().join(",");
        table.row([
            row.kind.clone(),
            row.namespace.clone(),
            row.name.clone(),
            if selector.is_empty() { row.scope.clone() } else { selector },
            says(row),
            if row.state == "enforced" {
                "enforced".to_owned()
            } else {
                row.state.to_uppercase().replace('_', " ")
            },
            row.selects.to_string(),
            row.selects_local.to_string(),
        ]);
    }
    table
}

fn says(row: &PolicyRow) -> String {
    if let Some(action) = &row.action {
        return format!("{action}, {} {}", row.rules, if row.rules == 1 { "rule" } else { "rules" });
    }
    let default = row.mode.clone().unwrap_or_else(|| "inherits".to_owned());
    let ports = row.port_modes.iter().map(|(port, mode)| format!("{port} {mode}"));
    [default].into_iter().chain(ports).collect::<Vec<_>>().join(", ")
}

fn write_warnings(out: &mut dyn Write, rows: &[PolicyRow]) -> io::Result<()> {
    for row in rows {
        for warning in &row.warnings {
            let line = format!("{} {}/{} {warning}", row.kind, row.namespace, row.name);
            writeln!(out, "warning: {}", printable(&line))?;
        }
    }
    Ok(())
}
