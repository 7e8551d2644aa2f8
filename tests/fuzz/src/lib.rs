//! The codecs under fuzz, compiled alone: they do no I/O, and instrumenting the whole agent takes many minutes and
//! gigabytes for nothing.

#![allow(dead_code, reason = "what hands keys to the kernel is compiled with them, and not under fuzz")]

#[path = "../../../mtls-userspace/src/addr.rs"]
pub mod addr;

#[path = "../../../mtls-userspace/src/tunnel"]
pub mod tunnel {
    pub mod frame;
    mod key;
    pub mod order;
    pub mod record;
}
