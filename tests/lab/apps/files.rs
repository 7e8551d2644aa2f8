//! One long connection that carries a lot of bytes one way, and their checksum the other.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{Session, ip_in};
use crate::{MARKER, Pod, Running};

pub struct Files {
    server: Running,
    address: SocketAddr,
}

impl Files {
    pub const PORT: u16 = 9000;

    pub fn start(pod: &Pod) -> Result<Self> {
        let server = pod.serve(&["sum", "--listen", &format!("[::]:{}", Self::PORT)])?;
        Ok(Self { server, address: pod.addr(Self::PORT) })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Sends so many bytes; the receiver answers with the checksum after the sender's end of stream.
    pub fn send(&self, client: &Pod, bytes: u64) -> Result<Session> {
        let earlier = self.server.all_json_with("accepted").len();
        let (address, count) = (self.address.to_string(), bytes.to_string());
        let sender = client.start_app(&[
            "dial",
            "upload",
            &address,
            "--bytes",
            &count,
            "--message",
            MARKER,
            "--limit-ms",
            "480000",
        ])?;
        let answer = sender.finish_within(Duration::from_secs(500))?.success()?.json()?;
        ensure!(
            answer["match"] == true && answer["sent"] == bytes && answer["ended"] == "eof",
            "sending went {answer}"
        );
        let accepted = self.server.json_after("accepted", earlier)?;
        let seen = accepted["accepted"].as_str().context("no address")?;
        let gigabits = bytes as f64 * 8e-9 / answer["seconds"].as_f64().unwrap_or(f64::INFINITY);
        Ok(Session {
            what: "one large transfer",
            done: format!("{} MB, checksum equal, {gigabits:.1} Gbit/s", bytes / 1_000_000),
            client_seen: ip_in(seen)?,
        })
    }
}
