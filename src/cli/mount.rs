//! `packmule mount` and `packmule demo`: from words to a [`Config`], then to the process that serves it.

use std::process::ExitCode;

use clap::ArgMatches;

use super::{MOUNT_FAILED, commands, failed};
use crate::config::{Config, Environment, Invocation};
use crate::publish::headers::HeaderRules;

/// `packmule mount SOURCE DIRECTORY …`.
pub fn run(matches: &ArgMatches) -> ExitCode {
    let invocation = Invocation {
        source: matches.get_one::<String>("source").cloned().unwrap_or_default(),
        mountpoint: commands::path_of(matches, "directory").unwrap_or_default(),
        arguments: commands::arguments(matches),
        sloppy: false,
    };
    match load(&invocation) {
        Ok(config) => crate::daemon::run(&config),
        Err(error) => failed(&error, MOUNT_FAILED),
    }
}

/// No directory lies under it.
pub const NOWHERE: &str = "/dev/null/mountpoint";

/// A source with its options, for who judges those and mounts nothing.
pub fn nowhere(source: &str, matches: &ArgMatches) -> Invocation {
    Invocation { source: source.to_owned(), mountpoint: NOWHERE.into(), arguments: commands::arguments(matches), sloppy: false }
}

/// Everything that can be known wrong before anything is asked of a network, and the one warning.
pub fn load(invocation: &Invocation) -> anyhow::Result<Config> {
    load_in(invocation, &Environment::of_process())
}

/// As [`load`], in another environment than this process's.
pub fn load_in(invocation: &Invocation, environment: &Environment) -> anyhow::Result<Config> {
    let config = Config::load(invocation, environment)?;
    HeaderRules::load(config.cache_control.as_deref(), &config.rules, config.header_rules.as_deref())?;
    if let Some(warning) = config.warning() {
        eprintln!("packmule: {warning}");
    }
    Ok(config)
}

/// `packmule demo`.
pub fn demo(matches: &ArgMatches) -> ExitCode {
    crate::demo::run(&crate::demo::Options { check: matches.get_flag("check"), folder: commands::path_of(matches, "dir") })
}
