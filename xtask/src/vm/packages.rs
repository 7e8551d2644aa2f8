//! Debian packages: a name in, its files and those of what it stands for out, below a directory; nothing is installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::dir;
use crate::{call, setup, step};

const OWN_KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// A kernel is spread over packages whose names begin so.
const PARTS: [&str; 3] = ["linux-image-", "linux-binary-", "linux-modules-"];

/// Where packages are looked for.
pub struct Archive {
    /// For every call of apt's.
    options: Vec<String>,
}

impl Archive {
    /// As this machine is set up.
    pub fn of_this_machine() -> Self {
        Self { options: Vec::new() }
    }

    /// Another suite, from the mirror this machine uses. The machine's own lists are left alone.
    pub fn suite(name: &str) -> Result<Self> {
        setup::require_debian(name)?;
        let lists = dir().join("apt").join(name);
        for made in ["lists/partial", "cache/archives/partial"].map(|part| lists.join(part)) {
            fs::create_dir_all(&made).with_context(|| format!("make {}", made.display()))?;
        }
        let sources = lists.join("sources.list");
        let line = format!("deb [signed-by={OWN_KEYS}] {} {name} main\n", mirror()?);
        fs::write(&sources, line).with_context(|| format!("write {}", sources.display()))?;
        let absolute = fs::canonicalize(&lists).with_context(|| format!("find {}", lists.display()))?;
        let at = |part: &str| absolute.join(part).display().to_string();
        let settings = [
            format!("Dir::State::lists={}", at("lists")),
            format!("Dir::Cache={}", at("cache")),
            format!("Dir::Etc::sourcelist={}", at("sources.list")),
            "Dir::Etc::sourceparts=/dev/null".to_owned(),
            // Whom apt becomes when it downloads may not see this directory.
            "APT::Sandbox::User=root".to_owned(),
            "Acquire::Languages=none".to_owned(),
        ];
        Ok(Self { options: settings.into_iter().flat_map(|setting| ["-o".to_owned(), setting]).collect() })
    }

    /// A package's files, below a directory of the given name. Kept: the next run needs no network.
    pub fn unpack(&self, package: &str, name: &str) -> Result<PathBuf> {
        let root = dir().join("kernels").join(name);
        if root.join("complete").exists() {
            return Ok(root);
        }
        setup::require_debian(package)?;
        step(&format!("fetching {package}"));
        // What a run that was ended left would be mixed with another version.
        let _ = fs::remove_dir_all(&root);
        fs::create_dir_all(&root).with_context(|| format!("make {}", root.display()))?;
        let parts = match self.parts(package) {
            Ok(parts) if self.download(&parts, &root).is_ok() => parts,
            // Package lists may be missing, or older than what the mirror still has.
            _ => {
                self.update()?;
                let parts = self.parts(package)?;
                self.download(&parts, &root)?;
                parts
            }
        };
        for part in &parts {
            let archive = only(&root, &format!("{part}_"))?;
            call(Command::new("dpkg-deb").arg("-x").arg(&archive).arg(&root))?;
            fs::remove_file(&archive)?;
        }
        fs::write(root.join("complete"), parts.join("\n"))?;
        Ok(root)
    }

    fn update(&self) -> Result<()> {
        call(Command::new("apt-get").arg("-qq").args(&self.options).arg("update"))
    }

    fn download(&self, packages: &[String], into: &Path) -> Result<()> {
        let mut command = Command::new("apt-get");
        call(command.arg("-qq").args(&self.options).arg("download").args(packages).current_dir(into))
    }

    /// The package and those parts of a kernel that it depends on, near or far.
    fn parts(&self, package: &str) -> Result<Vec<String>> {
        let mut parts = vec![package.to_owned()];
        let mut looked = 0;
        while let Some(name) = parts.get(looked).cloned() {
            looked += 1;
            let mut command = Command::new("apt-cache");
            let output = command.args(&self.options).args(["depends", &name]).output();
            let output = output.context("run apt-cache")?;
            ensure!(output.status.success(), "there is no package {name} here");
            for needed in needed(&String::from_utf8_lossy(&output.stdout)) {
                if !parts.contains(&needed) {
                    parts.push(needed);
                }
            }
        }
        Ok(parts)
    }
}

/// Parts of a kernel among what `apt-cache depends` lists.
fn needed(listed: &str) -> Vec<String> {
    let depends = listed.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
    depends.filter(|name| PARTS.iter().any(|part| name.starts_with(part))).map(str::to_owned).collect()
}

/// Where this machine has its own release from.
fn mirror() -> Result<String> {
    let release = fs::read_to_string("/etc/os-release").context("read /etc/os-release")?;
    let codename = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    let codename = codename.context("this Debian has no code name")?;
    let format = ["indextargets", "--format", "$(RELEASE) $(REPO_URI)", "Created-By: Packages"];
    let output = Command::new("apt-get").args(format).output().context("run apt-get indextargets")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let from = text.lines().find_map(|line| line.strip_prefix(codename)?.strip_prefix(' '));
    Ok(from.with_context(|| format!("no source of packages for {codename} is set up"))?.to_owned())
}

/// The one entry of a directory whose name starts so.
pub fn only(directory: &Path, start: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(directory).with_context(|| format!("read {}", directory.display()))?;
    let mut names = entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with(start));
    let entry = names.next().with_context(|| format!("nothing like {start}* in {}", directory.display()))?;
    Ok(entry.path())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_parts_of_a_kernel_are_fetched_with_it() {
        let listed = "linux-image-cloud-amd64\n  Depends: linux-base-cloud-amd64\n  \
                      Depends: linux-image-7.3-cloud-amd64\n  Depends: linux-modules-cloud-amd64\n |Depends: dracut\n  \
                      Depends: <linux-initramfs-tool>\n  Breaks: linux-image-other\n";
        assert_eq!(needed(listed), ["linux-image-7.3-cloud-amd64", "linux-modules-cloud-amd64"]);
    }
}
