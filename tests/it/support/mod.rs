//! What the tests stand on.

pub mod double;
pub mod leash;
pub mod mount;
pub mod proxy;
pub mod seaweed;
pub mod store;
pub mod web;
pub mod wiretap;
