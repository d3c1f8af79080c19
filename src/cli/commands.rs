//! What clap is told: the commands, and mount's options made from the table.

use std::path::PathBuf;

use clap::builder::{PossibleValue, PossibleValuesParser, ValueParser};
use clap::{Arg, ArgAction, ArgMatches, Command, ValueHint};

use crate::config::Argument;
use crate::config::table::{Kind, OPTIONS, Opt, TUNING};

/// The whole command line.
pub fn program() -> Command {
    Command::new("packmule")
        .version(env!("CARGO_PKG_VERSION"))
        .about("Mount S3 as a filesystem: buckets are directories, keys are files")
        .after_help("Called as packmule SOURCE DIRECTORY -o OPTIONS it mounts. In the fstab:\n  s3://releases/ /srv/releases packmule _netdev,nofail,allow_other,profile=release 0 0")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .disable_help_subcommand(true)
        .subcommand(mount())
        .subcommand(
            Command::new("umount")
                .visible_alias("unmount")
                .about("Wait for the uploads, then unmount")
                .arg(path("directory", "DIRECTORY", "Mountpoint, or the name of a mount in a config file").required(true).value_hint(ValueHint::DirPath))
                .arg(switch("lazy", "Take it out of the tree at once; the uploads end in the background").short('l'))
                .arg(timeout()),
        )
        .subcommand(
            Command::new("status")
                .about("What the mounts are doing: uploads and downloads, what is parked and why, cache, requests and their cost, last errors")
                .arg(path("directory", "PATH", "A file on a mount, or a mount or folder; else all mounts"))
                .arg(switch("json", "As JSON").conflicts_with("watch"))
                .arg(spool_dir().conflicts_with("directory"))
                .arg(switch("watch", "Again every second, until interrupted")),
        )
        .subcommand(
            Command::new("flush")
                .about("Upload at once what waits, and wait for it")
                .arg(path("path", "PATH", "Files; else everything of the only mount").num_args(0..))
                .arg(switch("as-is", "Publish a temporary name under that very name").requires("path"))
                .arg(timeout()),
        )
        .subcommand(
            Command::new("retry")
                .about("Store what was parked, now that the reason is gone")
                .arg(entry().num_args(0..).required_unless_present("all"))
                .arg(switch("all", "Everything that is parked; ENTRY, where given, are then mounts"))
                .arg(spool_dir()),
        )
        .subcommand(
            Command::new("discard")
                .about("Throw away what was parked or never closed")
                .arg(entry().num_args(1..).required(true))
                .arg(switch("yes", "Do not ask").short('y'))
                .arg(spool_dir()),
        )
        .subcommand(
            Command::new("recover")
                .about("Copy the bytes of a file that could not be stored out of the spool, with or without a mount")
                .arg(entry().required(true))
                .arg(path("file", "FILE", "Where to; - is standard output").required(true))
                .arg(switch("force", "Replace FILE").short('f'))
                .arg(spool_dir()),
        )
        .subcommand(
            Command::new("refresh")
                .about("Forget listings, so that everything is asked anew")
                .arg(path("directory", "DIRECTORY", "A mount, or a path on it; else the only one")),
        )
        .subcommand(cache())
        .subcommand(link())
        .subcommand(links())
        .subcommand(
            Command::new("config").about("Config files").subcommand_required(true).arg_required_else_help(true).subcommand(
                Command::new("check")
                    .about("Read the config files, the environment and the options as a mount would, and say what is wrong")
                    .arg(Arg::new("source").value_name("SOURCE").help("Check the options of this source too"))
                    .arg(options()),
            ),
        )
        .subcommand(
            Command::new("doctor")
                .about("Try everything that a mount needs, and say in plain words what is missing and what helps")
                .after_help("The exit status is 0 where a mount would work. What is written for the trial is one small object below the prefix, which is deleted again; with -o ro nothing is written.")
                .arg(Arg::new("source").value_name("SOURCE").help("As for mount; without it, what this machine lacks for any mount"))
                .arg(switch("json", "As JSON"))
                .arg(options()),
        )
        .subcommand(
            Command::new("setup")
                .about("Ask what is to be mounted and where, try it, and write it into the config file")
                .after_help("Answers are lines of standard input; an empty one, or none, takes what is in brackets. It asks in this order: source, name, the store's address, region, credentials (for keys: access key, secret key), folder, as root whose the files are; where the trial fails, whether to go on; whether to mount it at every start (as root by the fstab, else by a unit of the user's), and now."),
        )
        .subcommand(
            Command::new("demo")
                .about("Show the whole path on this machine: a server, a mount, an upload, a link")
                .arg(switch("check", "Do it, unmount, and say by the exit status whether all went well"))
                .arg(path("dir", "DIRECTORY", "Where to keep the demo's data and mount").long("dir").value_hint(ValueHint::DirPath)),
        )
        .subcommand(
            Command::new("completions").about("Print completions for a shell").arg(
                Arg::new("shell").value_name("SHELL").required(true).value_parser(PossibleValuesParser::new(["bash", "elvish", "fish", "powershell", "zsh"])),
            ),
        )
        .subcommand(
            Command::new("man")
                .about("Print the manual page, or write all of them")
                .arg(path("dir", "DIRECTORY", "Write packmule.1, a page a command, mount.packmule.8 and packmule.toml.5 here").long("dir").value_hint(ValueHint::DirPath)),
        )
}

fn mount() -> Command {
    let command = Command::new("mount")
        .about("Mount a bucket, a prefix of it, or all buckets")
        .override_usage("packmule mount [-f] SOURCE [DIRECTORY] [-o OPTION[=VALUE],…] [--OPTION[=VALUE]]…")
        .next_line_help(true)
        .arg(
            Arg::new("source")
                .value_name("SOURCE")
                .required(true)
                .help("s3://BUCKET/PREFIX/, BUCKET, BUCKET:/PREFIX, an access point's ARN, s3:// for every bucket, or the name of a mount in a config file"),
        )
        .arg(path("directory", "DIRECTORY", "Where; a mount with a name in a config file may have one there").value_hint(ValueHint::DirPath))
        .arg(options());
    with_table(command)
}

fn cache() -> Command {
    let of = |command: Command| {
        let dir = path("directory", "DIRECTORY", "A mount, or a path on it; else all mounts, and what mounts left that ended")
            .value_hint(ValueHint::DirPath);
        let cache_dir = path("cache-dir", "DIRECTORY", "Of mounts that ended alone, whose caches are here (cache_dir=)");
        command.arg(dir).arg(cache_dir.long("cache-dir").value_hint(ValueHint::DirPath).conflicts_with("directory"))
    };
    of(Command::new("cache").about("What the caches hold of objects that were read").args_conflicts_with_subcommands(true))
        .subcommand(of(Command::new("show").about("Where they are, and how much is in them")))
        .subcommand(of(
            Command::new("check").about("Compare every block with its checksum; what is damaged is fetched again when it is read")
        ))
        .subcommand(of(Command::new("empty").about("Remove what is neither being read nor pinned")))
        .subcommand(
            Command::new("pin")
                .about("Fetch a folder or a file, keep it up to date, and read it from the cache while the store does not answer")
                .arg(path("path", "PATH", "On a mount").required(true)),
        )
        .subcommand(
            Command::new("unpin")
                .about("Keep it no longer: it stays until something else needs the room")
                .arg(path("path", "PATH", "On a mount").required(true)),
        )
}

fn link() -> Command {
    Command::new("link")
        .about("Print a time-limited link to a file, that anybody may fetch with a browser")
        .arg(
            Arg::new("path")
                .value_name("PATH")
                .required(true)
                .help("A file on a mount, or s3://BUCKET/KEY")
                .value_hint(ValueHint::FilePath),
        )
        .arg(Arg::new("expires").long("expires").value_name("TIME").default_value("1h").help("How long it works, at most 7d"))
        .arg(options().help("Options for an s3:// URL, as for mount (profile=, endpoint_url= …)"))
}

fn links() -> Command {
    Command::new("links")
        .about("Count what was fetched over links, from access logs of S3 and CloudFront")
        .after_help(
            "One line for each object and link; - is what was fetched without a link of packmule link, whose URLs have the id as x-packmule-link=ID.\n\
             complete: the bytes sent to one client (an address and a program) cover the object, in one answer or in parts.\n\
             likely: it came in parts that add up to the object's size; S3 logs how many bytes a part has, and not which.\n\
             started: neither. CloudFront logs no size with a part: where no whole answer is in the logs, parts count as started.\n\
             HEAD, 304 and errors do not count, and a request that is logged twice counts once. Logs come hours late, and not every request is in them.\n\
             Fetch them first: aws s3 sync s3://LOGS/PREFIX FOLDER && packmule links FOLDER",
        )
        .arg(
            path("log", "LOG", "Log files, plain or gzip, or folders of them; - is standard input").num_args(1..).required(true),
        )
        .arg(switch("json", "As JSON"))
}

/// mount(8)'s `-o`.
pub fn options() -> Arg {
    Arg::new("o")
        .short('o')
        .value_name("OPTIONS")
        .action(ArgAction::Append)
        .value_parser(ValueParser::string())
        .help("Options joined by commas, as in the fstab: every --OPTION below without its dashes")
}

fn path(id: &'static str, name: &'static str, help: &'static str) -> Arg {
    Arg::new(id).value_name(name).help(help).value_parser(ValueParser::path_buf()).value_hint(ValueHint::AnyPath)
}

fn timeout() -> Arg {
    Arg::new("timeout").long("timeout").value_name("TIME").help("Wait so long at most [default: close_timeout after the last progress]")
}

fn entry() -> Arg {
    Arg::new("entry").value_name("ENTRY").help("Its number in packmule status, s3://BUCKET/KEY, or its path on the mount")
}

fn spool_dir() -> Arg {
    path("spool-dir", "DIRECTORY", "Where mounts that ended left files, if it was not the usual place (spool_dir=)")
        .long("spool-dir")
        .value_hint(ValueHint::DirPath)
}

fn switch(name: &'static str, help: &'static str) -> Arg {
    Arg::new(name).long(name).action(ArgAction::SetTrue).help(help)
}

/// Every word of the table as `--word`, with `-` or `_`.
fn with_table(mut command: Command) -> Command {
    for option in OPTIONS {
        for (place, word) in std::iter::once(option.name).chain(option.aliases.iter().map(|alias| alias.name)).enumerate() {
            let mut arg = word_arg(word, takes_value(&option.kind)).help_heading(option.group.title()).help(help(option));
            if place > 0 || matches!(option.kind, Kind::Nothing) {
                arg = arg.hide(true);
            }
            if word == "foreground" {
                arg = arg.short('f');
            }
            command = command.arg(described(arg, &option.kind));
        }
    }
    for (word, value) in TUNING {
        command = command.arg(word_arg(word, if *value { Takes::Always } else { Takes::Perhaps }).hide(true));
    }
    command
}

enum Takes {
    /// `--word VALUE` or `--word=VALUE`.
    Always,
    /// `--word` or `--word=VALUE`.
    Perhaps,
}

fn takes_value(kind: &Kind) -> Takes {
    match kind {
        Kind::Flag(_) | Kind::Nothing | Kind::Text { missing: Some(_), .. } => Takes::Perhaps,
        _ => Takes::Always,
    }
}

fn word_arg(word: &'static str, takes: Takes) -> Arg {
    let dashed = word.trim_start_matches('_').replace('_', "-");
    let arg = Arg::new(word).action(ArgAction::Append).value_parser(ValueParser::string());
    let arg = if dashed == word { arg } else { arg.alias(word) };
    let arg = arg.long(dashed);
    match takes {
        Takes::Always => arg,
        // The parser of words gives a bare word its meaning; clap needs something to stand for it.
        Takes::Perhaps => arg.num_args(0..=1).require_equals(true).default_missing_value(""),
    }
}

/// Name of the value in help, and what shells may complete. The parser of words judges values, not clap.
fn described(arg: Arg, kind: &Kind) -> Arg {
    match kind {
        Kind::Size(_) | Kind::SizeOr(..) | Kind::Share(_) => arg.value_name("SIZE"),
        Kind::Time(_) => arg.value_name("TIME"),
        Kind::Count(..) => arg.value_name("N"),
        Kind::Price(_) => arg.value_name("AMOUNT"),
        Kind::Octal(_) => arg.value_name("MODE"),
        Kind::Path(_) => arg.value_name("PATH").value_hint(ValueHint::AnyPath),
        Kind::Url(_) => arg.value_name("URL").value_hint(ValueHint::Url),
        Kind::Choice(words, _) => arg.value_name("WORD").value_parser(Words(words)),
        Kind::Flag(_) => arg.value_name("yes|no"),
        Kind::Text { .. } | Kind::Nothing => arg.value_name("VALUE"),
    }
}

/// Offers the words to completions and takes any text: a wrong one gets our message.
#[derive(Clone)]
struct Words(&'static [&'static str]);

impl clap::builder::TypedValueParser for Words {
    type Value = String;

    fn parse_ref(&self, _: &Command, _: Option<&Arg>, value: &std::ffi::OsStr) -> Result<String, clap::Error> {
        Ok(value.to_string_lossy().into_owned())
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        Some(Box::new(self.0.iter().map(|word| PossibleValue::new(*word))))
    }
}

fn help(option: &Opt) -> String {
    let also: Vec<&str> = option.aliases.iter().map(|alias| alias.name).collect();
    let also =
        if also.is_empty() || matches!(option.kind, Kind::Nothing) { String::new() } else { format!(" (also: {})", also.join(", ")) };
    let default = if option.default.is_empty() { String::new() } else { format!(" [default: {}]", option.default) };
    format!("{}{also}{default}", option.help)
}

/// The options of a mount in the order typed, whichever way: the last word wins.
pub fn arguments(matches: &ArgMatches) -> Vec<Argument> {
    let mut found = Vec::new();
    for id in matches.ids() {
        let id = id.as_str();
        let is_word = crate::config::table::find(id).is_some() || TUNING.iter().any(|(word, _)| *word == id);
        if id != "o" && !is_word {
            continue;
        }
        let values = matches.get_many::<String>(id).into_iter().flatten();
        for (index, value) in matches.indices_of(id).into_iter().flatten().zip(values) {
            let argument = if id == "o" {
                Argument::Options(value.clone())
            } else {
                Argument::Word(id.to_owned(), Some(value.clone()).filter(|value| !value.is_empty()))
            };
            found.push((index, argument));
        }
    }
    found.sort_by_key(|(index, _)| *index);
    found.into_iter().map(|(_, argument)| argument).collect()
}

/// A path argument.
pub fn path_of(matches: &ArgMatches, id: &str) -> Option<PathBuf> {
    matches.get_one::<PathBuf>(id).cloned()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn typed(line: &str) -> Vec<Argument> {
        let matches = program().try_get_matches_from(line.split(' ')).unwrap();
        arguments(matches.subcommand().unwrap().1)
    }

    #[test]
    fn the_grammar_is_sound() {
        program().debug_assert();
    }

    #[test]
    fn flags_and_options_keep_their_order() {
        let word = |name: &str, value: Option<&str>| Argument::Word(name.into(), value.map(Into::into));
        assert_eq!(
            typed("packmule mount --ro s3://b /m -o rw,uid=0 --cache-size 1G --ro=no --use_sse --max_read=4096 --big-writes -f"),
            [
                word("ro", None),
                Argument::Options("rw,uid=0".into()),
                word("cache_size", Some("1G")),
                word("ro", Some("no")),
                word("use_sse", None),
                word("max_read", Some("4096")),
                word("big_writes", None),
                word("foreground", None),
            ]
        );
    }

    #[test]
    fn every_word_of_the_table_is_a_flag() {
        for word in crate::config::table::words() {
            let (option, _) = crate::config::table::find(word).unwrap();
            for spelled in [word.to_owned(), word.trim_start_matches('_').replace('_', "-")] {
                let flag = match takes_value(&option.kind) {
                    Takes::Always => format!("--{spelled}=1"),
                    Takes::Perhaps => format!("--{spelled}"),
                };
                let found = typed(&format!("packmule mount s3://b /m {flag}"));
                assert!(matches!(found.as_slice(), [Argument::Word(name, _)] if name == word), "{flag}: {found:?}");
            }
        }
    }

    #[test]
    fn flags_and_fstab_options_type_the_same() {
        use crate::config::{Invocation, Typed};
        let values = [
            "",
            "64M",
            "5m",
            "7",
            "0640",
            "/x",
            "http://h:1",
            "root",
            "auto",
            "store",
            "keep",
            "overwrite",
            "arn:aws:iam::1:role/r",
            "123456789012",
            "127.0.0.1:1",
            "info",
            "EUR",
        ];
        let by = |arguments: Vec<Argument>| {
            let mut typed = Typed::default();
            Invocation { arguments, ..Invocation::default() }.apply(&mut typed).map(|()| typed)
        };
        for word in crate::config::table::words() {
            let mut taken = 0;
            for value in values {
                let pair = if value.is_empty() { word.to_owned() } else { format!("{word}={value}") };
                let Ok(by_option) = by(vec![Argument::Options(pair.clone())]) else { continue };
                let by_flag = by(typed(&format!("packmule mount s3://b /m --{}", pair.trim_start_matches('_')))).unwrap();
                assert_eq!(by_flag, by_option, "{pair}");
                taken += 1;
            }
            assert!(taken > 0, "{word} took none of the values");
        }
    }
}
