//! What stays true when the store, the room or the mount's process goes: promises 22 to 27.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use packmule::s3::PutOptions;

use crate::support::client::{block_on, connect, source};
use crate::support::double::{Fault, When};
use crate::support::files::{self, close, errno, noise};
use crate::support::mount::{Mount, can_mount, is_mounted};
use crate::support::stage::{Stage, on_every_store};
use crate::support::store::Store;

const MIB: usize = 1 << 20;
const BUCKET: &str = "releases";

on_every_store! {
    /// Promise 25: "`packmule umount` … wait for the work"
    fn the_command_waits(store) {
        let mut stage = Stage::with(store, &["write_back=1h"]);
        for n in 0..4 {
            files::write(&stage.path(&format!("f{n}")), &noise(n, 5 * MIB)).unwrap();
        }
        assert_eq!(stage.store.keys(), Vec::<String>::new());
        stage.mount.umount_by_command();
        assert!(!is_mounted(stage.dir()));
        assert_eq!(stage.store.keys(), ["f0", "f1", "f2", "f3"]);
        assert!((0..4).all(|n| stage.store.bytes(&format!("f{n}")) == noise(n, 5 * MIB)));
    }

    /// Promise 26: "nothing torn is visible; uploads that nobody needs are aborted"
    fn killed_while_it_uploads(store) {
        store.put("old", "before");
        let mut stage = Stage::new(store);
        let files = ["new", "old"].map(|name| File::create(stage.path(name)).unwrap());
        for file in &files {
            file.write_all_at(&noise(1, 20 * MIB), 0).unwrap();
        }
        stage.store.eventually("parts of both are on their way", |store| store.unfinished_uploads().len() == 2);
        stage.mount.crash();
        drop(files);
        assert_eq!(stage.store.keys(), ["old"]);
        stage.mount.again();
        stage.store.eventually("the uploads are aborted", |store| store.unfinished_uploads().is_empty());
        assert_eq!(files::names(stage.dir()), ["old"]);
        assert_eq!(fs::read(stage.path("old")).unwrap(), b"before");
        stage.mount.umount_leaving("new");
        assert_eq!(stage.store.keys(), ["old"]);
    }

    /// Promise 26: "no uploads of ours stay behind in the bucket": the next mount aborts that of what is thrown away without one.
    fn thrown_away_without_a_mount(store) {
        // A name of its own: a command knows all mounts of the machine.
        let mut stage = Stage::new(store);
        let file = File::create(stage.path("thrown-away")).unwrap();
        file.write_all_at(&noise(1, 20 * MIB), 0).unwrap();
        stage.store.eventually("parts are on their way", |store| store.unfinished_uploads() == ["thrown-away"]);
        stage.mount.crash();
        drop(file);
        let key = format!("s3://{}/thrown-away", stage.store.bucket());
        let said = files::output(stage.mount.command().args(["discard", "--yes", &key]));
        assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
        assert!(String::from_utf8_lossy(&said.stderr).contains("its next mount aborts their upload"));
        assert_eq!(stage.store.unfinished_uploads(), ["thrown-away"]);
        stage.mount.again();
        stage.store.eventually("the upload is aborted", |store| store.unfinished_uploads().is_empty());
        assert_eq!(stage.store.keys(), Vec::<String>::new());
    }
}

/// Promise 22: "what is known locally is answered at once"
#[test]
fn what_is_known_needs_no_store() {
    if !can_mount() {
        return;
    }
    let stage = Stage::with(Store::double(), &["metadata_ttl=1h", "negative_metadata_ttl=1h"]);
    stage.store.put("d/f", "content");
    assert_eq!(files::names(&stage.path("d")), ["f"]);
    let open = File::open(stage.path("d/f")).unwrap();
    let mut bytes = [0; 7];
    open.read_exact_at(&mut bytes, 0).unwrap();
    stage.double().set_down(true);
    assert_eq!(files::names(&stage.path("d")), ["f"]);
    assert_eq!(fs::metadata(stage.path("d/f")).unwrap().len(), 7);
    assert_eq!(errno(fs::metadata(stage.path("d/none"))), Errno::ENOENT);
    open.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(&bytes, b"content");
    let new = File::create(stage.path("d/new")).unwrap();
    new.write_all_at(b"new", 0).unwrap();
    assert_eq!(fs::read(stage.path("d/new")).unwrap(), b"new");
    stage.double().set_down(false);
    close(new).unwrap();
    assert_eq!(stage.store.bytes("d/new"), "new");
}

/// Promise 22: "write(), close() and rename go on while bytes move, and end `close_timeout` (5 min) after the last progress."
/// Promise 23: "ETIMEDOUT or EHOSTUNREACH for the network"
#[test]
fn writing_ends_without_a_store() {
    if !can_mount() {
        return;
    }
    let stage = Stage::with(Store::double(), &["metadata_ttl=1h", "close_timeout=2s"]);
    assert_eq!(files::names(stage.dir()), Vec::<String>::new());
    stage.double().set_down(true);
    let unreachable = |error: Errno| matches!(error, Errno::ETIMEDOUT | Errno::EHOSTUNREACH);
    let (small, large) = (File::create(stage.path("small")).unwrap(), File::create(stage.path("large")).unwrap());
    small.write_all_at(b"x", 0).unwrap();
    let error = close(small).unwrap_err();
    assert!(unreachable(error), "close: {error}");
    // A writer that is ahead by more than the store may owe is held back, and not for ever.
    let error = errno(large.write_all_at(&noise(1, 60 * MIB), 0));
    assert!(unreachable(error), "write: {error}");
    assert!(close(large).is_err());
    assert_eq!(stage.store.keys(), Vec::<String>::new());
    stage.double().set_down(false);
    files::write(&stage.path("small"), b"again").unwrap();
    assert_eq!(stage.store.bytes("small"), "again");
}

/// Promise 22: "go on while bytes move": longer than `close_timeout`, as long as parts arrive.
#[test]
fn a_slow_store_is_waited_for() {
    if !can_mount() {
        return;
    }
    let stage = Stage::with(Store::double(), &["close_timeout=2s", "max_connections=1"]);
    stage.double().fault(When::operation("UploadPart"), Fault::Delay(std::time::Duration::from_millis(900)));
    let bytes = noise(1, 40 * MIB);
    files::write(&stage.path("f"), &bytes).unwrap();
    assert!(stage.store.bytes("f") == bytes);
    assert!(stage.double().requests().of("UploadPart") >= 5, "{:?}", stage.double().requests().summary());
}

/// Promise 23: "The errno is the one whose text helps: EACCES for 403, ENOSPC for quota and full disks, ENOENT for a vanished bucket … EFBIG"
/// Promise 23: "The whole story, with the S3 request id, is in status, the log"
#[test]
fn the_error_that_helps() {
    if !can_mount() {
        return;
    }
    let stage = Stage::with(Store::double(), &["metadata_ttl=1h"]);
    assert_eq!(files::names(stage.dir()), Vec::<String>::new());
    for (status, code, expected) in [
        (403, "AccessDenied", Errno::EACCES),
        (403, "InvalidAccessKeyId", Errno::EACCES),
        (403, "QuotaExceeded", Errno::ENOSPC),
        (404, "NoSuchBucket", Errno::ENOENT),
        (400, "KeyTooLongError", Errno::ENAMETOOLONG),
    ] {
        stage.double().fault(When::operation("PutObject"), Fault::Error(status, code));
        assert_eq!(errno(files::write(&stage.path(code), b"x")), expected, "{code}");
        let (told, log) = (stage.mount.status(), stage.mount.log());
        let story = told.lines().find(|line| line.contains(&format!("/{code}"))).unwrap_or_else(|| panic!("{code}: {told}"));
        assert!(story.contains("FAULT"), "{code}: no request id in status: {story}");
        assert!(
            log.lines().any(|line| line.contains(&format!("/{code}")) && line.contains("FAULT")),
            "{code}: no request id in the log: {log}"
        );
        stage.double().clear_faults();
    }
    let file = File::create(stage.path("endless")).unwrap();
    assert_eq!(errno(file.set_len(1 << 60)), Errno::EFBIG);
    assert_eq!(stage.store.keys(), Vec::<String>::new());
}

/// Promise 23: "The whole story, with the S3 request id, is in status, the log"
#[test]
fn an_outage_is_told_while_it_lasts() {
    if !can_mount() {
        return;
    }
    let stage = Stage::with(Store::double(), &["write_back=100ms"]);
    stage.double().fault(When::operation("PutObject"), Fault::Error(500, "InternalError"));
    files::write(&stage.path("f"), b"waits").unwrap();
    stage.store.eventually("status says why", |_| stage.mount.status().contains("InternalError"));
    stage.store.eventually("the log says why", |_| stage.mount.log().contains("InternalError"));
    stage.double().clear_faults();
    stage.store.eventually("it is stored", |store| store.keys() == ["f"]);
}

/// Promise 23: "ENOSPC for quota and full disks"
/// Promise 27: "write() answers ENOSPC when that cannot fit"
#[test]
fn a_full_disk_says_so() {
    if !can_mount() {
        return;
    }
    let stage = Stage::with(Store::double(), &["min_free_space=1000T"]);
    let file = File::create(stage.path("f")).unwrap();
    assert_eq!(errno(file.write_all_at(b"x", 0)), Errno::ENOSPC);
    assert_ne!(close(file), Err(Errno::ENOSPC));
    assert_eq!(stage.store.keys(), Vec::<String>::new());
}

/// Promise 25: "what cannot be finished is said and resumed at the next mount"
#[test]
fn what_an_unmount_leaves_is_resumed() {
    if !can_mount() {
        return;
    }
    let mut stage = Stage::with(Store::double(), &["write_back=1h", "close_timeout=2s"]);
    files::write(&stage.path("f"), &noise(1, 9 * MIB)).unwrap();
    stage.double().fault(When::operation("UploadPart"), Fault::Error(503, "SlowDown"));
    stage.mount.umount_leaving("f");
    assert_eq!(stage.store.keys(), Vec::<String>::new());
    stage.double().clear_faults();
    stage.mount.again();
    stage.store.eventually("the file is published", |store| store.get("f").is_some());
    assert!(stage.store.bytes("f") == noise(1, 9 * MIB));
    stage.store.eventually("nothing of the upload is left", |store| store.unfinished_uploads().is_empty());
}

/// Promise 26: "no uploads of ours stay behind in the bucket", not where the store was gone when they were to be aborted, either.
#[test]
fn what_could_not_be_aborted_is_aborted_later() {
    if !can_mount() {
        return;
    }
    for ends in [Mount::crash, |mount: &mut Mount| mount.umount_leaving("f")] as [fn(&mut Mount); 2] {
        let mut stage = Stage::with(Store::double(), &["close_timeout=2s", "retries=0"]);
        let file = File::create(stage.path("f")).unwrap();
        file.write_all_at(&noise(1, 20 * MIB), 0).unwrap();
        stage.store.eventually("parts are on their way", |store| store.unfinished_uploads() == ["f"]);
        stage.double().set_down(true);
        assert!(close(file).is_err());
        ends(&mut stage.mount);
        stage.double().set_down(false);
        assert_eq!(stage.store.unfinished_uploads(), ["f"]);
        stage.mount.again();
        stage.store.eventually("the upload is aborted", |store| store.unfinished_uploads().is_empty());
        assert!(stage.mount.status().contains("parked"), "{}", stage.mount.status());
    }
}

/// Promise 26: "one with parts that we did not record is somebody else's"
#[test]
fn somebody_else_s_upload_is_left_alone() {
    if !can_mount() {
        return;
    }
    let mut stage = Stage::new(Store::double());
    let theirs = block_on(async {
        let bucket = connect(&stage.store).bucket;
        let id = bucket.create_multipart("f", PutOptions::default()).await.unwrap();
        bucket.upload_part("f", &id, 1, source(noise(1, 6 * MIB)), None).await.unwrap();
        id
    });
    // Nobody told us the id of the first upload that we began: it is found among theirs.
    stage.double().fault(When::operation("CreateMultipartUpload").times(1), Fault::LostAnswer);
    let file = File::create(stage.path("f")).unwrap();
    file.write_all_at(&noise(2, 20 * MIB), 0).unwrap();
    stage.store.eventually("our upload is begun", |store| store.unfinished_uploads().len() >= 2);
    stage.mount.crash();
    drop(file);
    stage.mount.again();
    let left = || stage.double().unfinished_uploads(BUCKET);
    stage.store.eventually("ours is aborted", |_| left().len() <= 1);
    assert_eq!(left(), [("f".to_owned(), theirs.to_string())]);
    // A signal before the mount says that it is there would end it without a drain.
    stage.store.eventually("the mount is there", |_| stage.mount.log().matches("INFO mounted").count() == 2);
    stage.mount.umount_leaving("f");
    assert_eq!(stage.double().unfinished_uploads(BUCKET), [("f".to_owned(), theirs.to_string())]);
}

/// Promise 27: "write() … blocks only for space that others will free"
#[test]
fn a_writer_waits_for_the_room_of_an_upload() {
    if !can_mount() {
        return;
    }
    let stage = Stage::with(Store::double(), &["spool_size=24M"]);
    stage.double().fault(When::operation("CompleteMultipartUpload").key("first"), Fault::Error(503, "SlowDown"));
    let stored = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            files::write(&stage.path("first"), &noise(1, 16 * MIB)).unwrap();
            stored.store(true, Ordering::SeqCst);
        });
        stage.store.eventually("the first is complete but for the store", |_| stage.double().requests().of("CompleteMultipartUpload") > 0);
        let second = scope.spawn(|| files::write(&stage.path("second"), &noise(2, 16 * MIB)));
        std::thread::sleep(std::time::Duration::from_millis(300));
        assert!(!second.is_finished(), "16 MiB and 16 MiB are in a spool of 24 MiB");
        assert!(!stored.load(Ordering::SeqCst));
        stage.double().clear_faults();
        second.join().unwrap().unwrap();
        assert!(stored.load(Ordering::SeqCst), "the second had no room before the first was stored");
    });
    assert!(stage.store.bytes("first") == noise(1, 16 * MIB) && stage.store.bytes("second") == noise(2, 16 * MIB));
}

/// Promise 27: "Where only other uploads are in the way, writing waits for them.", not for the delay of what is queued.
#[test]
fn what_is_queued_goes_when_its_room_is_wanted() {
    if !can_mount() {
        return;
    }
    let stage = Stage::with(Store::double(), &["write_back=1h", "spool_size=24M", "close_timeout=20s"]);
    files::write(&stage.path("first"), &noise(1, 16 * MIB)).unwrap();
    assert_eq!(stage.store.keys(), Vec::<String>::new());
    files::write(&stage.path("second"), &noise(2, 16 * MIB)).unwrap();
    assert!(stage.store.bytes("first") == noise(1, 16 * MIB));
    assert!(fs::read(stage.path("second")).unwrap() == noise(2, 16 * MIB));
}

/// Promise 27: "if it does not fit, writing says so", also where it is many files of which each takes a block and its record another.
#[test]
fn small_files_fill_a_spool() {
    if !can_mount() {
        return;
    }
    let stage = Stage::with(Store::double(), &["write_back=1h", "spool_size=1M"]);
    stage.double().fault(When::operation("PutObject"), Fault::Error(403, "AccessDenied"));
    let refused = (0..300).map(|n| files::write(&stage.path(&format!("f{n}")), b"x")).find_map(Result::err);
    assert_eq!(refused.and_then(|error| error.raw_os_error()), Some(Errno::ENOSPC as i32));
}

/// Promise 27: "A file is in the spool until it is stored", where holes take nothing.
#[test]
fn holes_take_no_room() {
    if !can_mount() {
        return;
    }
    let stage = Stage::with(Store::double(), &["spool_size=16M"]);
    let sparse = File::create(stage.path("sparse")).unwrap();
    sparse.set_len(4 << 30).unwrap();
    sparse.write_all_at(b"end", (4 << 30) - 3).unwrap();
    files::write(&stage.path("other"), &noise(1, 4 * MIB)).unwrap();
    assert!(stage.store.bytes("other") == noise(1, 4 * MIB));
    // What is written into a hole is counted.
    let filled = (0..8).map(|n| sparse.write_all_at(&noise(n, 4 * MIB), n * 100 * MIB as u64)).find_map(Result::err);
    assert_eq!(filled.and_then(|error| error.raw_os_error()), Some(Errno::ENOSPC as i32));
    fs::remove_file(stage.path("sparse")).unwrap();
}
