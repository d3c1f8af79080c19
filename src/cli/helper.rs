//! The program under mount(8)'s and umount(8)'s names: `/sbin/mount.packmule SPEC DIR [-sfnv] [-N NS] [-o OPTIONS]
//! [-t TYPE]` and `/sbin/umount.fuse.packmule DIR [-flnrv] [-N NS] [-t TYPE]`. mount(8) describes both grammars under
//! EXTERNAL HELPERS.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::builder::ValueParser;
use clap::{Arg, ArgAction, ArgMatches, Command};

use super::pages::say;
use super::{MOUNT_FAILED, WRONG_USAGE, client, commands, failed, first_paragraph, mount};
use crate::config::{Argument, Environment, Invocation, named};
use crate::control::umount::Options;

/// Below the help of mount's helper, and on its manual page.
const MOUNT_NOTES: &str = "In the fstab the type is packmule (fuse.packmule does too):\n\n\
    s3://releases/ /srv/releases packmule _netdev,nofail,x-systemd.automount,allow_other,profile=release 0 0\n\n\
    _netdev makes umount(8) call its helper, which waits until everything is stored. Where uploads can take longer than 90 seconds, \
    x-systemd.mount-timeout=15min keeps systemd from giving up on that wait.\n\n\
    Options are those of packmule-mount(1), with _ or -; words for mount(8) itself and x-* are taken and ignored. \
    The exit status is 0, 2 after wrong usage, or 32 where the mount failed; the reason is one line.";

/// The same of umount's.
const UMOUNT_NOTES: &str = "umount(8) calls it for mounts whose fstab line has _netdev or an x-... word; after a bare packmule mount \
    use packmule-umount(1). While a file is open for writing it says that the mount is busy. What cannot be stored stays in the spool, \
    is named by packmule status, and goes on at the next mount.";

fn switch(flag: char, id: &'static str, help: &'static str) -> Arg {
    Arg::new(id).short(flag).action(ArgAction::Count).help(help)
}

fn value(flag: char, id: &'static str, name: &'static str, help: &'static str) -> Arg {
    Arg::new(id).short(flag).value_name(name).action(ArgAction::Append).value_parser(ValueParser::string()).help(help)
}

fn directory() -> Arg {
    Arg::new("directory").value_name("DIRECTORY").help("Mountpoint").required(true).value_parser(ValueParser::path_buf())
}

/// What mount(8) calls.
pub fn mount_grammar() -> Command {
    Command::new("mount.packmule")
        .version(env!("CARGO_PKG_VERSION"))
        .about("Mounts S3 for mount(8) and the fstab; see packmule-mount(1) for the options")
        .after_help(MOUNT_NOTES)
        .arg(Arg::new("source").value_name("SOURCE").help("s3://BUCKET/PREFIX/, or s3:// for every bucket").required(true))
        .arg(directory())
        .args([
            switch('s', "sloppy", "Ignore words that nobody knows"),
            switch('f', "fake", "Check everything, mount nothing"),
            switch('n', "no-mtab", "Taken; there is no mtab"),
            switch('v', "verbose", "Say what is mounted"),
            value('N', "namespace", "PID|FILE", "Mount in the mount namespace of this process or file"),
            value('t', "type", "TYPE", "Taken"),
        ])
        .arg(commands::options())
}

/// What umount(8) calls.
pub fn umount_grammar() -> Command {
    Command::new("umount.fuse.packmule")
        .version(env!("CARGO_PKG_VERSION"))
        .about("Waits for the uploads, then unmounts, for umount(8)")
        .after_help(UMOUNT_NOTES)
        .arg(directory())
        .args([
            switch('f', "force", "As -l"),
            switch('l', "lazy", "Take it out of the tree at once; the uploads end in the background"),
            switch('n', "no-mtab", "Taken; there is no mtab"),
            switch('r', "read-only", "Taken"),
            switch('v', "verbose", "Taken"),
            value('N', "namespace", "PID|FILE", "Unmount in the mount namespace of this process or file"),
            value('t', "type", "TYPE", "Taken"),
        ])
}

/// `mount.packmule` and `mount.fuse.packmule`.
pub fn mount(arguments: &[OsString]) -> ExitCode {
    let matches = match parse(mount_grammar(), arguments) {
        Ok(matches) => matches,
        Err(status) => return status,
    };
    if let Some(status) = elsewhere(&matches, arguments) {
        return status;
    }
    let typed = matches.get_one::<String>("source").cloned().unwrap_or_default();
    let mut invocation = Invocation {
        source: typed.clone(),
        mountpoint: matches.get_one::<PathBuf>("directory").cloned().unwrap_or_default(),
        arguments: matches.get_many::<String>("o").into_iter().flatten().cloned().map(Argument::Options).collect(),
        sloppy: matches.get_count("sloppy") > 0,
    };
    match named::name_of_path(&typed, &Environment::of_process()) {
        // `mount -a` compares what is mounted with the path that it made.
        Ok(Some(name)) => {
            invocation.source = name;
            invocation.arguments.insert(0, Argument::Word("fsname".to_owned(), Some(typed)));
        }
        Ok(None) => {}
        Err(error) => return failed(&error.into(), MOUNT_FAILED),
    }
    let config = match mount::load(&invocation) {
        Ok(config) => config,
        Err(error) => return failed(&error, MOUNT_FAILED),
    };
    if matches.get_count("verbose") > 0 {
        // Whether somebody reads it is nothing to the mount.
        let _ = say(&format!("packmule: {} on {}", config.fsname, config.mountpoint.display()));
    }
    if matches.get_count("fake") > 0 {
        return ExitCode::SUCCESS;
    }
    crate::daemon::run(&config)
}

/// `umount.packmule` and `umount.fuse.packmule`.
pub fn umount(arguments: &[OsString]) -> ExitCode {
    let matches = match parse(umount_grammar(), arguments) {
        Ok(matches) => matches,
        Err(status) => return status,
    };
    if let Some(status) = elsewhere(&matches, arguments) {
        return status;
    }
    let directory = matches.get_one::<PathBuf>("directory").cloned().unwrap_or_default();
    let lazy = matches.get_count("force") > 0 || matches.get_count("lazy") > 0;
    match client::unmount(&directory, Options { lazy, timeout: None }) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error, 1),
    }
}

fn parse(grammar: Command, arguments: &[OsString]) -> Result<ArgMatches, ExitCode> {
    grammar.try_get_matches_from(arguments).map_err(|error| {
        if error.use_stderr() {
            eprintln!("packmule: {}; see mount(8)", first_paragraph(&error));
            return ExitCode::from(WRONG_USAGE);
        }
        let shown = error.print();
        if shown.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    })
}

/// `-N NS`: the same command again in that namespace, which nsenter(1) of util-linux enters (mount(8) brings it along).
/// A process with threads cannot change its own.
fn elsewhere(matches: &ArgMatches, arguments: &[OsString]) -> Option<ExitCode> {
    let namespace = matches.get_one::<String>("namespace")?;
    let file = match namespace.parse::<u32>() {
        Ok(pid) => format!("/proc/{pid}/ns/mnt"),
        Err(_) => namespace.clone(),
    };
    // mount(8) gives its helpers their whole path as argv[0]: by it the new process knows its name again.
    let (name, rest) = arguments.split_first()?;
    let status =
        std::process::Command::new("nsenter").arg(format!("--mount={file}")).arg("--").arg(name).args(without_namespace(rest)).status();
    Some(match status {
        Ok(status) => ExitCode::from(u8::try_from(status.code().unwrap_or(i32::from(MOUNT_FAILED))).unwrap_or(MOUNT_FAILED)),
        Err(error) => failed(&anyhow::anyhow!("-N {namespace}: nsenter cannot be run ({error}); install util-linux"), MOUNT_FAILED),
    })
}

fn without_namespace(arguments: &[OsString]) -> Vec<OsString> {
    let mut kept = Vec::new();
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        if argument == "-N" {
            arguments.next();
        } else if !argument.to_string_lossy().starts_with("-N") {
            kept.push(argument.clone());
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn mount_matches(line: &str) -> ArgMatches {
        mount_grammar().try_get_matches_from(line.split(' ')).unwrap()
    }

    #[test]
    fn the_flags_are_those_of_mount() {
        let matches = mount_matches("mount.packmule s3://b/ /mnt -sfnv -o rw,_netdev -t fuse.packmule -o ro");
        assert_eq!((matches.get_count("sloppy"), matches.get_count("fake"), matches.get_count("verbose")), (1, 1, 1));
        let options: Vec<&String> = matches.get_many::<String>("o").unwrap().collect();
        assert_eq!(options, ["rw,_netdev", "ro"]);
        assert_eq!(
            umount_grammar().try_get_matches_from("umount.packmule /mnt -l -f -n -r -v -t x".split(' ')).unwrap().get_count("lazy"),
            1
        );
        assert!(mount_grammar().try_get_matches_from(["mount.packmule", "s3://b"]).is_err());
        mount_grammar().debug_assert();
        umount_grammar().debug_assert();
    }

    #[test]
    fn the_namespace_is_taken_out() {
        let arguments: Vec<OsString> = ["s3://b", "/mnt", "-N", "12", "-o", "ro", "-N/proc/1/ns/mnt"].map(OsString::from).into();
        assert_eq!(without_namespace(&arguments), ["s3://b", "/mnt", "-o", "ro"]);
    }
}
