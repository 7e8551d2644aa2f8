//! What records cost: sealed, carried over loopback and opened, by the kernel and by this process.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

use nix::sys::resource::{UsageWho, getrusage};
use rustls::ConnectionTrafficSecrets;
use rustls::crypto::cipher::{AeadKey, Iv};

use super::hand_over;
use crate::tunnel::key::Key;
use crate::tunnel::record::{ContentType, HEADER, MAX_CONTENT, Opener, Sealer, TRAILER};

/// Longest wait for a record over loopback.
const WAIT: Duration = Duration::from_secs(2);

/// CPU time per gigabyte.
#[derive(Debug, Clone, Copy)]
pub struct RecordCost {
    pub kernel: Duration,
    pub userspace: Duration,
}

impl fmt::Display for RecordCost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [kernel, userspace] = [self.kernel, self.userspace].map(|cost| cost.as_secs_f64());
        write!(f, "a gigabyte costs {kernel:.2} CPU seconds in the kernel, {userspace:.2} in userspace")
    }
}

impl RecordCost {
    /// The least of a few measurements with AES-128-GCM, some milliseconds in all. Splicing then spares the kernel's way
    /// the copies that are in here.
    pub fn measure() -> io::Result<Self> {
        let secrets =
            ConnectionTrafficSecrets::Aes128Gcm { key: AeadKey::from([7; 32]), iv: Iv::from([9; 12]) };
        let mut least = [Duration::MAX; 2];
        for _ in 0..3 {
            let costs = [cost_in_kernel(&secrets)?, cost_in_userspace(&secrets)?];
            least.iter_mut().zip(costs).for_each(|(least, cost)| *least = cost.min(*least));
        }
        let [kernel, userspace] = least.map(|cost| cost.mul_f64(1e9 / (RECORDS * MAX_CONTENT) as f64));
        Ok(Self { kernel, userspace })
    }
}

/// A connection over loopback.
fn pair() -> io::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    let near = TcpStream::connect(listener.local_addr()?)?;
    let (far, _) = listener.accept()?;
    near.set_nodelay(true)?;
    near.set_write_timeout(Some(WAIT))?;
    far.set_read_timeout(Some(WAIT))?;
    Ok((near, far))
}

/// Full records that go over loopback in one measurement, two at a time, which any socket buffer holds.
const RECORDS: usize = 64;

/// CPU time of this thread for [`RECORDS`] records that the kernel seals and opens.
fn cost_in_kernel(secrets: &ConnectionTrafficSecrets) -> io::Result<Duration> {
    let (mut near, mut far) = pair()?;
    let key = Key::new(0, secrets).map_err(io::Error::other)?;
    hand_over(near.as_fd(), libc::TLS_TX, &key)?;
    hand_over(far.as_fd(), libc::TLS_RX, &key)?;
    let mut bytes = vec![0; 2 * MAX_CONTENT];
    measure(|| {
        near.write_all(&bytes)?;
        far.read_exact(&mut bytes)
    })
}

/// As [`cost_in_kernel`], sealed and opened here.
fn cost_in_userspace(secrets: &ConnectionTrafficSecrets) -> io::Result<Duration> {
    const RECORD: usize = HEADER + MAX_CONTENT + TRAILER;
    let (mut near, mut far) = pair()?;
    let mut sealer = Sealer::new(0, secrets).map_err(io::Error::other)?;
    let mut opener = Opener::new(0, secrets).map_err(io::Error::other)?;
    let mut bytes = vec![0; 2 * RECORD];
    measure(|| {
        for record in bytes.chunks_exact_mut(RECORD) {
            sealer.seal(record, MAX_CONTENT, ContentType::ApplicationData).map_err(io::Error::other)?;
        }
        near.write_all(&bytes)?;
        far.read_exact(&mut bytes)?;
        for record in bytes.chunks_exact_mut(RECORD) {
            opener.open(record).map_err(io::Error::other)?;
        }
        Ok(())
    })
}

fn measure(mut round: impl FnMut() -> io::Result<()>) -> io::Result<Duration> {
    // Once for the allocations and the key's expansion.
    round()?;
    let began = cpu_time()?;
    for _ in 0..RECORDS / 2 {
        round()?;
    }
    Ok(cpu_time()?.saturating_sub(began))
}

/// What this thread has used.
fn cpu_time() -> io::Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_THREAD)?;
    let spent = usage.user_time() + usage.system_time();
    let micros = spent.tv_sec().saturating_mul(1_000_000).saturating_add(spent.tv_usec());
    Ok(Duration::from_micros(micros.try_into().unwrap_or(0)))
}
