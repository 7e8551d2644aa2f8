//! Kernel modules: a kernel's module directory in, those the tests need and those they depend on out.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

pub struct Module {
    pub name: String,
    /// The file, not compressed.
    pub bytes: Vec<u8>,
    depends: Vec<String>,
    aliases: Vec<String>,
}

/// What the lab or a capability of the product may ask for; a kernel that has one built in has no module for it.
const WANTED: [&str; 26] = [
    // The lab's network, and packets seen on it.
    "ipv6",
    "veth",
    "bridge",
    "af_packet",
    // Kernel TLS and its ciphers.
    "tls",
    "gcm",
    "ctr",
    "ghash-generic",
    "aesni-intel",
    "ghash-clmulni-intel",
    "chacha20poly1305",
    "chacha_generic",
    "chacha",
    "chacha-x86_64",
    "poly1305_generic",
    "poly1305-x86_64",
    "seqiv",
    "authenc",
    "crypto_null",
    "ccm",
    // Listing and ending sockets.
    "inet_diag",
    "tcp_diag",
    "unix_diag",
    // Congestion control that may be the default.
    "tcp_bbr",
    "sch_fq",
    "sch_fq_codel",
];

pub fn wanted(directory: &Path) -> Result<Vec<Module>> {
    let mut files = BTreeMap::new();
    find(directory, &mut files)?;
    let mut found: BTreeMap<String, Module> = BTreeMap::new();
    let mut open: Vec<String> = WANTED.iter().map(|name| plain(name)).collect();
    while let Some(name) = open.pop() {
        let Some(path) = files.get(&name).filter(|_| !found.contains_key(&name)) else { continue };
        let module = read(name.clone(), path)?;
        open.extend(module.depends.iter().map(|name| plain(name)));
        found.insert(name, module);
    }
    Ok(found.into_values().collect())
}

/// What the machine's modprobe reads: `name dependency,… alias,…` a line.
pub fn index(modules: &[Module]) -> String {
    let line = |module: &Module| {
        format!("{} {} {}\n", module.name, module.depends.join(","), module.aliases.join(","))
    };
    modules.iter().map(line).collect()
}

fn find(directory: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    let entries = fs::read_dir(directory).with_context(|| format!("read {}", directory.display()))?;
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            find(&entry.path(), files)?;
        } else if let Some((name, _)) = entry.file_name().to_string_lossy().split_once(".ko") {
            files.insert(plain(name), entry.path());
        }
    }
    Ok(())
}

fn read(name: String, path: &Path) -> Result<Module> {
    let bytes = match path.extension().and_then(|extension| extension.to_str()) {
        Some("ko") => fs::read(path).with_context(|| format!("read {}", path.display()))?,
        Some("xz") => {
            let output = Command::new("xz").arg("-dc").arg(path).output().context("run xz")?;
            ensure!(output.status.success(), "xz cannot unpack {}", path.display());
            output.stdout
        }
        _ => bail!("{} is compressed in a way that is not known here", path.display()),
    };
    let depends = described(&bytes, "depends=").flat_map(|list| list.split(',').map(str::to_owned));
    let depends = depends.filter(|name| !name.is_empty()).collect();
    // Those with patterns in them are for hardware, which no kernel asks for by that name.
    let aliases = described(&bytes, "alias=").filter(|alias| !alias.contains(['*', ',', ' ']));
    let aliases = aliases.map(str::to_owned).collect();
    Ok(Module { name, depends, aliases, bytes })
}

/// What a module says of itself, in strings such as `alias=tcp-ulp-tls` that end with NUL.
fn described<'a>(bytes: &'a [u8], key: &'a str) -> impl Iterator<Item = &'a str> {
    let strings = bytes.split(|byte| *byte == 0).filter(move |string| string.starts_with(key.as_bytes()));
    strings.filter_map(move |string| std::str::from_utf8(string).ok()?.strip_prefix(key))
}

fn plain(name: &str) -> String {
    name.replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_is_described_by_strings_in_it() {
        let bytes = b"\x7fELF\0alias=tcp-ulp-tls\0depends=a,b\0name=tls\0alias=tls";
        assert_eq!(described(bytes, "alias=").collect::<Vec<_>>(), ["tcp-ulp-tls", "tls"]);
        assert_eq!(described(bytes, "depends=").collect::<Vec<_>>(), ["a,b"]);
        assert_eq!(described(bytes, "vermagic=").count(), 0);
    }
}
