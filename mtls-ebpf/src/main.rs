//! Kernel half: entry points only. What each hook decides is in the file of its family.

#![no_std]
#![no_main]

mod connect;
mod direct;
mod lookup;
mod maps;
mod names;
mod sock_ops;

use aya_ebpf::macros::{cgroup_sock_addr, sk_lookup, sock_ops};
use aya_ebpf::programs::{SkLookupContext, SockAddrContext, SockOpsContext};

#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    connect::v4(&ctx)
}

#[cgroup_sock_addr(connect6)]
pub fn connect6(ctx: SockAddrContext) -> i32 {
    connect::v6(&ctx)
}

#[cgroup_sock_addr(getpeername4)]
pub fn getpeername4(ctx: SockAddrContext) -> i32 {
    names::peer4(&ctx)
}

#[cgroup_sock_addr(getpeername6)]
pub fn getpeername6(ctx: SockAddrContext) -> i32 {
    names::peer6(&ctx)
}

#[sock_ops]
pub fn mtls_sock_ops(ctx: SockOpsContext) -> u32 {
    sock_ops::event(&ctx)
}

#[sk_lookup]
pub fn mtls_sk_lookup(ctx: SkLookupContext) -> u32 {
    lookup::incoming(&ctx)
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";
