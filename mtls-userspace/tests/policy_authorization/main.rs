//! The rules of `AuthorizationPolicy` at L4, a row each: a module for each section of what they say.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod bench;
mod effects;
mod fields;
mod limits;
mod rules;
