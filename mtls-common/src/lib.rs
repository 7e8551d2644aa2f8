#![no_std]
//! The contract between the kernel half and the userspace half: layouts and names, no logic.
