//! gRPC: a bidirectional stream between two programs built with tonic.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};

use super::{Session, ip_in};
use crate::{MARKER, Pod, Running};

pub struct Grpc {
    server: Running,
    address: SocketAddr,
}

impl Grpc {
    pub const PORT: u16 = 50051;

    pub fn start(pod: &Pod) -> Result<Self> {
        let listen = format!("[::]:{}", Self::PORT);
        let server = pod.start_app(&["chat-serve", "--listen", &listen])?;
        server.json_with("listening")?;
        Ok(Self { server, address: pod.addr(Self::PORT) })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// One stream with messages going back and forth.
    pub fn talk(&self, client: &Pod) -> Result<Session> {
        let earlier = self.server.all_json_with("accepted").len();
        let address = self.address.to_string();
        let answer = client.app(&["chat-dial", &address, "--lines", "1000", "--message", MARKER])?;
        ensure!(answer["turns"] == 1000 && answer["ended"] == "eof", "the stream went {answer}");
        let accepted = self.server.json_after("accepted", earlier)?;
        let seen = accepted["accepted"].as_str().context("no address")?;
        ensure!(answer["caller"] == *seen, "the server told {answer}, and recorded {seen}");
        Ok(Session { what: "gRPC, two-way stream", done: "1000 messages".into(), client_seen: ip_in(seen)? })
    }
}
