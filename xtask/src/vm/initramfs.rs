//! The machine's only file system: files in, a cpio archive (`newc`, as the kernel unpacks it) out.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::setup;

#[derive(Default)]
pub struct Initramfs {
    /// By absolute path.
    entries: BTreeMap<String, Entry>,
}

struct Entry {
    mode: u32,
    device: (u32, u32),
    bytes: Vec<u8>,
}

const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

impl Initramfs {
    pub fn file(&mut self, path: &str, bytes: Vec<u8>, permissions: u32) {
        self.put(path, FILE | permissions, bytes);
    }

    pub fn link(&mut self, path: &str, target: &str) {
        self.put(path, LINK | 0o777, target.into());
    }

    /// A program that needs nothing else, in `/bin`.
    pub fn program(&mut self, path: &Path) -> Result<()> {
        let name = path.file_name().context("a program without a name")?.to_string_lossy();
        let bytes = fs::read(path).with_context(|| format!("read {}", path.display()))?;
        self.file(&format!("/bin/{name}"), bytes, 0o755);
        Ok(())
    }

    /// One of this machine's programs, with the libraries it is linked with.
    pub fn shared_program(&mut self, name: &str) -> Result<()> {
        let path = setup::find(name).with_context(|| format!("{name} is not installed"))?;
        let output = Command::new("ldd").arg(&path).output().context("run ldd")?;
        ensure!(output.status.success(), "ldd {} failed", path.display());
        for library in String::from_utf8_lossy(&output.stdout).lines().filter_map(library) {
            let bytes = fs::read(&library).with_context(|| format!("read {}", library.display()))?;
            self.file(&library.to_string_lossy(), bytes, 0o755);
        }
        self.program(&path)
    }

    fn put(&mut self, path: &str, mode: u32, bytes: Vec<u8>) {
        for (end, _) in path.match_indices('/').skip(1) {
            let directory = Entry { mode: DIRECTORY | 0o755, device: (0, 0), bytes: Vec::new() };
            self.entries.entry(path[..end].to_owned()).or_insert(directory);
        }
        self.entries.insert(path.to_owned(), Entry { mode, device: (0, 0), bytes });
    }

    pub fn write(mut self, path: &Path) -> Result<()> {
        // Process 1 has its standard streams from here, before anything is mounted.
        self.put("/dev/console", CHARACTER_DEVICE | 0o600, Vec::new());
        if let Some(console) = self.entries.get_mut("/dev/console") {
            console.device = (5, 1);
        }
        let file = File::create(path).with_context(|| format!("make {}", path.display()))?;
        let mut archive = BufWriter::new(file);
        for (number, (path, entry)) in (1..).zip(&self.entries) {
            write_entry(&mut archive, number, path.trim_start_matches('/'), entry)?;
        }
        let end = Entry { mode: 0, device: (0, 0), bytes: Vec::new() };
        write_entry(&mut archive, 0, "TRAILER!!!", &end)?;
        archive.flush().with_context(|| format!("write {}", path.display()))
    }
}

fn write_entry(archive: &mut impl Write, number: u32, name: &str, entry: &Entry) -> Result<()> {
    let size = u32::try_from(entry.bytes.len()).context("too large for an initramfs")?;
    let (major, minor) = entry.device;
    let name_size = name.len() as u32 + 1;
    write!(archive, "070701")?;
    // inode, mode, owner, group, links, time, size, device it is on, device it is, length of the name, checksum
    for field in [number, entry.mode, 0, 0, 1, 0, size, 0, 0, major, minor, name_size, 0] {
        write!(archive, "{field:08X}")?;
    }
    archive.write_all(name.as_bytes())?;
    // The header has 110 bytes; it with the name, and the content, are filled up to a multiple of four.
    archive.write_all(&[0; 4][..1 + padding(110 + name.len() + 1)])?;
    archive.write_all(&entry.bytes)?;
    archive.write_all(&[0; 4][..padding(entry.bytes.len())])?;
    Ok(())
}

fn padding(length: usize) -> usize {
    length.wrapping_neg() % 4
}

/// `libc.so.6 => /lib/libc.so.6 (0x…)`, or `/lib64/ld-linux.so.2 (0x…)`.
fn library(line: &str) -> Option<PathBuf> {
    let line = line.split_once("=> ").map_or(line, |(_, path)| path).trim();
    line.starts_with('/').then(|| line.split(' ').next().map(PathBuf::from))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_found_in_what_ldd_says() {
        assert_eq!(library("\tlibc.so.6 => /lib/libc.so.6 (0x7f)"), Some("/lib/libc.so.6".into()));
        assert_eq!(
            library("\t/lib64/ld-linux-x86-64.so.2 (0x7f)"),
            Some("/lib64/ld-linux-x86-64.so.2".into())
        );
        assert_eq!(library("\tlinux-vdso.so.1 (0x7f)"), None);
    }

    #[test]
    fn headers_and_contents_are_aligned() {
        let mut archive = Vec::new();
        let entry = Entry { mode: FILE | 0o644, device: (0, 0), bytes: b"hello".to_vec() };
        write_entry(&mut archive, 1, "name", &entry).expect("a vector takes everything");
        assert_eq!(archive.len(), 116 + 8);
        assert_eq!(&archive[..14], b"07070100000001");
        assert_eq!(&archive[110..121], b"name\0\0hello");
        assert_eq!(&archive[54..62], b"00000005");
    }

    #[test]
    fn directories_come_before_what_is_in_them() {
        let mut files = Initramfs::default();
        files.file("/a/b/c", Vec::new(), 0o644);
        assert_eq!(files.entries.keys().collect::<Vec<_>>(), ["/a", "/a/b", "/a/b/c"]);
    }
}
