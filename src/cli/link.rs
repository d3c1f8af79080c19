//! `packmule link`: a time-limited link, from the mount that holds the file or from the bucket itself.

use std::path::Path;

use anyhow::{anyhow, bail, ensure};
use clap::ArgMatches;

use super::commands;
use super::pages::say;
use crate::config::{Environment, Source, resolve, values};
use crate::control::{self, Client, Request, Response};
use crate::publish::links;
use crate::s3::explain::explain;

/// SigV4 signs for seven days at most.
const LONGEST_SECONDS: u64 = 604_800;

/// `packmule link PATH [--expires TIME]`.
pub fn run(matches: &ArgMatches) -> anyhow::Result<()> {
    let path = matches.get_one::<String>("path").map(String::as_str).unwrap_or_default();
    let expires = expires(matches.get_one::<String>("expires").map(String::as_str).unwrap_or_default())?;
    let url = match path.strip_prefix("s3://") {
        Some(rest) => of_object(rest, expires, matches)?,
        None => of_file(Path::new(path), expires)?,
    };
    say(&url)
}

fn expires(text: &str) -> anyhow::Result<u64> {
    let seconds = values::time(text).map(|time| time.as_secs()).unwrap_or_default();
    ensure!((1..=LONGEST_SECONDS).contains(&seconds), "--expires {text}: expected a time from 1s to 7d, S3 signs for no longer");
    Ok(seconds)
}

fn of_file(path: &Path, expires_seconds: u64) -> anyhow::Result<String> {
    let request = Request::Link { path: control::resolve(path)?, expires_seconds };
    match Client::connect_for(Some(path))?.call(&request)? {
        Response::Link { url } => Ok(url),
        _ => bail!("{}: the mount runs another version of packmule: mount it anew", path.display()),
    }
}

fn of_object(rest: &str, expires_seconds: u64, matches: &ArgMatches) -> anyhow::Result<String> {
    let Some((bucket, key)) = rest.split_once('/').filter(|(_, key)| !key.is_empty()) else {
        bail!("s3://{rest}: names no object; write s3://BUCKET/KEY");
    };
    let source = Source::parse(bucket)?;
    let client = resolve::client_of(&commands::arguments(matches), &source, &Environment::of_process())?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(links::presign(client, bucket, key, expires_seconds)).map_err(|error| anyhow!(explain(&error)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn seven_days_at_most() {
        assert_eq!(expires("1h").unwrap(), 3600);
        assert_eq!(expires("7d").unwrap(), LONGEST_SECONDS);
        for bad in ["8d", "0", "soon", ""] {
            assert!(expires(bad).unwrap_err().to_string().contains("7d"), "{bad}");
        }
    }
}
