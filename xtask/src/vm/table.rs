//! The README's table of kernels: what was seen on each in, the text between two marks out.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::kernel::Kernel;
use super::verdict::Seen;

const BEGIN: &str = "<!-- kernels: written by `cargo xtask vm --table` -->\n";
const END: &str = "<!-- end of kernels -->";

/// Puts what was seen where the README shows it.
pub fn write(seen: &[(Kernel, Seen)]) -> Result<()> {
    let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join("README.md");
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let text = replaced(&text, &table(seen)).with_context(|| path.display().to_string())?;
    fs::write(&path, text).with_context(|| format!("write {}", path.display()))
}

fn replaced(text: &str, table: &str) -> Result<String> {
    let (before, rest) = text.split_once(BEGIN).context("has no mark where the table of kernels begins")?;
    let (_, after) = rest.split_once(END).context("has no mark where the table of kernels ends")?;
    ensure!(!after.contains(BEGIN), "has two tables of kernels");
    Ok(format!("{before}{BEGIN}\n{table}\n{END}{after}"))
}

fn table(seen: &[(Kernel, Seen)]) -> String {
    let mut text = String::from("| |");
    for (kernel, seen) in seen {
        // What follows the version number says how it was packed.
        let version = seen.release.split(['-', '+']).next().unwrap_or_default();
        text += &format!(" {version}, {} |", kernel.origin());
    }
    text += &format!("\n|---|{}\n", "---|".repeat(seen.len()));
    let mut rows: Vec<&str> = Vec::new();
    for name in seen.iter().flat_map(|(_, seen)| &seen.cases).map(|(name, _)| name.as_str()) {
        if !rows.contains(&name) {
            rows.push(name);
        }
    }
    for row in rows {
        let cell = |seen: &Seen| seen.cases.iter().find(|(name, _)| name == row).map(|(_, passed)| *passed);
        text += &line(row, seen.iter().map(|(_, seen)| cell(seen)));
    }
    let mut optional: Vec<&String> = seen.iter().flat_map(|(_, seen)| seen.optional.keys()).collect();
    optional.sort();
    optional.dedup();
    for row in optional {
        text += &line(&format!("`{row}`"), seen.iter().map(|(_, seen)| seen.optional.get(row).copied()));
    }
    text
}

fn line(name: &str, cells: impl Iterator<Item = Option<bool>>) -> String {
    let cells = cells.map(|cell| match cell {
        Some(true) => " yes |",
        Some(false) => " no |",
        None => " – |",
    });
    format!("| {name} |{}\n", cells.collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_stands_between_its_marks() {
        let mut old = Seen::default();
        old.note(r#"{"kernel":"6.1"}"#);
        old.note(r#"{"case":"STRICT","passed":true}"#);
        let mut new = Seen::default();
        new.note(r#"{"kernel":"6.12"}"#);
        new.note(r#"{"case":"STRICT","passed":false}"#);
        new.note(r#"{"optional":{"splice":true}}"#);
        let table = table(&[(Kernel::Debian12, old), (Kernel::Debian13, new)]);
        assert!(table.contains("\n| STRICT | yes | no |\n| `splice` | – | yes |\n"), "{table}");
        let text = format!("a\n{BEGIN}old\n{END}\nb\n");
        let once = replaced(&text, &table).expect("there are marks");
        assert_eq!(once, format!("a\n{BEGIN}\n{table}\n{END}\nb\n"));
        assert_eq!(replaced(&once, &table).expect("there are marks"), once);
        assert!(replaced("no marks", &table).is_err());
    }
}
