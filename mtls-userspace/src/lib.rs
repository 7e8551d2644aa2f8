//! Transparent mTLS: the map of the house.
//!
//! A connection walks through rooms; each is a folder with one public face (`mod.rs`), one `Error`, and one type it
//! hands on. Read [`connection`] first: it writes the walk out once, top to bottom.
//!
//! ```text
//! outbound:  capture ─► mesh (who is the destination) ─► tunnel ─► relay
//! inbound :  capture ─► tunnel (who is calling) ─► policy ─► relay
//! ```
//!
//! | room | takes → gives |
//! |---|---|
//! | [`locate`] | a pod's UID → its network namespace and cgroup on this node |
//! | [`cni`] | a container runtime's call → the pod starts, protected, or not at all |
//! | [`capture`] | pods → captured streams; the only room that speaks to the kernel half |
//! | [`features`] | a machine → what its kernel can do, and what the agent makes of it |
//! | [`mesh`] | manifests, or a Kubernetes API server's objects → an immutable [`mesh::Mesh`] snapshot |
//! | [`identity`] | SPIFFE ID → current certificate, key and trust bundle |
//! | [`policy`] | (peer, workload, port) → [`policy::Authorized`] or a reason; pure |
//! | [`tunnel`] | captured stream + destination ↔ authenticated tunnel |
//! | [`relay`] | two streams → a report |
//! | [`direct`] | policy and pods of one node → grants to connect without the agent |
//! | [`ca`] | certificate signing requests → certificates |
//! | [`plaintext`] | plaintext that was seen → readiness for STRICT |
//! | [`succession`] | another agent → its place, without a connection refused |
//! | [`observe`] | counters, access log, admin API |
//! | [`node_check`] | a node before installing → what is missing, in the way, or to be set |
//!
//! [`kubernetes`] is the way to the API server, for the rooms that need one; [`inspect`] answers the admin socket's questions from what the rooms hold and the kernel has;
//! [`explain`] says what the walk would do to a connection without making one.

pub mod addr;
pub mod agent_socket;
pub mod bench;
pub mod ca;
pub mod capture;
pub mod cli;
pub mod cni;
pub mod compare;
pub mod config;
pub mod connection;
pub mod control;
pub mod direct;
pub mod door;
pub mod drain;
pub mod enrolment;
pub mod explain;
pub mod features;
pub mod identity;
pub mod inspect;
pub mod kubernetes;
pub mod locate;
pub mod mesh;
pub mod node;
pub mod node_check;
pub mod observe;
pub mod outcome;
pub mod plaintext;
pub mod policy;
pub mod relay;
pub mod results;
mod rtnetlink;
pub mod succession;
pub mod tenure;
pub mod tunnel;
pub mod unplaced;
pub mod worker;
