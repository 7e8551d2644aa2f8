//! What an operator sees from outside: a scrape, a probe, a line of the access log, the admin socket, `mtls status`.

// A test that cannot go on fails where it stands.
#![allow(clippy::unwrap_used)]

mod access_log;
mod admin;
mod agent;
mod exposition;
mod flows;
mod health_metrics;
mod inspector;
mod overview;
mod status_command;
mod strict_readiness;
mod traffic_metrics;
