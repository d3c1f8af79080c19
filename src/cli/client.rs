//! Commands that speak to a running mount.

use std::path::{Path, PathBuf};

use anyhow::bail;
use clap::ArgMatches;

use super::commands::path_of;
use crate::control::umount::{self, Options};
use crate::control::{self, Client, Request, Response, Upload};

/// `packmule umount DIRECTORY`.
pub fn umount(matches: &ArgMatches) -> anyhow::Result<()> {
    unmount(&path_of(matches, "directory").unwrap_or_default(), Options { lazy: matches.get_flag("lazy"), quiet: false })
}

/// Unmounts, and names what is not in S3: that is no failure of umount.
pub fn unmount(directory: &Path, options: Options) -> anyhow::Result<()> {
    let left = umount::umount(directory, options)?;
    say_left(&left);
    Ok(())
}

/// Names what is not in S3, and says how many.
fn say_left(uploads: &[Upload]) -> usize {
    for upload in uploads {
        let then = match upload.phase.as_str() {
            "writing" | "parked" => "kept in the spool",
            Upload::UNDELETED => "still there",
            _ => "goes on at the next mount",
        };
        let reason = upload.reason.as_ref().map(|reason| format!(", {reason}")).unwrap_or_default();
        let what = if upload.is_delete() { "deleted" } else { "uploaded" };
        eprintln!("packmule: not {what}, {then}: s3://{}/{} ({}{reason})", upload.bucket, upload.key.escape_debug(), upload.phase);
    }
    uploads.len()
}

/// `packmule flush [PATH…] [--as-is]`.
pub fn flush(matches: &ArgMatches) -> anyhow::Result<()> {
    let as_is = matches.get_flag("as-is");
    let paths: Vec<_> = matches.get_many::<PathBuf>("path").into_iter().flatten().collect();
    let mut left = 0;
    if paths.is_empty() {
        left += flush_one(Client::connect_for(None)?, None, as_is)?;
    }
    for path in paths {
        let client = Client::connect_for(Some(path))?;
        let path = control::resolve(path)?;
        let whole = path == client.mountpoint();
        left += flush_one(client, Some(path).filter(|_| !whole), as_is)?;
    }
    if left > 0 {
        bail!("{left} not done; see packmule status");
    }
    Ok(())
}

fn flush_one(mut client: Client, path: Option<PathBuf>, as_is: bool) -> anyhow::Result<usize> {
    match client.call(&Request::Flush { path, as_is })? {
        Response::Left { uploads } => Ok(say_left(&uploads)),
        _ => Ok(0),
    }
}

/// `packmule refresh [DIRECTORY]`.
pub fn refresh(matches: &ArgMatches) -> anyhow::Result<()> {
    Client::connect_for(path_of(matches, "directory").as_deref())?.call(&Request::Refresh).map(drop)
}
