//! Pinned state: `<bpffs>/mtls-v<layout>/{maps,links}`. Paths in; what is there, adopted or made, out.
//!
//! A link is never detached to be attached again: the program behind it is replaced. State of other layouts is left
//! alone until [`Pins::drop_other_layouts`], so that their enforcement holds while this one takes over.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use mtls_common::LAYOUT;
use nix::fcntl::{Flock, FlockArg};

use super::error::Error;
use super::netns::Netns;
use super::sys::{self, AttachType, LinkInfo, LinkTarget};

const DIRECTORY: &str = "mtls-v";
/// What every name begins with that an agent pins by, while it tries what the kernel can do, too.
const OURS: &str = "mtls-";
const LINKS: &str = "links";
const LOOKUP: &str = "lookup-";

#[derive(Debug)]
pub(super) struct Pins {
    bpffs: PathBuf,
}

/// Removes what agents of any version pinned in a directory, and nothing else there, which lets go of their pods.
/// Returns the number of those.
///
/// # Errors
///
/// When the directory is in no BPF file system, or something there cannot be removed.
pub fn release(bpffs: &Path) -> Result<usize, Error> {
    super::preflight::bpffs(bpffs)?;
    if !bpffs.exists() {
        return Ok(0);
    }
    let failed = |source| Error::Pin { what: "removing what is in", path: bpffs.to_path_buf(), source };
    let mut pods = 0;
    for entry in fs::read_dir(bpffs).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if !entry.file_name().to_string_lossy().starts_with(OURS) {
            continue;
        }
        let path = entry.path();
        pods += looked_up(&path.join(LINKS)).map_or(0, |pods| pods.len());
        if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }.map_err(failed)?;
    }
    // Somebody else's directory stays.
    let _ = fs::remove_dir(bpffs);
    Ok(pods)
}

impl Pins {
    pub fn create(bpffs: &Path) -> Result<Self, Error> {
        let pins = Self { bpffs: bpffs.to_path_buf() };
        for path in [pins.maps(), pins.links()] {
            fs::create_dir_all(&path).map_err(|source| Error::Pin { what: "creating", path, source })?;
        }
        Ok(pins)
    }

    /// Two agents of one node may run at once, but not start at once.
    pub fn lock(&self) -> Result<Flock<fs::File>, Error> {
        let path = self.root();
        let error = |source| Error::Pin { what: "locking", path: path.clone(), source };
        let directory = fs::File::open(&path).map_err(error)?;
        Flock::lock(directory, FlockArg::LockExclusive).map_err(|(_, errno)| error(errno.into()))
    }

    fn root(&self) -> PathBuf {
        self.bpffs.join(format!("{DIRECTORY}{LAYOUT}"))
    }

    fn maps(&self) -> PathBuf {
        self.root().join("maps")
    }

    fn links(&self) -> PathBuf {
        self.root().join(LINKS)
    }

    pub fn map(&self, name: &str) -> PathBuf {
        self.maps().join(name)
    }

    /// Puts a program behind the pinned link of that name, or attaches and pins it.
    pub fn cgroup_link(
        &self,
        name: &str,
        program: BorrowedFd<'_>,
        attach: AttachType,
        cgroup: impl AsFd,
        wanted: u64,
    ) -> Result<(), Error> {
        let path = self.links().join(name);
        if let Some(link) = existing(&path)? {
            match sys::link_target(&link).map_err(|source| pin_error("reading", &path, source))? {
                LinkTarget::Cgroup { id: 0 } => remove(&path)?,
                LinkTarget::Cgroup { id } if id == wanted => return replace(&link, program, &path),
                LinkTarget::Cgroup { id } => {
                    let (found, wanted) = (format!("cgroup {id}"), format!("cgroup {wanted}"));
                    return Err(Error::PinnedElsewhere { path: self.root(), found, wanted });
                }
                LinkTarget::Netns { .. } | LinkTarget::Other => return Err(Error::PinnedShape { path }),
            }
        }
        let link =
            sys::attach(program, cgroup, attach).map_err(|source| pin_error("attaching", &path, source))?;
        sys::pin(link.as_fd(), &path).map_err(|source| pin_error("pinning", &path, source))
    }

    /// The same for the lookup of one pod. True if there was one.
    pub fn lookup_link(&self, pod: &str, netns: &Netns, program: BorrowedFd<'_>) -> Result<bool, Error> {
        let error = |source| Error::Attach { pod: pod.into(), source };
        let path = self.lookup_path(netns.cookie());
        if let Some(link) = existing(&path)? {
            match sys::link_target(&link).map_err(error)? {
                LinkTarget::Netns { inode } if u64::from(inode) == netns.inode().map_err(error)? => {
                    return replace(&link, program, &path).map(|()| true);
                }
                _ => remove(&path)?,
            }
        }
        let link = sys::attach(program, netns, AttachType::SkLookup).map_err(error)?;
        sys::pin(link.as_fd(), &path).map_err(error)?;
        Ok(false)
    }

    /// Puts the program behind the lookup of every pod that an earlier agent enrolled.
    pub fn replace_lookups(&self, program: BorrowedFd<'_>) -> Result<(), Error> {
        for cookie in self.pods()? {
            let path = self.lookup_path(cookie);
            let Some(link) = existing(&path)? else { continue };
            match sys::link_target(&link).map_err(|source| pin_error("reading", &path, source))? {
                LinkTarget::Netns { inode: 0 } => remove(&path)?,
                _ => replace(&link, program, &path)?,
            }
        }
        Ok(())
    }

    /// The pinned link of that name; none if there is none.
    pub fn link_info(&self, name: &str) -> Result<Option<LinkInfo>, Error> {
        info(&self.links().join(name))
    }

    /// The pinned lookup of a pod; none if there is none.
    pub fn lookup_info(&self, cookie: u64) -> Result<Option<LinkInfo>, Error> {
        info(&self.lookup_path(cookie))
    }

    /// Netns cookies of the pods whose lookup is pinned.
    pub fn pods(&self) -> Result<Vec<u64>, Error> {
        looked_up(&self.links())
    }

    pub fn drop_lookup(&self, cookie: u64) -> Result<(), Error> {
        remove(&self.lookup_path(cookie))
    }

    pub fn drop_other_layouts(&self) -> Result<(), Error> {
        let error = |source| pin_error("listing", &self.bpffs, source);
        for entry in fs::read_dir(&self.bpffs).map_err(error)? {
            let entry = entry.map_err(error)?;
            let is_other = entry.file_name().to_str().is_some_and(|name| {
                name.strip_prefix(DIRECTORY)
                    .and_then(|layout| layout.parse().ok())
                    .is_some_and(|layout: u32| layout != LAYOUT)
            });
            if is_other {
                let path = entry.path();
                fs::remove_dir_all(&path).map_err(|source| pin_error("removing", &path, source))?;
            }
        }
        Ok(())
    }

    // The pin of a dead namespace is told from a new one's by the cookie, which is never used twice.
    fn lookup_path(&self, cookie: u64) -> PathBuf {
        self.links().join(format!("{LOOKUP}{cookie:x}"))
    }
}

/// Netns cookies of the pods whose lookups are pinned in a directory of links.
fn looked_up(links: &Path) -> Result<Vec<u64>, Error> {
    let error = |source| pin_error("listing", links, source);
    let mut cookies = Vec::new();
    for entry in fs::read_dir(links).map_err(error)? {
        let name = entry.map_err(error)?.file_name();
        let cookie = name
            .to_str()
            .and_then(|name| name.strip_prefix(LOOKUP))
            .and_then(|hex| u64::from_str_radix(hex, 16).ok());
        cookies.extend(cookie);
    }
    Ok(cookies)
}

fn info(path: &Path) -> Result<Option<LinkInfo>, Error> {
    let link = existing(path)?;
    let info = link.map(sys::link_info).transpose();
    info.map_err(|source| pin_error("reading", path, source))
}

fn existing(path: &Path) -> Result<Option<OwnedFd>, Error> {
    match sys::pinned(path) {
        Ok(link) => Ok(Some(link)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(pin_error("opening", path, source)),
    }
}

fn replace(link: &OwnedFd, program: BorrowedFd<'_>, path: &Path) -> Result<(), Error> {
    sys::replace(link, program).map_err(|source| pin_error("replacing the program behind", path, source))
}

fn remove(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(pin_error("removing", path, source)),
        _ => Ok(()),
    }
}

fn pin_error(what: &'static str, path: &Path, source: io::Error) -> Error {
    Error::Pin { what, path: path.to_path_buf(), source }
}
