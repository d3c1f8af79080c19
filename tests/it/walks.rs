//! Walks of whole trees, which are listed without delimiter ahead of who walks: each shows what is there, whoever changes it.

use std::path::Path;
use std::time::Duration;

use crate::support::double::{Fault, When};
use crate::support::files::{self, sh};
use crate::support::mount::{Mount, Setup, can_mount};
use crate::support::stage::{Stage, on_every_store};
use crate::support::store::Store;

/// All names below a directory, sorted.
fn walk(dir: &Path) -> Vec<String> {
    let found = sh(dir, "find . -mindepth 1 -printf '%P %y\\n'");
    let mut names: Vec<String> = found.lines().map(str::to_owned).collect();
    names.sort_unstable();
    names
}

/// Numbers that are the same in each run.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, most: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % most
    }
}

/// One change of a tree of some directories with some files each, as the shell makes it.
fn change(numbers: &mut Numbers) -> String {
    let mut dir = || format!("d{}/e{}", numbers.below(4), numbers.below(4));
    let (from, to) = (dir(), dir());
    let (one, other) = (numbers.below(5), numbers.below(5));
    match numbers.below(9) {
        0 | 1 => format!("mkdir -p {from} && echo content > {from}/f{one}"),
        2 => format!("rm -f {from}/f{one}"),
        3 => format!("rm -rf {from}"),
        4 => format!("mkdir -p {from} && test ! -e {to} && mv -T {from} {to}"),
        5 => format!("mkdir -p {to} && test -e {from}/f{one} && mv {from}/f{one} {to}/f{other}"),
        6 => format!("rmdir {from}"),
        7 => format!("mkdir -p {from}"),
        _ => format!("rm -rf d{}", one % 4),
    }
}

/// Every change is in the next walk, and the walks before it have not made it forget any.
fn walks_show_every_change(store: Store, options: &[&str]) {
    let stage = Stage::with(store, options);
    let reference = tempfile::tempdir().unwrap();
    let mut numbers = Numbers(7);
    for _ in 0..16 {
        let made = "for d in 0 1 2 3; do mkdir -p d$d/e$d d$d/e0; echo content > d$d/e0/f0; done; true";
        sh(stage.dir(), made);
        sh(reference.path(), made);
        for _ in 0..8 {
            let change = format!("{{ {}; }} 2> /dev/null || true", change(&mut numbers));
            sh(stage.dir(), &change);
            sh(reference.path(), &change);
            let (seen, expected) = (walk(stage.dir()), walk(reference.path()));
            assert!(
                seen == expected,
                "after {change}\nseen: {seen:?}\nexpected: {expected:?}\nkeys: {:?}\nseen now: {:?}",
                stage.store.keys(),
                walk(stage.dir())
            );
        }
    }
}

on_every_store! {
    /// Promise 14: "Read after write, and after close everywhere."
    fn a_walk_shows_what_was_changed_here(store) {
        walks_show_every_change(store, &[]);
    }

    /// With `write_back` too, where S3 hears of it later.
    fn a_walk_shows_what_waits(store) {
        walks_show_every_change(store, &["write_back=3s"]);
    }

    /// Promise 14: "Another client's change is seen within `metadata_ttl` (5 s)", of a directory too that was listed with others.
    fn a_walk_shows_what_others_change(store) {
        for n in 0..8 {
            store.put(&format!("t/d{n}/f"), "x");
        }
        let stage = Stage::with(store, &["metadata_ttl=2s"]);
        // A walk that stops at the third.
        for dir in ["t", "t/d0", "t/d1", "t/d2"] {
            files::names(&stage.path(dir));
        }
        stage.store.put("t/d5/theirs", "theirs");
        stage.store.delete("t/d6/f");
        stage.store.put("t/d6/g", "x");
        std::thread::sleep(Duration::from_millis(2100));
        assert_eq!(files::names(&stage.path("t/d5")), ["f", "theirs"]);
        assert_eq!(files::names(&stage.path("t/d6")), ["g"]);
    }

    /// Directories that no key tells of (SeaweedFS keeps some whose last key another client deleted) are no hindrance.
    fn a_tree_with_empty_directories_goes(store) {
        for n in 0..4 {
            store.put(&format!("t/d{n}/f"), "x");
            store.put(&format!("t/d{n}/e/g/h"), "x");
        }
        for n in 0..4 {
            store.delete(&format!("t/d{n}/e/g/h"));
        }
        let stage = Stage::new(store);
        // What is not seen at first is asked for by who is told of it.
        sh(stage.dir(), "rm -r t || rm -r t");
        assert_eq!(files::names(stage.dir()), Vec::<String>::new(), "keys: {:?}", stage.store.keys());
        assert_eq!(stage.store.keys(), Vec::<String>::new());
    }
}

/// What was listed ahead is bounded, however much there is: the directories are whole all the same.
#[test]
fn a_large_tree_is_walked_whole() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    for n in 0..12_000 {
        store.put(&format!("t/a{:02}/b{:02}/f{n}", n % 40, n / 40 % 30), "");
    }
    // A directory larger than a page among them, and keys that no path could be.
    for n in 0..2500 {
        store.put(&format!("t/a05/large/f{n:04}"), "");
    }
    for key in ["t/a06//x", "t/a06/../y", "t/a07/b01", "t/a07/b01-z", "t/a07/b01.z/w"] {
        store.put(key, "");
    }
    let stage = Stage::with(store, &["metadata_ttl=1m"]);
    stage.double().reset_requests();
    let found = walk(&stage.path("t"));
    let requests = stage.double().requests();
    assert_eq!(found.iter().filter(|name| name.ends_with(" f")).count(), 12_000 + 2500 + 5);
    // 15 pages hold all of it; where it begins, and a directory larger than a page, costs some more.
    assert!(requests.total() <= 40, "{:?}", requests.summary());
    // The same names as one directory after the other has them.
    let alone = Mount::start(Setup::of(&stage.store).option("metadata_ttl=0"));
    assert_eq!(walk(&alone.path("t")), found);
}

/// "100,000 keys in one directory: … memory ≤ 200 bytes a name above the base", whoever looks at them. Most of a directory that is listed in
/// ranges at once is here before its first names are read, and one that is looked at for longer than it is true is listed again.
#[test]
fn a_huge_directory_takes_little_memory() {
    if !can_mount() {
        return;
    }
    const NAMES: u64 = 100_000;
    let store = Store::double();
    for n in 0..NAMES {
        store.put(&format!("many/file-{n:06}.bin"), "");
    }
    for n in 0..7000 {
        store.put(&format!("few/file-{n:04}.bin"), "");
    }
    let stage = Stage::new(store);
    // Connections, threads and pages on their way are there for any directory.
    sh(stage.dir(), "ls -l few few few > /dev/null");
    let base = stage.mount.peak_memory();
    for look in ["ls -f many", "ls -l many", "find many -size 0"] {
        let found = sh(stage.dir(), &format!("{look} | grep -c file-"));
        assert_eq!(found.trim(), NAMES.to_string(), "{look}");
        let each = (stage.mount.peak_memory() - base) / NAMES;
        assert!(each <= 200, "{look}: {each} bytes a name, over {base}");
    }
}

/// Who looks at every name of a large directory, later than its listing is true, has it listed again instead of asked for name by name.
#[test]
fn many_names_of_a_large_directory_are_listed_again() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    const NAMES: usize = 9000;
    for n in 0..NAMES {
        store.put(&format!("many/file-{n:04}"), "");
    }
    let stage = Stage::with(store, &["metadata_ttl=2s"]);
    assert_eq!(files::names(&stage.path("many")).len(), NAMES);
    std::thread::sleep(Duration::from_millis(2100));
    stage.double().reset_requests();
    // A later name than the first page holds; names that are not there cost no more.
    for n in 0..500 {
        assert!(!stage.path(&format!("many/file-{:04}-not", NAMES - 1 - n)).exists());
        assert!(stage.path(&format!("many/file-{:04}", NAMES - 1 - n)).exists(), "{n}");
    }
    assert_eq!(files::names(&stage.path("many")).len(), NAMES);
    let requests = stage.double().requests();
    // Two for each name that is not on the first page would be some two thousand.
    assert!(requests.total() <= 500, "{:?}", requests.summary());
}

/// A listing that takes longer than it is true is read to its end without a request for each of its names.
#[test]
fn a_long_look_asks_for_no_name_alone() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    for n in 0..21_000 {
        store.put(&format!("many/file-{n:05}"), "");
    }
    let stage = Stage::with(store, &["metadata_ttl=1s"]);
    stage.double().fault(When::operation("ListObjectsV2"), Fault::Delay(Duration::from_millis(300)));
    stage.double().reset_requests();
    let found = sh(stage.dir(), "ls -l many | grep -c file-");
    assert_eq!(found.trim(), "21000");
    let requests = stage.double().requests();
    // Some, on a machine that keeps `ls` waiting for longer than the kernel believes what it was shown.
    assert!(requests.of("HeadObject") <= 50 && requests.total() <= 300, "{:?}", requests.summary());
}
