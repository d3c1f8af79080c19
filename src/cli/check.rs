//! `packmule config check`: what a mount would read, judged without mounting.

use clap::ArgMatches;

use super::{WRONG_USAGE, commands, mount};
use crate::config::{Environment, Invocation, Typed};

/// Says which files were read and that they are right; the first thing that is wrong is the error.
pub fn run(matches: &ArgMatches) -> anyhow::Result<()> {
    let Some(("check", matches)) = matches.subcommand() else { anyhow::bail!("see packmule config --help (exit status {WRONG_USAGE})") };
    let environment = Environment::of_process();
    match matches.get_one::<String>("source") {
        Some(source) => {
            // Any place will do: a mountpoint is the mount command's to judge.
            let invocation = Invocation { source: source.clone(), mountpoint: "/".into(), arguments: commands::arguments(matches), sloppy: false };
            mount::load(&invocation)?;
        }
        None => {
            Typed::inherited(&environment, None)?;
        }
    }
    let files: Vec<String> = environment.config_files().into_iter().filter(|(path, _)| path.exists()).map(|(path, _)| path.display().to_string()).collect();
    println!("{}: right", if files.is_empty() { "no config file, environment".to_owned() } else { files.join(", ") });
    Ok(())
}
