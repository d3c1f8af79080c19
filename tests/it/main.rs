//! The integration tests: packmule against a store that is not ours, through the real binary and the kernel.
#![allow(clippy::unwrap_used, missing_docs)]

mod foreign;
mod posix;
mod support;
