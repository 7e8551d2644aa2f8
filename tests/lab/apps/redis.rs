//! Redis and redis-benchmark.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use super::{Session, as_user, await_listening, data_dir, ip_in, program};
use crate::{Lab, MARKER, Pod, Running};

pub struct Redis {
    _server: Running,
    address: SocketAddr,
}

impl Redis {
    pub const NEEDS: [&'static str; 3] = ["redis-server", "redis-cli", "redis-benchmark"];
    pub const PORT: u16 = 6379;

    pub fn start(lab: &Lab, pod: &Pod) -> Result<Self> {
        let dir = data_dir(lab, pod, "redis", Some("redis"))?;
        let mut command = as_user(pod, "redis", &program("redis-server")?);
        let port = Self::PORT.to_string();
        command.args(["--port", &port, "--bind", "0.0.0.0", "-::", "--protected-mode", "no", "--save", ""]);
        command.arg("--dir").arg(&dir);
        let mut server = Running::start(command)?.stopped_by(Signal::SIGTERM);
        let address = await_listening(pod, Self::PORT, &mut server)?;
        Ok(Self { _server: server, address })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Reads and writes on many connections, then a question about ourselves.
    pub fn benchmark(&self, client: &Pod) -> Result<Session> {
        let (host, port) = (self.address.ip().to_string(), self.address.port().to_string());
        let args =
            ["-h", &host, "-p", &port, "-n", "10000", "-c", "32", "-t", "set,get", "-d", "256", "--csv"];
        let out = client.run("redis-benchmark", &args)?.success()?.stdout;
        ensure!(out.contains("\"SET\"") && out.contains("\"GET\""), "redis-benchmark said:\n{out}");
        self.cli(client, &["SET", "note", MARKER])?;
        let note = self.cli(client, &["GET", "note"])?;
        ensure!(note.trim() == MARKER, "the note reads {note:?}");
        let list = self.cli(client, &["CLIENT", "LIST"])?;
        // The one that asks is the one that runs `client`.
        let line = list
            .lines()
            .find(|line| line.contains("cmd=client"))
            .with_context(|| format!("who asks? {list}"))?;
        let seen = line.split(' ').find_map(|field| field.strip_prefix("addr=")).context("no addr field")?;
        Ok(Session {
            what: "Redis, redis-benchmark",
            done: "20000 commands".into(),
            client_seen: ip_in(seen)?,
        })
    }

    pub fn cli(&self, client: &Pod, args: &[&str]) -> Result<String> {
        let (host, port) = (self.address.ip().to_string(), self.address.port().to_string());
        let finished = client.run("redis-cli", &[&["-h", &host, "-p", &port], args].concat())?;
        Ok(finished.success()?.stdout)
    }
}
