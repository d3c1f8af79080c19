//! Commands that speak to a running mount.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use clap::ArgMatches;

use super::commands::path_of;
use crate::config::{Environment, named, values};
use crate::control::umount::{self, Options};
use crate::control::{self, Client, Request, Response, Upload, milliseconds, progress};
use crate::fuse::mountinfo::{FS_TYPE, mounted_at};

/// `packmule umount DIRECTORY`.
pub fn umount(matches: &ArgMatches) -> anyhow::Result<()> {
    let options = Options { lazy: matches.get_flag("lazy"), timeout: timeout(matches)? };
    let typed = path_of(matches, "directory").unwrap_or_default();
    // A folder of that name that is no mount is not meant.
    let is_mount = mounted_at(&control::resolve(&typed)?)?.is_some_and(|mount| mount.fs_type == FS_TYPE);
    let named = if is_mount { None } else { named::mountpoint_of(&typed, &Environment::of_process())? };
    unmount(&named.unwrap_or(typed), options)
}

/// `--timeout TIME`.
fn timeout(matches: &ArgMatches) -> anyhow::Result<Option<Duration>> {
    let Some(typed) = matches.get_one::<String>("timeout") else { return Ok(None) };
    let time = values::time(typed).with_context(|| format!("--timeout {typed}: expected a time, as 30s, 5m or 1h30m"))?;
    Ok(Some(time))
}

/// Unmounts, and names what is not in S3. Where something is that was to be there, that is an error, as it is of the mount's process.
pub fn unmount(directory: &Path, options: Options) -> anyhow::Result<()> {
    let umount::Unmounted { left, had_died } = umount::umount(directory, options)?;
    if had_died {
        eprintln!(
            "packmule: {}: its packmule had died; what it had not stored waits in the spool (packmule status) for the next mount",
            directory.display()
        );
    }
    say_left(&left, "goes on at the next mount");
    match left.iter().filter(|upload| !upload.may_wait()).count() {
        0 => Ok(()),
        owed => bail!("{}: unmounted, and {owed} not done", directory.display()),
    }
}

/// Names what is not in S3, and says how many. `then`: what becomes of what is on its way.
fn say_left(uploads: &[Upload], then: &str) -> usize {
    for upload in uploads {
        let then = match upload.phase.as_str() {
            "writing" | "parked" => "kept in the spool",
            Upload::UNDELETED => "still there",
            _ => then,
        };
        let reason = upload.reason.as_ref().map(|reason| format!(", {reason}")).unwrap_or_default();
        let what = if upload.is_delete() { "deleted" } else { "uploaded" };
        eprintln!("packmule: not {what}, {then}: {} ({}{reason})", upload.shown(), upload.phase);
    }
    uploads.len()
}

/// `packmule flush [PATH…] [--as-is]`.
pub fn flush(matches: &ArgMatches) -> anyhow::Result<()> {
    let (as_is, timeout) = (matches.get_flag("as-is"), timeout(matches)?);
    let paths: Vec<_> = matches.get_many::<PathBuf>("path").into_iter().flatten().collect();
    let mut left = 0;
    if paths.is_empty() {
        left += flush_one(Client::connect_for(None)?, None, as_is, timeout)?;
    }
    for path in paths {
        let client = Client::connect_for(Some(path))?;
        let path = control::resolve(path)?;
        let whole = path == client.mountpoint();
        left += flush_one(client, Some(path).filter(|_| !whole), as_is, timeout)?;
    }
    if left > 0 {
        bail!("{left} not done; see packmule status");
    }
    Ok(())
}

fn flush_one(mut client: Client, path: Option<PathBuf>, as_is: bool, timeout: Option<Duration>) -> anyhow::Result<usize> {
    let mountpoint = client.mountpoint().to_owned();
    let name = path.as_deref().and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
    let request = Request::Flush { path, as_is, timeout_ms: timeout.map(milliseconds) };
    let meant = |upload: &Upload| name.as_ref().is_none_or(|name| upload.key.ends_with(name.as_str()));
    match progress::during(&mountpoint, meant, || client.call(&request))? {
        Response::Left { uploads } => Ok(say_left(&uploads, "goes on in the background")),
        _ => Ok(0),
    }
}

/// `packmule refresh [DIRECTORY]`.
pub fn refresh(matches: &ArgMatches) -> anyhow::Result<()> {
    Client::connect_for(path_of(matches, "directory").as_deref())?.call(&Request::Refresh).map(drop)
}
