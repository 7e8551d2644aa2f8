//! The certificate authority and the agents' side of it, end to end: real TLS and gRPC on loopback.

// Clippy knows test functions by their attribute; what they share has none.
#![allow(clippy::unwrap_used)]

mod bench;
mod callers;
mod command;
mod directory;
mod requests;
mod revocation;
mod roots;
mod rotation;
mod traffic;
mod workload_api;
