//! `packmule status`: what the mounts are doing.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::time::Duration;

use anyhow::bail;
use bytesize::ByteSize;
use clap::ArgMatches;

use super::commands::path_of;
use crate::control::{Client, Request, Response, Status, Upload};
use crate::fuse::mountinfo::mounts;

/// `packmule status [DIRECTORY] [--json|--watch]`.
pub fn run(matches: &ArgMatches) -> anyhow::Result<()> {
    let path = path_of(matches, "directory");
    let watch = matches.get_flag("watch");
    loop {
        let found = ask(path.as_deref())?;
        if found.told.is_empty() && found.silent.is_empty() && !matches.get_flag("json") {
            eprintln!("packmule: nothing is mounted");
        }
        let mut text = if matches.get_flag("json") {
            serde_json::to_string_pretty(&found.told)? + "\n"
        } else {
            found.told.iter().map(table).collect()
        };
        if watch && io::stdout().is_terminal() {
            // Home, then clear to the end: no flicker.
            text = format!("\x1b[H\x1b[J{text}");
        }
        let mut stdout = io::stdout().lock();
        match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            result => result?,
        }
        for line in &found.silent {
            eprintln!("packmule: {line}");
        }
        if !watch {
            if !found.silent.is_empty() {
                bail!("a mount does not answer");
            }
            return Ok(());
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}

/// What the mounts told, and why others did not.
struct Found {
    told: Vec<Status>,
    silent: Vec<String>,
}

/// The mount of a path, or all of this user's.
fn ask(path: Option<&Path>) -> anyhow::Result<Found> {
    if path.is_some() {
        return Ok(Found { told: vec![ask_one(Client::connect_for(path)?)?], silent: Vec::new() });
    }
    let me = nix::unistd::geteuid();
    let mut found = Found { told: Vec::new(), silent: Vec::new() };
    for mount in mounts()?.into_iter().filter(|mount| mount.is_ours(me)) {
        match Client::connect(&mount.target).and_then(ask_one) {
            Ok(status) => found.told.push(status),
            Err(error) => found.silent.push(format!("{error:#}")),
        }
    }
    Ok(found)
}

fn ask_one(mut client: Client) -> anyhow::Result<Status> {
    match client.call(&Request::Status)? {
        Response::Status(status) => Ok(*status),
        _ => bail!("{}: runs another version of packmule: mount it anew", client.mountpoint().display()),
    }
}

/// A mount as people read it. Names come from anybody: control characters are escaped.
fn table(status: &Status) -> String {
    let mut text = String::new();
    let requests: u64 = status.requests.values().sum();
    let _ = writeln!(text, "{} on {}", status.source.escape_debug(), status.mountpoint.display().to_string().escape_debug());
    let _ = writeln!(
        text,
        "  up {}, pid {}, version {}",
        humantime::format_duration(Duration::from_secs(status.uptime_seconds)),
        status.pid,
        status.version
    );
    let _ = writeln!(text, "  cache: {} in {} files; requests since the mount: {requests}", size(status.cache_bytes), status.cache_files);
    if status.uploads.is_empty() {
        let _ = writeln!(text, "  everything is in S3");
    }
    for upload in &status.uploads {
        let _ = writeln!(text, "  {}", line(upload));
    }
    text
}

fn line(upload: &Upload) -> String {
    let percent = (upload.sent.min(upload.size) * 100).checked_div(upload.size).unwrap_or(0);
    let waits = match (upload.held, upload.recovered) {
        (true, true) => "  (temporary name, left by an earlier mount: goes when it is renamed, or by packmule flush FILE --as-is)",
        (true, false) => "  (temporary name: goes when it is renamed, or by packmule flush FILE --as-is)",
        (false, true) => "  (left by an earlier mount)",
        (false, false) => "",
    };
    let reason = upload.reason.as_ref().map(|reason| format!("  {}", reason.escape_debug())).unwrap_or_default();
    if upload.is_delete() {
        return format!("{:>10}  s3://{}/{}{reason}", upload.phase, upload.bucket, upload.key.escape_debug());
    }
    format!(
        "{:>10} {percent:>3}% of {:>10}  s3://{}/{}{reason}{waits}",
        upload.phase,
        size(upload.size),
        upload.bucket,
        upload.key.escape_debug()
    )
}

fn size(bytes: u64) -> String {
    ByteSize::b(bytes).display().iec().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_as_people_read_it() {
        let upload = Upload {
            bucket: "b".into(),
            key: "a\n.bin".into(),
            phase: "uploading".into(),
            size: 2048,
            sent: 1024,
            reason: Some("slow".into()),
            ..Upload::default()
        };
        let status =
            Status { source: "s3://b/".into(), mountpoint: "/m".into(), uptime_seconds: 61, uploads: vec![upload], ..Status::default() };
        let text = table(&status);
        assert!(text.starts_with("s3://b/ on /m\n  up 1m 1s"), "{text}");
        assert!(text.contains("uploading  50% of    2.0 KiB  s3://b/a\\n.bin  slow"), "{text}");
        assert!(table(&Status::default()).contains("everything is in S3"));
        assert!(line(&Upload::default()).contains("0%"));
        let delete = Upload { bucket: "b".into(), key: "k".into(), phase: Upload::DELETING.into(), ..Upload::default() };
        assert_eq!(line(&delete), "  deleting  s3://b/k");
    }
}
