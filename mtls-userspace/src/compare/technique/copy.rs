//! Plaintext, read into a buffer and written from it: what the agent does between two pods of one node.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::TcpStream;

use super::{Carried, Ends, OnAccept, Technique, dial, ended};
use crate::relay::{Progress, plain};

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
        onward(ends.tunnel)
    }

    fn far(&self, ends: Arc<Ends>) -> OnAccept {
        onward(ends.server)
    }
}

fn onward(to: SocketAddr) -> OnAccept {
    Box::new(move |from: TcpStream| -> Carried {
        Box::pin(async move {
            from.set_nodelay(true)?;
            let to = dial(to).await?;
            ended(plain(&from, &to, &Progress::default(), std::future::pending()).await.end)
        })
    })
}
