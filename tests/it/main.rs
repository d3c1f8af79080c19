//! The integration tests: packmule against a store that is not ours, through the real binary and the kernel.
#![allow(clippy::unwrap_used, missing_docs)]

mod account;
mod acls;
mod adoption;
mod architecture;
mod attr;
mod cache;
mod client;
mod client_faults;
mod closing;
mod cluster;
mod conflicts;
mod copies;
mod cost;
mod cost_edits;
mod crash;
mod deadlines;
mod deletes;
mod desktop;
mod directories;
mod doctor;
mod failing;
mod faults;
mod foreign;
mod freshness;
mod fstab;
mod handles;
mod huge;
mod links;
mod markers;
mod meanwhile;
mod metrics;
mod model;
mod names;
mod namespace;
mod neighbours;
mod options;
mod outages;
mod package;
mod passed;
mod patterns;
mod pins;
mod posix;
mod programs;
mod promises;
mod read;
mod refusals;
mod seen;
mod service;
mod setup;
mod signatures;
mod start;
mod status;
mod support;
mod temporary;
mod trees;
mod versions;
mod waiting;
mod walks;
mod write;
mod write_back;

/// The suites that run on every store, by name.
const COMMON: &[(&str, &[&str])] = &[
    ("account", account::COMMON),
    ("attr", attr::COMMON),
    ("client", client::COMMON),
    ("closing", closing::COMMON),
    ("conflicts", conflicts::COMMON),
    ("copies", copies::COMMON),
    ("deletes", deletes::COMMON),
    ("desktop", desktop::COMMON),
    ("doctor", doctor::COMMON),
    ("freshness", freshness::COMMON),
    ("handles", handles::COMMON),
    ("links", links::COMMON),
    ("markers", markers::COMMON),
    ("namespace", namespace::COMMON),
    ("trees", trees::COMMON),
    ("options", options::COMMON),
    ("outages", outages::COMMON),
    ("programs", programs::COMMON),
    ("read", read::COMMON),
    ("refusals", refusals::COMMON),
    ("temporary", temporary::COMMON),
    ("versions", versions::COMMON),
    ("walks", walks::COMMON),
    ("write", write::COMMON),
    ("write_back", write_back::COMMON),
];

/// What SeaweedFS, on one machine or on three, and Garage cannot hold is a list of tests that exist, each with its reason.
#[test]
fn the_list_of_what_seaweedfs_cannot_hold_is_true() {
    for (test, reason) in support::seaweed::CANNOT.iter().chain(support::cluster::CANNOT).chain(support::cluster::GARAGE_CANNOT) {
        let (suite, name) = test.split_once("::").unwrap();
        let tests = COMMON.iter().find(|(known, _)| *known == suite).map(|(_, tests)| *tests);
        assert!(tests.is_some_and(|tests| tests.contains(&name)), "there is no test {test}");
        assert!(!reason.is_empty(), "{test} has no reason");
    }
}
