//! Clients: an address and what to do there in, a report of how it went out.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::ValueEnum;
use serde_json::{Value, json};

use crate::socket::{self, Kind};
use crate::stream::{Source, Sum, await_sent, drain, send};
use crate::{await_line, ending, report, ring};

#[derive(clap::Args)]
pub struct Dial {
    what: What,
    to: SocketAddr,
    /// What is sent, and expected back.
    #[arg(long, default_value = "hello")]
    message: String,
    #[arg(long, default_value_t = 1)]
    times: u32,
    /// Pause between messages.
    #[arg(long, default_value_t = 0)]
    pause_ms: u64,
    /// Read a line before sending anything.
    #[arg(long)]
    greeted: bool,
    #[arg(long, default_value_t = 1 << 20)]
    bytes: u64,
    #[arg(long, default_value_t = 1)]
    connections: u32,
    /// How long connecting and each read may take.
    #[arg(long, default_value_t = 20_000)]
    limit_ms: u64,
    /// Move this process into another cgroup before dialling.
    #[arg(long)]
    cgroup: Option<PathBuf>,
    #[command(flatten)]
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum What {
    /// Send messages, get each back, end our direction, read to the end.
    Echo,
    /// The same until a line arrives on standard input.
    Stream,
    /// Send the message and a stream, end our direction, compare the sum that comes back.
    Upload,
    /// Read a stream to its end.
    Download,
    /// Echo once, then reset.
    Abort,
    /// Echo once, say so, then read to the end.
    Wait,
    /// Read to the end first, then send a stream.
    SendLast,
    /// Open many, echo on each, wait for a line, echo on each again.
    Hold,
    /// Echo on one connection after the other until a line arrives on standard input, and count what fails.
    Again,
}

/// What became of a conversation: how the peer ended it and what there is to say about it.
type Outcome = io::Result<(usize, Value)>;

impl Dial {
    pub fn run(self) -> Result<()> {
        if let Some(cgroup) = &self.cgroup {
            let procs = cgroup.join("cgroup.procs");
            std::fs::write(&procs, "0").with_context(|| format!("move into {}", procs.display()))?;
        }
        if self.kind.io_uring {
            report(&ring::echo(&self.kind, self.to, self.message.as_bytes())?);
            return Ok(());
        }
        if self.what == What::Hold {
            return self.hold();
        }
        if self.what == What::Again {
            return self.again();
        }
        let begun = Instant::now();
        let stream = match self.kind.connect(self.to, Duration::from_millis(self.limit_ms)) {
            Ok(stream) => stream,
            Err(error) => {
                report(&json!({
                    "connected": false, "ended": ending(&Err(error)), "ms": begun.elapsed().as_secs_f64() * 1e3,
                }));
                return Ok(());
            }
        };
        let connect_ms = begun.elapsed().as_secs_f64() * 1e3;
        // With Fast Open there is no connection before the first bytes.
        let first = if self.kind.fast_open {
            self.kind.send_first(&stream, self.to, self.message.as_bytes()).map(|_| ())
        } else {
            Ok(())
        };
        let (local, peer) = (stream.local_addr().ok(), stream.peer_addr().ok());
        stream.set_read_timeout(Some(Duration::from_millis(self.limit_ms)))?;
        let outcome = first.and_then(|()| self.converse(&stream));
        let mut answer = json!({
            "connected": true, "local": local, "peer": peer, "protocol": socket::protocol(&stream),
            "connect_ms": connect_ms, "ms": begun.elapsed().as_secs_f64() * 1e3,
        });
        match outcome {
            Ok((end, said)) => {
                answer["ended"] = ending(&Ok(end)).into();
                for (key, value) in said.as_object().into_iter().flatten() {
                    answer[key] = value.clone();
                }
            }
            Err(error) => {
                answer["error"] = error.to_string().into();
                answer["ended"] = ending(&Err(error)).into();
            }
        }
        report(&answer);
        Ok(())
    }

    fn converse(&self, stream: &TcpStream) -> Outcome {
        match self.what {
            What::Echo | What::Hold | What::Again => {
                let greeting = if self.greeted { Some(line(stream)?) } else { None };
                let mut echoed = 0;
                for turn in 0..self.times {
                    let sent = turn == 0 && self.kind.fast_open;
                    echoed += exchange(stream, self.message.as_bytes(), sent)?;
                    std::thread::sleep(Duration::from_millis(self.pause_ms));
                }
                stream.shutdown(Shutdown::Write)?;
                let mut sum = Sum::default();
                Ok((
                    drain(stream, &mut sum)?,
                    json!({ "echoed": echoed, "greeting": greeting, "extra": sum.bytes }),
                ))
            }
            What::Stream => self.stream(stream),
            What::Upload => self.upload(stream),
            What::Download => {
                let mut sum = Sum::default();
                // How it ended is the point here, and so is how much came before.
                let end = ending(&drain(stream, &mut sum));
                Ok((0, json!({ "received": sum.bytes, "sum": sum.finish(), "ended": end })))
            }
            What::Abort => {
                exchange(stream, self.message.as_bytes(), false)?;
                let copy = stream.try_clone()?;
                socket::reset(copy)?;
                Ok((0, json!({ "ended": "we reset" })))
            }
            What::Wait => {
                exchange(stream, self.message.as_bytes(), false)?;
                report(&json!({ "established": true, "local": stream.local_addr().ok() }));
                let waited = Instant::now();
                let mut sum = Sum::default();
                let end = drain(stream, &mut sum);
                let ms = waited.elapsed().as_secs_f64() * 1e3;
                Ok((0, json!({ "ended": ending(&end), "waited_ms": ms, "extra": sum.bytes })))
            }
            What::SendLast => {
                let mut before = Sum::default();
                drain(stream, &mut before)?;
                let mut sum = Sum::default();
                send(stream, self.bytes, &mut sum)?;
                stream.shutdown(Shutdown::Write)?;
                await_sent(stream);
                Ok((0, json!({ "before": before.bytes, "sent": sum.bytes, "sum": sum.finish() })))
            }
        }
    }

    fn stream(&self, stream: &TcpStream) -> Outcome {
        let stop = std::thread::spawn(await_line);
        let mut turns = 0u64;
        while !stop.is_finished() {
            if let Err(error) = exchange(stream, self.message.as_bytes(), false) {
                return Ok((0, json!({ "turns": turns, "ended": ending(&Err(error)) })));
            }
            turns += 1;
            if turns == 1 {
                report(&json!({ "established": true, "local": stream.local_addr().ok() }));
            }
            std::thread::sleep(Duration::from_millis(self.pause_ms));
        }
        stream.shutdown(Shutdown::Write)?;
        Ok((drain(stream, &mut Sum::default())?, json!({ "turns": turns })))
    }

    fn upload(&self, mut stream: &TcpStream) -> Outcome {
        let mut source = Source::default();
        let mut sum = Sum::default();
        let mut buffer = vec![0; 256 << 10];
        stream.write_all(self.message.as_bytes())?;
        sum.add(self.message.as_bytes());
        let mut left = self.bytes.saturating_sub(sum.bytes);
        let mut stalled = None;
        let begun = Instant::now();
        // A write that makes no progress for this long is worth a report, once.
        stream.set_write_timeout(Some(Duration::from_millis(1500)))?;
        while left > 0 {
            source.fill(&mut buffer);
            let n = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
            let mut rest = &buffer[..n];
            while !rest.is_empty() {
                match stream.write(rest) {
                    Ok(written) => rest = &rest[written..],
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        if stalled.is_none() {
                            let at = self.bytes - left + (n - rest.len()) as u64;
                            report(&json!({ "stalled": at }));
                            stalled = Some(at);
                        }
                    }
                    Err(error) => return Err(error),
                }
            }
            sum.add(&buffer[..n]);
            left -= n as u64;
        }
        stream.shutdown(Shutdown::Write)?;
        let answer = line(stream)?;
        let seconds = begun.elapsed().as_secs_f64();
        let end = drain(stream, &mut Sum::default())?;
        Ok((
            end,
            json!({
                "sent": sum.bytes, "sum": sum.finish(), "answer": answer, "match": answer == sum.finish(),
                "stalled_at": stalled, "seconds": seconds,
            }),
        ))
    }

    fn again(&self) -> Result<()> {
        let told = Arc::new(AtomicBool::new(false));
        let tell = Arc::clone(&told);
        std::thread::spawn(move || {
            await_line();
            tell.store(true, Ordering::Relaxed);
        });
        let limit = Duration::from_millis(self.limit_ms);
        let (mut conversations, mut failures) = (0u64, BTreeMap::<String, u64>::new());
        while !told.load(Ordering::Relaxed) {
            let outcome = self.kind.connect(self.to, limit).and_then(|stream| {
                stream.set_read_timeout(Some(limit))?;
                self.converse(&stream)
            });
            match outcome {
                Ok(_) => conversations += 1,
                Err(error) => *failures.entry(ending(&Err(error)).to_owned()).or_default() += 1,
            }
            std::thread::sleep(Duration::from_millis(self.pause_ms));
        }
        report(&json!({ "conversations": conversations, "failures": failures }));
        Ok(())
    }

    fn hold(&self) -> Result<()> {
        let limit = Duration::from_millis(self.limit_ms);
        let mut streams = Vec::new();
        for n in 0..self.connections {
            let stream = self.kind.connect(self.to, limit).with_context(|| format!("connection {n}"))?;
            stream.set_read_timeout(Some(limit))?;
            streams.push(stream);
        }
        let mut echoed = 0;
        for (n, stream) in streams.iter().enumerate() {
            echoed += exchange(stream, self.message.as_bytes(), false)
                .with_context(|| format!("connection {n}"))?;
        }
        report(&json!({ "open": streams.len(), "echoed": echoed }));
        await_line();
        let mut again = 0;
        for (n, stream) in streams.iter().enumerate() {
            again += exchange(stream, self.message.as_bytes(), false)
                .with_context(|| format!("connection {n}"))?;
        }
        report(&json!({ "connected": true, "open": streams.len(), "echoed": echoed, "again": again }));
        Ok(())
    }
}

/// Sends a message and reads as many bytes back; they must be the same.
fn exchange(mut stream: &TcpStream, message: &[u8], already_sent: bool) -> io::Result<u64> {
    if !already_sent {
        stream.write_all(message)?;
    }
    let mut back = vec![0; message.len()];
    let mut have = 0;
    while have < back.len() {
        match stream.read(&mut back[have..])? {
            0 => {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the stream ended before the echo"));
            }
            n => have += n,
        }
    }
    if back != message {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the echo is not what was sent"));
    }
    Ok(message.len() as u64)
}

/// Reads up to the end of a line, and nothing behind it.
fn line(mut stream: &TcpStream) -> io::Result<String> {
    let mut text = Vec::new();
    let mut byte = [0];
    while stream.read(&mut byte)? == 1 && byte[0] != b'\n' {
        text.push(byte[0]);
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}
