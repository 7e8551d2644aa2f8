//! CNI: no pod runs before it is protected.
//!
//! `mtls-cni` is the last plugin of the node's network configuration. It is called when a pod's network has been made
//! and before any of its containers starts ([`plugin`]), asks the agent, and lets the pod start when the agent says so
//! ([`Admissions`]). [`Installation`] puts it there, keeps it there while others rewrite the configuration, and takes it
//! away. Nothing here makes or changes a network.

mod admissions;
mod chain;
mod install;
mod spec;

pub mod plugin;

pub use admissions::{Admissions, Admitted, Standing};
pub use install::{Error, Installation, Settings, uninstall};
pub use spec::WhenAway;

/// Name of the plugin: of its binary, and in the network configuration.
pub const NAME: &str = "mtls-cni";
