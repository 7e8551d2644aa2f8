//! Plaintext, read into a buffer and written from it: what the agent does between two pods of one node.

use std::sync::Arc;

use anyhow::Result;
use tokio::net::TcpStream;

use super::{Ends, OnAccept, Technique, ended, onward};
use crate::relay::{Progress, Unwritten, plain};

pub(super) static TECHNIQUE: Copy = Copy;

pub(super) struct Copy;

impl Technique for Copy {
    fn name(&self) -> &'static str {
        "plaintext, copy"
    }

    fn about(&self) -> &'static str {
        "two relays that read and write, as the agent does on one node"
    }

    fn near(&self, ends: Arc<Ends>) -> OnAccept {
        onward(ends.tunnel, both_ways)
    }

    fn far(&self, ends: Arc<Ends>) -> OnAccept {
        onward(ends.server, both_ways)
    }
}

async fn both_ways(from: TcpStream, to: TcpStream) -> Result<()> {
    ended(plain(&from, &to, Unwritten::default(), &Progress::default(), std::future::pending()).await.end)
}
