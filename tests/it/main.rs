//! The integration tests: packmule against a store that is not ours, through the real binary and the kernel.
#![allow(clippy::unwrap_used, missing_docs)]

mod architecture;
mod attr;
mod client;
mod client_faults;
mod cost;
mod failing;
mod foreign;
mod names;
mod namespace;
mod programs;
mod posix;
mod read;
mod start;
mod support;
mod write;
