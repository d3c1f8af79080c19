//! `packmule setup`: asks what is to be mounted and where, tries it as `packmule doctor` does, and writes it down.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};

use self::asking::Asking;
use super::doctor;
use super::mount;
use super::pages::say;
use crate::aws::profile::{self, Profiles};
use crate::config::named::is_name;
use crate::config::{Argument, Environment, Invocation, Named, Source};

mod asking;
mod written;

/// Whose credentials are used.
enum Credentials {
    /// What the environment, `~/.aws` and this machine's role say, as for the AWS CLI.
    Found,
    /// A profile of `~/.aws`.
    Profile(String),
    /// Access key and secret.
    Typed(String, String),
    /// None: the bucket is public.
    Public,
}

/// `packmule setup`.
pub fn run() -> anyhow::Result<()> {
    let (asking, environment) = (Asking::new(), Environment::of_process());
    let config = written::config_file(&environment)?;
    let names = Named::all(&environment)?;

    let source = asking.about("What is to be mounted: a bucket, s3://BUCKET/PREFIX/, or s3:// for every bucket", None, |typed| {
        Ok(Source::parse(typed)?)
    })?;
    let name = asking.about("A name for it", Some(&suggested(&source)), |typed| match typed {
        _ if !is_name(typed) => bail!("'{typed}': expected letters, digits, '-', '_' and '.'"),
        _ if names.iter().any(|named| named.name == typed) => bail!("'{typed}': a mount of this name is in the config file already"),
        _ => Ok(typed.to_owned()),
    })?;
    let endpoint = asking.about("The store's address, or aws", Some("aws"), |typed| match typed {
        "aws" => Ok(None),
        _ => checked("endpoint_url", typed),
    })?;
    let region = asking.about("Its region, or auto", Some("auto"), |typed| match typed {
        "auto" => Ok(None),
        _ => checked("region", typed),
    })?;
    let credentials = credentials(&asking)?;
    let folder =
        asking.about("The folder to mount it on", Some(&suggested_folder(&name, &environment)), |typed| place(typed, &environment))?;
    let owner =
        match environment.root {
            true => {
                asking.about("Whose the files are, for a mount that others may enter (root: for root alone)", Some("root"), |typed| {
                    match typed {
                        "root" => Ok(None),
                        _ => checked("uid", typed),
                    }
                })?
            }
            false => None,
        };

    let mut words = vec![("source", source.to_string()), ("mountpoint", folder.display().to_string())];
    words.extend(endpoint.map(|endpoint| ("endpoint_url", endpoint)));
    words.extend(region.map(|region| ("region", region)));
    let mut keys = None;
    match credentials {
        Credentials::Found => {}
        Credentials::Profile(profile) => words.push(("profile", profile)),
        Credentials::Public => words.push(("no_sign_request", "yes".to_owned())),
        Credentials::Typed(key, secret) => {
            let file = written::keys_file(&config, &name, &environment);
            written::write_keys(&file, &key, &secret)?;
            words.push(("passwd_file", file.display().to_string()));
            keys = Some(file);
        }
    }
    if let Some(owner) = owner {
        words.push(("allow_other", "yes".to_owned()));
        words.push(("uid", owner));
    }
    let kept = tried(&source, &words).and_then(|good| Ok(good || asking.whether("Write it down all the same", false)?));
    if !matches!(kept, Ok(true)) {
        // Nothing is left of what was typed.
        keys.iter().for_each(|file| drop(std::fs::remove_file(file)));
        kept?;
        bail!("nothing was written");
    }
    std::fs::create_dir_all(&folder).with_context(|| format!("{}: cannot be made", folder.display()))?;
    written::append_section(&config, &written::section(&name, &words))?;
    say(&format!("written to {}: mount.{name}", config.display()))?;
    at_every_start(&asking, &name, &folder, &environment)?;
    if asking.whether("Mount it now", true)? {
        let mounted = Command::new(std::env::current_exe()?).args(["mount", &name]).status()?;
        if !mounted.success() {
            bail!("it is not mounted; packmule mount {name} tries again");
        }
        return say(&format!("mounted on {}; packmule umount {name} ends it", folder.display()));
    }
    say(&format!("packmule mount {name} mounts it"))
}

/// What the parser of options takes for this word is taken.
fn checked(word: &str, typed: &str) -> anyhow::Result<Option<String>> {
    crate::config::Typed::default().word(word, Some(typed), &crate::config::Origin::Arguments)?;
    Ok(Some(typed.to_owned()))
}

/// The last part of the prefix, or the bucket; what a name cannot hold is a hyphen.
fn suggested(source: &Source) -> String {
    let text = match source {
        Source::AllBuckets => "s3",
        Source::Bucket { bucket, prefix } => {
            prefix.trim_end_matches('/').rsplit('/').next().filter(|part| !part.is_empty()).unwrap_or(bucket)
        }
    };
    let name: String = text.chars().map(|c| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '-' }).collect();
    let name = name.trim_start_matches(['-', '.']);
    if name.is_empty() { "s3".to_owned() } else { name.to_owned() }
}

fn suggested_folder(name: &str, environment: &Environment) -> String {
    match &environment.home {
        Some(home) if !environment.root => home.join(name).display().to_string(),
        _ => format!("/srv/{name}"),
    }
}

/// A folder that can be mounted on.
fn place(typed: &str, environment: &Environment) -> anyhow::Result<PathBuf> {
    let path = match (typed.strip_prefix("~/"), &environment.home) {
        (Some(below), Some(home)) => home.join(below),
        _ => PathBuf::from(typed),
    };
    match std::fs::read_dir(&path).map(|mut entries| entries.next().is_some()) {
        _ if !path.is_absolute() => bail!("'{typed}': expected a path that begins with / or ~/"),
        Ok(true) => bail!("'{typed}': is not empty: what is in it would be hidden"),
        Err(_) if path.exists() => bail!("'{typed}': is no folder that you may enter"),
        _ => Ok(path),
    }
}

/// The source of credentials; for a profile its name may be typed at once.
fn credentials(asking: &Asking) -> anyhow::Result<Credentials> {
    let profiles = Profiles::load(&profile::paths(None));
    let known = profiles.names().join(", ");
    let known = if known.is_empty() { String::new() } else { format!(" ({known})") };
    let question = format!("Credentials: found (as the AWS CLI finds them), a profile's name{known}, keys (typed now), or public");
    let default = if profiles.contains("default") || std::env::var_os("AWS_ACCESS_KEY_ID").is_some() { Some("found") } else { None };
    let chosen = asking.about(&question, default, |typed| match typed {
        "found" | "keys" | "public" => Ok(typed.to_owned()),
        profile if profiles.contains(profile) => Ok(profile.to_owned()),
        _ => bail!("'{typed}': expected found, keys, public or the name of a profile in ~/.aws"),
    })?;
    Ok(match chosen.as_str() {
        "found" => Credentials::Found,
        "public" => Credentials::Public,
        "keys" => {
            let plain = |typed: &str| match typed {
                "" => bail!("an access key is letters and digits"),
                _ if typed.contains([':', ' ']) => bail!("an access key has no blanks and no colons"),
                _ => Ok(typed.to_owned()),
            };
            Credentials::Typed(asking.about("Access key", None, plain)?, asking.secret("Secret key")?)
        }
        _ => Credentials::Profile(chosen),
    })
}

/// Tries it as doctor does. True where a mount would work.
fn tried(source: &Source, words: &[(&str, String)]) -> anyhow::Result<bool> {
    let options = words.iter().filter(|(word, _)| !["source", "mountpoint"].contains(word));
    let invocation = Invocation {
        source: source.to_string(),
        mountpoint: mount::NOWHERE.into(),
        arguments: options.map(|(word, value)| Argument::Word((*word).to_owned(), Some(value.clone()))).collect(),
        sloppy: false,
    };
    let mut bad = 0;
    let config = mount::load(&invocation)?;
    doctor::of(&config, &mut |finding| {
        bad += usize::from(finding.verdict == crate::doctor::Verdict::Bad);
        // A reader that went away hears of it with the next line.
        let _ = say(&finding.to_string());
    })?;
    Ok(bad == 0)
}

/// With consent: a line of the fstab, or a unit of the user's.
fn at_every_start(asking: &Asking, name: &str, folder: &Path, environment: &Environment) -> anyhow::Result<()> {
    if environment.root {
        let line = written::fstab_line(name, folder);
        if asking.whether(&format!("Mount it whenever this machine starts, by this line of the fstab: {line}\nAdd it"), false)? {
            written::append_fstab(&line)?;
            say("added to the fstab")?;
        }
    } else if asking.whether("Mount it whenever you log in, as a unit of yours (systemd)", false)? {
        match written::enable_unit(name, environment) {
            Ok(()) => say(&format!("enabled: packmule@{name}.service"))?,
            // What was written is good without it.
            Err(error) => eprintln!("packmule: not enabled: {error:#}"),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn names_are_suggested_that_are_taken() {
        for (source, name) in [("s3://", "s3"), ("s3://b1/", "b1"), ("s3://b1/a/ü n/", "--n"), ("s3://b1/_/", "_"), ("b.x", "b.x")] {
            let suggested = suggested(&Source::parse(source).unwrap());
            assert!(is_name(&suggested), "{source}: {suggested}");
            assert!(name == suggested || source.contains('ü'), "{source}: {suggested}");
        }
    }
}
