//! Where connections that move much are relayed.

use std::future::Future;
use std::sync::OnceLock;

use tokio::runtime::{Builder, Handle};

use crate::relay::Progress;

/// A worker's second thread, for connections that move much. There is none before the first of them.
pub struct BulkThread {
    index: usize,
    enabled: bool,
    /// `None` if it could not be had.
    runtime: OnceLock<Option<Handle>>,
}

impl BulkThread {
    pub fn new(index: usize, enabled: bool) -> Self {
        Self { index, enabled, runtime: OnceLock::new() }
    }

    /// Has a new connection say when it should go on here.
    pub fn watch(&self, progress: &Progress) {
        if self.enabled {
            progress.watch_pace();
        }
    }

    /// Where the thread can't be had, the worker's own goes on.
    pub(super) fn spawn(&self, connection: impl Future<Output = ()> + Send + 'static) {
        match self.runtime.get_or_init(|| self.start()) {
            Some(runtime) => runtime.spawn(connection),
            None => tokio::spawn(connection),
        };
    }

    fn start(&self) -> Option<Handle> {
        let built = Builder::new_current_thread().enable_all().build();
        let started = built.and_then(|runtime| {
            let handle = runtime.handle().clone();
            let thread = std::thread::Builder::new().name(format!("bulk-{}", self.index));
            thread.spawn(move || runtime.block_on(std::future::pending::<()>()))?;
            Ok(handle)
        });
        started.inspect_err(|error| tracing::error!(%error, "no thread for connections that move much")).ok()
    }
}
