//! "Freshness": what others do shows within `metadata_ttl`, at once by open(), and at once after `packmule refresh`. Two mounts of one
//! bucket.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read as _;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::support::files::{self, errno, noise, sh};
use crate::support::mount::{Mount, Setup, can_mount};
use crate::support::stage::on_every_store;
use crate::support::store::Store;

const MIB: usize = 1 << 20;

/// What is there, and what the other mount makes of it.
const BEFORE: &str = "mkdir -p d/gone d/kept d/becomes-file; echo old > d/changed; echo x > d/removed; echo x > d/gone/f;
    echo x > d/becomes-file/f; echo x > d/becomes-dir; echo same > d/kept/f; echo moved > d/moved";
const CHANGES: &str = "echo longer than before > d/changed; rm d/removed; rm -r d/gone; mkdir -p d/made/deep; echo new > d/made/deep/f;
    rm d/becomes-dir; mkdir d/becomes-dir; echo inner > d/becomes-dir/f; rm -r d/becomes-file; echo now a file > d/becomes-file;
    mv d/moved d/moved-here; echo new > d/kept/new";

/// Every path, with its size or as a folder, by the calls that programs make: stat(2) of each, readdir(3), read(2).
fn seen(dir: &Path) -> BTreeMap<String, String> {
    let names = [
        "d",
        "d/changed",
        "d/removed",
        "d/gone",
        "d/gone/f",
        "d/kept",
        "d/kept/f",
        "d/kept/new",
        "d/becomes-file",
        "d/becomes-file/f",
        "d/becomes-dir",
        "d/becomes-dir/f",
        "d/made",
        "d/made/deep",
        "d/made/deep/f",
        "d/moved",
        "d/moved-here",
    ];
    let mut seen = BTreeMap::new();
    for name in names {
        let path = dir.join(name);
        let what = match fs::symlink_metadata(&path) {
            Ok(meta) if meta.is_dir() => format!("folder of {:?}", files::names(&path)),
            Ok(meta) => format!("{} bytes: {:?}", meta.len(), fs::read_to_string(&path)),
            Err(error) => format!("{:?}", error.raw_os_error().map(Errno::from_raw)),
        };
        seen.insert(name.to_owned(), what);
    }
    seen
}

fn two_mounts(store: &Store, options: &[&str]) -> (Mount, Mount) {
    let setup = options.iter().fold(Setup::of(store), |setup, word| setup.option(word));
    (Mount::start(setup.clone()), Mount::start(setup))
}

/// Markers of folders come a moment after their last name went: both mounts look at what has settled.
fn change(mount: &Mount, script: &str) {
    sh(mount.dir(), script);
    mount.ask(&["flush"], mount.dir());
}

#[track_caller]
fn assert_seen(expected: &BTreeMap<String, String>, found: &BTreeMap<String, String>, what: &str) {
    for (name, is) in expected {
        assert_eq!(found.get(name), Some(is), "{what}: {name}");
    }
}

on_every_store! {
    /// Promise 14: "Another client's change is seen within `metadata_ttl` (5 s)"
    fn changes_show_within_metadata_ttl(store) {
        let (theirs, ours) = two_mounts(&store, &["metadata_ttl=2s", "negative_metadata_ttl=2s"]);
        change(&theirs, BEFORE);
        std::thread::sleep(Duration::from_millis(2050));
        assert_seen(&seen(theirs.dir()), &seen(ours.dir()), "before");
        change(&theirs, CHANGES);
        // Whoever looks at it all the time has the kernel told again and again.
        let changed = Instant::now();
        while changed.elapsed() < Duration::from_secs(2) {
            seen(ours.dir());
        }
        let found = seen(ours.dir());
        assert_seen(&seen(theirs.dir()), &found, "after metadata_ttl");
    }

    /// Promise 14: "Another client's change is seen within `metadata_ttl` (5 s)", or when `packmule refresh` says so.
    fn changes_show_after_refresh(store) {
        let (theirs, ours) = two_mounts(&store, &["metadata_ttl=1h", "negative_metadata_ttl=1h"]);
        for turn in 0..5 {
            change(&theirs, BEFORE);
            ours.ask(&["refresh"], &ours.path("d"));
            let before = seen(ours.dir());
            assert_seen(&seen(theirs.dir()), &before, &format!("{turn}: before"));
            change(&theirs, CHANGES);
            assert_eq!(files::names(&ours.path("d/gone")), ["f"], "it is known for an hour");
            ours.ask(&["refresh"], ours.dir());
            let found = seen(ours.dir());
            assert_seen(&seen(theirs.dir()), &found, &format!("{turn}: after refresh"));
            change(&theirs, "rm -r d");
        }
    }

    /// Promise 14: "and at once by open()", where it is cached, listed and in the kernel's pages too.
    fn content_shows_at_open(store) {
        let (theirs, ours) = two_mounts(&store, &["metadata_ttl=1h", "negative_metadata_ttl=1h"]);
        sh(theirs.dir(), "mkdir d");
        // The same size tells nothing; what is large is the kernel's to read.
        for (name, sizes) in [("small", [1000, 1000, 10, 5000]), ("pages", [300_000, 300_000, 200_000, 400_000]), ("large", [9 * MIB, 9 * MIB, 5 * MIB, 12 * MIB])] {
            let (theirs, refreshed, ours) = (theirs.path("d").join(name), &ours, ours.path("d").join(name));
            for (turn, size) in sizes.into_iter().enumerate() {
                files::write(&theirs, &noise(turn as u64, size)).unwrap();
                if turn == 0 {
                    // It is a new name there: that shows within metadata_ttl.
                    refreshed.ask(&["refresh"], refreshed.dir());
                    continue;
                }
                for _ in 0..3 {
                    assert!(fs::read(&ours).unwrap() == noise(turn as u64, size), "{name}, {turn}: {size}");
                }
                let open = File::open(&ours).unwrap();
                assert_eq!(open.metadata().unwrap().len(), size as u64, "{name}, {turn}");
            }
        }
    }

    /// Promise 14: "and at once by open()": what is gone cannot be opened.
    fn removals_show_at_open(store) {
        let (theirs, ours) = two_mounts(&store, &["metadata_ttl=1h", "negative_metadata_ttl=1h"]);
        for read in [false, true] {
            change(&theirs, "mkdir -p d; echo content > d/f; echo content > d/g");
            ours.ask(&["refresh"], ours.dir());
            assert_eq!(files::names(&ours.path("d")), ["f", "g"]);
            if read {
                assert_eq!(fs::read_to_string(ours.path("d/f")).unwrap(), "content\n");
            }
            std::thread::sleep(Duration::from_millis(1100));
            fs::remove_file(theirs.path("d/f")).unwrap();
            assert_eq!(errno(File::open(ours.path("d/f"))), Errno::ENOENT, "{read}");
            assert_eq!(files::names(&ours.path("d")), ["g"], "{read}");
        }
    }

    /// Promise 15: "A reader sees one version from open to close. If it was replaced and cannot be had any more: ESTALE."
    fn an_open_file_stays_what_it_was(store) {
        let (theirs, ours) = two_mounts(&store, &["metadata_ttl=1h"]);
        let (old, new) = (noise(1, 3 * MIB), noise(2, 3 * MIB));
        files::write(&theirs.path("f"), &old).unwrap();
        let mut open = File::open(ours.path("f")).unwrap();
        let mut head = vec![0; 4096];
        open.read_exact(&mut head).unwrap();
        files::write(&theirs.path("f"), &new).unwrap();
        assert!(fs::read(ours.path("f")).unwrap() == new);
        let mut rest = Vec::new();
        match open.read_to_end(&mut rest) {
            Ok(_) => assert!(head == old[..4096] && rest == old[4096..], "a mixture"),
            Err(error) => assert!(error.raw_os_error() == Some(Errno::ESTALE as i32) && old[4096..].starts_with(&rest), "{error}"),
        }
    }
}

/// Promise 14: "A first open of a file listed or fetched within the last second asks nothing more.": by then it is what it was or what it
/// is, and whole.
#[test]
fn what_changes_right_after_it_was_listed_can_be_read() {
    if !can_mount() {
        return;
    }
    for size in [3000, 300_000, 12 * MIB] {
        let (old, new) = (noise(1, size), noise(2, size + 5));
        let store = Store::double();
        store.put("d/f", old.clone());
        let ours = Mount::start(Setup::of(&store));
        assert_eq!(files::names(&ours.path("d")), ["f"]);
        store.put("d/f", new.clone());
        let found = fs::read(ours.path("d/f"));
        assert!(found.as_ref().is_ok_and(|found| *found == new || *found == old), "{size}: {:?}", found.map(|found| found.len()));
    }
}

/// Promise 14: "and at once by open()", both ways, turn by turn.
#[test]
fn two_mounts_write_by_turns() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    let (a, b) = two_mounts(&store, &["metadata_ttl=1h"]);
    sh(a.dir(), "echo 0 > counter");
    assert_eq!(fs::read_to_string(b.path("counter")).unwrap(), "0\n");
    for turn in 1..=6 {
        let (writes, reads) = if turn % 2 == 0 { (&a, &b) } else { (&b, &a) };
        // What was listed, fetched or written within the last second is opened as it is known.
        std::thread::sleep(Duration::from_millis(1100));
        sh(writes.dir(), "n=$(cat counter); echo $((n + 1)) > counter");
        assert_eq!(fs::read_to_string(reads.path("counter")).unwrap(), format!("{turn}\n"));
    }
}
