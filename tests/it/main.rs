//! The integration tests: packmule against a store that is not ours, through the real binary and the kernel.
#![allow(clippy::unwrap_used, missing_docs)]

mod attr;
mod client;
mod client_faults;
mod cost;
mod failing;
mod foreign;
mod model;
mod names;
mod namespace;
mod posix;
mod programs;
mod read;
mod support;
mod write;
