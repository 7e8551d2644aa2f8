//! Joining two sockets by a sockmap: listed so that nobody looks for it, and why nobody should.

use anyhow::{Result, bail};

use super::{Carrier, Path};
use crate::compare::place::Lab;

struct Sockmap;

pub(super) fn paths() -> Vec<Box<dyn Path>> {
    vec![Box::new(Sockmap)]
}

impl Path for Sockmap {
    fn name(&self) -> String {
        "relay, plaintext, sockmap".into()
    }

    fn about(&self) -> String {
        "the kernel moves bytes from socket to socket by a BPF verdict; unsafe".into()
    }

    fn start(&self, _: &Lab) -> Result<Carrier> {
        bail!(
            "unsafe, and so not carried: tried on Linux 6.18, a slow reader lets the writer queue gigabytes of kernel \
             memory until ENOMEM, blocking reads return EAGAIN, splice sees nothing, and bulk transfers fail; nor may a \
             socket in one have kernel TLS"
        )
    }
}
