//! Directories while others change them, and trees that are larger than anybody wants to keep.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::fs::{Mode, OFlags, RawDir, SeekFrom, seek};

use crate::support::double::Object;
use crate::support::files::{self, sh};
use crate::support::mount::can_mount;
use crate::support::stage::{Stage, torture};
use crate::support::store::Store;

const BUCKET: &str = "releases";

fn stage(options: &[&str], names: impl IntoIterator<Item = String>) -> Option<Stage> {
    if !can_mount() {
        return None;
    }
    let store = Store::double();
    let double = store.as_double().unwrap();
    let object = Object::new("x");
    for name in names {
        double.put_object(BUCKET, &name, object.clone());
    }
    Some(Stage::with(store, options))
}

fn opendir(path: &Path) -> OwnedFd {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap()
}

/// Names from where the directory stands, each with the offset that follows it: by getdents64(2) with so small a buffer that each call
/// brings a few.
fn some(dir: impl AsFd, buffer: usize, calls: usize) -> Vec<(String, u64)> {
    let mut found = Vec::new();
    for _ in 0..calls {
        let mut buffer = Vec::with_capacity(buffer);
        // One call of getdents64 fills it; what it holds is read, and no more is asked for.
        let mut entries = RawDir::new(dir.as_fd(), buffer.spare_capacity_mut());
        let before = found.len();
        while let Some(entry) = entries.next() {
            let entry = entry.unwrap();
            found.push((entry.file_name().to_str().unwrap().to_owned(), entry.next_entry_cookie()));
            if entries.is_buffer_empty() {
                break;
            }
        }
        if found.len() == before {
            break;
        }
    }
    found.retain(|(name, _)| name != "." && name != "..");
    found
}

fn name(n: usize) -> String {
    format!("file-{n:06}")
}

/// Every name that is there all the time, once; no name twice; of those that come or go some.
#[track_caller]
fn assert_whole(found: &[(String, u64)], all_the_time: impl IntoIterator<Item = String>, what: &str) {
    let mut counts = BTreeMap::new();
    for (name, _) in found {
        *counts.entry(name.as_str()).or_insert(0) += 1;
    }
    let twice: Vec<_> = counts.iter().filter(|(_, count)| **count > 1).take(5).collect();
    assert!(twice.is_empty(), "{what}: twice: {twice:?}");
    let missing: Vec<_> = all_the_time.into_iter().filter(|name| !counts.contains_key(name.as_str())).take(5).collect();
    assert!(missing.is_empty(), "{what}: missed: {missing:?} of {}", counts.len());
}

/// A reader in the middle of a directory, while this mount and others add names and remove them before and behind it.
#[test]
fn offsets_hold_while_the_directory_changes() {
    for count in [300, 7500] {
        for options in [&["metadata_ttl=0"][..], &[]] {
            let names = (0..count).map(|n| format!("d/{}", name(n)));
            let Some(stage) = stage(options, names) else { return };
            let what = format!("{count}, {options:?}");
            let dir = opendir(&stage.path("d"));
            let mut found = some(&dir, 1000, 5);
            for turn in 0..20 {
                // Removed and added before it, behind it, at the end.
                let (gone, near) = (turn * 2 + 1, count / 2 + turn * 2 + 1);
                stage.double().delete_object(BUCKET, &format!("d/{}", name(gone)));
                stage.double().put_object(BUCKET, &format!("d/file-{:06}x", turn), Object::new("x"));
                fs::remove_file(stage.path(&format!("d/{}", name(near)))).unwrap();
                files::write(&stage.path(&format!("d/ours-{turn}")), b"x").unwrap();
                files::write(&stage.path(&format!("d/a-ours-{turn}")), b"x").unwrap();
                found.extend(some(&dir, 2000, count / 300));
            }
            found.extend(some(&dir, 4000, usize::MAX));
            let kept =
                (0..count).filter(|n| !(*n < 41 && n % 2 == 1 || (count / 2..count / 2 + 41).contains(n) && (n - count / 2) % 2 == 1));
            assert_whole(&found, kept.map(name), &what);
            // As rewinddir(3) does it: from the start, and as it is now.
            seek(&dir, SeekFrom::Start(0)).unwrap();
            let again = some(&dir, 8000, usize::MAX);
            let listed: BTreeSet<String> = again.iter().map(|(name, _)| name.clone()).collect();
            assert!(listed.contains("ours-19") && listed.contains("a-ours-0") && !listed.contains(&name(count / 2 + 1)), "{what}");
            assert_eq!(listed.len(), again.len(), "{what}");
            if options.contains(&"metadata_ttl=0") {
                let now: BTreeSet<String> =
                    stage.store.keys().into_iter().filter_map(|key| Some(key.strip_prefix("d/")?.to_owned())).collect();
                assert!(listed == now, "{what}: {:?}", listed.symmetric_difference(&now).take(5).collect::<Vec<_>>());
            }
        }
    }
}

/// telldir(3) and seekdir(3): back to a place that was told, while names before it go and come.
#[test]
fn seeks_find_the_place_that_was_told() {
    for count in [300, 7500] {
        let Some(stage) = stage(&["metadata_ttl=0"], (0..count).map(|n| format!("d/{}", name(n)))) else { return };
        let dir = opendir(&stage.path("d"));
        let all = some(&dir, 4000, usize::MAX);
        assert_eq!(all.len(), count);
        for (turn, at) in [count / 2, 10, count - 5, count / 3, 1].into_iter().enumerate() {
            // Before that place, where a page is asked for again.
            stage.double().delete_object(BUCKET, &format!("d/{}", name(turn)));
            stage.double().put_object(BUCKET, &format!("d/file-000000-{turn}"), Object::new("x"));
            let (last, offset) = &all[at];
            seek(&dir, SeekFrom::Start(*offset)).unwrap();
            let rest = some(&dir, 4000, usize::MAX);
            let expected = all[at + 1..].iter().map(|(name, _)| name.clone()).filter(|name| *name > self::name(turn));
            assert_whole(&rest, expected, &format!("{count}: after {last}"));
            assert!(rest.iter().all(|(name, _)| name > last), "{count}: {:?} after {last}", rest.first());
        }
    }
}

/// `rm -r` removes what it has read, and reads on.
#[test]
fn a_directory_is_removed_while_it_is_read() {
    let Some(stage) = stage(&[], (0..5200).map(|n| format!("d/{}", name(n)))) else { return };
    let dir = opendir(&stage.path("d"));
    let mut removed = 0;
    loop {
        let found = some(&dir, 5000, 1);
        if found.is_empty() {
            break;
        }
        for (name, _) in found {
            fs::remove_file(stage.path("d").join(name)).unwrap();
            removed += 1;
        }
    }
    assert_eq!(removed, 5200);
    assert_eq!(files::names(&stage.path("d")), Vec::<String>::new());
}

/// What is read of a tree is not kept: `find` of any number of names.
#[test]
fn a_tree_of_many_names_is_walked_in_bounded_memory() {
    let (dirs, each) = if torture() { (10_000, 100) } else { (2000, 100) };
    let names = (0..dirs).flat_map(|dir| (0..each).map(move |n| format!("t/a{:03}/b{dir}/f{n}", dir % 100)));
    let Some(stage) = stage(&["memory_limit=64M"], names) else { return };
    let before = stage.mount.peak_memory();
    // All of it at 1.5 KiB a name would be 300 MiB; what a walk leaves is a part of memory_limit.
    let most = 96 << 20;
    for walk in ["find t -type f | wc -l", "find t -type f -size -9 | wc -l"] {
        let found = sh(stage.dir(), walk);
        assert_eq!(found.trim(), (dirs * each).to_string());
        let peak = stage.mount.peak_memory();
        assert!(peak < most, "{walk}: {} MiB, {} before", peak >> 20, before >> 20);
    }
}

/// Others change a directory all the time.
#[test]
fn a_directory_that_others_change_all_the_time() {
    let count = 2600;
    let Some(stage) = stage(&["metadata_ttl=1s"], (0..count).map(|n| format!("d/{}", name(n)))) else { return };
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for turn in (0..count).cycle() {
                if done.load(Ordering::SeqCst) {
                    break;
                }
                let key = format!("d/file-{:06}-theirs", turn * 7 % count);
                stage.double().put_object(BUCKET, &key, Object::new("x"));
                std::thread::sleep(Duration::from_micros(300));
                stage.double().delete_object(BUCKET, &key);
            }
        });
        for turn in 0..20 {
            let dir = opendir(&stage.path("d"));
            let found = some(&dir, 3000, usize::MAX);
            assert_whole(&found, (0..count).map(name), &format!("turn {turn}"));
        }
        done.store(true, Ordering::SeqCst);
    });
}
