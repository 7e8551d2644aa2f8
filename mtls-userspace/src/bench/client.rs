//! The load client: opens the connections, keeps the time, adds up.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use super::{CHUNK, Header, Latency, Load, Purpose, Report, Workload};

/// Runs one load against a server and reports.
///
/// # Errors
///
/// The first error of any connection: a load that lost a connection measured something else.
pub async fn run(to: SocketAddr, load: Load) -> io::Result<Report> {
    let start = Instant::now();
    let end = start + load.duration;
    let mut tasks = JoinSet::new();
    for _ in 0..load.connections {
        match load.workload {
            Workload::Upload => tasks.spawn(upload(to, end)),
            Workload::Download => tasks.spawn(download(to, end)),
            Workload::Request => tasks.spawn(request(to, load.size, end)),
            Workload::Connect => tasks.spawn(connect(to, load.size, end)),
            Workload::Idle => tasks.spawn(hold(to, load.size)),
        };
    }
    let mut total = Tally::new()?;
    let mut held = Vec::new();
    while let Some(done) = tasks.join_next().await {
        let (tally, stream) = done.map_err(io::Error::other)??;
        total.add(&tally)?;
        held.extend(stream);
    }
    let report = total.report(start.elapsed());
    if load.workload == Workload::Idle {
        eprintln!("READY {}", held.len());
        // Ends with standard input.
        let ended = tokio::task::spawn_blocking(|| io::copy(&mut io::stdin(), &mut io::sink()));
        ended.await.map_err(io::Error::other)??;
    }
    Ok(report)
}

/// What one connection did, and the connection itself if it is to be held.
type Done = io::Result<(Tally, Option<TcpStream>)>;

struct Tally {
    bytes: u64,
    /// Nanoseconds.
    latency: Histogram<u64>,
}

async fn upload(to: SocketAddr, end: Instant) -> Done {
    let mut stream = open(to, Purpose::Sink, 0).await?;
    let chunk = vec![0x5a; CHUNK];
    while Instant::now() < end {
        stream.write_all(&chunk).await?;
    }
    stream.shutdown().await?;
    // What the server received, not what a socket buffer took.
    Ok((Tally { bytes: stream.read_u64().await?, ..Tally::new()? }, None))
}

async fn download(to: SocketAddr, end: Instant) -> Done {
    let mut stream = open(to, Purpose::Source, 0).await?;
    let mut chunk = vec![0; CHUNK];
    let mut tally = Tally::new()?;
    while Instant::now() < end {
        match stream.read(&mut chunk).await? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => tally.bytes += n as u64,
        }
    }
    Ok((tally, None))
}

async fn request(to: SocketAddr, size: usize, end: Instant) -> Done {
    let mut stream = open(to, Purpose::Echo, size).await?;
    let mut buffer = vec![0x5a; size];
    let mut tally = Tally::new()?;
    exchange(&mut stream, &mut buffer).await?;
    while Instant::now() < end {
        let start = Instant::now();
        exchange(&mut stream, &mut buffer).await?;
        tally.record(start.elapsed());
    }
    Ok((tally, None))
}

async fn connect(to: SocketAddr, size: usize, end: Instant) -> Done {
    let mut buffer = vec![0x5a; size];
    let mut tally = Tally::new()?;
    while Instant::now() < end {
        let start = Instant::now();
        let mut stream = open(to, Purpose::Echo, size).await?;
        exchange(&mut stream, &mut buffer).await?;
        drop(stream);
        tally.record(start.elapsed());
    }
    Ok((tally, None))
}

async fn hold(to: SocketAddr, size: usize) -> Done {
    let mut stream = open(to, Purpose::Echo, size).await?;
    exchange(&mut stream, &mut vec![0x5a; size]).await?;
    Ok((Tally::new()?, Some(stream)))
}

async fn open(to: SocketAddr, purpose: Purpose, size: usize) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect(to).await?;
    stream.set_nodelay(true)?;
    let header = Header { purpose, size: u32::try_from(size).map_err(io::Error::other)? };
    stream.write_all(&header.encode()).await?;
    Ok(stream)
}

async fn exchange(stream: &mut TcpStream, buffer: &mut [u8]) -> io::Result<()> {
    stream.write_all(buffer).await?;
    stream.read_exact(buffer).await.map(|_| ())
}

impl Tally {
    fn new() -> io::Result<Self> {
        Ok(Self { bytes: 0, latency: Histogram::new(3).map_err(io::Error::other)? })
    }

    fn record(&mut self, took: Duration) {
        self.latency.saturating_record(took.as_nanos() as u64);
    }

    fn add(&mut self, other: &Self) -> io::Result<()> {
        self.bytes += other.bytes;
        self.latency.add(&other.latency).map_err(io::Error::other)
    }

    fn report(&self, elapsed: Duration) -> Report {
        let at = |quantile| self.latency.value_at_quantile(quantile) as f64 / 1e3;
        let latency_us = (!self.latency.is_empty()).then(|| Latency {
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p999: at(0.999),
            max: self.latency.max() as f64 / 1e3,
        });
        Report {
            seconds: elapsed.as_secs_f64(),
            bytes: self.bytes,
            exchanges: self.latency.len(),
            latency_us,
        }
    }
}
