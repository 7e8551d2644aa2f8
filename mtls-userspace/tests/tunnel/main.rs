//! Tunnels and relays between real sockets: what an application sees, and what a peer that lies gets.

#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]

#[macro_use]
mod ways;

mod foreign;
mod interop;
mod raw;
mod raw_peers;
mod raw_withheld;
mod refusals;
mod resets;
mod reuse;
mod serving;
mod shared;
mod transfers;
mod trust;
mod wandering;
mod world;
