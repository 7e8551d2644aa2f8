//! The Kubernetes API as source, authority and publisher, against a server of the tests' own.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod authority;
mod cluster;
mod following;
mod policies;
mod server_calls;
mod services;
