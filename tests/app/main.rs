//! Servers and clients that behave in one exactly known way each, for running inside the lab's pods.
//!
//! Arguments in, one JSON object a line on standard output out. A connection that fails is a report, not a failure:
//! the exit status is non-zero only when the program could not do what it was asked to try.

mod chat;
mod dial;
mod probe;
mod ring;
mod scan;
mod secure;
mod serve;
mod socket;
mod stream;

use clap::{Parser, Subcommand};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::Value;

#[derive(Parser)]
#[command(name = "lab-app", about = "Servers and clients for the lab's pods")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Accept connections.
    Serve(serve::Serve),
    /// Open one connection or more.
    Dial(dial::Dial),
    /// Open a TLS connection with credentials of any kind, and send anything.
    TlsDial(secure::TlsDial),
    /// Accept TLS connections with credentials of any kind.
    TlsServe(secure::TlsServe),
    /// Try every port.
    Scan(scan::Scan),
    /// Serve gRPC.
    ChatServe(chat::ChatServe),
    /// Hold a gRPC stream.
    ChatDial(chat::ChatDial),
    /// Answer kubelet's probes.
    ProbeServe(probe::ProbeServe),
    /// Probe as kubelet does.
    Probe(probe::Probe),
    /// Do nothing, as the container that holds a pod's namespaces.
    Pause,
}

fn main() -> anyhow::Result<()> {
    // Thousands of connections need as many descriptors; the usual soft limit is 1024.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    match Args::parse().command {
        Command::Serve(serve) => serve.run(),
        Command::Dial(dial) => dial.run(),
        Command::TlsDial(dial) => dial.run(),
        Command::TlsServe(serve) => serve.run(),
        Command::Scan(scan) => scan.run(),
        Command::ChatServe(serve) => serve.run(),
        Command::ChatDial(dial) => dial.run(),
        Command::ProbeServe(serve) => serve.run(),
        Command::Probe(probe) => probe.run(),
        Command::Pause => pause(),
    }
}

/// Until a signal, which the first process of a pid namespace gets only if it asks for it.
fn pause() -> anyhow::Result<()> {
    use nix::sys::signal::{SigSet, Signal};
    let mut end = SigSet::empty();
    end.add(Signal::SIGTERM);
    end.add(Signal::SIGINT);
    end.thread_block()?;
    end.wait()?;
    Ok(())
}

/// Prints one report. Nobody may be listening any more, which is no reason to fail.
fn report(value: &Value) {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{value}").and_then(|()| out.flush());
}

/// How a connection ended, in one word.
fn ending(result: &std::io::Result<usize>) -> &'static str {
    match result {
        Ok(0) => "eof",
        Ok(_) => "open",
        Err(error) => match error.raw_os_error() {
            Some(libc::ECONNRESET) => "reset",
            Some(libc::EPIPE) => "pipe",
            Some(libc::ECONNREFUSED) => "refused",
            Some(libc::ETIMEDOUT | libc::EAGAIN) => "timeout",
            Some(libc::EHOSTUNREACH | libc::ENETUNREACH) => "unreachable",
            _ => "error",
        },
    }
}

/// Waits until somebody writes a line to us, or closes our input.
fn await_line() {
    let _ = std::io::stdin().read_line(&mut String::new());
}
