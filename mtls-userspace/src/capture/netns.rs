//! A pod's network namespace: its path in, sockets and addresses of it out.

use std::cell::OnceCell;
use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::abort;

use nix::sched::{CloneFlags, setns};
use socket2::{Domain, Socket, Type};

use super::sys;

#[derive(Debug)]
pub(super) struct Netns {
    file: File,
    cookie: u64,
}

thread_local! {
    /// The namespace this thread belongs to, open so that it can return without a look at the file system.
    static HOME: OnceCell<File> = const { OnceCell::new() };
}

impl Netns {
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let cookie = within(&file, cookie)??;
        Ok(Self { file, cookie })
    }

    pub fn cookie(&self) -> u64 {
        self.cookie
    }

    pub fn inode(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.ino())
    }

    /// Runs `f` with the calling thread in the namespace. `f` must not wait for anything.
    pub fn within<T>(&self, f: impl FnOnce() -> T) -> io::Result<T> {
        within(&self.file, f)
    }

    /// Every address of the pod that can be reached from outside.
    pub fn addresses(&self) -> io::Result<Vec<IpAddr>> {
        let found = self.within(nix::ifaddrs::getifaddrs)??;
        Ok(found
            .filter_map(|interface| interface.address)
            .filter_map(|address| {
                let v4 = address.as_sockaddr_in().map(|v4| IpAddr::from(v4.ip()));
                v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::from(v6.ip())))
            })
            .filter(|ip| is_reachable(*ip))
            .collect())
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The cookie of the calling thread's namespace.
pub(super) fn cookie() -> io::Result<u64> {
    sys::netns_cookie(&Socket::new(Domain::UNIX, Type::DGRAM, None)?)
}

fn is_reachable(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_link_local() && !v4.is_unspecified(),
        IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local() && !v6.is_unspecified(),
    }
}

fn within<T>(target: &File, f: impl FnOnce() -> T) -> io::Result<T> {
    HOME.with(|home| {
        let home = match home.get() {
            Some(home) => home,
            None => {
                let opened = File::open("/proc/thread-self/ns/net")?;
                home.get_or_init(|| opened)
            }
        };
        let _back = enter(target, home)?;
        Ok(f())
    })
}

/// Returns home on drop, also when `f` panics.
struct Back<'a>(&'a File);

fn enter<'a>(target: &File, home: &'a File) -> io::Result<Back<'a>> {
    setns(target, CloneFlags::CLONE_NEWNET)?;
    Ok(Back(home))
}

impl Drop for Back<'_> {
    fn drop(&mut self) {
        // A thread that is left in a pod's namespace would open its next socket there: nothing is worth that.
        if setns(self.0, CloneFlags::CLONE_NEWNET).is_err() {
            abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_that_others_can_dial_count() {
        for ip in ["10.0.0.1", "fd00::1", "192.168.1.1", "2001:db8::1"] {
            assert!(is_reachable(ip.parse().unwrap()), "{ip}");
        }
        for ip in ["127.0.0.1", "::1", "169.254.1.1", "fe80::1", "0.0.0.0", "::"] {
            assert!(!is_reachable(ip.parse().unwrap()), "{ip}");
        }
    }
}
