//! Kernel TLS that fails midway: a system call of its set-up is refused, and the stream goes on, in userspace as far as
//! need be.

use libc::{BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, sock_filter, sock_fprog};
use mtls::relay::{End, Records};
use tokio::io::AsyncWriteExt;

use crate::raw::{BOTH_ASK, converse, ends, kernel, rekeys};
use crate::world::soon;

/// A socket option by level and name.
type Refused = (libc::c_int, libc::c_int);

#[test]
fn what_the_kernel_does_not_take_stays_in_userspace() {
    let cases: [(Refused, Records); 3] = [
        ((libc::IPPROTO_TCP, libc::TCP_ULP), Records::Userspace),
        ((libc::SOL_TLS, libc::TLS_TX), Records::KernelReceives),
        ((libc::SOL_TLS, libc::TLS_RX), Records::KernelSends),
    ];
    // Found out before anything is refused.
    let (works, _) = (kernel(), rekeys());
    for (refused, records) in cases {
        // What is refused stays refused to a thread until its end.
        let stream = std::thread::spawn(move || {
            refuse(refused);
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let mut agents = BOTH_ASK.agents().await;
                let (mut near, mut far) = soon(agents.connect()).await;
                converse(&mut near, &mut far).await;
                near.shutdown().await.unwrap();
                far.shutdown().await.unwrap();
                ends(&mut agents).await
            })
        });
        for report in stream.join().unwrap() {
            assert!(matches!(report.end, End::Clean), "without {refused:?}: {:?}", report.end);
            assert_eq!((report.sent, report.received), (4 << 17, 4 << 17), "without {refused:?}");
            let expected = if works { records } else { Records::Userspace };
            assert_eq!(report.records, expected, "without {refused:?}");
        }
    }
}

/// From here on this thread's `setsockopt` of that option fails with ENOMEM (seccomp).
fn refuse((level, name): Refused) {
    /// Of `struct seccomp_data`: the call's number, and the lower half of its second and third argument.
    const CALL: u32 = 0;
    const HALF: u32 = if cfg!(target_endian = "big") { 4 } else { 0 };
    const LEVEL: u32 = 16 + 8 + HALF;
    const NAME: u32 = 16 + 16 + HALF;
    let load = |at| sock_filter { code: (BPF_LD | BPF_W | BPF_ABS) as u16, jt: 0, jf: 0, k: at };
    // Past everything to the permission unless equal.
    let equal = |to, past| sock_filter { code: (BPF_JMP | BPF_JEQ | BPF_K) as u16, jt: 0, jf: past, k: to };
    let done = |with| sock_filter { code: (BPF_RET | BPF_K) as u16, jt: 0, jf: 0, k: with };
    let mut filter = [
        load(CALL),
        equal(libc::SYS_setsockopt as u32, 5),
        load(LEVEL),
        equal(level as u32, 3),
        load(NAME),
        equal(name as u32, 1),
        done(libc::SECCOMP_RET_ERRNO | libc::ENOMEM as u32),
        done(libc::SECCOMP_RET_ALLOW),
    ];
    let program = sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the second call reads `program` and the filter it points to, which live through it.
    let outcome = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            | libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program)
    };
    assert_eq!(outcome, 0, "{}", std::io::Error::last_os_error());
}
