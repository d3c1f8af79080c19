use std::ffi::OsStr;
use std::time::SystemTime;

use super::*;
use crate::cache::fake::Fake;
use crate::s3::{ETag, ListEntry};
use crate::vfs::attr::Kind;
use crate::vfs::inode::Node;

const TTL: Duration = Duration::from_secs(60);

fn place(key: &str) -> Place {
    Place { store: Fake::new(bytes::Bytes::new(), "e"), key: key.to_owned() }
}

fn page(keys: &[&str]) -> ListPage {
    let entry = |key: &&str| ListEntry {
        key: (*key).to_owned(),
        size: 1,
        etag: ETag::new("e"),
        last_modified: SystemTime::UNIX_EPOCH,
        storage_class: None,
        sha1: false,
    };
    ListPage { entries: keys.iter().map(entry).collect(), prefixes: Vec::new(), next: None }
}

fn begin(table: &mut Table) -> Ask {
    table.surveys.begin(place("t/"), &place("t/a/")).unwrap()
}

fn directory(table: &mut Table, parent: Ino, name: &str, kind: Kind) -> Ino {
    let ino = table.insert(Node::new(parent, name.into(), name.to_owned(), kind, SystemTime::now()));
    table.remember(ino);
    ino
}

#[test]
fn what_changed_since_is_not_forgotten() {
    let mut table = Table::new(SystemTime::now(), 256 << 20);
    let ask = begin(&mut table);
    let dir = directory(&mut table, ROOT, "d", Kind::Directory);
    let file = directory(&mut table, dir, "new", Kind::File);
    table.get_mut(file).unwrap().since = Some(Instant::now());
    table.dir_mut(dir).unwrap().removed.insert("gone".into(), Instant::now());
    let emptied = directory(&mut table, ROOT, "emptied", Kind::Directory);
    table.dir_mut(emptied).unwrap().removed.insert("gone".into(), Instant::now());
    let unchanged = directory(&mut table, ROOT, "unchanged", Kind::Directory);
    table.surveys.arrived(&ask, page(&["t/b/f"]));
    drop(ask);
    [file, dir, emptied, unchanged].into_iter().for_each(|ino| table.forget(ino, 1));
    assert!(table.get(file).is_some() && table.get(emptied).is_some() && table.get(unchanged).is_none());
    let released = |table: &mut Table, ttl| table.surveys.expire(ttl).into_iter().for_each(|ino| table.release(ino));
    released(&mut table, TTL);
    assert!(table.get(file).is_some() && table.get(emptied).is_some(), "what is held lacks it");
    released(&mut table, Duration::ZERO);
    assert!(table.get(file).is_none() && table.get(dir).is_none() && table.get(emptied).is_none(), "nothing is held");
    assert_eq!(table.child(ROOT, OsStr::new("d")), None);
}

#[test]
fn a_directory_that_went_is_not_what_was_listed() {
    let mut table = Table::new(SystemTime::now(), 256 << 20);
    let ask = begin(&mut table);
    // Before the page has come, and afterwards.
    table.surveys.forget(&place("t/b/"));
    table.surveys.arrived(&ask, page(&["t/b/f", "t/b/e/g", "t/bb/f", "t/c/f", "t/d/f"]));
    table.surveys.forget(&place("t/d/"));
    let mut held = |key: &str| table.surveys.take(&place(key), TTL).is_some();
    assert!(!held("t/b/") && !held("t/b/e/") && !held("t/d/"));
    assert!(held("t/bb/") && held("t/c/") && !held("t/c/"), "each once");
}

#[test]
fn what_is_of_no_use_is_tried_less_and_less() {
    let mut table = Table::new(SystemTime::now(), 256 << 20);
    let attempts =
        |table: &mut Table, reads: usize| (0..reads).filter(|_| table.surveys.begin(place(""), &place("t/a/")).is_some()).count();
    assert_eq!(attempts(&mut table, 200), 8, "each drops what it asked for");
    table.surveys.unfit.insert(place("").store.bucket().to_owned());
    assert_eq!(attempts(&mut table, 200), 0);
}
