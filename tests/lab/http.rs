//! The smallest HTTP client: an address inside a namespace and a request in, status and body out.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::network::Netns;

#[derive(Debug)]
pub struct Response {
    pub status: u16,
    pub body: String,
}

/// One request on a connection of its own.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    pub method: &'a str,
    pub path: &'a str,
    /// JSON.
    pub body: &'a str,
    /// How long connecting, and then each read, may take.
    pub limit: Duration,
}

impl Request<'_> {
    /// Sends it from inside a namespace.
    pub fn send(&self, netns: &Netns, address: SocketAddr) -> Result<Response> {
        let Self { method, path, body, limit } = self;
        let answer = netns
            .within(|| {
                let mut stream = TcpStream::connect_timeout(&address, *limit)?;
                stream.set_read_timeout(Some(*limit))?;
                let length = body.len();
                write!(
                    stream,
                    "{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\
                     Content-Length: {length}\r\n\r\n{body}"
                )?;
                let mut answer = Vec::new();
                let mut buffer = [0; 16 * 1024];
                // Some servers close late, or never.
                while !is_complete(&answer) {
                    match stream.read(&mut buffer)? {
                        0 => break,
                        n => answer.extend_from_slice(&buffer[..n]),
                    }
                }
                Ok::<_, std::io::Error>(answer)
            })
            .with_context(|| format!("{method} http://{address}{path}"))?;
        let answer = String::from_utf8_lossy(&answer);
        let (head, body) = answer.split_once("\r\n\r\n").context("no end of the header")?;
        let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).context("no status")?;
        Ok(Response { status, body: body.into() })
    }
}

/// Whether everything is there that the header announces.
fn is_complete(answer: &[u8]) -> bool {
    let Some(end) = answer.windows(4).position(|four| four == b"\r\n\r\n") else { return false };
    let head = String::from_utf8_lossy(&answer[..end]).to_ascii_lowercase();
    let length =
        head.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse::<usize>().ok());
    length.is_some_and(|length| answer.len() >= end + 4 + length)
}

/// `GET path` from inside a namespace.
pub fn get(netns: &Netns, address: SocketAddr, path: &str) -> Result<Response> {
    Request { method: "GET", path, body: "", limit: Duration::from_secs(5) }.send(netns, address)
}
