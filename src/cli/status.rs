//! `packmule status`: what the mounts are doing, and what waits for one.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, SystemTime};

use anyhow::bail;
use bytesize::ByteSize;
use clap::ArgMatches;
use serde_json::{Value, json};

use super::cache::pin_line;
use super::commands::path_of;
use super::everything::{Everything, Left, Owner};
use crate::control::{ConflictCopy, Status, Upload};
use crate::vfs::RenameReport;

/// `packmule status [DIRECTORY] [--json|--watch]`.
pub fn run(matches: &ArgMatches) -> anyhow::Result<()> {
    let path = path_of(matches, "directory");
    let watch = matches.get_flag("watch");
    loop {
        let found = match &path {
            Some(path) => Everything::of(path)?,
            None => Everything::look(path_of(matches, "spool-dir"))?,
        };
        if found.told.is_empty() && found.silent.is_empty() && !matches.get_flag("json") {
            eprintln!("packmule: nothing is mounted");
        }
        let mut text = if matches.get_flag("json") { serde_json::to_string_pretty(&as_json(&found)?)? + "\n" } else { as_text(&found) };
        if watch && io::stdout().is_terminal() {
            // Home, then clear to the end: no flicker.
            text = format!("\x1b[H\x1b[J{text}");
        }
        let mut stdout = io::stdout().lock();
        match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            result => result?,
        }
        for line in found.silent.iter().chain(&found.unread) {
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
        let number = found.number(upload);
        shown["commands"] = json!(owner.commands(upload, &number));
        shown["number"] = json!(number);
    }
    element
}

fn as_text(found: &Everything) -> String {
    let mounts = found.told.iter().map(|mount| table(mount, found));
    mounts.chain(found.left.iter().map(|left| waiting(left, found))).collect()
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
        text += &entry(upload, Owner::Folder(&left.spool), found);
    }
    text
}

/// A mount as people read it. Names come from anybody: control characters are escaped.
fn table(status: &Status, found: &Everything) -> String {
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
        text += &entry(upload, Owner::Mount(&status.mountpoint), found);
    }
    for copy in &status.conflicts {
        let _ = writeln!(text, "  {}", conflict(copy));
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
    let at = SystemTime::UNIX_EPOCH + Duration::from_secs(copy.at);
    let at = jiff::Timestamp::try_from(at).unwrap_or_default().to_zoned(jiff::tz::TimeZone::system());
    format!(
        "{}  somebody else changed s3://{}/{} meanwhile: ours is kept beside it as {}",
        at.strftime("%Y-%m-%d %H:%M"),
        copy.bucket,
        copy.key.escape_debug(),
        copy.kept_as.rsplit('/').next().unwrap_or_default().escape_debug()
    )
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
fn entry(upload: &Upload, owner: Owner<'_>, found: &Everything) -> String {
    let number = found.number(upload);
    let commands = owner.commands(upload, &number);
    if commands.is_empty() {
        return format!("  {}\n", line(upload));
    }
    format!("  {number:>6} {}\n         {}\n", line(upload), commands.join("  |  "))
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
        return format!("{:>10}  {}{reason}", upload.phase, upload.shown());
    }
    format!("{:>10} {percent:>3}% of {:>10}  {}{reason}{waits}", upload.phase, size(upload.size), upload.shown())
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
        let text = as_text(&found);
        assert!(!text.contains("rename of"), "{text}");
        assert!(text.starts_with("s3://b/ on /m\n  up 1m 1s"), "{text}");
        assert!(text.contains("uploading  50% of    2.0 KiB  s3://b/a\\n.bin  slow"), "{text}");
        assert!(text.contains("  567890     parked") && text.contains("packmule retry 567890  |  packmule recover 567890 FILE"), "{text}");
        assert!(text.contains("ours is kept beside it as a (conflict of h)"), "{text}");
        assert!(table(&Status::default(), &found).contains("everything is in S3"));
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
        assert!(line(&Upload::default()).contains("0%"));
        let rename = RenameReport { from: "s3://b/a/".into(), to: "s3://b/c/".into(), phase: "copying".into(), ..RenameReport::default() };
        let rename = RenameReport { objects: 20, done: 3, bytes: 4096, copied: 1024, ..rename };
        let failed = RenameReport { phase: "failed".into(), reason: Some("no".into()), resumed: true, ..rename.clone() };
        let text = table(&Status { renames: vec![rename, failed], ..Status::default() }, &found);
        assert!(text.contains("rename of s3://b/a/ to s3://b/c/: copying: 3 of 20 objects, 1.0 KiB of 4.0 KiB\n"), "{text}");
        assert!(text.contains("rename of s3://b/a/ to s3://b/c/: failed  no  (begun by an earlier mount)"), "{text}");
        assert!(!text.contains("everything is in S3"), "{text}");
        let delete = Upload { bucket: "b".into(), key: "k".into(), phase: Upload::DELETING.into(), ..Upload::default() };
        assert_eq!(line(&delete), "  deleting  s3://b/k");
    }
}
