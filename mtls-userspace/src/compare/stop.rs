//! Ctrl-C and SIGTERM: heard, so that what the lab made is undone before the process ends.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, ensure};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

static STOPPED: AtomicBool = AtomicBool::new(false);

extern "C" fn heard(_: libc::c_int) {
    STOPPED.store(true, Ordering::Relaxed);
}

/// From here on a signal only makes [`check`] fail; a second one ends the process as usual.
pub fn listen_for_stop() -> Result<()> {
    let action = SigAction::new(SigHandler::Handler(heard), SaFlags::SA_RESETHAND, SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        // SAFETY: the handler does nothing but store to an atomic.
        unsafe { sigaction(signal, &action)? };
    }
    Ok(())
}

/// An error once somebody asked to stop.
pub(super) fn check() -> Result<()> {
    ensure!(!STOPPED.load(Ordering::Relaxed), "stopped");
    Ok(())
}
