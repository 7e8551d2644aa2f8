//! What this kernel's record layer can do, found by doing it over loopback, and whether it is worth it.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

use nix::sys::resource::{UsageWho, getrusage};
use rustls::crypto::cipher::{AeadKey, Iv};
use rustls::{CipherSuite, ConnectionTrafficSecrets};

use super::{hand_over, receive_record, send_record, set};
use crate::tunnel::key::Key;
use crate::tunnel::record::{ContentType, HEADER, MAX_CONTENT, Opener, RecordError, Sealer, TRAILER};

/// Longest wait for a record over loopback.
const WAIT: Duration = Duration::from_secs(2);

/// What this kernel's record layer can do, found by doing it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelRecords {
    /// Suites whose records it carries.
    pub suites: Vec<CipherSuite>,
}

/// Why this kernel can carry no records.
#[derive(Debug, thiserror::Error)]
pub enum NoKernelRecords {
    #[error("cannot make a connection over loopback to try it on: {0}")]
    Loopback(io::Error),
    #[error("the kernel has no TLS: {0}; it needs CONFIG_TLS, as a module `tls` (`modprobe tls`)")]
    Missing(io::Error),
    #[error(
        "the kernel has TLS but takes no AES-128-GCM key: {0}; a module `gcm` may be missing (`modprobe gcm`)"
    )]
    Key(io::Error),
    #[error("the kernel's TLS carries no record over loopback: {0}")]
    Record(io::Error),
    #[error(transparent)]
    Unusable(#[from] RecordError),
}

impl KernelRecords {
    /// Sets up both directions between two sockets over loopback and sends a record and an alert, for every suite.
    /// AES-128-GCM, which most tunnels negotiate, must work.
    pub fn probe() -> Result<Self, NoKernelRecords> {
        let (key, iv) = (|| AeadKey::from([7; 32]), || Iv::from([9; 12]));
        let (s128, s256, chacha) = (
            ConnectionTrafficSecrets::Aes128Gcm { key: key(), iv: iv() },
            ConnectionTrafficSecrets::Aes256Gcm { key: key(), iv: iv() },
            ConnectionTrafficSecrets::Chacha20Poly1305 { key: key(), iv: iv() },
        );
        attempt(&s128)?;
        let more = [
            (CipherSuite::TLS13_AES_256_GCM_SHA384, s256),
            (CipherSuite::TLS13_CHACHA20_POLY1305_SHA256, chacha),
        ];
        let works = more.into_iter().filter(|(_, secrets)| attempt(secrets).is_ok()).map(|(suite, _)| suite);
        Ok(Self { suites: std::iter::once(CipherSuite::TLS13_AES_128_GCM_SHA256).chain(works).collect() })
    }

    /// CPU time per gigabyte sealed, carried over loopback and opened, by the kernel and by this process; the least of a
    /// few measurements, some milliseconds in all. Splicing then spares the kernel's way the copies that are in here.
    pub fn cost(&self) -> Result<(Duration, Duration), NoKernelRecords> {
        let secrets =
            ConnectionTrafficSecrets::Aes128Gcm { key: AeadKey::from([7; 32]), iv: Iv::from([9; 12]) };
        let mut least = [Duration::MAX; 2];
        for _ in 0..3 {
            let costs = [cost_in_kernel(&secrets)?, cost_in_userspace(&secrets)?];
            least.iter_mut().zip(costs).for_each(|(least, cost)| *least = cost.min(*least));
        }
        let per_gigabyte = |cost: Duration| cost.mul_f64(1e9 / (RECORDS * MAX_CONTENT) as f64);
        let [kernel, userspace] = least.map(per_gigabyte);
        Ok((kernel, userspace))
    }
}

/// A connection over loopback.
fn pair() -> Result<(TcpStream, TcpStream), NoKernelRecords> {
    let connect = || {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        let near = TcpStream::connect(listener.local_addr()?)?;
        let (far, _) = listener.accept()?;
        near.set_nodelay(true)?;
        near.set_write_timeout(Some(WAIT))?;
        far.set_read_timeout(Some(WAIT))?;
        io::Result::Ok((near, far))
    };
    connect().map_err(NoKernelRecords::Loopback)
}

/// A connection whose records the kernel carries from the first to the second.
fn in_kernel(secrets: &ConnectionTrafficSecrets) -> Result<(TcpStream, TcpStream), NoKernelRecords> {
    let (near, far) = pair()?;
    let key = Key::new(3, secrets)?;
    set(near.as_fd(), libc::IPPROTO_TCP, libc::TCP_ULP, b"tls").map_err(NoKernelRecords::Missing)?;
    hand_over(near.as_fd(), libc::TLS_TX, &key).map_err(NoKernelRecords::Key)?;
    hand_over(far.as_fd(), libc::TLS_RX, &key).map_err(NoKernelRecords::Key)?;
    Ok((near, far))
}

fn attempt(secrets: &ConnectionTrafficSecrets) -> Result<(), NoKernelRecords> {
    const WORDS: &[u8] = b"a record";
    let (near, far) = in_kernel(secrets)?;
    let exchange = |kind| {
        send_record(near.as_fd(), kind, WORDS)?;
        let mut heard = [0; 64];
        let (got, n) = receive_record(far.as_fd(), &mut heard)?;
        if got == kind && heard.get(..n) == Some(WORDS) {
            Ok(())
        } else {
            Err(io::ErrorKind::InvalidData.into())
        }
    };
    exchange(ContentType::ApplicationData as u8)
        .and_then(|()| exchange(ContentType::Alert as u8))
        .map_err(NoKernelRecords::Record)
}

/// Full records that go over loopback in one measurement, two at a time, which any socket buffer holds.
const RECORDS: usize = 64;

/// CPU time of this thread for [`RECORDS`] records that the kernel seals and opens.
fn cost_in_kernel(secrets: &ConnectionTrafficSecrets) -> Result<Duration, NoKernelRecords> {
    let (mut near, mut far) = in_kernel(secrets)?;
    let mut bytes = vec![0; 2 * MAX_CONTENT];
    measure(|| {
        near.write_all(&bytes)?;
        far.read_exact(&mut bytes)
    })
    .map_err(NoKernelRecords::Record)
}

/// As [`cost_in_kernel`], sealed and opened here.
fn cost_in_userspace(secrets: &ConnectionTrafficSecrets) -> Result<Duration, NoKernelRecords> {
    const RECORD: usize = HEADER + MAX_CONTENT + TRAILER;
    let (mut near, mut far) = pair()?;
    let (mut sealer, mut opener) = (Sealer::new(3, secrets)?, Opener::new(3, secrets)?);
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
    .map_err(NoKernelRecords::Record)
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
