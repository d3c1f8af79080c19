//! `packmule status`: what the mounts are doing, and what waits for one.

use std::fmt::Write as _;
use std::time::{Duration, SystemTime};

use anyhow::bail;
use bytesize::ByteSize;
use clap::ArgMatches;
use serde_json::{Value, json};

use super::cache::pin_line;
use super::commands::path_of;
use super::everything::{Everything, Left, Owner};
use super::pages::show;
use super::watch;
use crate::cache::Download;
use crate::control::{ConflictCopy, FileStatus, Status, Upload};
use crate::s3::Failure;
use crate::vfs::RenameReport;

/// `packmule status [PATH] [--json|--watch]`.
pub fn run(matches: &ArgMatches) -> anyhow::Result<()> {
    let path = path_of(matches, "directory");
    let look = || match &path {
        Some(path) => Everything::of(path),
        None => Ok((Everything::look(path_of(matches, "spool-dir"))?, None)),
    };
    if matches.get_flag("watch") {
        return watch::forever(|| {
            let (found, file) = look()?;
            let troubles: String = found.silent.iter().chain(&found.unread).map(|line| format!("packmule: {line}\n")).collect();
            let nothing = found.told.is_empty() && found.left.is_empty() && troubles.is_empty();
            Ok(if nothing { "nothing is mounted\n".to_owned() } else { troubles + &as_text(&found, file.as_ref(), true) })
        });
    }
    let (found, file) = look()?;
    let json = matches.get_flag("json");
    if found.told.is_empty() && found.silent.is_empty() && !json {
        eprintln!("packmule: nothing is mounted");
    }
    let text = match (json, &file) {
        (true, Some(file)) => serde_json::to_string_pretty(&file_as_json(file, &found)?)? + "\n",
        (true, None) => serde_json::to_string_pretty(&as_json(&found)?)? + "\n",
        (false, _) => as_text(&found, file.as_ref(), false),
    };
    show(text.as_bytes())?;
    for line in found.silent.iter().chain(&found.unread) {
        eprintln!("packmule: {line}");
    }
    if !found.silent.is_empty() {
        bail!("a mount does not answer");
    }
    Ok(())
}

/// An element a mount, and one a spool folder that waits for its mount (it has `spool` and no `mountpoint`). Every upload has the
/// number to type and the commands that it takes.
fn as_json(found: &Everything) -> anyhow::Result<Value> {
    let mut elements = Vec::new();
    for mount in &found.told {
        elements.push(with_commands(serde_json::to_value(mount)?, found, &mount.uploads, Owner::Mount(&mount.mountpoint)));
    }
    for left in &found.left {
        elements.push(with_commands(serde_json::to_value(left)?, found, &left.uploads, Owner::Folder(&left.spool)));
    }
    Ok(Value::Array(elements))
}

fn with_commands(mut element: Value, found: &Everything, uploads: &[Upload], owner: Owner<'_>) -> Value {
    for (shown, upload) in element["uploads"].as_array_mut().into_iter().flatten().zip(uploads) {
        // What takes no command is nobody's to type: its whole number will do.
        let number = if upload.waits { found.number(upload) } else { upload.id.to_string() };
        shown["commands"] = json!(owner.commands(upload, &number));
        shown["number"] = json!(number);
    }
    element
}

/// One file in the same words, by the number and the commands that what waits of it takes.
fn file_as_json(file: &FileStatus, found: &Everything) -> anyhow::Result<Value> {
    let mountpoint = found.told.first().map(|mount| mount.mountpoint.clone()).unwrap_or_default();
    Ok(with_commands(serde_json::to_value(file)?, found, &file.uploads, Owner::Mount(&mountpoint)))
}

/// `bars`: for a table that is watched.
fn as_text(found: &Everything, file: Option<&FileStatus>, bars: bool) -> String {
    if let (Some(file), Some(mount)) = (file, found.told.first()) {
        return one_file(file, mount, found, bars);
    }
    let mounts = found.told.iter().map(|mount| table(mount, found, bars));
    mounts.chain(found.left.iter().map(|left| waiting(left, found))).collect()
}

/// Where a file stands: the word of its extended attribute, and what there is to say about it.
fn one_file(file: &FileStatus, mount: &Status, found: &Everything, bars: bool) -> String {
    let word = match (&file.word, file.uploads.first()) {
        (Some(word), _) => word.as_str(),
        (None, Some(upload)) => upload.phase.as_str(),
        (None, None) => "not there",
    };
    let mut text = format!("{}: {word}\n", file.path.display().to_string().escape_debug());
    let _ = writeln!(text, "  s3://{}/{}", file.bucket, file.key.escape_debug());
    for upload in &file.uploads {
        text += &entry(upload, Owner::Mount(&mount.mountpoint), found, bars);
    }
    for download in &file.downloads {
        let _ = writeln!(text, "  {}", coming(download, bars));
    }
    text
}

/// A folder that no mount has, as people read it.
fn waiting(left: &Left, found: &Everything) -> String {
    let mut text = String::new();
    let _ = writeln!(text, "{}: left by an earlier mount, waits for the next mount of it that may write", left.source.escape_debug());
    let _ = writeln!(text, "  spool: {}", left.spool.display().to_string().escape_debug());
    for rename in &left.renames {
        let _ = writeln!(text, "  {}", rename_line(rename));
    }
    for upload in &left.uploads {
        text += &entry(upload, Owner::Folder(&left.spool), found, false);
    }
    text
}

/// A mount as people read it. Names come from anybody: control characters are escaped.
fn table(status: &Status, found: &Everything, bars: bool) -> String {
    let mut text = String::new();
    let _ = writeln!(text, "{} on {}", status.source.escape_debug(), status.mountpoint.display().to_string().escape_debug());
    let _ = writeln!(
        text,
        "  up {}, pid {}, version {}",
        humantime::format_duration(Duration::from_secs(status.uptime_seconds)),
        status.pid,
        status.version
    );
    let _ = writeln!(text, "  cache: {} in {} files", size(status.cache_bytes), status.cache_files);
    text += &spent(status);
    let idle = status.uploads.is_empty() && !status.renames.iter().any(RenameReport::runs);
    match (idle, status.read_only) {
        (true, false) => text += "  everything is in S3\n",
        (true, true) => text += "  read-only: nothing is stored by this mount\n",
        (false, _) => {}
    }
    for pin in &status.pins {
        let _ = writeln!(text, "  {}", pin_line(pin));
    }
    for rename in &status.renames {
        let _ = writeln!(text, "  {}", rename_line(rename));
    }
    for upload in &status.uploads {
        text += &entry(upload, Owner::Mount(&status.mountpoint), found, bars);
    }
    for download in &status.downloads {
        let _ = writeln!(text, "  {}", coming(download, bars));
    }
    for copy in &status.conflicts {
        let _ = writeln!(text, "  {}", conflict(copy));
    }
    for failure in &status.errors {
        let _ = writeln!(text, "  {}", failed(failure));
    }
    text
}

/// What was asked of the store, and what that cost.
fn spent(status: &Status) -> String {
    let mut kinds: Vec<_> = status.requests.iter().collect();
    kinds.sort_by_key(|(name, count)| (std::cmp::Reverse(**count), *name));
    let kinds: Vec<String> = kinds.iter().map(|(name, count)| format!("{name} {count}")).collect();
    let mut text = format!(
        "  requests since the mount: {} ({}); sent {}, received {}\n",
        status.requests.values().sum::<u64>(),
        kinds.join(", "),
        size(status.bytes_sent),
        size(status.bytes_received)
    );
    match &status.cost {
        Some(cost) => {
            let _ = writeln!(
                text,
                "  cost since the mount: about {} (requests {}, {} out {}; {})",
                cost.money(cost.total()),
                cost.money(cost.requests),
                size(status.bytes_received),
                cost.money(cost.out),
                cost.prices
            );
        }
        None if status.endpoint.is_empty() => {}
        None => {
            let _ = writeln!(
                text,
                "  cost: no prices are known for {}: set price_put, price_get and price_out",
                status.endpoint.escape_debug()
            );
        }
    }
    text
}

fn conflict(copy: &ConflictCopy) -> String {
    format!(
        "{}  somebody else changed s3://{}/{} meanwhile: ours is kept beside it as {}",
        local_time(copy.at),
        copy.bucket,
        copy.key.escape_debug(),
        copy.kept_as.rsplit('/').next().unwrap_or_default().escape_debug()
    )
}

/// A request that failed, with what S3's owner asks for: the time and the request id.
fn failed(failure: &Failure) -> String {
    let answer = match (&failure.code, failure.status) {
        (Some(code), _) => format!("{code}: "),
        (None, 0) => String::new(),
        (None, status) => format!("HTTP status {status}: "),
    };
    let id = failure.request_id.as_ref().map(|id| format!(" (request id {})", id.escape_debug())).unwrap_or_default();
    let times = if failure.count > 1 { format!("  {} times", failure.count) } else { String::new() };
    format!(
        "{}  failed: {} {}: {}{}{id}{times}",
        local_time(failure.at),
        failure.operation,
        failure.resource.escape_debug(),
        answer,
        failure.message.escape_debug()
    )
}

/// Seconds since 1970 as a clock on the wall shows them.
fn local_time(seconds: u64) -> impl std::fmt::Display {
    let at = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    jiff::Timestamp::try_from(at).unwrap_or_default().to_zoned(jiff::tz::TimeZone::system()).strftime("%Y-%m-%d %H:%M").to_string()
}

/// A directory's rename. Names are escaped already.
fn rename_line(rename: &RenameReport) -> String {
    let RenameReport { from, to, phase, objects, done, bytes, copied, .. } = rename;
    let reason = rename.reason.as_ref().map(|reason| format!("  {}", reason.escape_debug())).unwrap_or_default();
    let resumed = if rename.resumed { "  (begun by an earlier mount)" } else { "" };
    let far = match phase.as_str() {
        "failed" | "done" | "waiting" => String::new(),
        "listing" => format!(": {objects} objects so far"),
        "copying" => format!(": {done} of {objects} objects, {} of {}", size(*copied), size(*bytes)),
        _ => format!(": {done} of {objects} objects"),
    };
    format!("rename of {from} to {to}: {phase}{far}{reason}{resumed}")
}

/// An upload, and below it what can be done where it waits for that.
fn entry(upload: &Upload, owner: Owner<'_>, found: &Everything, bars: bool) -> String {
    if !upload.waits {
        return format!("  {}\n", line(upload, bars));
    }
    let number = found.number(upload);
    let commands = owner.commands(upload, &number);
    format!("  {number:>6} {}\n         {}\n", line(upload, false), commands.join("  |  "))
}

/// How far something is: a bar where it is watched, how much of how much, and how fast and how long still while it moves.
fn far(done: u64, all: u64, speed: u64, eta_seconds: Option<u64>, bars: bool) -> String {
    let percent = (u128::from(done.min(all)) * 100).checked_div(u128::from(all)).unwrap_or(0);
    let bar = if bars { watch::bar(done, all) + " " } else { String::new() };
    let speed = if speed > 0 { format!("  {}/s", size(speed)) } else { String::new() };
    let left = eta_seconds.map(|eta| format!(", {} left", humantime::format_duration(Duration::from_secs(eta)))).unwrap_or_default();
    format!("{bar}{percent:>3}% of {:>10}{speed}{left}", size(all))
}

fn coming(download: &Download, bars: bool) -> String {
    let far = far(download.here, download.size, download.speed, download.eta_seconds, bars);
    format!("{:>10} {far}  {}", "reading", download.shown())
}

fn line(upload: &Upload, bars: bool) -> String {
    let waits = match (upload.held, upload.recovered) {
        (true, true) => "  (temporary name, left by an earlier mount: goes when it is renamed, or by packmule flush FILE --as-is)",
        (true, false) => "  (temporary name: goes when it is renamed, or by packmule flush FILE --as-is)",
        (false, true) => "  (left by an earlier mount)",
        (false, false) => "",
    };
    let reason = upload.reason.as_ref().map(|reason| format!("  {}", reason.escape_debug())).unwrap_or_default();
    if upload.is_delete() {
        return format!("{:>10}  {}{reason}", upload.phase, upload.shown());
    }
    let far = far(upload.sent, upload.size, upload.speed, upload.eta_seconds, bars);
    format!("{:>10} {far}  {}{reason}{waits}", upload.phase, upload.shown())
}

pub fn size(bytes: u64) -> String {
    ByteSize::b(bytes).display().iec().to_string()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::cost::Cost;

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
        let status = Status { source: "s3://b/".into(), mountpoint: "/m".into(), uptime_seconds: 61, ..Status::default() };
        let copy = ConflictCopy { bucket: "b".into(), key: "d/a".into(), kept_as: "d/a (conflict of h)".into(), at: 0 };
        let parked = Upload { id: 1_234_567_890, phase: "parked".into(), waits: true, ..upload.clone() };
        let status = Status { uploads: vec![upload, parked], conflicts: vec![copy], ..status };
        let found = Everything { told: vec![status.clone()], ..Everything::default() };
        let text = as_text(&found, None, false);
        assert!(!text.contains("rename of"), "{text}");
        assert!(text.starts_with("s3://b/ on /m\n  up 1m 1s"), "{text}");
        assert!(text.contains("uploading  50% of    2.0 KiB  s3://b/a\\n.bin  slow"), "{text}");
        assert!(text.contains("  567890     parked") && text.contains("packmule retry 567890  |  packmule recover 567890 FILE"), "{text}");
        assert!(text.contains("ours is kept beside it as a (conflict of h)"), "{text}");
        assert!(table(&Status::default(), &found, false).contains("everything is in S3"));
        let json = as_json(&found).unwrap();
        assert_eq!(json[0]["uploads"][1]["number"], "567890");
        assert_eq!(json[0]["uploads"][1]["commands"][2], "packmule discard 567890");
        assert_eq!(json[0]["uploads"][0]["commands"], json!([]));
        let cost = Cost { currency: "USD".into(), requests: 0.012, out: 0.0003, prices: "prices of S3 Standard in us-east-1".into() };
        let requests = [("GetObject", 3), ("ListObjectsV2", 3), ("PutObject", 12)].map(|(name, count)| (name.to_owned(), count));
        let status = Status { cost: Some(cost), requests: requests.into(), bytes_received: 30 << 20, ..Status::default() };
        let text = spent(&status);
        assert!(text.contains(": 18 (PutObject 12, GetObject 3, ListObjectsV2 3); sent 0 B, received 30.0 MiB\n"), "{text}");
        assert!(text.contains(": about $0.0123 (requests $0.0120, 30.0 MiB out $0.0003; prices of S3 Standard in us-east-1)\n"), "{text}");
        // What an older packmule tells, which knows nothing of bytes and prices.
        let mut old = serde_json::to_value(&status).unwrap();
        for field in ["bytes_sent", "bytes_received", "endpoint", "cost"] {
            old.as_object_mut().unwrap().remove(field);
        }
        assert!(!spent(&serde_json::from_value(old).unwrap()).contains("cost"));
        assert!(line(&Upload::default(), false).contains("0%"));
        let rename = RenameReport { from: "s3://b/a/".into(), to: "s3://b/c/".into(), phase: "copying".into(), ..RenameReport::default() };
        let rename = RenameReport { objects: 20, done: 3, bytes: 4096, copied: 1024, ..rename };
        let failed = RenameReport { phase: "failed".into(), reason: Some("no".into()), resumed: true, ..rename.clone() };
        let text = table(&Status { renames: vec![rename, failed], ..Status::default() }, &found, false);
        assert!(text.contains("rename of s3://b/a/ to s3://b/c/: copying: 3 of 20 objects, 1.0 KiB of 4.0 KiB\n"), "{text}");
        assert!(text.contains("rename of s3://b/a/ to s3://b/c/: failed  no  (begun by an earlier mount)"), "{text}");
        assert!(!text.contains("everything is in S3"), "{text}");
        let delete = Upload { bucket: "b".into(), key: "k".into(), phase: Upload::DELETING.into(), ..Upload::default() };
        assert_eq!(line(&delete, false), "  deleting  s3://b/k");
    }

    #[test]
    fn what_moves_says_how_fast_and_how_long_still() {
        let upload = Upload { bucket: "b".into(), key: "k".into(), phase: "uploading".into(), size: 4 << 20, ..Upload::default() };
        let upload = Upload { sent: 1 << 20, speed: 1 << 20, eta_seconds: Some(3), ..upload };
        assert_eq!(line(&upload, false), " uploading  25% of    4.0 MiB  1.0 MiB/s, 3s left  s3://b/k");
        assert_eq!(line(&upload, true), " uploading [====>               ]  25% of    4.0 MiB  1.0 MiB/s, 3s left  s3://b/k");
        let download = Download { bucket: "b".into(), key: "d\n".into(), size: 4 << 20, here: 2 << 20, ..Download::default() };
        assert_eq!(coming(&download, false), "   reading  50% of    4.0 MiB  s3://b/d\\n");
        let status = Status { mountpoint: "/m".into(), uploads: vec![upload], downloads: vec![download], ..Status::default() };
        let found = Everything { told: vec![status.clone()], ..Everything::default() };
        let text = as_text(&found, None, true);
        assert!(text.contains("[====>") && text.contains("[=========>"), "{text}");
        let file = FileStatus {
            path: "/m/k".into(),
            word: Some("not uploaded yet".into()),
            bucket: "b".into(),
            key: "k".into(),
            ..FileStatus::default()
        };
        let file = FileStatus { uploads: status.uploads.clone(), ..file };
        let text = as_text(&found, Some(&file), false);
        assert!(text.starts_with("/m/k: not uploaded yet\n  s3://b/k\n") && text.lines().count() == 3, "{text}");
        assert_eq!(file_as_json(&file, &found).unwrap()["uploads"][0]["commands"], json!([]));
        assert!(as_text(&found, Some(&FileStatus { word: None, uploads: Vec::new(), ..file }), false).starts_with("/m/k: not there\n"));
    }

    #[test]
    fn a_failed_request_is_one_line_with_its_id() {
        let failure = Failure { at: 0, operation: "PutObject".into(), resource: "s3://b/a\nb".into(), status: 403, ..Failure::default() };
        let failure =
            Failure { code: Some("AccessDenied".into()), message: "no".into(), request_id: Some("4Z".into()), count: 3, ..failure };
        assert!(
            failed(&failure).ends_with("  failed: PutObject s3://b/a\\nb: AccessDenied: no (request id 4Z)  3 times"),
            "{}",
            failed(&failure)
        );
        let silent = Failure { code: None, status: 0, message: "nobody answers".into(), request_id: None, count: 1, ..failure };
        assert!(failed(&silent).ends_with("s3://b/a\\nb: nobody answers"), "{}", failed(&silent));
    }
}
