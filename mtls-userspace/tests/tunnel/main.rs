//! Tunnels and relays between real sockets: what an application sees, and what a peer that lies gets.

mod foreign;
mod interop;
mod refusals;
mod resets;
mod reuse;
mod transfers;
mod world;
