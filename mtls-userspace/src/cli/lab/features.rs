//! `mtls lab features`: what this machine's kernel can do, tried out, as a table or as JSON.

use std::fmt;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use crate::cli::{Align, Output, Table};
use crate::features::{self, Finding, Machine, Report};

/// The agent cannot run here.
const CANNOT_RUN: u8 = 1;

#[derive(clap::Args, Debug)]
pub struct Args {
    /// cgroup2 directory above every pod of this node [default: the cgroup2 mount]
    #[arg(long, value_name = "DIR")]
    cgroup_root: Option<PathBuf>,
    /// Directory on a bpffs where the agent pins
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/mtls")]
    bpffs: PathBuf,
    /// Table for people, or JSON for programs
    #[arg(long, short, value_enum, default_value_t = Output::Table)]
    output: Output,
}

pub fn main(args: &Args) -> ExitCode {
    let report = features::examine(args.cgroup_root.as_deref(), &args.bpffs);
    let mut out = io::stdout().lock();
    // Whoever stopped reading has seen enough; the exit code is what counts.
    let _ = match args.output {
        Output::Table => write!(out, "{}", Page(&report)),
        Output::Json => {
            let text = serde_json::to_string_pretty(&report).unwrap_or_else(|error| error.to_string());
            writeln!(out, "{text}")
        }
    };
    if report.can_run { ExitCode::SUCCESS } else { ExitCode::from(CANNOT_RUN) }
}

struct Page<'a>(&'a Report);

impl fmt::Display for Page<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { can_run, machine, features } = self.0;
        let columns = ["FEATURE", "WORKS", "NEEDED FOR", "SINCE", "SEEN, OR WHY NOT", "WITHOUT IT"];
        let mut table = Table::new(&columns.map(|name| (name, Align::Left)));
        for Finding { feature, works, seen, errno } in features {
            let errno = errno.map(|errno| format!(" (errno {errno})")).unwrap_or_default();
            let seen = if seen.contains("os error") { seen.clone() } else { format!("{seen}{errno}") };
            table.row([
                feature.name.to_owned(),
                match works {
                    Some(true) => "yes".to_owned(),
                    Some(false) => "NO".to_owned(),
                    None => "not tried".to_owned(),
                },
                feature.needed_for.to_owned(),
                feature.since.to_owned(),
                seen,
                feature.instead.to_owned(),
            ]);
        }
        writeln!(f, "{table}")?;
        write!(f, "{}", surroundings(machine))?;
        let missing =
            features.iter().filter(|finding| finding.feature.required && finding.works == Some(false));
        let missing: Vec<&str> = missing.map(|finding| finding.feature.name).collect();
        match can_run {
            true => writeln!(f, "\nThe agent can run here."),
            false => writeln!(f, "\nThe agent cannot run here: {}.", missing.join(", ")),
        }
    }
}

fn surroundings(machine: &Machine) -> Table {
    let mut table = Table::new(&[("MACHINE", Align::Left), ("", Align::Left)]);
    let mut row = |name: &str, value: String| table.row([name.to_owned(), value]);
    row("kernel", format!("{} {}", machine.kernel, machine.architecture));
    match &machine.cgroup_root {
        Some(root) => {
            row("cgroup2 root", root.path.display().to_string());
            row("processes outside it", limited(&root.outside));
        }
        None => row("cgroup2 root", "none".into()),
    }
    let mounts: Vec<String> = machine.bpffs.iter().map(|path| path.display().to_string()).collect();
    row("bpffs mounted at", if mounts.is_empty() { "nowhere".into() } else { mounts.join(", ") });
    row("the agent pins in", machine.pins.display().to_string());
    row("BTF of the kernel", if machine.btf { "yes" } else { "no, and not needed" }.into());
    let jit = match machine.jit {
        Some(0) | None => "no: programs are interpreted",
        Some(_) => "yes",
    };
    row("JIT", jit.into());
    row("lockdown", machine.lockdown.clone().unwrap_or_else(|| "none".into()));
    row("capabilities", machine.capabilities.join(", "));
    let modules: Vec<String> =
        machine.modules.iter().map(|module| format!("{}: {}", module.name, module.state)).collect();
    row("modules", modules.join(", "));
    let hooks: Vec<String> = machine
        .hooks
        .iter()
        .map(|hook| format!("{}: {} (id {})", hook.hook, hook.program, hook.id))
        .collect();
    row("programs at the hooks", if hooks.is_empty() { "none".into() } else { hooks.join(", ") });
    table
}

/// The first few names, and how many more there are.
fn limited(names: &[String]) -> String {
    const SHOWN: usize = 8;
    let shown = names.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 if names.is_empty() => "none that can be seen from here".into(),
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}
