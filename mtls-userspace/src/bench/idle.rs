//! Connections that do nothing, held so that their cost can be weighed.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::time::Instant;

use super::client::{exchange, open_echoes};
use super::{Load, Report};

/// Opens them, says so in a line `{"open":N}` on standard output, and holds them until standard input ends. Then each
/// has to answer once more: one that was lost meanwhile is an error.
pub(super) fn run(to: SocketAddr, load: &Load) -> io::Result<Report> {
    let start = Instant::now();
    let mut streams = open_echoes(to, load)?;
    let elapsed = start.elapsed();
    println!("{{\"open\":{}}}", streams.len());
    io::stdout().flush()?;
    io::copy(&mut io::stdin(), &mut io::sink())?;
    let mut buffer = vec![0x5a; load.size];
    for stream in &mut streams {
        exchange(stream, &mut buffer)?;
    }
    Ok(Report {
        seconds: elapsed.as_secs_f64(),
        all_exchanges: 2 * streams.len() as u64,
        ..Report::default()
    })
}
