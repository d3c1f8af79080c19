//! mkdir with `write_back`: a directory's marker is queued as a file is, durable meanwhile, and none is sent of a directory that went
//! before. Promises 2, 20, 24 and 26.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::time::Duration;

use crate::support::double::{Fault, Options, When};
use crate::support::faulty::{Fault as Wire, Faulty, When as OnWire};
use crate::support::files::{self, sh};
use crate::support::mount::{AWS, Mount, Setup, can_mount};
use crate::support::stage::{Stage, on_every_store};
use crate::support::store::Store;
use crate::write_back::{CHANGES, LATER, changes, counted, flush, spooled};

const TOLD: i64 = 981_173_106;

on_every_store! {
    /// Promise 20: "With `write_back` that object is queued as files are"
    fn a_tree_of_directories_is_queued(store) {
        store.put("kept", "x");
        let mut stage = Stage::with(store, &[LATER, "metadata_ttl=0"]);
        sh(stage.dir(), "mkdir -p a/b/c empty; echo content > a/b/f; chmod 750 a; touch -d '2001-02-03 04:05:06 UTC' a");
        assert_eq!(stage.store.keys(), ["kept"], "nothing was to be stored yet");
        let shown = |stage: &Stage| {
            assert_eq!(files::names(stage.dir()), ["a", "empty", "kept"]);
            assert_eq!(files::names(&stage.path("a/b")), ["c", "f"]);
            assert!(files::names(&stage.path("a/b/c")).is_empty());
            let told = fs::metadata(stage.path("a")).unwrap();
            assert_eq!((told.mtime(), told.permissions().mode() & 0o777), (TOLD, 0o750));
        };
        shown(&stage);
        flush(&stage);
        shown(&stage);
        stage.store.eventually("the spool is empty", |_| spooled(&stage.mount, "json").is_empty());
        stage.mount.remount();
        shown(&stage);
    }

    /// Promise 26: "kill -9 at any moment", of a mount on which folders were made.
    fn a_crash_forgets_no_directory(store) {
        let mut stage = Stage::with(store, &[LATER]);
        sh(stage.dir(), "mkdir -p a/b gone; chmod 750 a; rmdir gone; mkdir a/gone; rmdir a/gone; touch -d '2001-02-03 04:05:06 UTC' a");
        stage.mount.crash();
        assert_eq!(stage.store.keys(), Vec::<String>::new());
        stage.mount.again();
        assert_eq!((files::names(stage.dir()), files::names(&stage.path("a"))), (vec!["a".to_owned()], vec!["b".to_owned()]));
        flush(&stage);
        stage.mount.remount();
        assert_eq!((files::names(stage.dir()), files::names(&stage.path("a"))), (vec!["a".to_owned()], vec!["b".to_owned()]));
        let told = fs::metadata(stage.path("a")).unwrap();
        assert_eq!((told.mtime(), told.permissions().mode() & 0o777), (TOLD, 0o750));
    }

    /// What is queued goes with its directory's rename, and nothing is left under the old name.
    fn a_directory_is_renamed_before_its_marker_is_stored(store) {
        let mut stage = Stage::with(store, &[LATER, "metadata_ttl=0"]);
        sh(stage.dir(), "mkdir -p a/b; echo content > a/f; mv a c; mkdir d; mv d c/b/d; mkdir over; mv c over");
        assert_eq!(stage.store.keys(), Vec::<String>::new());
        assert_eq!(files::names(stage.dir()), ["over"]);
        sh(stage.dir(), "mv over/c top; rmdir over; mkdir onto; mv -T top onto");
        flush(&stage);
        stage.mount.remount();
        assert_eq!(files::names(stage.dir()), ["onto"]);
        assert_eq!((files::names(&stage.path("onto")), files::names(&stage.path("onto/b"))), (vec!["b".to_owned(), "f".to_owned()], vec!["d".to_owned()]));
        assert!(files::names(&stage.path("onto/b/d")).is_empty());
        assert_eq!(stage.store.bytes("onto/f"), "content\n");
    }

    /// A folder that was stored, removed and made again within the delay is there; the other way round it is gone.
    fn the_last_word_counts(store) {
        let mut stage = Stage::with(store, &[LATER, "metadata_ttl=0"]);
        sh(stage.dir(), "mkdir stays goes");
        flush(&stage);
        sh(stage.dir(), "rmdir stays; mkdir stays; rmdir stays; mkdir stays; rmdir goes; mkdir goes; rmdir goes");
        assert_eq!(files::names(stage.dir()), ["stays"]);
        stage.mount.crash();
        stage.mount.again();
        flush(&stage);
        assert_eq!(files::names(stage.dir()), ["stays"]);
        stage.mount.remount();
        assert_eq!(files::names(stage.dir()), ["stays"]);
    }
}

/// No request before its time, one a directory at its time, with the attributes set meanwhile, and none of what went before.
#[test]
fn a_directory_costs_one_request() {
    let Some(stage) = counted(&[LATER, "metadata_ttl=1h"], []) else { return };
    files::names(stage.dir());
    stage.double().reset_requests();
    stage.double().set_down(true);
    sh(stage.dir(), "mkdir a; chmod 750 a; mkdir a/b gone; rmdir gone; touch -d '2001-02-03 04:05:06 UTC' a");
    assert_eq!(stage.double().requests().total(), 0, "{:?}", stage.double().requests().summary());
    let records: Vec<String> = spooled(&stage.mount, "json").into_iter().map(|record| fs::read_to_string(record).unwrap()).collect();
    assert!(records.len() == 2 && records.iter().all(|record| record.contains("\"durable\":true")), "{records:?}");
    let status = stage.mount.status();
    assert!(status.contains("s3://releases/a/") && status.contains("s3://releases/a/b/"), "{status}");
    stage.double().set_down(false);
    flush(&stage);
    let requests = changes(&stage);
    assert_eq!((requests.of("PutObject"), requests.of_any(CHANGES)), (2, 2), "{:?}", requests.summary());
    assert_eq!(stage.store.keys(), ["a/", "a/b/"]);
    let metadata = stage.store.get("a/").unwrap().metadata;
    assert_eq!(stage.store.get("a/").unwrap().content_type.as_deref(), Some("application/x-directory"));
    assert!(metadata["mtime"].starts_with(&TOLD.to_string()) && metadata["mode"] == 0o40750.to_string(), "{metadata:?}");
    // Two seconds later nothing has followed.
    std::thread::sleep(Duration::from_millis(2500));
    assert_eq!(changes(&stage).of_any(CHANGES), 2);
}

/// Makes `d` and runs `meanwhile` while its marker is on its way.
fn during_its_upload(stage: &Stage, meanwhile: impl FnOnce()) {
    stage.double().fault(When::operation("PutObject").key("d/").times(1), Fault::Delay(Duration::from_secs(2)));
    fs::create_dir(stage.path("d")).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| flush(stage));
        stage.store.eventually("the marker is on its way", |_| stage.double().open() > 0);
        std::thread::sleep(Duration::from_millis(300));
        meanwhile();
    });
}

/// What is set while the marker is on its way follows it.
#[test]
fn attributes_set_during_the_upload_follow() {
    let Some(stage) = counted(&[LATER, "metadata_ttl=1h"], []) else { return };
    during_its_upload(&stage, || drop(sh(stage.dir(), "chmod 750 d")));
    let kept = |mode: u32| fs::metadata(stage.path("d")).unwrap().permissions().mode() & 0o777 == mode;
    assert!(kept(0o750));
    stage.store.eventually("the mode is in S3", |store| {
        store.get("d/").unwrap().metadata.get("mode").is_some_and(|mode| *mode == 0o40750.to_string())
    });
    assert_eq!(changes(&stage).of("PutObject"), 2);
    assert!(kept(0o750));
}

/// rmdir waits for a marker that is on its way, and removes it.
#[test]
fn a_directory_removed_during_its_upload_is_gone() {
    let Some(stage) = counted(&[LATER, "metadata_ttl=1h"], []) else { return };
    during_its_upload(&stage, || fs::remove_dir(stage.path("d")).unwrap());
    assert!(files::names(stage.dir()).is_empty());
    flush(&stage);
    assert_eq!(stage.store.keys(), Vec::<String>::new());
}

/// A listing that left the store before the marker came, and arrived after it, does not tell that there is none.
#[test]
fn a_marker_outlives_an_older_listing() {
    if !can_mount() {
        return;
    }
    // Elsewhere a directory is deleted whatever is known of its marker.
    let store = Store::double_with(Options { domain: Some(AWS.to_owned()), ..Options::default() });
    let faulty = Faulty::before(&store.endpoint());
    let setup = Setup::of(&store).taken_for_aws(&faulty.endpoint());
    let mount = Mount::start(setup.option("write_back=3s").option("metadata_ttl=2s"));
    fs::create_dir(mount.path("d")).unwrap();
    std::thread::sleep(Duration::from_millis(2100));
    faulty.fault(OnWire::any_of(&[]).containing("prefix=d"), Wire::Latency(Duration::from_millis(1400)));
    assert!(files::names(&mount.path("d")).is_empty());
    store.eventually("the marker is stored", |store| store.keys() == ["d/"]);
    fs::remove_dir(mount.path("d")).unwrap();
    mount.ask(&["flush"], mount.dir());
    assert_eq!(store.keys(), Vec::<String>::new());
}

/// Promise 24: "What cannot be stored stays in the spool, named with the reason by `packmule status`", a folder's marker too; what is
/// in the folder stays in reach.
#[test]
fn a_refused_marker_is_said_and_can_be_retried() {
    let Some(mut stage) = counted(&[LATER, "metadata_ttl=1s"], [("kept", "x")]) else { return };
    fs::write(stage.path("first"), "x").unwrap();
    flush(&stage);
    for key in ["empty/", "full/"] {
        stage.double().fault(When::operation("PutObject").key(key), Fault::Error(403, "AccessDenied"));
    }
    sh(stage.dir(), "mkdir empty full; echo content > full/f");
    let open = fs::OpenOptions::new().write(true).create_new(true).open(stage.path("full/open")).unwrap();
    let said = crate::write_back::flush_fails(&stage);
    assert!(said.contains("s3://releases/empty/") && said.contains("s3://releases/full/"), "{said}");
    let status = stage.mount.status();
    assert!(status.contains("empty/") && status.contains("is denied"), "{status}");
    std::thread::sleep(Duration::from_millis(1200));
    assert_eq!(files::names(stage.dir()), ["first", "full", "kept"]);
    assert_eq!(files::names(&stage.path("full")), ["f", "open"]);
    files::close(open).unwrap();
    stage.double().clear_faults();
    for key in ["s3://releases/empty/", "s3://releases/full/"] {
        let number = status
            .lines()
            .find(|line| line.contains(key))
            .and_then(|line| line.split_whitespace().find(|word| word.parse::<u64>().is_ok()));
        assert!(files::output(stage.mount.command().args(["retry", number.unwrap()])).status.success());
    }
    stage.store.eventually("the name shows what S3 holds", |_| files::names(stage.dir()) == ["empty", "first", "full", "kept"]);
    stage.mount.remount();
    assert_eq!(stage.store.keys(), ["empty/", "first", "full/", "full/f", "full/open", "kept"]);
    assert_eq!(stage.store.bytes("full/f"), "content\n");
}

/// Promise 2: "Credentials that may not write turn `write_back` off", for folders too.
#[test]
fn who_may_not_write_is_told_by_mkdir() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    for operation in ["PutObject", "UploadPart"] {
        store.as_double().unwrap().fault(When::operation(operation), Fault::Error(403, "AccessDenied"));
    }
    let stage = Stage::with(store, &[LATER]);
    assert_eq!(files::errno(fs::create_dir(stage.path("d"))), nix::errno::Errno::EACCES);
    assert!(files::names(stage.dir()).is_empty());
}
