//! Plaintext moved by the kernel alone: two sockets in a map, and a program that hands what one receives to the other.
//!
//! Here to be compared, and unsafe: nothing slows a writer whose reader is slow, so that the kernel queues without end
//! what is on its way. A connection that does so is cut. The agent has no such path.

use std::io;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use socket2::SockRef;
use tokio::net::TcpStream;

use super::{Carried, Ends, OnAccept, Technique, dial};
use crate::tunnel::low_water;

mod verdict;

use verdict::Verdict;

pub(super) static TECHNIQUE: Sockmap = Sockmap;

pub(super) struct Sockmap;

/// What the kernel may hold of one connection's direction before it is cut.
const MOST_QUEUED: u64 = 256 << 20;
/// How often that is looked at: on a connection that moves bytes, and on one that has been idle for long.
const PERIODS: [Duration; 2] = [Duration::from_millis(5), Duration::from_millis(100)];
/// For the kernel to pass on what it holds at the end of a direction.
const PATIENCE: Duration = Duration::from_secs(10);

impl Technique for Sockmap {
    fn name(&self) -> &'static str {
        "plaintext, sockmap (unsafe)"
    }

    fn about(&self) -> &'static str {
        "two relays whose sockets the kernel joins by a BPF verdict; without back-pressure, never in the agent"
    }

    fn obstacle(&self) -> Option<String> {
        let error = Verdict::attach().err()?;
        Some(format!("the kernel joins no sockets by a BPF verdict: {error}"))
    }

    fn in_kernel(&self) -> bool {
        true
    }

    fn near(&self, ends: Arc<Ends>) -> OnAccept {
        joining(ends.tunnel)
    }

    fn far(&self, ends: Arc<Ends>) -> OnAccept {
        joining(ends.server)
    }
}

fn joining(to: std::net::SocketAddr) -> OnAccept {
    let verdict = Verdict::attach().map(Rc::new).map_err(|error| error.to_string());
    Box::new(move |from: TcpStream| -> Carried {
        let verdict = verdict.clone();
        Box::pin(async move {
            from.set_nodelay(true)?;
            let verdict = verdict.map_err(anyhow::Error::msg)?;
            let to = dial(to).await?;
            verdict.join(&from, &to).context("join two sockets")?;
            // What came before is passed on when the kernel next looks, which this makes it do.
            for socket in [&from, &to] {
                low_water(socket, 1)?;
            }
            tokio::try_join!(one_way(&from, &to), one_way(&to, &from))?;
            Ok(())
        })
    })
}

/// Watches a direction that the kernel carries, and carries its end, which the kernel does not.
async fn one_way(from: &TcpStream, to: &TcpStream) -> Result<()> {
    let [often, seldom] = PERIODS;
    let (mut period, mut seen) = (often, 0);
    loop {
        tokio::select! {
            ready = from.readable() => ready?,
            () = tokio::time::sleep(period) => {
                let got = received(from)?;
                let queued = got.saturating_sub(sent(to)?);
                if queued >= MOST_QUEUED {
                    // For the results, which show what a relay said last when its load fails.
                    eprintln!("no back-pressure: a connection was cut when the kernel held {queued} bytes of it");
                    bail!("cut");
                }
                period = if got == seen { seldom.min(period * 2) } else { often };
                seen = got;
                continue;
            }
        }
        match from.try_read(&mut [0]) {
            Ok(0) => break,
            Ok(_) => bail!("a byte came past the verdict"),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
    }
    // A FIN would overtake what the kernel still holds. It counts as a byte received.
    let passed_on = async {
        while sent(to)? + 1 < received(from)? {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        io::Result::Ok(())
    };
    tokio::time::timeout(PATIENCE, passed_on).await.context("the kernel lost bytes on their way")??;
    Ok(SockRef::from(to).shutdown(Shutdown::Write)?)
}

/// Bytes received, read or not.
fn received(socket: &TcpStream) -> io::Result<u64> {
    Ok(u64::from_ne_bytes(info(socket)?.eight(128)))
}

/// Bytes that were given to be sent.
fn sent(socket: &TcpStream) -> io::Result<u64> {
    let info = info(socket)?;
    let waiting = u32::from_ne_bytes(info.four(144));
    let [sent, again] = [200, 208].map(|at| u64::from_ne_bytes(info.eight(at)));
    Ok((sent + u64::from(waiting)).saturating_sub(again))
}

/// `struct tcp_info` of linux/tcp.h as of 4.19, of which libc names half.
struct Info([u8; 224]);

impl Info {
    fn four(&self, at: usize) -> [u8; 4] {
        self.0.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or_default()
    }

    fn eight(&self, at: usize) -> [u8; 8] {
        self.0.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or_default()
    }
}

fn info(socket: &TcpStream) -> io::Result<Info> {
    let mut info = Info([0; 224]);
    let mut length = size_of_val(&info.0) as libc::socklen_t;
    let (fd, to) = (socket.as_raw_fd(), info.0.as_mut_ptr().cast());
    // SAFETY: the kernel writes at most `length` bytes to a buffer that is as long.
    match unsafe { libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, to, &raw mut length) } {
        0 => Ok(info),
        _ => Err(io::Error::last_os_error()),
    }
}
