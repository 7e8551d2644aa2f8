//! Where connections that move much are relayed.

use std::future::Future;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use tokio::runtime::{Builder, Handle};

use crate::relay::Progress;
use crate::tunnel;

/// A worker's second thread, for connections that move much. There is none before the first of them.
pub struct BulkThread {
    index: usize,
    enabled: bool,
    /// `None` if it could not be had.
    runtime: OnceLock<Option<Handle>>,
    /// Connections here that have not ended.
    open: Arc<AtomicUsize>,
}

impl BulkThread {
    pub fn new(index: usize, enabled: bool) -> Self {
        Self { index, enabled, runtime: OnceLock::new(), open: Arc::default() }
    }

    /// Has a new connection say when it should go on here.
    pub fn watch(&self, progress: &Progress) {
        if self.enabled {
            progress.watch_pace();
        }
    }

    /// Where the thread can't be had, the worker's own goes on.
    pub(super) fn spawn(&self, connection: impl Future<Output = ()> + Send + 'static) {
        let open = self.open.clone();
        open.fetch_add(1, Ordering::Relaxed);
        let connection = async move {
            connection.await;
            // The last of them for now: what the thread's buffers hold is more than a node's idle connections take.
            if open.fetch_sub(1, Ordering::Relaxed) == 1 {
                tunnel::release_spare_buffers();
            }
        };
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
