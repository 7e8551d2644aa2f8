//! nginx and wrk: HTTP with connections kept alive and with one connection a request.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use super::{Session, await_listening, data_dir, ip_in, program};
use crate::{Lab, MARKER, Pod, Running};

pub struct Nginx {
    _server: Running,
    address: SocketAddr,
    access_log: PathBuf,
    dir: PathBuf,
}

impl Nginx {
    pub const NEEDS: [&'static str; 3] = ["nginx", "wrk", "curl"];
    pub const PORT: u16 = 8080;

    pub fn start(lab: &Lab, pod: &Pod) -> Result<Self> {
        let dir = data_dir(lab, pod, "nginx", None)?;
        fs::write(dir.join("index.html"), format!("<html>{MARKER}</html>\n"))?;
        let root = dir.display();
        let port = Self::PORT;
        fs::write(
            dir.join("nginx.conf"),
            format!(
                "daemon off; user root; worker_processes 1; pid {root}/pid; error_log {root}/error.log;\n\
                 events {{ worker_connections 4096; }}\n\
                 http {{\n\
                   access_log {root}/access.log combined;\n\
                   client_body_temp_path {root}/t1; proxy_temp_path {root}/t2; fastcgi_temp_path {root}/t3;\n\
                   uwsgi_temp_path {root}/t4; scgi_temp_path {root}/t5;\n\
                   keepalive_requests 100000000; sendfile on;\n\
                   server {{ listen {port}; listen [::]:{port}; root {root}; }}\n\
                 }}\n"
            ),
        )?;
        let mut command = pod.command(program("nginx")?);
        command
            .arg("-p")
            .arg(&dir)
            .arg("-e")
            .arg(dir.join("error.log"))
            .arg("-c")
            .arg(dir.join("nginx.conf"));
        let mut server = Running::start(command)?.stopped_by(Signal::SIGTERM);
        let address = await_listening(pod, port, &mut server)?;
        Ok(Self { _server: server, address, access_log: dir.join("access.log"), dir })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Many requests over few connections.
    pub fn keep_alive(&self, client: &Pod) -> Result<Session> {
        self.load("nginx, keep-alive", client, self.address, &["-c", "16"])
    }

    /// A new connection for every request.
    pub fn short_connections(&self, client: &Pod) -> Result<Session> {
        self.load("nginx, short connections", client, self.address, &["-c", "16", "-H", "Connection: close"])
    }

    /// The same through another address, a Service's for instance.
    pub fn keep_alive_at(&self, client: &Pod, address: SocketAddr) -> Result<Session> {
        self.load("nginx, keep-alive", client, address, &["-c", "16"])
    }

    /// A large file that curl fetches, compared byte by byte with what nginx has on disk.
    pub fn large_file(&self, client: &Pod, megabytes: usize) -> Result<Session> {
        let name = format!("file-{megabytes}");
        let original = self.dir.join(&name);
        if !original.exists() {
            let mut state = 0x2545_f491_4f6c_dd1du64;
            let words = megabytes << 17;
            let mut bytes = Vec::with_capacity(words * 8);
            for _ in 0..words {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                bytes.extend(state.to_le_bytes());
            }
            bytes.extend(MARKER.as_bytes());
            fs::write(&original, bytes)?;
        }
        let copy = self.dir.join(format!("copy-for-{}", client.name()));
        let url = format!("http://{}/{name}", self.address);
        client.run("curl", &["-sS", "--fail", "-o", &copy.to_string_lossy(), &url])?.success()?;
        let sums = client
            .run("sha256sum", &[&original.to_string_lossy(), &copy.to_string_lossy()])?
            .success()?
            .stdout;
        let mut sums = sums.lines().filter_map(|line| line.split(' ').next());
        let (first, second) = (sums.next(), sums.next());
        ensure!(first.is_some() && first == second, "the file arrived changed: {first:?}, {second:?}");
        fs::remove_file(&copy)?;
        Ok(Session {
            what: "nginx, large file",
            done: format!("{megabytes} MiB, checksum equal"),
            client_seen: self.last_client()?,
        })
    }

    fn load(&self, what: &'static str, client: &Pod, at: SocketAddr, args: &[&str]) -> Result<Session> {
        let url = format!("http://{at}/index.html");
        let finished =
            client.run("wrk", &[&["-t", "1", "-d", "2s", "--timeout", "10s"], args, &[&url]].concat())?;
        let out = finished.success()?.stdout;
        ensure!(!out.contains("Socket errors") && !out.contains("Non-2xx"), "wrk saw errors:\n{out}");
        let line = out
            .lines()
            .find(|line| line.contains("requests in"))
            .with_context(|| format!("wrk said:\n{out}"))?;
        let requests: u64 = line.trim().split(' ').next().unwrap_or_default().parse()?;
        ensure!(requests > 100, "only {requests} requests in two seconds:\n{out}");
        Ok(Session { what, done: format!("{requests} requests"), client_seen: self.last_client()? })
    }

    /// The client in the last line of nginx's access log.
    fn last_client(&self) -> Result<IpAddr> {
        let log = fs::read_to_string(&self.access_log)?;
        let line = log.lines().last().context("nginx logged nothing")?;
        ip_in(line.split(' ').next().unwrap_or_default())
    }
}
