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
use crate::config::{Config, Environment, Invocation, Named, Of, Source, Typed, resolve};

mod asking;
mod written;

/// Where mount(8) looks for what mounts the type packmule.
const HELPER: &str = "/sbin/mount.packmule";

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

/// What a shell may say and a boot or a login does not: it would hide for now what is written down.
const OF_THIS_SHELL: [&str; 9] = [
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_PROFILE",
    "PACKMULE_ENDPOINT_URL",
    "PACKMULE_REGION",
    "PACKMULE_PROFILE",
    "PACKMULE_PASSWD_FILE",
];

/// `packmule setup`.
pub fn run() -> anyhow::Result<()> {
    let (asking, mut environment) = (Asking::new(), Environment::of_process());
    OF_THIS_SHELL.iter().for_each(|name| drop(environment.variables.remove(*name)));
    let config = written::config_file(&environment)?;
    let (names, shared) = (Named::sections(&environment)?, Typed::inherited(&environment, Of::All)?);

    let source = asking.about("What is to be mounted: a bucket, s3://BUCKET/PREFIX/, or s3:// for every bucket", None, |typed| {
        Ok(Source::parse(typed)?)
    })?;
    let name = asking.about("A name for it", Some(&suggested(&source)), |typed| match typed {
        _ if !is_name(typed) => bail!("'{typed}': expected letters, digits, '-', '_' and '.'"),
        _ if names.iter().any(|name| name == typed) => bail!("'{typed}': a section of this name is in the config file already"),
        _ => Ok(typed.to_owned()),
    })?;
    let known = shared.endpoint_url.as_ref().map(ToString::to_string);
    let endpoint = asking.about("The store's address, or aws", Some(known.as_deref().unwrap_or("aws")), |typed| match typed {
        "aws" if known.is_some() => bail!("the config file has endpoint_url for every mount: put it into the sections that it is for"),
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
    match &credentials {
        Credentials::Found | Credentials::Typed(..) => {}
        Credentials::Profile(profile) => words.push(("profile", profile.clone())),
        Credentials::Public => words.push(("no_sign_request", "yes".to_owned())),
    }
    if let Some(owner) = owner {
        words.push(("allow_other", "yes".to_owned()));
        words.push(("uid", owner));
    }
    let keys = written::keys_file(&config, &name, &environment);
    if !tried(&config, &name, words.clone(), &credentials, &keys, &environment)? && !asking.whether("Write it down all the same", false)? {
        bail!("nothing was written");
    }

    std::fs::create_dir_all(&folder).with_context(|| format!("{}: cannot be made", folder.display()))?;
    let kept = match &credentials {
        Credentials::Typed(key, secret) => {
            words.push(("passwd_file", keys.display().to_string()));
            Some(written::write_keys(&keys, key, secret)?)
        }
        _ => None,
    };
    let text = written::with_section(&config, &written::section(&name, &words))?;
    // What cannot be read again would fail every mount.
    read(&name, &config, text.clone(), &environment)?;
    written::replace(&config, &text)?;
    kept.into_iter().for_each(written::Keys::keep);
    say(&format!("written to {}: mount.{name}", config.display()))?;

    let mut mount = at_every_start(&asking, &name, &folder, &environment)?;
    if asking.whether("Mount it now", true)? {
        let mounted = mount.envs(environment.get("PACKMULE_CONFIG").map(|config| ("PACKMULE_CONFIG", config))).status()?;
        if !mounted.success() {
            bail!("it is not mounted; packmule mount {name} tries again");
        }
        return say(&format!("mounted on {}; packmule umount {name} ends it", folder.display()));
    }
    say(&format!("packmule mount {name} mounts it"))
}

/// The mount as the config file will have it, read as a mount reads it.
fn read(name: &str, config: &Path, text: String, environment: &Environment) -> anyhow::Result<Config> {
    let environment = Environment { draft: Some((config.to_owned(), text)), ..environment.clone() };
    let invocation = Invocation { source: name.to_owned(), mountpoint: mount::NOWHERE.into(), ..Invocation::default() };
    mount::load_in(&invocation, &environment)
}

/// What the parser of options takes for this word is taken.
fn checked(word: &str, typed: &str) -> anyhow::Result<Option<String>> {
    Typed::default().word(word, Some(typed), &crate::config::Origin::Arguments)?;
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
    if !typed.starts_with('/') && !typed.starts_with("~/") {
        bail!("'{typed}': expected a path that begins with / or ~/");
    }
    let path = resolve::absolute(typed.into(), environment)?;
    match std::fs::read_dir(&path).map(|mut entries| entries.next().is_some()) {
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

/// Tries as doctor does what is about to be written; keys that were typed lie in a file without a name meanwhile, and are told of as in
/// `keys`. True where a mount would work.
fn tried(
    config: &Path,
    name: &str,
    mut words: Vec<(&str, String)>,
    credentials: &Credentials,
    keys: &Path,
    environment: &Environment,
) -> anyhow::Result<bool> {
    let nameless = match credentials {
        Credentials::Typed(key, secret) => Some(written::keys_without_name(key, secret)?),
        _ => None,
    };
    let path = nameless.as_ref().map(|(_, path)| path.display().to_string());
    words.extend(path.iter().map(|path| ("passwd_file", path.clone())));
    let text = written::with_section(config, &written::section(name, &words))?;
    let mut bad = 0;
    let loaded = read(name, config, text, environment)?;
    doctor::of(&loaded, &mut |finding| {
        bad += usize::from(finding.verdict == crate::doctor::Verdict::Bad);
        let shown = finding.to_string();
        // A reader that went away hears of it with the next line.
        let _ = say(&path.as_ref().map_or(shown.clone(), |path| shown.replace(path, &keys.display().to_string())));
    })?;
    if matches!(credentials, Credentials::Found) && ["AWS_ACCESS_KEY_ID", "AWS_PROFILE"].iter().any(|name| std::env::var_os(name).is_some())
    {
        say(
            "note  credentials: this shell's environment names them: a mount at the start of this machine or at login does not see that\n      → name a profile, or type the keys",
        )?;
    }
    Ok(bad == 0)
}

/// With consent: a line of the fstab, or a unit of the user's. Gives what mounts it now: what will do so at every start, so that what
/// unmounts it is the same.
fn at_every_start(asking: &Asking, name: &str, folder: &Path, environment: &Environment) -> anyhow::Result<Command> {
    let mut mount = Command::new(std::env::current_exe()?);
    mount.args(["mount", name]);
    for name in OF_THIS_SHELL {
        mount.env_remove(name);
    }
    if environment.root {
        let line = written::fstab_line(name, folder);
        if asking.whether(&format!("Mount it whenever this machine starts, by this line of the fstab: {line}\nAdd it"), false)? {
            match written::append_fstab(&line) {
                Ok(()) => say("added to the fstab")?,
                // What was written is good without it.
                Err(error) => {
                    eprintln!("packmule: not added: {error:#}");
                    return Ok(mount);
                }
            }
            if Path::new(HELPER).exists() {
                mount = Command::new("mount");
                mount.arg(folder);
            } else {
                say(&format!(
                    "mount(8) looks for packmule as {HELPER}: install the package, or ln -s {} {HELPER}",
                    std::env::current_exe()?.display()
                ))?;
            }
        }
    } else if asking.whether("Mount it whenever you log in, as a unit of yours (systemd)", false)? {
        match written::enable_unit(name, environment) {
            Ok(()) => {
                say(&format!("enabled: packmule@{name}.service"))?;
                mount = Command::new("systemctl");
                mount.args(["--user", "start", &format!("packmule@{name}.service")]);
            }
            Err(error) => eprintln!("packmule: not enabled: {error:#}"),
        }
    }
    Ok(mount)
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
