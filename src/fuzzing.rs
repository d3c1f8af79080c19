//! What is fuzzed: everything that reads bytes which others wrote. None of it may panic, and what was understood reads the same
//! when it is written again.
//!
//! `tests/fuzz` has a cargo-fuzz target for each function, and a corpus; the test below runs every file of it and mutations of
//! each without a fuzzer.

use std::fmt::Debug;
use std::path::Path;

use http::{HeaderMap, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::aws::encode;
use crate::cache::block::{self, Sidecar};
use crate::config::{Of, Source, Typed, table, values};
use crate::control::{Request, Response};
use crate::publish::access_log::{self, Delivery, Line, Parser, Part};
use crate::publish::downloads::Tally;
use crate::publish::links;
use crate::s3::xml::{self, Element};
use crate::s3::{delete, list, response};
use crate::writeback::content::Content;
use crate::writeback::manifest::{Record, framed};
use crate::writeback::{Deletion, MetadataChange};

/// A store's answer: listings, parts, uploads, deletions, errors.
pub fn answer(bytes: &[u8]) {
    xml::root_name(bytes);
    for status in [StatusCode::OK, StatusCode::FORBIDDEN, StatusCode::SERVICE_UNAVAILABLE] {
        let told = response::error_body(&HeaderMap::new(), bytes);
        let error = response::error("GetObject", "s3://b/k", status, &HeaderMap::new(), &told);
        let line = crate::s3::explain::explain(&error);
        assert!(!line.contains(['\n', '\r']), "two lines: {line:?}");
    }
    let Ok(root) = Element::parse(bytes) else { return };
    if is_named(&root) {
        assert_eq!(Element::parse(document(&root).as_bytes()).as_ref(), Ok(&root));
    }
    if let Ok(page) = list::page(&root) {
        assert!(page.next.as_ref().is_none_or(|next| !next.is_empty()));
    }
    let _ = list::read_parts(&root);
    list::read_uploads(&root);
    delete::read_refused(&root).for_each(drop);
}

/// The reader takes names that XML has not, as `a/b`; written again they mean something else.
fn is_named(element: &Element) -> bool {
    let legal = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-' | '.');
    !element.name.is_empty() && element.name.chars().all(legal) && element.children.iter().all(is_named)
}

/// An element as a document of its own.
fn document(element: &Element) -> String {
    let inner: String =
        if element.children.is_empty() { xml::escape(&element.text) } else { element.children.iter().map(document).collect() };
    format!("<{0}>{inner}</{0}>", element.name)
}

/// A record of the spool and its journals: as it lies there, and as JSON whose checksum is right.
pub fn manifest(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    for text in [text.to_string(), framed(&text)] {
        let Ok(record) = Record::parse(&text) else { continue };
        if let Ok(written) = record.text() {
            assert_eq!(Record::parse(&written).ok().as_ref(), Some(&record));
        }
        let content = Content::of(&record);
        content.is_dirty();
        content.is_whole();
        let mut end = 0;
        for (range, _) in content.origins(0..content.size) {
            assert_eq!(range.start, end, "a gap between runs");
            end = range.end;
        }
        assert_eq!(end, content.size);
    }
    same_again::<Deletion>(bytes);
    same_again::<MetadataChange>(bytes);
}

/// A cache file's sidecar: as it lies there, and with the right sum behind it.
pub fn sidecar(bytes: &[u8]) {
    if let Some(head) = bytes.first_chunk() {
        block::peek_complete(head);
    }
    let summed = [bytes, &block::sum_of(bytes).to_le_bytes()].concat();
    for record in [bytes, &summed] {
        let Some(read) = Sidecar::decode(record) else { continue };
        assert_eq!(read.encode(), record, "it is not what is written");
        let blocks = block::blocks_of(0..read.version.size);
        assert!(read.blocks.present() <= blocks.end, "more blocks than the object has");
        if read.blocks.is_complete() {
            assert!(blocks.take(1 << 16).all(|block| read.blocks.has(block)), "complete, and a block is missing");
        }
    }
}

/// A line of the control socket, either way.
pub fn control(bytes: &[u8]) {
    same_again::<Request>(bytes);
    same_again::<Response>(bytes);
}

fn same_again<T: Serialize + DeserializeOwned + PartialEq + Debug>(bytes: &[u8]) {
    let Ok(read) = serde_json::from_slice::<T>(bytes) else { return };
    let Ok(written) = serde_json::to_vec(&read) else { return };
    assert_eq!(serde_json::from_slice::<T>(&written).ok().as_ref(), Some(&read));
}

/// Words of `-o` and the fstab, a config file, a source, and the values of options.
pub fn options(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let typed = |sloppy| {
        let mut typed = Typed::default();
        typed.options(&text, sloppy).map(|()| typed)
    };
    match typed(false) {
        Ok(strict) => assert_eq!(typed(true), Ok(strict), "mount -s reads it in another way"),
        Err(error) => one_line(&error),
    }
    if let Err(error) = Typed::default().file(Path::new("/etc/packmule.toml"), &text, Of::All, &[]) {
        one_line(&error);
    }
    match Source::parse(&text) {
        Ok(source) => assert_eq!(Source::parse(&source.to_string()), Ok(source)),
        Err(error) => one_line(&error),
    }
    for unit in [1, 1 << 20] {
        values::amount(&text, unit);
    }
    values::time(&text);
    values::tags(&text);
    values::octal(&text);
    table::header_value(&text);
}

/// An access log, as a file and as what such a file unpacks to.
pub fn access_log(bytes: &[u8]) {
    let mut tally = Tally::default();
    let mut again = Tally::default();
    let (mut lines, mut unknown, mut sent) = (0u64, 0, 0u64);
    let mut each = |line: Line| {
        lines += 1;
        unknown += u64::from(line == Line::Unknown);
        if let Line::Delivery(delivery) = &line {
            sent = sent.saturating_add(delivery.bytes);
            assert!(delivery.size.is_none_or(|size| delivery.bytes <= size), "more than there is: {delivery:?}");
            assert!(delivery.bytes > 0 || delivery.part == Part::Whole, "nothing was sent: {delivery:?}");
            assert!(delivery.link.as_deref().is_none_or(links::is_id), "no link of ours: {delivery:?}");
            if let Some(written) = line_of_s3(delivery) {
                assert_eq!(Parser::default().line(&written), line, "{written}");
            }
        }
        tally.add(line.clone());
        again.add(line.clone());
        if matches!(&line, Line::Delivery(delivery) if !delivery.request.is_empty()) {
            again.add(line);
        }
    };
    let whole = access_log::read(bytes, &mut each);
    assert!(whole.is_ok() || bytes.starts_with(&[0x1f, 0x8b]), "only gzip can be damaged");
    let found = tally.downloads();
    assert_eq!(found, again.downloads(), "a request that is logged twice counts twice");
    assert_eq!(tally.unknown_lines, unknown);
    let downloads: u64 = found.iter().map(|found| found.complete + found.likely + found.started).sum();
    assert!(downloads <= lines - unknown, "{downloads} downloads in {lines} lines");
    assert!(found.iter().fold(0u64, |sum, found| sum.saturating_add(found.bytes)) <= sent);
    for found in &found {
        assert!(found.first <= found.last && found.complete + found.likely + found.started > 0, "{found:?}");
    }
}

/// A delivery of S3's as its log writes one; `None` for CloudFront's.
fn line_of_s3(delivery: &Delivery) -> Option<String> {
    let (bucket, key) = delivery.object.strip_prefix("s3://")?.split_once('/')?;
    let (address, program) = delivery.client.split_once(' ')?;
    let query = delivery.link.as_ref().map(|link| format!("?{}={link}", links::PARAMETER)).unwrap_or_default();
    let status = if delivery.part == Part::Unknown { 206 } else { 200 };
    let size = delivery.size.map_or("-".to_owned(), |size| size.to_string());
    let request = Some(delivery.request.as_str()).filter(|request| !request.is_empty()).unwrap_or("-");
    let key = encode::component(&encode::component(key));
    Some(format!(
        "o {bucket} [{}] {address} - {request} REST.GET.OBJECT {key} \"GET /{query} HTTP/1.1\" {status} - {} {size} 1 1 \"-\" \"{program}\" -",
        delivery.time.strftime("%d/%b/%Y:%H:%M:%S %z"),
        delivery.bytes
    ))
}

fn one_line(error: &impl std::fmt::Display) {
    let line = error.to_string();
    assert!(!line.is_empty() && !line.contains(['\n', '\r']), "not one line: {line:?}");
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs;

    use super::*;

    /// Mutations of each file of a corpus.
    const MUTATIONS: u64 = 300;

    /// xorshift64: the same mutations every time.
    struct Dice(u64);

    impl Dice {
        fn below(&mut self, end: usize) -> usize {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            (self.0 % end.max(1) as u64) as usize
        }

        fn range(&mut self, len: usize) -> std::ops::Range<usize> {
            let start = self.below(len + 1);
            start..(start + self.below(16)).min(len)
        }
    }

    fn mutate(seed: &[u8], other: &[u8], dice: &mut Dice) -> Vec<u8> {
        let mut bytes = seed.to_vec();
        for _ in 0..1 + dice.below(4) {
            let range = dice.range(bytes.len());
            match dice.below(6) {
                0 if !bytes.is_empty() => {
                    let at = dice.below(bytes.len());
                    bytes[at] ^= 1 << dice.below(8);
                }
                1 => drop(bytes.splice(range, [])),
                2 => {
                    let copy = bytes[range.clone()].to_vec();
                    drop(bytes.splice(range.start..range.start, copy));
                }
                3 => drop(bytes.splice(range, other[dice.range(other.len())].iter().copied())),
                4 => drop(bytes.splice(range, [[0, 0xff, b'9', b'<', b'"', b'\n', b',', b'}'][dice.below(8)]; 3])),
                _ => bytes.truncate(range.end),
            }
        }
        bytes
    }

    fn corpus(target: &str) -> Vec<(String, Vec<u8>)> {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(target);
        let listed = fs::read_dir(&dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
        let mut paths: Vec<_> = listed.map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        paths.into_iter().map(|path| (path.display().to_string(), fs::read(path).unwrap())).collect()
    }

    fn run(target: &str, check: fn(&[u8])) {
        let seeds = corpus(target);
        assert!(seeds.len() >= 5, "{target} has few seeds");
        for (number, (path, seed)) in seeds.iter().enumerate() {
            let survives = |bytes: &[u8], which: &str| {
                let result = std::panic::catch_unwind(|| check(bytes));
                assert!(result.is_ok(), "{path}: {which}: {:?}", String::from_utf8_lossy(bytes));
            };
            survives(seed, "as it is");
            let mut dice = Dice(0x9e37_79b9_7f4a_7c15 ^ (number as u64 + 1));
            for mutation in 0..MUTATIONS {
                let other = &seeds[dice.below(seeds.len())].1;
                survives(&mutate(seed, other, &mut dice), &format!("mutation {mutation}"));
            }
        }
    }

    #[test]
    fn no_answer_of_a_store_panics() {
        run("answer", answer);
    }

    #[test]
    fn no_record_of_the_spool_panics() {
        run("manifest", manifest);
    }

    #[test]
    fn no_sidecar_of_the_cache_panics() {
        run("sidecar", sidecar);
    }

    #[test]
    fn no_message_to_a_mount_panics() {
        run("control", control);
    }

    #[test]
    fn no_option_panics() {
        run("options", options);
    }

    #[test]
    fn no_access_log_panics() {
        run("access_log", access_log);
    }

    fn delivers(log: &[u8]) -> bool {
        let mut deliveries = 0;
        let read = access_log::read(log, &mut |line| deliveries += u32::from(matches!(line, Line::Delivery(_))));
        read.is_ok() && deliveries > 0
    }

    /// The corpora hold what is right, so that mutations begin behind the first check.
    #[test]
    fn every_corpus_holds_what_is_understood() {
        let understood = |target: &str, read: fn(&[u8]) -> bool| corpus(target).iter().filter(|(_, seed)| read(seed)).count();
        assert!(understood("answer", |seed| Element::parse(seed).is_ok()) >= 5);
        assert!(understood("manifest", |seed| Record::parse(&framed(&String::from_utf8_lossy(seed))).is_ok()) >= 3);
        assert!(understood("sidecar", |seed| { Sidecar::decode(&[seed, &block::sum_of(seed).to_le_bytes()[..]].concat()).is_some() }) >= 3);
        assert!(understood("control", |seed| serde_json::from_slice::<Request>(seed).is_ok()) >= 5);
        assert!(understood("control", |seed| serde_json::from_slice::<Response>(seed).is_ok()) >= 5);
        assert!(understood("access_log", delivers) >= 5);
        assert!(understood("options", |seed| Typed::default().options(&String::from_utf8_lossy(seed), false).is_ok()) >= 3);
    }
}
