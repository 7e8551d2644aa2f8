//! `mtls verify`: asks this node's agent for proof of how one pod's connections to another are protected, and says so
//! by its exit code.
//!
//! 0: proven, encrypted or within the node. 1: not. 2: nobody could tell: wrong usage, an unknown pod, no agent.

use std::io::{self, Write};
use std::process::ExitCode;
use std::str::FromStr;

use super::agent::{Ask, Error, Query, block_on};
use super::connections::{ended_table, open_table};
use super::policy::ForPeople;
use super::{Align, Table, printable};
use crate::observe::{CheckRow, End, Proof, Verification};

const NOT_PROVEN: u8 = 1;
const UNKNOWN: u8 = 2;

#[derive(clap::Args, Debug)]
pub struct Args {
    /// The pod that dials.
    #[arg(long, value_name = "NAMESPACE/POD")]
    from: Pod,

    /// The pod that is dialled, and its port.
    #[arg(long, value_name = "NAMESPACE/POD:PORT")]
    to: Target,

    #[command(flatten)]
    ask: Ask,
}

#[derive(Clone, Debug)]
struct Pod(String);

#[derive(Clone, Debug)]
struct Target {
    pod: Pod,
    port: u16,
}

impl FromStr for Pod {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('/') {
            Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
                Ok(Self(text.to_owned()))
            }
            _ => Err("a pod is written NAMESPACE/NAME".to_owned()),
        }
    }
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || "a pod and its port are written NAMESPACE/NAME:PORT, with a port from 1 to 65535".to_owned();
        let (pod, port) = text.rsplit_once(':').ok_or_else(wrong)?;
        let port = port.parse().ok().filter(|port| *port > 0).ok_or_else(wrong)?;
        Ok(Self { pod: pod.parse()?, port })
    }
}

/// Runs `mtls verify` to its end.
pub fn main(args: &Args) -> ExitCode {
    match block_on(run(args, &mut io::stdout())) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(NOT_PROVEN),
        Err(error) => {
            eprintln!("mtls: {error}");
            ExitCode::from(UNKNOWN)
        }
    }
}

/// Asks and prints. Returns whether protection is proven.
async fn run(args: &Args, out: &mut (dyn Write + Send)) -> Result<bool, Error> {
    let Args { from, to, ask } = args;
    let query = Query::default().with("from", Some(&from.0)).with("to", Some(&to.pod.0));
    let resource = query.with("port", Some(&to.port.to_string())).of("/verify");
    let verification: Verification = ask.get(&resource, out).await?;
    if ask.is_for_people() {
        write_people(out, &verification)?;
    }
    Ok(verification.verdict.is_protected())
}

fn write_people(out: &mut dyn Write, verification: &Verification) -> io::Result<()> {
    let Verification { verdict, reasons, expected, checks, open, ended, unseen, .. } = verification;
    writeln!(out, "{}", words(*verdict))?;
    for reason in reasons {
        writeln!(out, "  {}", printable(reason))?;
    }
    write!(out, "\n{}", ForPeople(expected))?;
    writeln!(out, "\nFOUND ON {} ({})", printable(&verification.node), checks.len())?;
    if !checks.is_empty() {
        write!(out, "{}", checks_table(checks))?;
    }
    for unseen in unseen {
        writeln!(out, "  not seen: {}", printable(unseen))?;
    }
    writeln!(out, "\nOPEN CONNECTIONS OF THE PAIR ({})", open.len())?;
    if !open.is_empty() {
        write!(out, "{}", open_table(open))?;
    }
    writeln!(out, "\nLAST CONNECTIONS OF THE PAIR ({})", ended.len())?;
    if !ended.is_empty() {
        write!(out, "{}", ended_table(ended))?;
    }
    Ok(())
}

fn words(proof: Proof) -> &'static str {
    match proof {
        Proof::Encrypted => "PROVEN: mutual TLS on the wire, both identities proven",
        Proof::SameNode => "PROVEN: within the node and on no wire, both identities proven by the kernel",
        Proof::Direct => {
            "READABLE ON THE NODE: on no wire, both identities proven by the kernel, but not encrypted"
        }
        Proof::Refused => "REFUSED: there is no connection to protect",
        Proof::Plaintext => "PLAINTEXT: bytes are readable on their way",
        Proof::Unproven => "NOT PROVEN",
    }
}

fn checks_table(checks: &[CheckRow]) -> Table {
    let mut table = Table::new(&["END", "CHECK", "RESULT", "FOUND"].map(|name| (name, Align::Left)));
    for CheckRow { end, name, passed, found } in checks {
        let end = match end {
            End::Source => "source",
            End::Destination => "destination",
        };
        let result = if *passed { "ok" } else { "FAILED" };
        table.row([end.to_owned(), name.replace('_', " "), result.to_owned(), found.clone()]);
    }
    table
}
