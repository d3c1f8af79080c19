//! The command line. clap's arguments are made from the option table, so that `--cache-size 10G`, `-o cache_size=10G` and
//! `PACKMULE_CACHE_SIZE` are one word with one parser.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{ArgMatches, Command};

use crate::config::words::nearest;

mod cache;
mod check;
mod client;
mod commands;
mod doctor;
mod entries;
mod everything;
pub mod helper;
mod link;
mod links;
mod mount;
mod pages;
mod reference;
mod setup;
mod status;
mod watch;

/// It was asked for the wrong way.
const WRONG_USAGE: u8 = 2;
/// mount(8): the mount failed.
const MOUNT_FAILED: u8 = 32;

/// `packmule …`: a command, or `packmule SOURCE DIRECTORY …`, which mounts (mount.fuse3 calls it so).
pub fn run(mut arguments: Vec<OsString>) -> ExitCode {
    let program = commands::program();
    if is_bare_mount(&program, &arguments) {
        arguments.insert(1, "mount".into());
    }
    match program.try_get_matches_from(&arguments) {
        Ok(matches) => dispatch(&matches),
        Err(error) => wrong_usage(&error, arguments.get(1).is_some_and(|command| command == "mount")),
    }
}

fn dispatch(matches: &ArgMatches) -> ExitCode {
    let Some((command, matches)) = matches.subcommand() else { return ExitCode::from(WRONG_USAGE) };
    match command {
        "mount" => return mount::run(matches),
        "umount" => client::umount(matches),
        "status" => status::run(matches),
        "flush" => client::flush(matches),
        "retry" => entries::retry(matches),
        "discard" => entries::discard(matches),
        "recover" => entries::recover(matches),
        "refresh" => client::refresh(matches),
        "cache" => cache::run(matches),
        "link" => link::run(matches),
        "links" => links::run(matches),
        "config" => check::run(matches),
        "doctor" => return doctor::run(matches),
        "setup" => setup::run(),
        "demo" => return mount::demo(matches),
        "completions" => pages::completions(matches),
        "man" => pages::man(matches),
        // clap knows the commands; it has answered for any other.
        _ => return ExitCode::from(WRONG_USAGE),
    }
    .map_or_else(|error| failed(&error, 1), |()| ExitCode::SUCCESS)
}

/// A first argument that is neither a command nor a question for help is a source, or an option of mount.
fn is_bare_mount(program: &Command, arguments: &[OsString]) -> bool {
    let Some(first) = arguments.get(1).map(|first| first.to_string_lossy()) else { return false };
    let question = matches!(&*first, "-h" | "--help" | "-V" | "--version" | "help");
    !question && program.find_subcommand(&*first).is_none() && (arguments.len() > 2 || first.starts_with('-') || first.contains(':'))
}

/// One line, whatever went wrong.
fn failed(error: &anyhow::Error, status: u8) -> ExitCode {
    eprintln!("packmule: {}", one_line(&format!("{error:#}")));
    ExitCode::from(status)
}

fn one_line(text: &str) -> String {
    text.trim().replace('\n', "; ")
}

/// Help and version go to stdout. Everything else is one line; an option that nobody knows fails a mount as it would in
/// the fstab.
fn wrong_usage(error: &clap::Error, mounting: bool) -> ExitCode {
    let context = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        _ => None,
    };
    let (line, status) = match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            let shown = error.print();
            return if shown.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = error.print();
            return ExitCode::from(WRONG_USAGE);
        }
        ErrorKind::UnknownArgument if mounting => {
            let typed = context(ContextKind::InvalidArg).unwrap_or_default();
            let word = typed.trim_start_matches('-').replace('-', "_");
            let line = if typed.starts_with("--") {
                format!("unknown option '{typed}'; the nearest is --{}", nearest(&word).replace('_', "-"))
            } else {
                format!("unknown argument '{typed}'; see packmule mount --help")
            };
            (line, MOUNT_FAILED)
        }
        _ => (format!("{}; see packmule {}--help", first_paragraph(error), if mounting { "mount " } else { "" }), WRONG_USAGE),
    };
    eprintln!("packmule: {line}");
    ExitCode::from(status)
}

/// clap's first paragraph says what is wrong; usage and tips follow.
fn first_paragraph(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let words: Vec<&str> = text.split("\n\n").next().unwrap_or_default().split_whitespace().collect();
    words.join(" ").trim_start_matches("error: ").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_in_the_place_of_a_command_mounts() {
        let bare = |line: &str| is_bare_mount(&commands::program(), &line.split(' ').map(OsString::from).collect::<Vec<_>>());
        for line in [
            "packmule s3://b/ /mnt -o ro",
            "packmule releases /mnt",
            "packmule -o ro s3://b /mnt",
            "packmule s3://b",
            "packmule releases:/x /mnt",
        ] {
            assert!(bare(line), "{line}");
        }
        for line in ["packmule", "packmule mount s3://b /mnt", "packmule status /mnt", "packmule --help", "packmule -V", "packmule stauts"]
        {
            assert!(!bare(line), "{line}");
        }
    }
}
