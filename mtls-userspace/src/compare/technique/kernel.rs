//! The agent's tunnel, its records handed to the kernel as soon as a stream is a little long.

use std::sync::Arc;

use rustls::CipherSuite;

use super::{Ends, OnAccept, Technique, userspace};
use crate::tunnel::{Config, RecordCost};

pub(super) static TECHNIQUE: Kernel = Kernel;

pub(super) struct Kernel;

/// Much sooner than the agent does, so that a short measurement sees it.
const AFTER: u64 = 256 * 1024;

impl Technique for Kernel {
    fn name(&self) -> &'static str {
        "TLS, ours, kernel"
    }

    fn about(&self) -> &'static str {
        "the same, with streams of more than 256 KiB handed to the kernel's TLS and moved by splice"
    }

    fn obstacle(&self) -> Option<String> {
        let error = RecordCost::measure().err()?;
        Some(format!("the kernel carries no TLS records: {error}; it needs CONFIG_TLS (`modprobe tls`)"))
    }

    fn near(&self, ends: Arc<Ends>) -> OnAccept {
        userspace::near(ends, config())
    }

    fn far(&self, ends: Arc<Ends>) -> OnAccept {
        userspace::far(ends, config())
    }
}

fn config() -> Config {
    use CipherSuite::*;
    let kernel = vec![TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256];
    Config { raw_after: Some(AFTER), kernel, ..Config::default() }
}
