//! When the store or the way to it fails: promises 2, 12, 15, 16, 22 to 24.

use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags};

use crate::support::double::{Fault, Object, Options, When};
use crate::support::files::{self, close, errno, noise, sh};
use crate::support::mount::can_mount;
use crate::support::stage::Stage;
use crate::support::store::Store;

const MIB: usize = 1 << 20;
const BUCKET: &str = "releases";

/// A fault on the way of one write; the file arrives whole all the same.
fn arrives_in_spite_of(size: usize, when: When, fault: Fault) {
    if !can_mount() {
        return;
    }
    let stage = Stage::new(Store::double());
    stage.double().put_object(BUCKET, "f", Object::new("old"));
    stage.double().fault(when, fault);
    let bytes = noise(size as u64, size);
    files::write(&stage.path("f"), &bytes).unwrap();
    assert!(stage.store.bytes("f") == bytes);
    assert_eq!(stage.store.unfinished_uploads(), Vec::<String>::new());
}

#[test]
fn throttled_put() {
    arrives_in_spite_of(1000, When::operation("PutObject").times(2), Fault::Error(503, "SlowDown"));
}

#[test]
fn internal_error_of_a_part() {
    arrives_in_spite_of(20 * MIB, When::operation("UploadPart").after(1).times(2), Fault::Error(500, "InternalError"));
}

/// Promise 2: "or the new one if only the store's answer was lost"
#[test]
fn lost_answer_of_a_put() {
    arrives_in_spite_of(1000, When::operation("PutObject").times(1), Fault::LostAnswer);
}

#[test]
fn lost_answer_of_a_part() {
    arrives_in_spite_of(20 * MIB, When::operation("UploadPart").times(1), Fault::LostAnswer);
}

/// Promise 26: "an upload of that key without parts, begun after the intent, is the unrecorded one"
#[test]
fn lost_answer_of_create() {
    if !can_mount() {
        return;
    }
    for clock_behind in [0, 600].map(Duration::from_secs) {
        let mut stage = Stage::new(Store::double_with(Options { clock_behind, ..Options::default() }));
        stage.double().fault(When::operation("CreateMultipartUpload").times(1), Fault::LostAnswer);
        let bytes = noise(1, 20 * MIB);
        files::write(&stage.path("f"), &bytes).unwrap();
        assert!(stage.store.bytes("f") == bytes);
        // "one without parts, begun after the intent, is the unrecorded one"
        stage.mount.umount();
        assert_eq!(stage.store.unfinished_uploads(), Vec::<String>::new());
    }
}

#[test]
fn lost_answer_of_complete() {
    arrives_in_spite_of(20 * MIB, When::operation("CompleteMultipartUpload").times(1), Fault::LostAnswer);
}

/// Promise 7: "Parts that did not change are copied inside S3", and promise 16 on a store that tells a wrong checksum of them.
#[test]
fn copies_with_the_checksum_of_their_source() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new(Store::double_with(Options { copies_tell_all: true, ..Options::default() }));
    let mut bytes = noise(1, 20 * MIB);
    files::write(&stage.path("f"), &bytes).unwrap();
    for at in [1, 9] {
        let file = OpenOptions::new().write(true).open(stage.path("f")).unwrap();
        file.write_all_at(b"changed", at << 20).unwrap();
        close(file).unwrap();
        bytes[(at << 20) as usize..][..7].copy_from_slice(b"changed");
        assert!(stage.store.bytes("f") == bytes);
    }
    assert!(stage.double().requests().of("UploadPartCopy") > 0, "{:?}", stage.double().requests().summary());
    assert_eq!(stage.store.unfinished_uploads(), Vec::<String>::new());
}

#[test]
fn error_in_the_200_of_complete() {
    arrives_in_spite_of(20 * MIB, When::operation("CompleteMultipartUpload").times(1), Fault::ErrorIn200("InternalError"));
}

#[test]
fn refused_connections() {
    arrives_in_spite_of(1000, When::operation("PutObject").times(3), Fault::Refuse);
}

/// close() succeeds only with the object in S3, whatever answered 200.
#[test]
fn a_captive_portal_is_no_success() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    store.put("old", "old");
    let stage = Stage::with(store, &["close_timeout=3s"]);
    let (small, large) = (b"x".to_vec(), noise(1, 20 * MIB));
    let store = |bytes: &[u8]| files::write(&stage.path("f"), bytes).is_err();
    for (operation, refused) in [
        ("PutObject", &(|| store(&small)) as &dyn Fn() -> bool),
        ("PutObject", &|| fs::create_dir(stage.path("d")).is_err()),
        ("CreateMultipartUpload", &|| store(&large)),
        ("UploadPart", &|| store(&large)),
        ("CompleteMultipartUpload", &|| store(&large)),
        ("DeleteObject", &|| fs::remove_file(stage.path("old")).is_err()),
        ("CopyObject", &|| fs::rename(stage.path("old"), stage.path("new")).is_err()),
    ] {
        stage.double().clear_faults();
        stage.double().fault(When::operation(operation), Fault::Html);
        assert!(refused(), "{operation}");
        assert_eq!(stage.store.keys(), ["old"], "{operation}");
    }
}

/// Promise 24: "Outages of minutes are ridden out."
#[test]
fn an_outage_of_seconds() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new(Store::double());
    let file = File::create(stage.path("f")).unwrap();
    stage.double().set_down(true);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_secs(6));
            stage.double().set_down(false);
        });
        file.write_all_at(&noise(1, 12 * MIB), 0).unwrap();
        close(file).unwrap();
    });
    assert!(stage.store.bytes("f") == noise(1, 12 * MIB));
}

/// Promise 2: "otherwise an errno. What S3 holds is whole either way: the old object"
/// Promise 23: "EACCES for 403"
/// Promise 24: "A parked file leaves the namespace: its name shows what S3 holds, so that a file manager's Retry works."
#[test]
fn a_refused_upload_is_close_s_error_and_leaves_the_old_object() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new(Store::double());
    stage.double().put_object(BUCKET, "f", Object::new("old"));
    for (size, operation) in [(1000, "PutObject"), (20 * MIB, "UploadPart"), (20 * MIB, "CreateMultipartUpload")] {
        stage.double().fault(When::operation(operation), Fault::Error(403, "AccessDenied"));
        let error = errno(files::write(&stage.path("f"), &noise(1, size)));
        assert_eq!(error, Errno::EACCES, "{operation}");
        stage.double().clear_faults();
        // "A parked file leaves the namespace: its name shows what S3 holds"
        assert_eq!(stage.store.bytes("f"), "old", "{operation}");
        stage.store.eventually("the name shows what S3 holds", |_| fs::read(stage.path("f")).unwrap() == b"old");
    }
    // "superseded by a new copy"
    files::write(&stage.path("f"), b"new").unwrap();
    assert_eq!(stage.store.bytes("f"), "new");
}

/// Promise 23: "ENOSPC for quota"
#[test]
fn a_full_account_says_so() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new(Store::double());
    stage.double().fault(When::operation("PutObject"), Fault::Error(403, "QuotaExceeded"));
    assert_eq!(errno(files::write(&stage.path("f"), b"x")), Errno::ENOSPC);
}

/// Promise 12: "O_EXCL creates only if the name is free in S3 too … a name taken meanwhile makes close() fail with EEXIST and parks ours,
/// whatever `on_conflict` says"
#[test]
fn exclusive_create_of_a_name_taken_meanwhile() {
    if !can_mount() {
        return;
    }
    let stage = Stage::with(Store::double(), &["on_conflict=overwrite"]);
    files::names(stage.dir());
    let mut ours = OpenOptions::new().write(true).create_new(true).open(stage.path("f")).unwrap();
    ours.write_all(b"ours").unwrap();
    stage.double().put_object(BUCKET, "f", Object::new("theirs"));
    assert_eq!(close(ours), Err(Errno::EEXIST));
    assert_eq!(stage.store.bytes("f"), "theirs");
}

/// Promise 12: "`on_conflict=keep` publishes ours beside theirs as `name (conflict of HOST DATE).ext`, close() returns 0"
#[test]
fn a_whole_new_content_is_kept_beside_theirs() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new(Store::double());
    let conflict = stage.conflict();
    assert_eq!(stage.store.bytes("report.txt"), "theirs");
    assert_eq!(stage.store.bytes(&conflict), "ours");
}

/// Promise 12: "any other change of a part answers ESTALE and is parked"
#[test]
fn a_changed_part_of_a_changed_file_is_stale() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new(Store::double());
    stage.double().put_object(BUCKET, "f", Object::new("base base base"));
    let ours = files::open_existing(&stage.path("f"));
    ours.write_all_at(b"OURS", 5).unwrap();
    stage.double().put_object(BUCKET, "f", Object::new("theirs is here"));
    assert_eq!(close(ours), Err(Errno::ESTALE));
    assert_eq!(stage.store.bytes("f"), "theirs is here");
}

/// Promise 12: "an O_APPEND handle appends again to theirs"
#[test]
fn an_append_is_done_again_on_theirs() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new(Store::double());
    stage.double().put_object(BUCKET, "log", Object::new("one\n"));
    let mut ours = OpenOptions::new().append(true).open(stage.path("log")).unwrap();
    ours.write_all(b"ours\n").unwrap();
    stage.double().put_object(BUCKET, "log", Object::new("one\ntheirs\n"));
    close(ours).unwrap();
    assert_eq!(stage.store.bytes("log"), "one\ntheirs\nours\n");
}

/// Promise 12: "`fail` answers ESTALE and parks; `overwrite` overwrites. Theirs deleted → ours is created."
#[test]
fn the_other_words_of_on_conflict() {
    if !can_mount() {
        return;
    }
    for (word, closes, holds) in [("fail", Err(Errno::ESTALE), "theirs"), ("overwrite", Ok(()), "ours")] {
        let store = Store::double();
        store.put("f", "base");
        store.put("g", "base");
        let stage = Stage::with(store, &[&format!("on_conflict={word}")]);
        let ours = OpenOptions::new().write(true).truncate(true).open(stage.path("f")).unwrap();
        ours.write_all_at(b"ours", 0).unwrap();
        stage.double().put_object(BUCKET, "f", Object::new("theirs"));
        assert_eq!(close(ours), closes, "{word}");
        assert_eq!(stage.store.bytes("f"), holds, "{word}");
        let ours = OpenOptions::new().write(true).truncate(true).open(stage.path("g")).unwrap();
        ours.write_all_at(b"ours", 0).unwrap();
        stage.double().delete_object(BUCKET, "g");
        close(ours).unwrap();
        assert_eq!(stage.store.bytes("g"), "ours", "{word}");
    }
}

/// A GET that ends early is gone on with; the reader notices nothing.
#[test]
fn reads_go_on_after_resets_and_short_bodies() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new(Store::double());
    let bytes = noise(7, 24 * MIB);
    stage.double().put_object(BUCKET, "f", Object::new(bytes.clone()));
    stage.double().fault(When::operation("GetObject").times(1), Fault::Reset(100_000));
    stage.double().fault(When::operation("GetObject").after(1).times(1), Fault::Truncate(50_000));
    stage.double().fault(When::operation("GetObject").after(2).times(1), Fault::Error(503, "SlowDown"));
    assert!(fs::read(stage.path("f")).unwrap() == bytes);
}

/// Promise 16: "A damaged byte is never delivered … for every object read whole that has a whole checksum"
#[test]
fn a_damaged_byte_is_never_delivered() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new(Store::double());
    let bytes = noise(8, 200_000);
    stage.double().put_object(BUCKET, "f", Object::new(bytes.clone()));
    stage.double().fault(When::operation("GetObject").times(1), Fault::Corrupt(77_777));
    let mut file = File::open(stage.path("f")).unwrap();
    let mut seen = Vec::new();
    match file.read_to_end(&mut seen) {
        Ok(_) => assert!(seen == bytes, "a damaged byte was delivered"),
        Err(error) => assert_eq!(error.raw_os_error(), Some(Errno::EIO as i32)),
    }
    drop(file);
    // "the cache dropped": asked again, it comes right.
    assert!(fs::read(stage.path("f")).unwrap() == bytes);
}

/// Promise 15: "A reader sees one version from open to close. If it was replaced and cannot be had any more: ESTALE. Never a mixture"
#[test]
fn a_reader_never_sees_two_versions() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new(Store::double());
    let old = noise(1, 40 * MIB);
    stage.double().put_object(BUCKET, "f", Object::new(old.clone()));
    let mut file = File::open(stage.path("f")).unwrap();
    let mut head = vec![0; 16 << 10];
    file.read_exact(&mut head).unwrap();
    stage.double().put_object(BUCKET, "f", Object::new(noise(2, 40 * MIB)));
    let mut rest = Vec::new();
    match file.read_to_end(&mut rest) {
        Ok(_) => assert!([head, rest].concat() == old, "a mixture of two versions"),
        Err(error) => {
            assert_eq!(error.raw_os_error(), Some(Errno::ESTALE as i32));
            assert!(old[head.len()..].starts_with(&rest), "a mixture of two versions");
        }
    }
    drop(file);
    // "A first open of a file listed or fetched within the last second asks nothing more."
    std::thread::sleep(Duration::from_millis(1100));
    assert!(fs::read(stage.path("f")).unwrap() == noise(2, 40 * MIB), "open() sees the change at once");
}

/// "an archived object lists, and opening it fails with EACCES and the remedy in the log"
#[test]
fn an_archived_object_lists_and_does_not_open() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new(Store::double());
    stage.double().put_object(BUCKET, "cold", Object::new("ice").class("GLACIER"));
    assert_eq!(files::names(stage.dir()), ["cold"]);
    assert_eq!(fs::metadata(stage.path("cold")).unwrap().len(), 3);
    assert_eq!(errno(File::open(stage.path("cold"))), Errno::EACCES);
    assert!(stage.mount.log().contains("restore"), "no remedy in the log: {}", stage.mount.log());
}

/// Promise 23: "EACCES for 403", and a listing's refusal is no empty directory.
#[test]
fn refusals_of_reading() {
    if !can_mount() {
        return;
    }
    let stage = Stage::with(Store::double(), &["metadata_ttl=0"]);
    stage.double().put_object(BUCKET, "d/f", Object::new("x"));
    assert_eq!(files::names(&stage.path("d")), ["f"]);
    stage.double().fault(When::any(), Fault::Error(403, "AccessDenied"));
    let refused = fs::read_dir(stage.path("d")).and_then(|mut entries| entries.next().transpose());
    assert_eq!(errno(refused), Errno::EACCES);
    let refused = File::open(stage.path("d/f")).and_then(|mut file| file.read(&mut [0; 1]));
    assert_eq!(errno(refused), Errno::EACCES);
    assert_eq!(errno(fs::create_dir(stage.path("e"))), Errno::EACCES);
}

/// Promise 22: "With the store gone, reads, lookups, listings, unlink, mkdir, rmdir and attribute changes end within 90 s by an errno"
#[test]
fn every_call_ends_with_the_store_gone() {
    if !can_mount() {
        return;
    }
    let stage = Stage::with(Store::double(), &["metadata_ttl=0", "close_timeout=5s"]);
    // A folder for each: the kernel lets no two of them change one at a time.
    for dir in ["read", "remove", "list", "change"] {
        stage.double().put_object(BUCKET, &format!("{dir}/f"), Object::new("x"));
        assert_eq!(files::names(&stage.path(dir)), ["f"]);
    }
    stage.double().set_down(true);
    let began = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| errno(fs::read(stage.path("read/f"))));
        scope.spawn(|| errno(fs::metadata(stage.path("unknown"))));
        scope.spawn(|| errno(fs::create_dir(stage.path("new"))));
        scope.spawn(|| errno(fs::remove_file(stage.path("remove/f"))));
        scope.spawn(|| errno(fs::read_dir(stage.path("list")).and_then(|mut names| names.next().transpose())));
        scope.spawn(|| errno(fs::set_permissions(stage.path("change/f"), fs::Permissions::from_mode(0o600))));
        scope.spawn(|| errno(files::write(&stage.path("w"), b"x")));
    });
    assert!(began.elapsed() < Duration::from_secs(90), "{:?}", began.elapsed());
    stage.double().set_down(false);
    assert_eq!(fs::read(stage.path("read/f")).unwrap(), b"x", "it works again when the store does");
}

/// A store that accepts and says nothing is given up like one that is gone.
#[test]
fn silence_ends_too() {
    if !can_mount() {
        return;
    }
    let stage = Stage::with(Store::double(), &["request_timeout=2s", "retries=1"]);
    stage.double().put_object(BUCKET, "f", Object::new("x"));
    stage.double().fault(When::operation("GetObject"), Fault::Stall(Duration::from_secs(60)));
    let began = Instant::now();
    assert_eq!(errno(fs::read(stage.path("f"))), Errno::ETIMEDOUT);
    assert!(began.elapsed() < Duration::from_secs(45), "{:?}", began.elapsed());
}

/// A body that stops coming is asked for again.
#[test]
fn a_stalled_body_is_resumed() {
    if !can_mount() {
        return;
    }
    let stage = Stage::with(Store::double(), &["request_timeout=2s"]);
    let bytes = noise(4, 3 * MIB);
    stage.double().put_object(BUCKET, "f", Object::new(bytes.clone()));
    stage.double().fault(When::operation("GetObject").times(1), Fault::StallBody(70_000, Duration::from_secs(60)));
    assert!(fs::read(stage.path("f")).unwrap() == bytes);
}

/// Promise 22: "Writing, closing and renaming go on while bytes move, and end `close_timeout` (5 min) after the last progress", not with
/// the deadline of lookups: inside the store a large object takes its time.
#[test]
fn a_rename_takes_as_long_as_the_store_works_on_it() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new(Store::double());
    stage.double().put_object(BUCKET, "big", Object::new("big"));
    stage.double().fault(When::operation("CopyObject"), Fault::Delay(Duration::from_secs(95)));
    fs::rename(stage.path("big"), stage.path("moved")).unwrap();
    assert_eq!(stage.store.keys(), ["moved"]);
    assert_eq!(files::names(stage.dir()), ["moved"]);
}

/// Promise 22: "Writing, closing and renaming go on while bytes move, and end `close_timeout` (5 min) after the last progress"; the old name
/// is then what it was.
#[test]
fn a_rename_that_stands_still_leaves_the_old_name_alone() {
    if !can_mount() {
        return;
    }
    let stage = Stage::with(Store::double(), &["close_timeout=3s"]);
    stage.double().put_object(BUCKET, "big", Object::new("big"));
    stage.double().put_object(BUCKET, "there", Object::new("there"));
    stage.double().fault(When::operation("CopyObject"), Fault::Stall(Duration::from_secs(600)));
    for target in ["moved", "there"] {
        assert_eq!(errno(fs::rename(stage.path("big"), stage.path(target))), Errno::ETIMEDOUT);
    }
    assert_eq!(stage.store.keys(), ["big", "there"]);
    assert_eq!(files::names(stage.dir()), ["big", "there"]);
    assert_eq!((fs::read(stage.path("big")).unwrap(), fs::read(stage.path("there")).unwrap()), (b"big".to_vec(), b"there".to_vec()));
    stage.double().clear_faults();
    fs::rename(stage.path("big"), stage.path("there")).unwrap();
    assert_eq!(stage.store.bytes("there"), "big");
}

/// renameat2(2), RENAME_NOREPLACE: what somebody else has made since the directory was listed is not replaced either.
#[test]
fn a_rename_without_replacing_asks_the_store() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new(Store::double());
    files::write(&stage.path("ours"), b"ours").unwrap();
    std::fs::create_dir(stage.path("dir")).unwrap();
    assert_eq!(files::names(stage.dir()), ["dir", "ours"]);
    stage.double().put_object(BUCKET, "target", Object::new("theirs"));
    stage.double().put_object(BUCKET, "there/x", Object::new("theirs"));
    for (from, to) in [("ours", "target"), ("dir", "there")] {
        let (from, to) = (stage.path(from), stage.path(to));
        let renamed = nix::fcntl::renameat2(AT_FDCWD, &from, AT_FDCWD, &to, RenameFlags::RENAME_NOREPLACE);
        assert_eq!(renamed, Err(Errno::EEXIST), "{}", to.display());
        assert!(from.exists());
    }
    assert_eq!((stage.store.bytes("ours"), stage.store.bytes("target")), ("ours".into(), "theirs".into()));
}

/// The same bytes made at two places are one file, not a conflict.
#[test]
fn equal_contents_are_no_conflict() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new(Store::double());
    for (name, bytes) in [("small", &b"the same"[..]), ("parts", &noise(7, 20 * MIB))] {
        let file = File::create(stage.path(name)).unwrap();
        file.write_all_at(bytes, 0).unwrap();
        stage.double().put_object(BUCKET, name, Object::new(bytes.to_vec()));
        close(file).unwrap();
        assert!(fs::read(stage.path(name)).unwrap() == bytes);
    }
    let file = OpenOptions::new().write(true).create_new(true).open(stage.path("lock")).unwrap();
    (&file).write_all(b"1").unwrap();
    stage.double().put_object(BUCKET, "lock", Object::new("1"));
    assert_eq!(close(file), Err(Errno::EEXIST), "only one made it");
    let keys = stage.store.keys();
    assert!(keys.iter().all(|key| !key.contains("conflict")), "{keys:?}");
}

/// Promise 12: "Somebody else's change since we opened the file (or, for a rename, since we saw its target) is not overwritten silently"
#[test]
fn a_directory_is_not_renamed_over_what_nobody_here_has_seen() {
    if !can_mount() {
        return;
    }
    let stage = Stage::with(Store::double(), &["metadata_ttl=1h"]);
    sh(stage.dir(), "mkdir from empty; echo ours > from/f");
    assert_eq!(files::names(stage.dir()), ["empty", "from"]);
    assert_eq!(files::names(&stage.path("empty")), Vec::<String>::new());
    for (to, expected) in [("empty", Errno::ENOTEMPTY), ("foreign", Errno::ENOTEMPTY)] {
        stage.double().put_object(BUCKET, &format!("{to}/f"), Object::new("theirs"));
        assert_eq!(errno(fs::rename(stage.path("from"), stage.path(to))), expected);
        assert_eq!(stage.store.bytes(&format!("{to}/f")), "theirs");
    }
    assert_eq!(fs::read(stage.path("from/f")).unwrap(), b"ours\n");
}

/// What somebody else changes below a directory while it is renamed is not deleted, whether or not the store honours ETags there.
#[test]
fn a_change_during_a_directory_s_rename_survives() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new(Store::double());
    sh(stage.dir(), "mkdir from; echo ours > from/f; echo ours > from/g");
    stage.double().fault(When::operation("CopyObject").key("to/g").times(1), Fault::Delay(Duration::from_millis(1500)));
    std::thread::scope(|scope| {
        let renamed = scope.spawn(|| fs::rename(stage.path("from"), stage.path("to")));
        stage.store.eventually("the first copy is there", |store| store.get("to/f").is_some());
        stage.double().put_object(BUCKET, "from/f", Object::new("theirs"));
        renamed.join().unwrap().unwrap();
    });
    assert_eq!((stage.store.bytes("from/f"), stage.store.bytes("to/f")), ("theirs".into(), "ours\n".into()));
    assert_eq!(stage.store.get("from/g").map(|seen| seen.bytes), None);
}
