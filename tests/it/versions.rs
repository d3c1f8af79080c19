//! Two who write, and what a reader gets of an object that changes: promises 12 and 14 to 16.

use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use nix::errno::Errno;

use crate::support::double::Object;
use crate::support::files::{self, close, noise, sh};
use crate::support::mount::{Mount, Setup, can_mount};
use crate::support::stage::{Stage, on_every_store};
use crate::support::store::Store;

const MIB: usize = 1 << 20;
const BUCKET: &str = "releases";

/// A look younger than a second is believed; this outlasts it.
const OUTLAST_A_LOOK: Duration = Duration::from_millis(1100);

/// A new file for writing that must not exist.
fn create_new(path: &Path) -> File {
    OpenOptions::new().write(true).create_new(true).open(path).unwrap()
}

/// Turns over one bit in the middle of every cached object.
fn damage_the_cache(folder: &Path) -> usize {
    let mut damaged = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            damaged += damage_the_cache(&path);
        } else if path.extension().is_some_and(|extension| extension == "data") {
            let file = files::open_existing(&path);
            let middle = file.metadata().unwrap().len() / 2;
            let mut byte = [0];
            file.read_exact_at(&mut byte, middle).unwrap();
            file.write_all_at(&[byte[0] ^ 4], middle).unwrap();
            damaged += 1;
        }
    }
    damaged
}

/// Reads a whole file all of whose bytes are its version's number.
fn read_one_version(path: &Path, size: usize, scattered: bool) -> std::io::Result<()> {
    const PIECE: usize = 100_000;
    let file = File::open(path)?;
    let mut pieces: Vec<usize> = (0..size.div_ceil(PIECE)).collect();
    if scattered {
        pieces.sort_by_key(|piece| piece * 7919 % 1009);
    }
    let mut number = None;
    for piece in pieces {
        let mut bytes = vec![0; PIECE.min(size - piece * PIECE)];
        file.read_exact_at(&mut bytes, (piece * PIECE) as u64)?;
        let number = *number.get_or_insert(bytes[0]);
        assert!(number > 0 && bytes.iter().all(|byte| *byte == number), "a mixture of two versions, at {piece}");
    }
    Ok(())
}

on_every_store! {
    /// Promise 12: "O_EXCL creates only if the name is free in S3 too … a name taken meanwhile makes close() fail with EEXIST and parks ours"
    fn two_machines_create_one_name(store) {
        let one = Stage::new(store);
        let two = Mount::start(Setup::of(&one.store));
        let (first, second) = (create_new(&one.path("lock")), create_new(&two.path("lock")));
        first.write_all_at(b"first", 0).unwrap();
        second.write_all_at(b"second", 0).unwrap();
        close(first).unwrap();
        assert_eq!(close(second), Err(Errno::EEXIST));
        assert_eq!(one.store.bytes("lock"), "first");
        assert_eq!(fs::read(two.path("lock")).unwrap(), b"first");
        assert!(two.status().contains("/lock"), "{}", two.status());
    }

    /// Promise 12: "Somebody else's change since we opened the file … is not overwritten silently: `on_conflict=keep` publishes ours beside theirs"
    fn two_machines_write_one_file(store) {
        store.put("report.txt", "base");
        let stage = Stage::new(store);
        let ours = File::create(stage.path("report.txt")).unwrap();
        ours.write_all_at(b"ours", 0).unwrap();
        stage.store.put("report.txt", "theirs");
        close(ours).unwrap();
        let keys = stage.store.keys();
        let beside = keys.iter().find(|key| key.starts_with("report (conflict of ") && key.ends_with(").txt"));
        assert_eq!(stage.store.bytes(beside.unwrap_or_else(|| panic!("nothing beside theirs: {keys:?}"))), "ours");
        assert_eq!(stage.store.bytes("report.txt"), "theirs");
        stage.store.eventually("both show in the mount", |_| files::names(stage.dir()) == keys);
        assert_eq!(fs::read(stage.path("report.txt")).unwrap(), b"theirs");
    }

    /// Promise 12: "(or, for a rename, since we saw its target) is not overwritten silently: `on_conflict=keep` publishes ours beside theirs"
    fn a_download_ends_over_what_others_wrote(store) {
        store.put("report.txt", "base");
        let stage = Stage::new(store);
        assert_eq!(fs::read(stage.path("report.txt")).unwrap(), b"base");
        files::write(&stage.path("report.txt.crdownload"), b"ours").unwrap();
        stage.store.put("report.txt", "theirs");
        fs::rename(stage.path("report.txt.crdownload"), stage.path("report.txt")).unwrap();
        assert_eq!(stage.store.bytes("report.txt"), "theirs");
        let keys = stage.store.keys();
        let beside = keys.iter().find(|key| key.starts_with("report (conflict of ") && key.ends_with(").txt"));
        assert_eq!(stage.store.bytes(beside.unwrap_or_else(|| panic!("nothing beside theirs: {keys:?}"))), "ours");
    }

    /// Promise 12: "an O_APPEND handle appends again to theirs"
    fn two_machines_append_to_one_file(store) {
        store.put("log", "begin\n");
        store.put("empty", "");
        let one = Stage::new(store);
        let two = Mount::start(Setup::of(&one.store));
        for (name, begin) in [("log", "begin\n"), ("empty", ""), ("new", "")] {
            let open = |dir: &Path| OpenOptions::new().append(true).create(true).open(dir.join(name)).unwrap();
            for turn in 0..4 {
                let (mut first, mut second) = (open(one.dir()), open(two.dir()));
                writeln!(first, "one {turn}").unwrap();
                writeln!(second, "two {turn}").unwrap();
                close(first).unwrap();
                close(second).unwrap();
            }
            let lines: String = (0..4).map(|turn| format!("one {turn}\ntwo {turn}\n")).collect();
            assert_eq!(one.store.bytes(name), format!("{begin}{lines}"), "{name}");
        }
        assert_eq!(one.store.keys(), ["empty", "log", "new"]);
    }

    /// Promise 14: "O_APPEND writes at the size so learned, not at the kernel's offset."
    fn appends_behind_what_others_wrote(store) {
        store.put("log", "one\n");
        let stage = Stage::with(store, &["metadata_ttl=1h"]);
        assert_eq!(fs::metadata(stage.path("log")).unwrap().len(), 4);
        stage.store.put("log", "one\nby others\n");
        std::thread::sleep(OUTLAST_A_LOOK);
        let mut file = OpenOptions::new().append(true).open(stage.path("log")).unwrap();
        file.write_all(b"ours\n").unwrap();
        close(file).unwrap();
        assert_eq!(stage.store.bytes("log"), "one\nby others\nours\n");
    }

    /// Promise 15: "A reader sees one version from open to close. If it was replaced and cannot be had any more: ESTALE. Never a mixture, never zeros, never short without an error."
    fn a_reader_of_what_is_replaced(store) {
        let (old, new) = (noise(1, 24 * MIB), noise(2, 24 * MIB));
        store.put("f", old.clone());
        let stage = Stage::new(store);
        let mut file = File::open(stage.path("f")).unwrap();
        let mut head = vec![0; 16 << 10];
        file.read_exact(&mut head).unwrap();
        stage.store.put("f", new.clone());
        let mut rest = Vec::new();
        let ended = file.read_to_end(&mut rest);
        assert!(old[head.len()..].starts_with(&rest), "a mixture of two versions");
        match ended {
            Ok(_) => assert_eq!(head.len() + rest.len(), old.len(), "short without an error"),
            Err(error) => assert_eq!(error.raw_os_error(), Some(Errno::ESTALE as i32)),
        }
        std::thread::sleep(OUTLAST_A_LOOK);
        assert!(fs::read(stage.path("f")).unwrap() == new, "who opens it now reads the new one");
    }

    /// Promise 15: "Who reads a file reads one version of it from open to close, or gets the error ESTALE: never a mixture, never zeros, never
    /// a short file without an error.", of a file that others overwrite all the time, read in order and here and there.
    fn a_reader_of_what_is_replaced_again_and_again(store) {
        const SIZE: usize = 9 * MIB;
        let version = |number: u8| vec![number; SIZE];
        store.put("f", version(1));
        let stage = Stage::new(store);
        let (over, whole) = (AtomicBool::new(false), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for lane in 0..2 {
                let (stage, over, whole) = (&stage, &over, &whole);
                scope.spawn(move || {
                    while !over.load(Ordering::Relaxed) {
                        let read = read_one_version(&stage.path("f"), SIZE, lane == 1);
                        match read {
                            Ok(()) => _ = whole.fetch_add(1, Ordering::Relaxed),
                            Err(error) => assert_eq!(error.raw_os_error(), Some(Errno::ESTALE as i32), "{error}"),
                        }
                    }
                });
            }
            for number in 2..30 {
                stage.store.put("f", version(number));
                std::thread::sleep(Duration::from_millis(u64::from(number) * 37 % 150));
            }
            over.store(true, Ordering::Relaxed);
        });
        assert!(whole.load(Ordering::Relaxed) > 0, "nobody ever read all of it");
        std::thread::sleep(OUTLAST_A_LOOK);
        assert!(fs::read(stage.path("f")).unwrap() == version(29));
    }

    /// Promise 16: "A damaged byte is never delivered: over TLS and from the cache always"
    fn a_damaged_cache_is_asked_again(store) {
        let bytes = noise(3, 3 * MIB);
        store.put("f", bytes.clone());
        let mut stage = Stage::new(store);
        assert!(fs::read(stage.path("f")).unwrap() == bytes);
        files::write(&stage.path("own"), &bytes).unwrap();
        stage.mount.umount();
        assert!(damage_the_cache(&stage.mount.home().join("cache")) >= 1, "nothing was cached");
        stage.mount.again();
        assert!(fs::read(stage.path("f")).unwrap() == bytes, "a damaged byte was delivered");
        assert!(fs::read(stage.path("own")).unwrap() == bytes, "a damaged byte was delivered");
    }
}

/// Promise 12: "It is judged at publication, no request at create"
#[test]
fn an_exclusive_create_asks_nothing() {
    if !can_mount() {
        return;
    }
    let stage = Stage::with(Store::double(), &["metadata_ttl=1h"]);
    assert_eq!(files::names(stage.dir()), Vec::<String>::new());
    stage.double().reset_requests();
    let file = create_new(&stage.path("f"));
    file.write_all_at(b"x", 0).unwrap();
    assert_eq!(stage.double().requests().total(), 0, "{:?}", stage.double().requests().summary());
    close(file).unwrap();
    assert_eq!(stage.double().requests().total(), 1, "{:?}", stage.double().requests().summary());
}

/// Promise 14: "a reader's open sends its first ranged GET with the known ETag, and a wholly cached file costs one HEAD. A first open of a
/// file listed or fetched within the last second asks nothing more."
#[test]
fn opening_costs_at_most_one_request() {
    if !can_mount() {
        return;
    }
    let stage = Stage::with(Store::double(), &["metadata_ttl=1h"]);
    stage.store.put("d/f", "content");
    stage.double().reset_requests();
    assert_eq!(sh(stage.dir(), "ls d > /dev/null; cat d/f"), "content");
    let requests = stage.double().requests();
    assert_eq!((requests.of("HeadObject"), requests.of("GetObject")), (0, 1), "{:?}", requests.summary());
    std::thread::sleep(OUTLAST_A_LOOK);
    stage.double().reset_requests();
    assert_eq!(fs::read(stage.path("d/f")).unwrap(), b"content");
    let requests = stage.double().requests();
    // A kernel that forgot the name meanwhile asks for a listing, which tells as much as a HEAD.
    assert_eq!((requests.of_any(&["HeadObject", "ListObjectsV2"]), requests.total()), (1, 1), "{:?}", requests.summary());
}

/// Promise 14: "A handle that changes an existing file asks one HEAD before or beside its first write … it brings size, ETag and the metadata to keep."
#[test]
fn changing_a_file_asks_one_head() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new(Store::double());
    stage.double().put_object(BUCKET, "f", Object::new("0123456789").meta("origin", "elsewhere"));
    assert_eq!(files::names(stage.dir()), ["f"]);
    stage.double().reset_requests();
    // Older than a listing is believed, so that the open asks.
    std::thread::sleep(Duration::from_millis(1100));
    let file = OpenOptions::new().write(true).open(stage.path("f")).unwrap();
    for at in 0..5 {
        std::thread::sleep(Duration::from_millis(if at == 0 { 1100 } else { 0 }));
        file.write_all_at(b"x", at * 2).unwrap();
    }
    close(file).unwrap();
    let requests = stage.double().requests();
    assert_eq!(requests.of("HeadObject"), 1, "{:?}", requests.summary());
    assert_eq!(requests.of("PutObject"), 1, "{:?}", requests.summary());
    assert_eq!(stage.store.bytes("f"), "x1x3x5x7x9");
    assert_eq!(stage.store.get("f").unwrap().metadata.get("origin").map(String::as_str), Some("elsewhere"));
}

/// Promise 15: "Who reads a file reads one version of it from open to close", replaced or not, where the bucket keeps versions.
#[test]
fn a_bucket_that_keeps_versions_gives_the_old_one_to_its_end() {
    if !can_mount() {
        return;
    }
    let store = Store::seaweed();
    store.keep_versions();
    let old = noise(31, 24 * MIB);
    store.put("big", old.clone());
    let stage = Stage::new(store);
    let mut file = File::open(stage.path("big")).unwrap();
    let mut begin = [0; 4096];
    file.read_exact(&mut begin).unwrap();
    assert!(begin == old[..4096]);
    stage.store.put("big", noise(32, MIB));
    let mut rest = Vec::new();
    file.read_to_end(&mut rest).unwrap();
    assert!(rest == old[4096..]);
    assert!(fs::read(stage.path("big")).unwrap() == noise(32, MIB), "who opens it now gets the new one");
}
