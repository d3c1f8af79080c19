//! What the store refuses for good is not lost: parked with its reason, stored by a retry, copied out or thrown away, with or
//! without a mount. Promises 2, 6, 12, 23, 24 and 26.

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::process::Output;

use nix::errno::Errno;
use serde_json::Value;

use crate::support::double::{Fault, Object, When};
use crate::support::files::{self, close, errno, noise, sh};
use crate::support::mount::{Setup, can_mount, is_mounted};
use crate::support::stage::{Stage, on_every_store};
use crate::support::store::Store;

const MIB: usize = 1 << 20;
const BUCKET: &str = "releases";

/// A command of packmule beside the mount, or after it.
fn say(stage: &Stage, arguments: &[&str]) -> Output {
    files::output(stage.mount.command().args(arguments))
}

/// The same, which must succeed.
#[track_caller]
fn did(stage: &Stage, arguments: &[&str]) -> String {
    let said = say(stage, arguments);
    assert!(said.status.success(), "{arguments:?}: {}", complaint(&said));
    String::from_utf8_lossy(&said.stdout).into_owned()
}

/// The same, which must fail with one line (after what it names one by one).
#[track_caller]
fn failed(stage: &Stage, arguments: &[&str]) -> String {
    let said = say(stage, arguments);
    assert_eq!(said.status.code(), Some(1), "{arguments:?}: {}", complaint(&said));
    complaint(&said)
}

fn complaint(said: &Output) -> String {
    String::from_utf8_lossy(&said.stderr).into_owned()
}

/// Every upload of `packmule status --json`.
fn uploads(stage: &Stage) -> Vec<Value> {
    // Of its own mount alone, where there is one: those of other tests may be dead, which makes the whole fail.
    let mut command = stage.mount.command();
    command.args(["status", "--json"]).args(is_mounted(stage.dir()).then_some(stage.dir()));
    let told: Value = serde_json::from_slice(&files::output(&mut command).stdout).unwrap();
    let ours = |element: &&Value| {
        let home = stage.mount.home().to_str().unwrap();
        [&element["mountpoint"], &element["spool"]].iter().any(|place| place.as_str().is_some_and(|place| place.starts_with(home)))
    };
    told.as_array().unwrap().iter().filter(ours).flat_map(|element| element["uploads"].as_array().unwrap().clone()).collect()
}

/// The number of the parked upload of a key, once it is parked.
fn parked(stage: &Stage, key: &str) -> String {
    let find = || uploads(stage).into_iter().find(|upload| upload["key"] == key && upload["phase"] == "parked");
    stage.store.eventually(&format!("{key} is parked"), |_| find().is_some());
    find().unwrap()["number"].as_str().unwrap().to_owned()
}

/// Why an upload waits.
fn reason(stage: &Stage, number: &str) -> String {
    let upload = uploads(stage).into_iter().find(|upload| upload["number"] == number).unwrap();
    upload["reason"].as_str().unwrap_or_default().to_owned()
}

/// Nothing waits, and the spool's room is free again.
fn nothing_is_left(stage: &Stage) {
    stage.store.eventually("the spool is empty", |_| uploads(stage).is_empty() && spooled(stage).is_empty());
}

/// The bytes that the spool holds, by file.
fn spooled(stage: &Stage) -> Vec<std::path::PathBuf> {
    let spool = stage.mount.home().join("state/packmule/spool");
    let folders = fs::read_dir(spool).unwrap().map(|folder| folder.unwrap().path()).filter(|path| path.is_dir());
    let files = folders.flat_map(|folder| fs::read_dir(folder).unwrap().map(|file| file.unwrap().path()).collect::<Vec<_>>());
    files.filter(|file| file.extension().is_some_and(|extension| extension == "data")).collect()
}

/// A place to recover to.
fn place(stage: &Stage, name: &str) -> String {
    stage.mount.home().join(name).to_str().unwrap().to_owned()
}

/// One refusal: what the store answers, what close() says, and the words of the reason.
struct Refusal {
    status: u16,
    code: &'static str,
    closes: Errno,
    says: &'static str,
}

const REFUSALS: [Refusal; 4] = [
    Refusal { status: 400, code: "ExpiredToken", closes: Errno::EACCES, says: "have expired; sign in again" },
    Refusal { status: 403, code: "AccessDenied", closes: Errno::EACCES, says: "is denied: the credentials lack the right" },
    Refusal { status: 404, code: "NoSuchBucket", closes: Errno::ENOENT, says: "no such bucket: s3://releases; check its name" },
    Refusal { status: 403, code: "QuotaExceeded", closes: Errno::ENOSPC, says: "has no room" },
];

impl Refusal {
    fn begins(&self, stage: &Stage) {
        for operation in ["PutObject", "CompleteMultipartUpload"] {
            stage.double().fault(When::operation(operation), Fault::Error(self.status, self.code));
        }
    }

    /// Every request about the objects is refused, so that nothing can be mounted.
    fn is_total(&self, stage: &Stage) {
        stage.double().fault(When::any(), Fault::Error(self.status, self.code));
    }

    /// Small and large, overwritten and new; retried, copied out, thrown away; over a crash.
    fn loses_nothing(&self, options: &[&str]) {
        let waits = options.is_empty();
        let mut stage = Stage::with(Store::double(), options);
        let (small, large) = (noise(1, 1000), noise(2, 9 * MIB));
        let contents = [("d/small", &small), ("d/large", &large), ("d/new", &small), ("d/unwanted", &small)];
        for key in ["d/small", "d/large", "d/unwanted"] {
            stage.store.put(key, "old");
        }
        assert_eq!(files::names(&stage.path("d")), ["large", "small", "unwanted"]);
        self.begins(&stage);
        for (key, bytes) in contents {
            let closed = files::write(&stage.path(key), bytes);
            if waits {
                assert_eq!(errno(closed), self.closes, "{}: {key}", self.code);
            } else {
                closed.unwrap();
            }
        }
        let numbers = contents.map(|(key, _)| parked(&stage, key));
        for ((key, bytes), number) in contents.iter().zip(&numbers) {
            let why = reason(&stage, number);
            assert!(why.contains(self.says) && why.contains(self.code), "{key}: {why}");
            // "its name shows what S3 holds"
            let shown = fs::read(stage.path(key)).ok();
            assert_eq!(shown.as_deref(), stage.store.get(key).map(|seen| seen.bytes).as_deref(), "{key}");
            assert!(stage.store.get(key).is_none_or(|seen| seen.bytes == "old"), "{key}");
            let copy = place(&stage, &key.replace('/', "-"));
            did(&stage, &["recover", number, &copy]);
            assert!(fs::read(copy).unwrap() == **bytes, "{key}: other bytes were recovered");
        }
        // It is refused again, and says so.
        assert!(failed(&stage, &["retry", &numbers[0]]).contains(self.says));
        stage.mount.crash();
        stage.mount.again();
        assert_eq!(contents.map(|(key, _)| parked(&stage, key)), numbers, "a number is for life");
        stage.double().clear_faults();
        let [small, large, new, unwanted] = numbers.each_ref().map(String::as_str);
        did(&stage, &["retry", small]);
        did(&stage, &["retry", large]);
        did(&stage, &["retry", stage.path("d/new").to_str().unwrap()]);
        for (key, bytes) in &contents[..3] {
            assert!(stage.store.bytes(key) == ***bytes, "{key}: other bytes were stored");
            assert!(fs::read(stage.path(key)).unwrap() == **bytes, "{key}: the mount shows others");
        }
        for gone in [large, new] {
            assert!(failed(&stage, &["retry", gone]).contains("nothing in the spool"));
        }
        assert!(failed(&stage, &["discard", unwanted]).contains("--yes"));
        did(&stage, &["discard", "--yes", unwanted]);
        assert_eq!(fs::read(stage.path("d/unwanted")).unwrap(), b"old");
        assert_eq!(stage.store.bytes("d/unwanted"), "old");
        nothing_is_left(&stage);
        assert_eq!(stage.store.unfinished_uploads(), Vec::<String>::new());
    }
}

/// Promise 23: "EACCES for 403, ENOSPC for quota and full disks, ENOENT for a vanished bucket"
/// Promise 24: "What cannot be stored stays in the spool, named with the reason by `packmule status`"
#[test]
fn what_close_reported_is_not_lost() {
    if can_mount() {
        REFUSALS.iter().for_each(|refusal| refusal.loses_nothing(&[]));
    }
}

/// Promise 2: "With `write_back` it succeeds when the file is safe in the spool; `packmule status` lists it until it is stored."
/// Promise 24: "What cannot be stored stays in the spool, named with the reason by `packmule status`"
#[test]
fn what_the_background_could_not_store_is_not_lost() {
    if can_mount() {
        REFUSALS.iter().for_each(|refusal| refusal.loses_nothing(&["write_back=100ms"]));
    }
}

/// The credentials are read again once before they are said to have expired: somebody may have renewed them.
#[test]
fn expired_credentials_are_read_again_once() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    let file = store.home().join("credentials");
    let profile = |key: &str| format!("[default]\naws_access_key_id = {key}\naws_secret_access_key = {}\n", store.secret_key());
    fs::write(&file, profile(store.access_key())).unwrap();
    let mut setup = Setup::of(&store).env("AWS_SHARED_CREDENTIALS_FILE", file.to_str().unwrap());
    setup.env.retain(|(name, _)| !name.starts_with("AWS_ACCESS") && !name.starts_with("AWS_SECRET"));
    let stage = Stage { mount: crate::support::mount::Mount::start(setup), store };
    stage.double().fault(When::operation("PutObject").times(1), Fault::Error(400, "ExpiredToken"));
    stage.double().reset_requests();
    files::write(&stage.path("renewed"), b"in time").unwrap();
    assert_eq!(stage.double().reset_requests().of("PutObject"), 2);
    stage.double().fault(When::operation("PutObject"), Fault::Error(400, "ExpiredToken"));
    assert_eq!(errno(files::write(&stage.path("late"), b"too late")), Errno::EACCES);
    assert_eq!(stage.double().reset_requests().of("PutObject"), 2);
    let number = parked(&stage, "late");
    stage.double().clear_faults();
    did(&stage, &["retry", &number]);
    assert_eq!(stage.store.bytes("late"), "too late");
    nothing_is_left(&stage);
}

on_every_store! {
    /// Promise 12: "changing a part of a file, or creating one that must not exist (`O_EXCL`), fails and the bytes stay in the spool. `on_conflict=fail` always fails"
    fn conflicts_are_not_lost(store) {
        let mut stage = Stage::with(store, &["on_conflict=fail"]);
        stage.store.put("d/conflict", "base");
        assert_eq!(files::names(&stage.path("d")), ["conflict"]);
        let changed = OpenOptions::new().write(true).truncate(true).open(stage.path("d/conflict")).unwrap();
        let mut taken = OpenOptions::new().write(true).create_new(true).open(stage.path("d/taken")).unwrap();
        changed.write_all_at(b"our change", 0).unwrap();
        taken.write_all(b"our lock").unwrap();
        for key in ["d/conflict", "d/taken"] {
            stage.store.put(key, "theirs");
        }
        assert_eq!((close(changed), close(taken)), (Err(Errno::ESTALE), Err(Errno::EEXIST)));
        for (key, ours, says) in [("d/conflict", &b"our change"[..], "somebody else"), ("d/taken", b"our lock", "was taken in S3")] {
            let number = parked(&stage, key);
            assert!(reason(&stage, &number).contains(says), "{}", reason(&stage, &number));
            stage.store.eventually("its name shows what S3 holds", |_| fs::read(stage.path(key)).is_ok_and(|shown| shown == b"theirs"));
            let copy = place(&stage, "copy");
            did(&stage, &["recover", "--force", &number, &copy]);
            assert_eq!(fs::read(copy).unwrap(), ours);
            assert!(failed(&stage, &["retry", &number]).contains(says));
            assert_eq!(stage.store.bytes(key), "theirs");
            stage.mount.crash();
            stage.mount.again();
            assert_eq!(parked(&stage, key), number);
            stage.store.delete(key);
            did(&stage, &["retry", &number]);
            assert_eq!(stage.store.bytes(key), ours);
        }
        nothing_is_left(&stage);
    }

    /// Promise 24: "What cannot be stored stays in the spool, named with the reason by `packmule status`"
    fn what_an_earlier_mount_left_needs_no_mount(store) {
        let mut stage = Stage::with(store, &["on_conflict=fail"]);
        stage.store.put("parked", "base");
        assert_eq!(files::names(stage.dir()), ["parked"]);
        let bytes = noise(3, 6 * MIB);
        let ours = OpenOptions::new().write(true).truncate(true).open(stage.path("parked")).unwrap();
        ours.write_all_at(&bytes, 0).unwrap();
        // A hole takes no room where it is copied to either.
        ours.set_len(64 * MIB as u64).unwrap();
        stage.store.put("parked", "theirs");
        assert_eq!(close(ours), Err(Errno::ESTALE));
        let number = parked(&stage, "parked");
        let open = File::create(stage.path("left open")).unwrap();
        open.write_all_at(b"never closed", 0).unwrap();
        open.sync_all().unwrap();
        let running = did(&stage, &["status", stage.dir().to_str().unwrap()]);
        assert!(running.contains(&format!("packmule retry {number}")), "{running}");
        stage.mount.crash();
        drop(open);
        let text = String::from_utf8(say(&stage, &["status"]).stdout).unwrap();
        assert!(text.contains("left by an earlier mount") && text.contains("left open"), "{text}");
        assert!(text.contains(&format!("packmule recover {number} FILE")) && !text.contains(&format!("packmule retry {number}")), "{text}");
        assert_eq!(parked(&stage, "parked"), number, "the number is the same without a mount");
        assert!(failed(&stage, &["retry", &number]).contains("mount its bucket again"));
        let copy = place(&stage, "copy");
        did(&stage, &["recover", &number, &copy]);
        let mut whole = bytes.clone();
        whole.resize(64 * MIB, 0);
        assert!(fs::read(&copy).unwrap() == whole);
        assert!(std::os::unix::fs::MetadataExt::blocks(&fs::metadata(&copy).unwrap()) * 512 < 32 * MIB as u64, "the hole was written");
        // Not over what is there, unless it is said.
        assert!(failed(&stage, &["recover", &number, &copy]).contains("--force"));
        did(&stage, &["recover", "--force", &number, &copy]);
        let bucket = stage.store.bucket().to_owned();
        let said = say(&stage, &["recover", &format!("s3://{bucket}/left open"), "-"]);
        assert_eq!((said.status.code(), said.stdout.as_slice()), (Some(0), &b"never closed"[..]));
        did(&stage, &["discard", "--yes", &format!("s3://{bucket}/left open")]);
        assert_eq!(uploads(&stage).len(), 1);
        stage.mount.again();
        assert_eq!(uploads(&stage).len(), 1);
        assert_eq!(parked(&stage, "parked"), number);
        stage.store.delete("parked");
        did(&stage, &["retry", "--all", stage.dir().to_str().unwrap()]);
        assert!(stage.store.bytes("parked") == whole);
        nothing_is_left(&stage);
    }
}

/// Promise 24: "or the same file is copied again": what is parked then is gone, whoever stores the newer one, and no retry brings it back.
#[test]
fn what_is_copied_again_is_superseded() {
    if !can_mount() {
        return;
    }
    for option in ["write_back=0", "write_back=1s"] {
        let stage = Stage::with(Store::double(), &[option, "on_conflict=overwrite"]);
        let refused = |key: &str| {
            if let Some((directory, _)) = key.rsplit_once('/') {
                fs::create_dir(stage.path(directory)).unwrap();
            }
            stage.double().fault(When::operation("PutObject").key(key), Fault::Error(403, "AccessDenied"));
            // With `write_back` nobody is told but status.
            let _ = files::write(&stage.path(key), b"old");
            let number = parked(&stage, key);
            stage.double().clear_faults();
            stage.store.eventually("its name shows what S3 holds", |_| !stage.path(key).exists());
            number
        };
        let alone = || stage.store.eventually("all else is stored", |_| spooled(&stage).len() == 1);
        let gone = |number: &str| {
            stage.store.eventually("what was parked is gone", |_| uploads(&stage).is_empty());
            assert!(failed(&stage, &["retry", number]).contains(number));
        };
        let copied = refused("copied");
        files::write(&stage.path("copied"), b"new").unwrap();
        gone(&copied);
        let renamed = refused("renamed");
        files::write(&stage.path("other"), b"new").unwrap();
        alone();
        fs::rename(stage.path("other"), stage.path("renamed")).unwrap();
        gone(&renamed);
        let linked = refused("linked");
        std::os::unix::fs::symlink("copied", stage.path("linked")).unwrap();
        gone(&linked);
        let moved = refused("d/moved");
        sh(stage.dir(), "rm -r d; mkdir e; printf new > e/moved");
        alone();
        fs::rename(stage.path("e"), stage.path("d")).unwrap();
        gone(&moved);
        for key in ["copied", "renamed", "d/moved"] {
            assert_eq!(stage.store.bytes(key), "new", "{option}: {key}");
        }
        nothing_is_left(&stage);
    }
}

/// A bucket that vanished is never mounted again: what was queued for it is copied out and thrown away all the same.
#[test]
fn a_bucket_that_vanished_takes_nothing_along() {
    if !can_mount() {
        return;
    }
    let mut stage = Stage::with(Store::double(), &["write_back=1h"]);
    files::write(&stage.path("queued"), b"safe in the spool").unwrap();
    stage.mount.crash();
    REFUSALS[2].is_total(&stage);
    let waiting = uploads(&stage);
    assert_eq!((waiting.len(), &waiting[0]["phase"]), (1, &Value::from("sealed")));
    let number = waiting[0]["number"].as_str().unwrap();
    let copy = place(&stage, "copy");
    did(&stage, &["recover", number, &copy]);
    assert_eq!(fs::read(copy).unwrap(), b"safe in the spool");
    did(&stage, &["discard", "-y", number]);
    assert!(uploads(&stage).is_empty() && spooled(&stage).is_empty());
}

/// The same on a mount of all buckets, which goes on without it.
#[test]
fn a_bucket_of_many_that_vanished_is_waited_for() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    let second = store.second_bucket();
    let setup = Setup::of(&store).source("s3://").option("write_back=1h");
    let mut stage = Stage { mount: crate::support::mount::Mount::start(setup), store };
    for name in ["queued", "unwanted"] {
        files::write(&stage.path(&format!("{second}/{name}")), name.as_bytes()).unwrap();
    }
    stage.mount.crash();
    stage.double().fault(When::bucket(&second), Fault::Error(404, "NoSuchBucket"));
    stage.mount.again();
    let waiting = uploads(&stage);
    let numbers: Vec<&str> = waiting.iter().map(|upload| upload["number"].as_str().unwrap()).collect();
    assert_eq!(numbers.len(), 2, "{waiting:?}");
    assert!(waiting[0]["reason"].as_str().unwrap().contains("its bucket cannot be reached: no such bucket"), "{waiting:?}");
    let copy = place(&stage, "copy");
    did(&stage, &["recover", numbers[0], &copy]);
    assert_eq!(fs::read(copy).unwrap(), b"queued");
    assert!(failed(&stage, &["retry", numbers[0]]).contains("no such bucket"));
    did(&stage, &["discard", "--yes", numbers[1]]);
    // It keeps nobody from unmounting, and is there again afterwards.
    stage.mount.remount();
    assert_eq!(uploads(&stage)[0]["number"], numbers[0]);
    stage.double().clear_faults();
    did(&stage, &["retry", numbers[0]]);
    assert_eq!(stage.double().object(&second, "queued").unwrap().bytes, "queued");
    nothing_is_left(&stage);
    assert_eq!(stage.double().keys(&second), ["queued"]);
}

/// What a changed file has in common with its object is fetched where that can be had; else it is said what is missing.
#[test]
fn a_change_is_recovered_with_what_it_changed() {
    if !can_mount() {
        return;
    }
    let mut stage = Stage::new(Store::double());
    let old = noise(1, 3 * MIB);
    stage.double().put_object(BUCKET, "f", Object::new(old.clone()));
    stage.double().put_object(BUCKET, "g", Object::new(old.clone()));
    assert_eq!(files::names(stage.dir()), ["f", "g"]);
    let mut changed = old.clone();
    changed[MIB..MIB + 4].copy_from_slice(b"OURS");
    stage.double().fault(When::operation("PutObject"), Fault::Error(403, "AccessDenied"));
    for key in ["f", "g"] {
        let file = files::open_existing(&stage.path(key));
        file.write_all_at(b"OURS", MIB as u64).unwrap();
        if key == "g" {
            stage.double().put_object(BUCKET, key, Object::new("theirs"));
        }
        assert!(close(file).is_err(), "{key}");
    }
    let copy = place(&stage, "copy");
    did(&stage, &["recover", &parked(&stage, "f"), &copy]);
    assert!(fs::read(&copy).unwrap() == changed);
    // What is unlike the object cannot come from it.
    stage.mount.crash();
    let said = failed(&stage, &["recover", "--force", &parked(&stage, "g"), &copy]);
    assert!(said.contains(&format!("bytes 0 to {MIB}, {} to {}", MIB + 4, 3 * MIB)), "{said}");
    let recovered = fs::read(&copy).unwrap();
    assert!(recovered.len() == 3 * MIB && &recovered[MIB..MIB + 4] == b"OURS" && recovered[..MIB].iter().all(|byte| *byte == 0));
}

/// Promise 6: "A file that could not be written completely is never stored."
#[test]
fn a_file_that_a_write_failed_of_is_not_retried() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new(Store::double());
    stage.double().fault(When::operation("CreateMultipartUpload"), Fault::Error(403, "AccessDenied"));
    let file = File::create(stage.path("f")).unwrap();
    let bytes = noise(1, 8 * MIB);
    file.write_all_at(&bytes, 0).unwrap();
    // The part that was sent ahead is refused; what is written then is told so at once.
    stage.store.eventually("the part is refused", |_| uploads(&stage).iter().any(|upload| upload["reason"].is_string()));
    assert_eq!(errno(file.write_all_at(b"more", bytes.len() as u64)), Errno::EACCES);
    assert_eq!(close(file), Err(Errno::EACCES));
    let number = parked(&stage, "f");
    stage.double().clear_faults();
    let status = stage.mount.status();
    assert!(!status.contains("packmule retry") && status.contains("copy the file again"), "{status}");
    assert!(failed(&stage, &["retry", &number]).contains("is not published"));
    did(&stage, &["retry", "--all", stage.dir().to_str().unwrap()]);
    assert_eq!(stage.store.keys(), Vec::<String>::new());
    let copy = place(&stage, "copy");
    did(&stage, &["recover", &number, &copy]);
    assert!(fs::read(copy).unwrap().starts_with(&bytes));
}

/// What is being written is nobody's to retry, discard or copy out of the spool.
#[test]
fn an_open_file_is_left_to_its_writer() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new(Store::double());
    // Root sees the mounts of other tests too: a key of its own.
    let file = File::create(stage.path("half written")).unwrap();
    file.write_all_at(b"half", 0).unwrap();
    let url = format!("s3://{BUCKET}/half written");
    assert!(failed(&stage, &["retry", &url]).contains("not parked"));
    assert!(failed(&stage, &["discard", "--yes", &url]).contains("not parked"));
    assert!(failed(&stage, &["recover", &url, "-"]).contains("still being written"));
    close(file).unwrap();
    assert_eq!(stage.store.bytes("half written"), "half");
    for nonsense in ["1", "s3://releases/none", "/nowhere"] {
        assert_eq!(failed(&stage, &["recover", nonsense, "-"]).lines().count(), 1);
    }
}

/// Promise 12: "New content is stored beside theirs as `name (conflict of HOST DATE).ext`", and status says so.
#[test]
fn a_conflict_copy_is_told_of() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new(Store::double());
    let kept = stage.conflict();
    let status = stage.mount.status();
    let line = status.lines().find(|line| line.contains(&kept)).unwrap_or_else(|| panic!("{status}"));
    assert!(line.contains("s3://releases/report.txt") && line.contains("kept beside it"), "{line}");
    let told: Value = serde_json::from_str(&stage.mount.ask(&["status", "--json"], stage.dir())).unwrap();
    assert_eq!(told[0]["conflicts"][0]["kept_as"], Value::from(kept));
}
