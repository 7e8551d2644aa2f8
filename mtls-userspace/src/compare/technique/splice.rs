//! Plaintext moved by splice(2) through a pipe: pages change hands and are never read.

use std::io;
use std::net::Shutdown;
use std::sync::Arc;

use anyhow::Result;
use socket2::SockRef;
use tokio::net::TcpStream;

use super::{Ends, OnAccept, Technique, onward};
use crate::relay::Pipe;

pub(super) static TECHNIQUE: Splice = Splice;

pub(super) struct Splice;

/// Taken at once.
const MOST: usize = 256 * 1024;

impl Technique for Splice {
    fn name(&self) -> &'static str {
        "plaintext, splice"
    }

    fn about(&self) -> &'static str {
        "two relays that move pages from socket to socket through a pipe"
    }

    fn near(&self, ends: Arc<Ends>) -> OnAccept {
        onward(ends.tunnel, both_ways)
    }

    fn far(&self, ends: Arc<Ends>) -> OnAccept {
        onward(ends.server, both_ways)
    }
}

async fn both_ways(from: TcpStream, to: TcpStream) -> Result<()> {
    tokio::try_join!(one_way(&from, &to), one_way(&to, &from))?;
    Ok(())
}

async fn one_way(from: &TcpStream, to: &TcpStream) -> io::Result<()> {
    // Made when there is something to move: an idle connection has no pipe.
    let mut made: Option<Pipe> = None;
    loop {
        from.readable().await?;
        let pipe = match &mut made {
            Some(pipe) => pipe,
            None => made.insert(Pipe::new()?),
        };
        match pipe.fill(from, MOST) {
            Ok(0) => return SockRef::from(to).shutdown(Shutdown::Write),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(error),
        }
        while pipe.held() > 0 {
            match pipe.drain(to) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => to.writable().await?,
                Err(error) => return Err(error),
            }
        }
    }
}
