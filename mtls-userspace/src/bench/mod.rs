//! Load client and server, so that one test runs the same in a lab, in pods on kind, and in a real cluster.
//!
//! A connection begins with one [`Header`] that says what it is for; the server keeps no other state. Nothing here
//! knows of the agent: it is an application like any other.

use std::time::Duration;

use serde::Serialize;

mod client;
mod server;

pub use client::run;
pub use server::serve;

/// What a client does.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Workload {
    /// Bytes from client to server as fast as they go
    Upload,
    /// Bytes from server to client as fast as they go
    Download,
    /// Requests and equal answers on persistent connections, one outstanding on each
    Request,
    /// Connect, one exchange, close; one after another on each of the parallel slots
    Connect,
    /// Open connections, exchange once, and hold them until standard input ends
    Idle,
}

/// How much of it.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    pub workload: Workload,
    /// In parallel.
    pub connections: usize,
    /// Bytes of a request, which are also the bytes of its answer.
    pub size: usize,
    pub duration: Duration,
}

/// What was measured.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    pub seconds: f64,
    pub bytes: u64,
    pub exchanges: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latency_us: Option<Latency>,
}

/// Of one exchange, in microseconds.
#[derive(Debug, Serialize)]
pub struct Latency {
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub p999: f64,
    pub max: f64,
}

impl Report {
    pub fn gbit_per_second(&self) -> f64 {
        self.bytes as f64 * 8.0 / self.seconds / 1e9
    }

    pub fn per_second(&self) -> f64 {
        self.exchanges as f64 / self.seconds
    }
}

/// The first bytes of a connection: purpose, then the request size (big-endian).
struct Header {
    purpose: Purpose,
    size: u32,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Purpose {
    Sink = 1,
    Source = 2,
    Echo = 3,
}

impl Header {
    const LEN: usize = 5;

    fn encode(&self) -> [u8; Self::LEN] {
        let [a, b, c, d] = self.size.to_be_bytes();
        [self.purpose as u8, a, b, c, d]
    }

    fn decode([purpose, size @ ..]: [u8; Self::LEN]) -> Option<Self> {
        let purpose = match purpose {
            1 => Purpose::Sink,
            2 => Purpose::Source,
            3 => Purpose::Echo,
            _ => return None,
        };
        let size = u32::from_be_bytes(size);
        (size <= MAX_SIZE).then_some(Self { purpose, size })
    }
}

/// A request larger than this is a bulk transfer.
const MAX_SIZE: u32 = 1 << 20;
const CHUNK: usize = 256 << 10;
