//! The certificate authority and the agents' side of it, end to end: real TLS and gRPC on loopback.

mod bench;
mod command;
mod directory;
mod requests;
mod rotation;
