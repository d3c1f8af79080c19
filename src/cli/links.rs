//! `packmule links`: what was fetched over links, counted from access logs.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, BufReader, ErrorKind};
use std::path::{Path, PathBuf};

use anyhow::bail;
use clap::ArgMatches;
use serde_json::json;

use super::{pages, status};
use crate::publish::access_log;
use crate::publish::downloads::{Downloads, Tally};

/// `packmule links LOG… [--json]`.
pub fn run(matches: &ArgMatches) -> anyhow::Result<()> {
    let mut tally = Tally::default();
    let mut failed = 0;
    for log in matches.get_many::<PathBuf>("log").into_iter().flatten() {
        read(log, &mut tally, &mut |path, error| {
            eprintln!("packmule: {}", refusal(path, error));
            failed += 1;
        });
    }
    let found = tally.downloads();
    let text = if matches.get_flag("json") {
        serde_json::to_string_pretty(&json!({ "links": found, "unknown_lines": tally.unknown_lines }))? + "\n"
    } else {
        table(&found)
    };
    pages::show(text.as_bytes())?;
    if tally.unknown_lines > 0 {
        eprintln!("packmule: skipped lines that are of no access log: {}", tally.unknown_lines);
    }
    if failed > 0 {
        bail!("{failed} of the logs could not be read wholly: the counts lack what is in them");
    }
    Ok(())
}

/// A file, or every file below a folder, in the order of names. Symbolic links to folders are followed only where they are named.
fn read(log: &Path, tally: &mut Tally, failed: &mut dyn FnMut(&Path, &io::Error)) {
    if log.as_os_str() == "-" {
        count(io::stdin().lock(), tally).unwrap_or_else(|error| failed(log, &error));
        return;
    }
    let mut waiting = vec![log.to_owned()];
    while let Some(path) = waiting.pop() {
        let result = if path == *log && path.is_dir() || path.symlink_metadata().is_ok_and(|meta| meta.is_dir()) {
            entries(&path).map(|entries| waiting.extend(entries.into_iter().rev()))
        } else if path == *log || path.is_file() {
            File::open(&path).and_then(|file| count(BufReader::new(file), tally))
        } else {
            Ok(())
        };
        result.unwrap_or_else(|error| failed(&path, &error));
    }
}

fn entries(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut entries = fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
    entries.sort();
    Ok(entries)
}

fn count(log: impl io::BufRead, tally: &mut Tally) -> io::Result<()> {
    access_log::read(log, &mut |line| tally.add(line))
}

/// Names what cannot be read, and what helps.
fn refusal(path: &Path, error: &io::Error) -> String {
    let path = path.display().to_string();
    let path = if path == "-" { "standard input" } else { &path }.escape_debug();
    match error.kind() {
        ErrorKind::NotFound => format!("{path}: is not there: fetch the logs with aws s3 sync s3://LOGS/PREFIX FOLDER, and name FOLDER"),
        ErrorKind::PermissionDenied => format!("{path}: may not be read by you: run packmule links as a user who may, or chmod a+r it"),
        ErrorKind::UnexpectedEof | ErrorKind::InvalidInput | ErrorKind::InvalidData => {
            format!("{path}: is a gzip file that is cut short or damaged ({error}): fetch it again")
        }
        _ => format!("{path}: cannot be read ({error}): copy it to another disk and name it there"),
    }
}

/// As people read it. Names come from anybody: control characters are escaped.
fn table(found: &[Downloads]) -> String {
    let mut text = format!(
        "{:<12}  {:>8}  {:>8}  {:>8}  {:>10}  {:<20}  {:<20}  {}\n",
        "LINK", "COMPLETE", "LIKELY", "STARTED", "BYTES", "FIRST", "LAST", "OBJECT"
    );
    for Downloads { link, object, complete, likely, started, bytes, first, last } in found {
        let _ = writeln!(
            text,
            "{:<12}  {complete:>8}  {likely:>8}  {started:>8}  {:>10}  {first:<20}  {last:<20}  {}",
            link.as_deref().unwrap_or("-"),
            status::size(*bytes),
            object.escape_debug()
        );
    }
    text
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const LINE: &str =
        "79a5 b [06/Feb/2019:00:00:38 +0000] ::1 - R1 REST.GET.OBJECT k \"GET /b/k HTTP/1.1\" 200 - 2048 2048 7 6 \"-\" \"curl\" - s9lz=\n";

    #[test]
    fn folders_are_read_through_and_what_fails_is_named() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("2026/11")).unwrap();
        fs::write(dir.path().join("2026/11/a"), LINE).unwrap();
        fs::write(dir.path().join("2026/again"), LINE).unwrap();
        fs::write(dir.path().join("cut.gz"), [0x1f, 0x8b, 8]).unwrap();
        std::os::unix::fs::symlink(dir.path(), dir.path().join("2026/round")).unwrap();
        let (mut tally, mut said) = (Tally::default(), Vec::new());
        for log in [dir.path().to_owned(), dir.path().join("nothing")] {
            read(&log, &mut tally, &mut |path, error| said.push(refusal(path, error)));
        }
        assert_eq!(said.len(), 2, "{said:?}");
        assert!(said[0].contains("cut.gz: ") && said[0].ends_with("fetch it again"), "{}", said[0]);
        assert!(said[1].contains("nothing: ") && said[1].contains("aws s3 sync"), "{}", said[1]);
        assert_eq!(
            table(&tally.downloads()).lines().nth(1).unwrap(),
            "-                    1         0         0     2.0 KiB  2019-02-06T00:00:38Z  2019-02-06T00:00:38Z  s3://b/k"
        );
    }
}
