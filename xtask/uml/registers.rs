//! Stands before `ptrace` in User-mode Linux: its own idea of how large a processor's state is in, the kernel's out.
//!
//! User-mode Linux keeps its processes' vector registers in 2696 bytes. Processors with AMX have 11008, and the kernel
//! takes all or nothing, so that User-mode Linux 6.1 can't start a process there. What it doesn't know of is state that
//! no process gets without asking for it, and none in there can: it is handed over as zeroes.
//!
//! Compiled by `cargo xtask vm` into a library of its own, which the loader puts before libc.

use std::ffi::{c_long, c_void};

const SYS_PTRACE: c_long = 101;
const PEEKS: std::ops::RangeInclusive<c_long> = 1..=3;
const GETREGSET: c_long = 0x4204;
const SETREGSET: c_long = 0x4205;
/// `NT_X86_XSTATE`
const XSTATE: c_long = 0x202;

/// `struct iovec`
#[repr(C)]
struct Buffer {
    base: *mut c_void,
    len: usize,
}

#[repr(C, align(64))]
struct State([u8; 32768]);

/// Not on the stack: User-mode Linux calls from stacks of its own, which are small. It never calls twice at once.
static mut STATE: State = State([0; 32768]);

unsafe extern "C" {
    fn syscall(number: c_long, ...) -> c_long;
}

/// # Safety
///
/// As `ptrace(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ptrace(request: c_long, pid: c_long, addr: c_long, data: *mut c_void) -> c_long {
    // SAFETY: arguments are handed on as they came, or replaced by a buffer that is larger than any processor's state.
    unsafe {
        if addr == XSTATE && (request == GETREGSET || request == SETREGSET) {
            let (known, state) = (&mut *data.cast::<Buffer>(), &mut *(&raw mut STATE));
            let mut whole = Buffer { base: state.0.as_mut_ptr().cast(), len: state.0.len() };
            let outcome = syscall(SYS_PTRACE, GETREGSET, pid, addr, &raw mut whole);
            if outcome < 0 {
                return outcome;
            }
            let len = known.len.min(whole.len);
            if request == GETREGSET {
                state.0.as_ptr().copy_to_nonoverlapping(known.base.cast(), len);
                known.len = len;
                return outcome;
            }
            state.0.fill(0);
            state.0.as_mut_ptr().copy_from_nonoverlapping(known.base.cast(), len);
            return syscall(SYS_PTRACE, SETREGSET, pid, addr, &raw mut whole);
        }
        if PEEKS.contains(&request) {
            // The system call writes the word that the library's function returns.
            let mut word: c_long = 0;
            let outcome = syscall(SYS_PTRACE, request, pid, addr, &raw mut word);
            return if outcome < 0 { outcome } else { word };
        }
        syscall(SYS_PTRACE, request, pid, addr, data)
    }
}
