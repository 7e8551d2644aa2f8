//! The command line: one file per subcommand, and the table they print for people.

use std::fmt;
use std::io::IsTerminal;

use anyhow::Context;

mod agent;
pub mod bench;
pub mod ca;
mod ca_in_cluster;
pub mod certs;
pub mod cni;
pub mod connections;
pub mod lab;
pub mod node;
pub mod node_check;
pub mod node_uninstall;
mod policies;
pub mod policy;
pub mod readiness;
pub mod services;
pub mod status;
mod stay;
pub mod verify;
mod words;
pub mod workloads;

/// In what form a subcommand prints.
#[derive(clap::ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum Output {
    Table,
    Json,
}

/// A table for people: a heading, columns as wide as their widest cell, nothing drawn around them.
pub struct Table {
    columns: Vec<(&'static str, Align)>,
    rows: Vec<Vec<String>>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Align {
    Left,
    Right,
}

impl Table {
    pub fn new(columns: &[(&'static str, Align)]) -> Self {
        Self { columns: columns.to_vec(), rows: Vec::new() }
    }

    /// Adds a row. An empty cell shows as `-`; control characters never reach the terminal.
    pub fn row<const N: usize>(&mut self, cells: [String; N]) {
        let cells =
            cells.into_iter().map(|cell| if cell.is_empty() { "-".to_owned() } else { printable(&cell) });
        self.rows.push(cells.collect());
    }
}

/// The text with every control character replaced.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let heading: Vec<String> = self.columns.iter().map(|(name, _)| (*name).to_owned()).collect();
        let lines = || std::iter::once(&heading).chain(&self.rows);
        let widths: Vec<usize> = (0..self.columns.len())
            .map(|column| {
                lines().filter_map(|cells| cells.get(column)).map(|cell| cell.chars().count()).max()
            })
            .map(Option::unwrap_or_default)
            .collect();
        for cells in lines() {
            let mut line = String::from(" ");
            for ((cell, width), (_, align)) in cells.iter().zip(&widths).zip(&self.columns) {
                let padding = " ".repeat(width - cell.chars().count());
                match align {
                    Align::Left => line.extend([" ", cell, &padding, " "]),
                    Align::Right => line.extend([" ", &padding, cell, " "]),
                }
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// Logs go to standard error; standard output is the access log's. `RUST_LOG` narrows or widens them.
pub fn log_to_stderr() {
    let filter = tracing_subscriber::EnvFilter::builder()
        .with_default_directive(tracing::level_filters::LevelFilter::INFO.into())
        .from_env_lossy()
        // Each of its errors comes back to us and is said by whoever asked, with what it was about.
        .add_directive("kube_client::client::builder=off".parse().unwrap_or_default());
    // Colours are for people; a container's log is read by programs.
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(std::io::stderr).init();
}

/// A core dump would write private keys to a disk.
pub fn forbid_core_dumps() -> anyhow::Result<()> {
    use nix::sys::{prctl, resource};
    resource::setrlimit(resource::Resource::RLIMIT_CORE, 0, 0).context("forbidding core dumps")?;
    prctl::set_dumpable(false).context("forbidding core dumps")
}

/// As many open files as the machine permits: a connection takes two, and the usual limit is 1024.
pub fn allow_open_files() -> anyhow::Result<()> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most).context("raising the limit of open files")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new(&[("NAME", Align::Left), ("BYTES", Align::Right)]);
        table.row(["a".to_owned(), "1234567".to_owned()]);
        table.row(["longer\u{1b}[31m".to_owned(), String::new()]);
        assert_eq!(
            table.to_string(),
            "  NAME           BYTES\n  a            1234567\n  longer\u{fffd}[31m        -\n"
        );
    }
}
