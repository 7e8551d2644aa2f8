//! Load client and server, so that one test runs the same in a lab, in pods on kind, and in a real cluster.
//!
//! A connection begins with one byte, its [`Purpose`]; the server keeps no other state. Nothing here knows of the agent:
//! it is an application like any other. Both ends are one thread around epoll, without a runtime, so that what is
//! measured is the path and not the tool.

use std::time::Duration;

use serde::Serialize;

mod bulk;
mod client;
mod connect;
mod decide;
mod idle;
mod paced;
mod poll;
mod request;
mod server;
mod tally;
mod verify;

pub use client::run;
pub use decide::{Decisions, decide};
pub use server::{Server, serve};

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
    /// Requests at a fixed rate; latency counts from when a request was due, not from when it could be sent
    Paced,
    /// Connect, one exchange, close; one after another on each of the parallel slots
    Connect,
    /// One new connection and one exchange on it: the time to the first byte
    First,
    /// Open connections, exchange once, and hold them until standard input ends
    Idle,
    /// A few megabytes there and back on one connection after another, each byte compared
    Verify,
}

/// How much of it.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    pub workload: Workload,
    /// In parallel.
    pub connections: usize,
    /// Bytes of a request, which are also the bytes of its answer.
    pub size: usize,
    /// Requests per second over all connections, for [`Workload::Paced`].
    pub rate: f64,
    pub duration: Duration,
}

/// What was measured.
#[derive(Debug, Default, PartialEq, Serialize)]
pub struct Report {
    /// Time that `bytes` and `exchanges` took.
    pub seconds: f64,
    pub bytes: u64,
    pub exchanges: u64,
    /// Exchanges with those that were not timed: the first on each connection and the warm-up.
    pub all_exchanges: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latency_us: Option<Latency>,
}

/// Of one exchange, in microseconds.
#[derive(Debug, PartialEq, Serialize)]
pub struct Latency {
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub p999: f64,
    pub max: f64,
}

/// The first byte of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Purpose {
    /// Read to the end, then answer with the number of bytes, eight bytes big-endian.
    Sink = 1,
    /// Write until the client goes.
    Source = 2,
    /// Send back what comes.
    Echo = 3,
}

impl Purpose {
    fn decode(byte: u8) -> Option<Self> {
        [Self::Sink, Self::Source, Self::Echo].into_iter().find(|purpose| *purpose as u8 == byte)
    }
}

/// Bytes of one read or write in bulk: what iperf3 uses.
const CHUNK: usize = 128 << 10;
/// A request larger than this is a bulk transfer.
pub const MAX_SIZE: usize = 64 << 10;
