//! `packmule config check`: what a mount would read, judged without mounting.

use anyhow::Context;
use clap::ArgMatches;

use super::pages::say;
use super::{WRONG_USAGE, mount};
use crate::config::{Environment, Named, Of, Typed};

/// Says which files were read and that they are right; the first thing that is wrong is the error.
pub fn run(matches: &ArgMatches) -> anyhow::Result<()> {
    let Some(("check", matches)) = matches.subcommand() else { anyhow::bail!("see packmule config --help (exit status {WRONG_USAGE})") };
    let environment = Environment::of_process();
    match matches.get_one::<String>("source") {
        Some(source) => {
            mount::load(&mount::nowhere(source, matches))?;
        }
        None => {
            Typed::inherited(&environment, Of::All)?;
            // A bucket that has no section: what is said for all.
            mount::load(&mount::nowhere("s3://packmule-config-check/", matches))?;
            for name in Named::sections(&environment)? {
                mount::load(&mount::nowhere(&name, matches)).with_context(|| format!("mount.{name}"))?;
            }
        }
    }
    let files: Vec<String> =
        environment.config_files().into_iter().filter(|(path, _)| path.exists()).map(|(path, _)| path.display().to_string()).collect();
    say(&format!("{}: right", if files.is_empty() { "no config file, environment".to_owned() } else { files.join(", ") }))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    #[test]
    fn a_source_is_checked_without_a_mountpoint() {
        let matches = crate::cli::commands::program()
            .try_get_matches_from(["packmule", "config", "check", "s3://bucket", "-o", "ca_bundle=/nope"])
            .unwrap();
        let message = super::run(matches.subcommand().unwrap().1).unwrap_err().to_string();
        assert!(message.starts_with("ca_bundle=/nope: No such file"), "{message}");
    }
}
