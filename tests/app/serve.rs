//! Servers: what to do with each connection in, a report at its start and at its end out.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};

use anyhow::{Context, Result};
use clap::ValueEnum;
use serde_json::json;

use crate::socket::{self, Kind};
use crate::stream::{Sum, await_sent, drain, send};
use crate::{await_line, ending, report, ring};

#[derive(clap::Args)]
pub struct Serve {
    what: What,
    #[arg(long)]
    listen: SocketAddr,
    /// How many bytes `source` sends.
    #[arg(long, default_value_t = 1 << 20)]
    bytes: u64,
    /// Read nothing before a line arrives on standard input.
    #[arg(long)]
    patient: bool,
    #[command(flatten)]
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum What {
    /// Send back what arrives.
    Echo,
    /// Speak first: one line, then echo.
    Greet,
    /// Read to the end, then answer with the sum of it all.
    Sum,
    /// Send a stream, then end.
    Source,
    /// Send a stream, then reset.
    SourceReset,
    /// Echo once, then reset.
    Reset,
    /// End our direction first, then read to the end.
    CloseFirst,
}

/// Whether readers may start.
type Gate = Arc<(Mutex<bool>, Condvar)>;

impl Serve {
    pub fn run(self) -> Result<()> {
        let listener = self.kind.listen(self.listen).with_context(|| format!("listen on {}", self.listen))?;
        let gate: Gate = Arc::new((Mutex::new(!self.patient), Condvar::new()));
        if self.patient {
            let gate = Arc::clone(&gate);
            std::thread::spawn(move || {
                await_line();
                *gate.0.lock().unwrap_or_else(|e| e.into_inner()) = true;
                gate.1.notify_all();
            });
        }
        report(&json!({ "listening": listener.local_addr()? }));
        loop {
            let (stream, accepted) = self.accept(&listener)?;
            report(&json!({
                "accepted": accepted, "peer": stream.peer_addr().ok(), "local": stream.local_addr().ok(),
                "protocol": socket::protocol(&stream),
            }));
            let (what, bytes, gate) = (self.what, self.bytes, Arc::clone(&gate));
            std::thread::Builder::new()
                .stack_size(256 << 10)
                .spawn(move || {
                    let open = gate.0.lock().unwrap_or_else(|e| e.into_inner());
                    drop(gate.1.wait_while(open, |open| !*open));
                    converse(what, bytes, stream, accepted);
                })
                .context("start a thread")?;
        }
    }

    fn accept(&self, listener: &TcpListener) -> Result<(TcpStream, SocketAddr)> {
        if self.kind.io_uring { ring::accept(listener) } else { listener.accept().context("accept") }
    }
}

fn converse(what: What, bytes: u64, stream: TcpStream, client: SocketAddr) {
    let mut sum = Sum::default();
    let end = match what {
        What::Echo => echo(&stream, &mut sum),
        What::Greet => (&stream).write_all(b"welcome\n").and_then(|()| echo(&stream, &mut sum)),
        What::Sum => drain(&stream, &mut sum).inspect(|_| {
            let _ = writeln!(&stream, "{}", sum.finish());
        }),
        What::Source => send(&stream, bytes, &mut sum).and_then(|()| {
            stream.shutdown(Shutdown::Write)?;
            drain(&stream, &mut Sum::default())
        }),
        What::SourceReset => {
            let sent = send(&stream, bytes, &mut sum);
            // The bytes are to arrive before the reset: a reset throws away what is still queued.
            await_sent(&stream);
            report(&json!({ "ended": "we reset", "client": client, "sent": sent.is_ok() }));
            let _ = socket::reset(stream);
            return;
        }
        What::Reset => {
            let _ = echo_once(&stream);
            report(&json!({ "ended": "we reset", "client": client }));
            let _ = socket::reset(stream);
            return;
        }
        What::CloseFirst => (&stream)
            .write_all(b"goodbye\n")
            .and_then(|()| stream.shutdown(Shutdown::Write))
            .and_then(|()| drain(&stream, &mut sum)),
    };
    // The report comes before the close, so that whoever sees the close finds it.
    report(&json!({ "ended": ending(&end), "client": client, "bytes": sum.bytes, "sum": sum.finish() }));
}

fn echo(mut stream: &TcpStream, sum: &mut Sum) -> io::Result<usize> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(0),
            n => {
                sum.add(&buffer[..n]);
                stream.write_all(&buffer[..n])?;
            }
        }
    }
}

fn echo_once(mut stream: &TcpStream) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    let n = stream.read(&mut buffer)?;
    stream.write_all(&buffer[..n])?;
    await_sent(stream);
    Ok(())
}
