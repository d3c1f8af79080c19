//! Every call ends, and no stalled or throttled connection holds up another: promise 22, on the wire.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::support::faulty::{Fault, Faulty, When};
use crate::support::files::{self, errno, noise};
use crate::support::mount::{Mount, Setup, can_mount};
use crate::support::store::Store;

const MIB: usize = 1 << 20;

/// Ninety seconds, and a slow machine.
const LONGEST_CALL: Duration = Duration::from_secs(105);
/// Throttling that fails nothing.
const A_MINUTE: Duration = Duration::from_secs(60);

fn stage(options: &[&str]) -> (Mount, Faulty, Store) {
    let store = Store::double();
    let faulty = Faulty::before(&store.endpoint());
    let setup = Setup::of(&store).through(&faulty.endpoint());
    (Mount::start(options.iter().fold(setup, |setup, word| setup.option(word))), faulty, store)
}

/// Promise 22: "end within 90 s with an error", while the store answers 503 for minutes, and while it answers nothing at all; and all goes
/// on when it is over. "It slows copies, and fails nothing that is opened for writing, written, closed or renamed before an hour".
#[test]
fn calls_end_while_the_store_throttles_or_is_silent() {
    if !can_mount() {
        return;
    }
    let (mount, faulty, store) = stage(&["metadata_ttl=0", "negative_metadata_ttl=0"]);
    let beside = |options: &[&str]| {
        let faulty = Faulty::before(&store.endpoint());
        let setup = Setup::of(&store).through(&faulty.endpoint());
        (Mount::start(options.iter().fold(setup, |setup, word| setup.option(word))), faulty)
    };
    let (silent, silence) = beside(&["metadata_ttl=0", "negative_metadata_ttl=0"]);
    let (writes, throttles) = beside(&["metadata_ttl=1h"]);
    let (copies, minute) = beside(&[]);
    store.put("held", noise(1, 20 * MIB));
    ["changed", "emptied", "copied/old"].iter().for_each(|key| store.put(key, "content"));
    for dir in ["stat", "list", "remove", "read", "make"] {
        store.put(&format!("{dir}/f"), "content");
        assert_eq!([&mount, &silent].map(|mount| files::names(&mount.path(dir))), [["f"], ["f"]]);
    }
    let [held, unheard] = [&mount, &silent].map(|mount| File::open(mount.path("held")).unwrap());
    [&held, &unheard].iter().for_each(|held| held.read_exact_at(&mut [0; 4096], 0).unwrap());
    // Another mount, that queues: the delete of a folder waits.
    let queues = Mount::start(Setup::of(&store).through(&faulty.endpoint()).option("write_back=1h").option("metadata_ttl=1h"));
    fs::create_dir(queues.path("gone")).unwrap();
    queues.ask(&["flush"], queues.dir());
    fs::remove_dir(queues.path("gone")).unwrap();
    assert!(store.keys().contains(&"gone/".to_owned()));
    let changed = File::options().write(true).open(writes.path("changed")).unwrap();
    fs::metadata(writes.path("emptied")).unwrap();
    let tree = tempfile::tempdir().unwrap();
    fs::create_dir_all(tree.path().join("tree/sub")).unwrap();
    fs::write(tree.path().join("tree/sub/f"), "content").unwrap();

    [&faulty, &throttles, &minute].iter().for_each(|way| way.fault(When::any_of(&[]), Fault::Refusal(503, "SlowDown")));
    silence.fault(When::any_of(&[]), Fault::StallUp);
    let began = Instant::now();
    std::thread::scope(|writers| {
        let change = writers.spawn(|| {
            changed.write_all_at(b"CON", 0).unwrap();
            files::close(changed).unwrap();
        });
        let empty = writers.spawn(|| files::write(&writes.path("emptied"), b"new").unwrap());
        std::thread::scope(|scope| {
            // Where folders are queued nobody waits for the store.
            scope.spawn(|| fs::create_dir(queues.path("gone")).unwrap());
            for (mount, held) in [(&mount, &held), (&silent, &unheard)] {
                scope.spawn(|| assert_eq!(errno(fs::metadata(mount.path("stat/unknown"))), Errno::ETIMEDOUT));
                scope.spawn(|| {
                    let listed = fs::read_dir(mount.path("list")).and_then(|mut names| names.next().transpose());
                    assert_eq!(errno(listed), Errno::ETIMEDOUT);
                });
                scope.spawn(|| {
                    let listed = fs::read_dir(mount.dir()).and_then(|names| names.collect::<Result<Vec<_>, _>>());
                    assert_eq!(errno(listed), Errno::ETIMEDOUT);
                });
                scope.spawn(|| assert_eq!(errno(fs::remove_file(mount.path("remove/f"))), Errno::ETIMEDOUT));
                scope.spawn(|| assert_eq!(errno(fs::create_dir(mount.path("make/new"))), Errno::ETIMEDOUT));
                scope.spawn(|| assert_eq!(errno(fs::read(mount.path("read/f"))), Errno::ETIMEDOUT));
                scope.spawn(move || assert_eq!(errno(held.read_exact_at(&mut vec![0; MIB], 8 << 20)), Errno::ETIMEDOUT));
            }
            scope.spawn(|| {
                std::thread::sleep(A_MINUTE);
                minute.heal();
            });
            scope.spawn(|| {
                let mut copy = std::process::Command::new("cp");
                copy.arg("-r").arg(tree.path().join("tree")).arg(copies.dir());
                assert!(copy.status().unwrap().success());
                assert_eq!(store.bytes("tree/sub/f"), "content");
            });
            scope.spawn(|| fs::rename(copies.path("copied/old"), copies.path("copied/new")).unwrap());
        });
        assert!(began.elapsed() < LONGEST_CALL, "{:?}", began.elapsed());
        assert!(!change.is_finished() && !empty.is_finished());
        [&faulty, &throttles, &silence].iter().for_each(|way| way.heal());
    });
    assert_eq!(["changed", "emptied", "copied/new"].map(|key| store.bytes(key)), ["CONtent", "new", "content"]);
    for mount in [&silent, &mount] {
        assert_eq!(fs::read(mount.path("read/f")).unwrap(), b"content");
        assert_eq!(files::names(&mount.path("list")), ["f"]);
        fs::metadata(mount.path("stat/f")).unwrap();
    }
    fs::remove_file(mount.path("remove/f")).unwrap();
    fs::create_dir(mount.path("make/new")).unwrap();
    for held in [held, unheard] {
        let mut bytes = vec![0; 20 * MIB];
        held.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes == noise(1, 20 * MIB));
    }
    // What came in the folder's place is stored, and not deleted.
    queues.ask(&["flush"], queues.dir());
    assert!(store.keys().contains(&"gone/".to_owned()), "{:?}", store.keys());
}

/// Promise 22: "Every call ends": one reader whose connection stalls holds up nobody else.
#[test]
fn a_stalled_read_blocks_no_other_file() {
    if !can_mount() {
        return;
    }
    let (mount, faulty, store) = stage(&["max_connections=4"]);
    store.put("stuck", noise(1, 20 * MIB));
    store.put("d/other", noise(2, 20 * MIB));
    assert_eq!(files::names(mount.dir()), ["d", "stuck"]);
    faulty.fault(When::any_of(&["GetObject"]).containing("/stuck"), Fault::StallDown);
    std::thread::scope(|scope| {
        let stuck = scope.spawn(|| fs::read(mount.path("stuck")));
        store.eventually("the read is stuck", |_| faulty.struck() > 0);
        assert!(fs::read(mount.path("d/other")).unwrap() == noise(2, 20 * MIB));
        assert_eq!(files::names(&mount.path("d")), ["other"]);
        files::write(&mount.path("d/new"), &noise(3, 20 * MIB)).unwrap();
        fs::rename(mount.path("d/new"), mount.path("d/newer")).unwrap();
        fs::remove_file(mount.path("d/newer")).unwrap();
        assert!(!stuck.is_finished());
        faulty.heal();
        assert!(stuck.join().unwrap().unwrap() == noise(1, 20 * MIB), "it goes on by itself");
    });
}

/// Promise 22: "A connection on which no byte moved for 20 s (`request_timeout`) is replaced": a listing, a read, uploads.
#[test]
fn a_stalled_connection_is_replaced() {
    if !can_mount() {
        return;
    }
    let (mount, faulty, store) = stage(&[]);
    store.put("d/f", noise(1, 2 * MIB));
    store.put("e/f", "x");
    assert_eq!(files::names(mount.dir()), ["d", "e"]);
    assert_eq!(fs::metadata(mount.path("d/f")).unwrap().len(), 2 * MIB as u64);
    for (operation, fault) in [
        ("GetObject", Fault::StallDown),
        ("ListObjects", Fault::StallUp),
        ("PutObject", Fault::StallUp),
        ("UploadPart", Fault::StallUp),
        ("CreateMultipartUpload", Fault::StallDown),
    ] {
        faulty.fault(When::any_of(&[operation]).times(1), fault);
    }
    let began = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| assert!(fs::read(mount.path("d/f")).unwrap() == noise(1, 2 * MIB)));
        scope.spawn(|| assert_eq!(files::names(&mount.path("e")), ["f"]));
        scope.spawn(|| files::write(&mount.path("small"), b"small").unwrap());
        scope.spawn(|| files::write(&mount.path("large"), &noise(4, 20 * MIB)).unwrap());
    });
    assert_eq!(faulty.struck(), 5);
    // The large file met two stalls, one after the other; waiting for `close_timeout` or the deadline of a listing takes longer.
    assert!(began.elapsed() < Duration::from_secs(85), "{:?}", began.elapsed());
    assert_eq!(store.bytes("small"), "small");
    assert!(store.bytes("large") == noise(4, 20 * MIB));
}

/// Promise 22: "Writing, closing and renaming go on while bytes move, and end `close_timeout` (5 min) after the last progress", where the
/// store takes all bytes, again and again, and answers nonsense or a conflict: that is none.
#[test]
fn bytes_that_are_taken_in_vain_are_no_progress() {
    if !can_mount() {
        return;
    }
    // The pause between attempts is at most 15 s.
    let (mount, faulty, _store) = stage(&["close_timeout=18s", "part_size=5M"]);
    faulty.fault(When::any_of(&["PutObject", "UploadPart"]).containing("/portal"), Fault::Portal);
    faulty.fault(When::any_of(&["PutObject"]).containing("/conflict"), Fault::Refusal(409, "OperationAborted"));
    std::thread::scope(|scope| {
        for (name, size) in [("portal.small", 50), ("portal.middle", 3 * MIB), ("portal.large", 12 * MIB), ("conflict.small", 50)] {
            let mount = &mount;
            scope.spawn(move || {
                let began = Instant::now();
                let closed = files::write(&mount.path(name), &noise(1, size));
                assert!(closed.is_err() && began.elapsed() < A_MINUTE, "{name}: {closed:?} after {:?}", began.elapsed());
            });
        }
    });
}

/// Promise 2: "With `write_back` it succeeds when the file is safe in the spool", and promise 8: a store that is silent in the middle of
/// an upload keeps nobody from the file.
#[test]
fn a_silent_store_keeps_nobody_from_a_queued_file() {
    if !can_mount() {
        return;
    }
    let (mount, faulty, store) = stage(&["write_back=100ms"]);
    let names = ["written", "appended", "emptied", "synced"];
    names.iter().for_each(|name| files::write(&mount.path(name), &noise(1, 2 * MIB)).unwrap());
    names.iter().for_each(|name| store.eventually("it is stored", |store| store.get(name).is_some()));
    faulty.fault(When::any_of(&["PutObject"]), Fault::StallDown);
    names.iter().for_each(|name| files::write(&mount.path(name), &noise(2, 2 * MIB)).unwrap());
    // They are on their way.
    std::thread::sleep(Duration::from_secs(1));
    let open = |name: &str| File::options().write(true).open(mount.path(name)).unwrap();
    let began = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| open("written").write_all_at(b"CON", 0).unwrap());
        scope.spawn(|| std::io::Write::write_all(&mut File::options().append(true).open(mount.path("appended")).unwrap(), b"CON").unwrap());
        scope.spawn(|| files::write(&mount.path("emptied"), b"CON").unwrap());
        scope.spawn(|| open("synced").sync_all().unwrap());
    });
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
    faulty.heal();
    store.eventually("all of it is stored", |store| {
        let of = |name: &str| store.get(name).map(|seen| seen.bytes.to_vec()).unwrap_or_default();
        of("written").starts_with(b"CON")
            && of("appended").ends_with(b"CON")
            && of("emptied") == b"CON"
            && of("synced") == noise(2, 2 * MIB)
    });
    assert_eq!(store.keys(), ["appended", "emptied", "synced", "written"]);
}
