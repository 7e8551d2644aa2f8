//! epoll, as much of it as a load client needs: sockets and keys in, keys of ready sockets out.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

const BATCH: usize = 256;

/// What a socket waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Interest {
    Read = libc::EPOLLIN as isize,
    Write = libc::EPOLLOUT as isize,
}

pub(super) struct Poll(OwnedFd);

/// Keys of sockets that became ready.
pub(super) struct Ready {
    events: [libc::epoll_event; BATCH],
    count: usize,
}

impl Ready {
    pub fn new() -> Self {
        Self { events: [libc::epoll_event { events: 0, u64: 0 }; BATCH], count: 0 }
    }

    pub fn keys(&self) -> impl Iterator<Item = usize> {
        self.events.iter().take(self.count).map(|event| event.u64 as usize)
    }
}

impl Poll {
    pub fn new() -> io::Result<Self> {
        // SAFETY: takes a number and returns a descriptor or -1.
        let fd = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        check(fd)?;
        // SAFETY: the descriptor was just made and belongs to nobody else.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    pub fn add(&self, socket: &impl AsRawFd, key: usize, interest: Interest) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_ADD, socket, key, interest)
    }

    pub fn change(&self, socket: &impl AsRawFd, key: usize, interest: Interest) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_MOD, socket, key, interest)
    }

    fn control(
        &self,
        operation: i32,
        socket: &impl AsRawFd,
        key: usize,
        interest: Interest,
    ) -> io::Result<()> {
        let mut event = libc::epoll_event { events: interest as u32, u64: key as u64 };
        // SAFETY: both descriptors are open, and the event is only read during the call.
        check(unsafe { libc::epoll_ctl(self.0.as_raw_fd(), operation, socket.as_raw_fd(), &mut event) })
    }

    /// Waits until a socket is ready or, to the nanosecond, `limit` is over.
    pub fn wait(&self, ready: &mut Ready, limit: Option<Duration>) -> io::Result<()> {
        let limit = limit.map(|limit| libc::timespec {
            tv_sec: limit.as_secs() as libc::time_t,
            tv_nsec: libc::c_long::from(limit.subsec_nanos() as i32),
        });
        let limit = limit.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        ready.count = 0;
        // SAFETY: the array has room for BATCH events; the time, if any, outlives the call.
        let count = unsafe {
            libc::epoll_pwait2(
                self.0.as_raw_fd(),
                ready.events.as_mut_ptr(),
                BATCH as i32,
                limit,
                std::ptr::null(),
            )
        };
        match check(count) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(error) => Err(error),
            Ok(()) => {
                ready.count = count as usize;
                Ok(())
            }
        }
    }
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Whether a call did nothing because the socket isn't ready.
pub(super) fn not_ready(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
