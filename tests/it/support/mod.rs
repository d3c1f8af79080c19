//! What the tests stand on.

pub mod client;
pub mod double;
#[allow(dead_code, reason = "the benchmark breaks nothing")]
pub mod faulty;
pub mod files;
pub mod leash;
pub mod mount;
#[allow(dead_code, reason = "the benchmark uses the rest")]
pub mod proxy;
pub mod seaweed;
pub mod stage;
pub mod store;
pub mod web;
#[allow(dead_code, reason = "the benchmark uses the rest")]
pub mod wiretap;
