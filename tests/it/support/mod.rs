//! What the tests stand on.

pub mod client;
#[allow(dead_code, reason = "the benchmark starts none")]
pub mod cluster;
pub mod double;
#[allow(dead_code, reason = "the benchmark breaks nothing")]
pub mod faulty;
pub mod files;
pub mod leash;
#[allow(dead_code, reason = "the benchmark asks nobody about settings")]
pub mod moto;
pub mod mount;
#[allow(dead_code, reason = "the benchmark uses the rest")]
pub mod proxy;
pub mod seaweed;
pub mod stage;
pub mod store;
pub mod web;
#[allow(dead_code, reason = "the benchmark uses the rest")]
pub mod wiretap;
