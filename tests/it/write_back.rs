//! `write_back=DELAY`: what is queued costs no request until its time, is safe meanwhile, and goes at once when asked to.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use nix::errno::Errno;

use crate::support::double::{Fault, Requests, When};
use crate::support::faulty::{Fault as Wire, Faulty, When as OnWire};
use crate::support::files::{self, close, errno, noise, output, sh};
use crate::support::mount::{Mount, Setup, can_mount};
use crate::support::stage::{Stage, on_every_store};
use crate::support::store::Store;

/// Longer than any test: what goes before goes because it was asked to.
pub const LATER: &str = "write_back=1h";
pub const DELETES: &[&str] = &["DeleteObject", "DeleteObjects"];
pub const CHANGES: &[&str] = &["PutObject", "CopyObject", "CreateMultipartUpload", "DeleteObject", "DeleteObjects"];

/// A mount of a double with these objects; what it asks from now on is counted.
pub fn counted<'a>(options: &[&str], objects: impl IntoIterator<Item = (&'a str, &'a str)>) -> Option<Stage> {
    if !can_mount() {
        return None;
    }
    let store = Store::double();
    for (key, bytes) in objects {
        store.put(key, bytes);
    }
    let stage = Stage::with(store, options);
    stage.double().reset_requests();
    Some(stage)
}

pub fn flush(stage: &Stage) {
    stage.mount.ask(&["flush"], stage.dir());
}

/// What `packmule flush` says that must fail.
pub fn flush_fails(stage: &Stage) -> String {
    let said = output(stage.mount.command().arg("flush").arg(stage.dir()));
    assert!(!said.status.success(), "{said:?}");
    String::from_utf8_lossy(&said.stderr).into_owned()
}

pub fn changes(stage: &Stage) -> Requests {
    let requests = stage.double().requests();
    eprintln!("{:?}", requests.summary());
    requests
}

/// Nobody on the mount sees a name, whichever way they look.
pub fn assert_gone(stage: &Stage, name: &str) {
    let path = stage.path(name);
    let directory = path.parent().unwrap();
    let last = path.file_name().unwrap().to_str().unwrap().to_owned();
    assert!(!files::names(directory).contains(&last), "{name} is listed");
    assert_eq!(errno(fs::metadata(&path)), Errno::ENOENT, "{name}");
    assert_eq!(errno(fs::read(&path)), Errno::ENOENT, "{name}");
}

/// Files of the mount's spool with this extension.
pub fn spooled(mount: &Mount, extension: &str) -> Vec<PathBuf> {
    let spool = mount.home().join("state/packmule/spool");
    let folders = fs::read_dir(&spool).unwrap_or_else(|error| panic!("{}: {error}", spool.display()));
    let files = folders.flatten().filter_map(|folder| fs::read_dir(folder.path()).ok()).flatten().flatten();
    files.map(|file| file.path()).filter(|path| path.extension().is_some_and(|found| found == extension)).collect()
}

on_every_store! {
    /// Promise 11: "With `write_back` deletes are queued"
    fn a_tree_is_removed(store) {
        for n in 0..30 {
            store.put(&format!("t/d{}/f{n}", n % 3), "x");
        }
        store.put("t/d0/a b&<c>é", "x");
        store.put("kept", "x");
        let mut stage = Stage::with(store, &[LATER, "metadata_ttl=0"]);
        fs::create_dir(stage.path("t/made")).unwrap();
        let before = stage.store.keys();
        sh(stage.dir(), "rm -r t");
        assert_eq!(stage.store.keys(), before, "nothing was to be deleted yet");
        assert_gone(&stage, "t");
        assert_eq!(files::names(stage.dir()), ["kept"]);
        stage.mount.umount();
        assert_eq!(stage.store.keys(), ["kept"]);
    }

    /// Promise 11: "With `write_back` deletes are queued", also when what was removed is made anew.
    fn what_is_made_anew_stays(store) {
        store.put("f", "before");
        store.put("d/x", "before");
        store.put("g", "moved");
        store.put("h", "before");
        let mut stage = Stage::with(store, &[LATER, "metadata_ttl=0"]);
        sh(stage.dir(), "rm f h; rm -r d; echo after > f; mkdir d; echo after > d/y; mv g h; ln -s f l");
        assert_eq!(files::names(stage.dir()), ["d", "f", "h", "l"]);
        assert_eq!(files::names(&stage.path("d")), ["y"]);
        stage.mount.remount();
        assert_eq!(files::names(stage.dir()), ["d", "f", "h", "l"]);
        assert_eq!(stage.store.bytes("f"), "after\n");
        assert_eq!(stage.store.bytes("d/y"), "after\n");
        assert_eq!(stage.store.bytes("h"), "moved");
        assert!(stage.store.get("d/x").is_none() && stage.store.get("g").is_none());
    }

    /// Promise 26: "kill -9 at any moment", of a mount that has removed names.
    fn a_crash_forgets_no_delete(store) {
        for n in 0..10 {
            store.put(&format!("t/f{n}"), "x");
        }
        store.put("kept", "x");
        let mut stage = Stage::with(store, &[LATER]);
        sh(stage.dir(), "rm -r t");
        stage.mount.crash();
        assert_eq!(stage.store.keys().len(), 11);
        stage.mount.again();
        assert_eq!(files::names(stage.dir()), ["kept"]);
        stage.store.eventually("the deletes are done", |store| store.keys() == ["kept"]);
        stage.store.eventually("their records are gone", |_| spooled(&stage.mount, "delete").is_empty());
    }
}

/// close() asks nothing of the store; bytes and intent are durable in the spool when it returns.
#[test]
fn close_returns_before_any_request() {
    let Some(stage) = counted(&[LATER, "metadata_ttl=1h"], []) else { return };
    files::names(stage.dir());
    stage.double().reset_requests();
    stage.double().set_down(true);
    files::write(&stage.path("f"), &noise(1, 9 << 20)).unwrap();
    assert_eq!(stage.double().requests().total(), 0);
    let records = spooled(&stage.mount, "json");
    assert_eq!(records.len(), 1);
    let record = fs::read_to_string(&records[0]).unwrap();
    assert!(record.contains("\"durable\":true") && record.contains("\"phase\":\"sealed\""), "{record}");
    assert!(fs::read(records[0].with_extension("data")).unwrap() == noise(1, 9 << 20));
    stage.double().set_down(false);
}

/// Rename, rewrite and delete before the upload cost no request, and several closes are one upload.
#[test]
fn what_changes_before_its_upload_costs_one_upload() {
    let Some(stage) = counted(&[LATER, "metadata_ttl=1h"], [("old", "before")]) else { return };
    files::names(stage.dir());
    stage.double().reset_requests();
    files::write(&stage.path("a"), b"one").unwrap();
    files::write(&stage.path("a"), b"two").unwrap();
    OpenOptions::new().append(true).open(stage.path("a")).unwrap().write_all(b"three").unwrap();
    fs::rename(stage.path("a"), stage.path("b")).unwrap();
    fs::rename(stage.path("b"), stage.path("c")).unwrap();
    sh(stage.dir(), "chmod 600 c; touch -d '2001-02-03 04:05:06 UTC' c; echo x > gone; rm gone");
    assert_eq!(stage.double().requests().total(), 0, "{:?}", stage.double().requests().summary());
    flush(&stage);
    let requests = changes(&stage);
    assert_eq!((requests.of("PutObject"), requests.of_any(CHANGES)), (1, 1), "{:?}", requests.summary());
    assert_eq!(stage.store.bytes("c"), "twothree");
    assert!(stage.store.get("c").unwrap().metadata["mtime"].starts_with("981173106"));

    // An overwrite that is renamed: the new content, and the old name's delete.
    stage.double().reset_requests();
    sh(stage.dir(), "echo after > old; mv old new");
    assert_eq!(changes(&stage).of_any(CHANGES), 0);
    assert_eq!(files::names(stage.dir()), ["c", "new"]);
    flush(&stage);
    let requests = changes(&stage);
    assert_eq!((requests.of("PutObject"), requests.of_any(CHANGES)), (1, 2), "{:?}", requests.summary());
    assert_eq!(stage.store.keys(), ["c", "new"]);
}

/// Several closes of a file within the delay are one upload, which comes by itself.
#[test]
fn several_closes_are_one_upload() {
    let Some(stage) = counted(&["write_back=3s"], []) else { return };
    for turn in 0..5 {
        files::write(&stage.path("f"), format!("turn {turn}").as_bytes()).unwrap();
    }
    stage.store.eventually("the last one is in S3", |store| store.get("f").is_some_and(|seen| seen.bytes == "turn 4"));
    let requests = changes(&stage);
    assert_eq!(requests.of("PutObject"), 1, "{:?}", requests.summary());
}

/// Small files are uploaded many at once.
#[test]
fn small_files_travel_together() {
    let Some(stage) = counted(&[LATER], []) else { return };
    stage.double().fault(When::operation("PutObject"), Fault::Delay(Duration::from_millis(100)));
    for n in 0..40 {
        files::write(&stage.path(&format!("f{n}")), b"content").unwrap();
    }
    flush(&stage);
    let requests = changes(&stage);
    assert_eq!(requests.of("PutObject"), 40);
    assert!(requests.peak >= 8, "{} at once", requests.peak);
}

/// `packmule umount` starts what is queued at once; umount(8) does in `fstab::mount_and_umount`, SIGTERM above.
#[test]
fn umount_starts_the_queue() {
    let Some(mut stage) = counted(&[LATER], [("gone", "x")]) else { return };
    sh(stage.dir(), "echo content > f; rm gone");
    stage.mount.umount_by_command();
    assert_eq!(stage.store.keys(), ["f"]);
}

/// What is closed or removed while a flush waits is started too, and waited for.
#[test]
fn a_flush_takes_along_what_comes_meanwhile() {
    let Some(stage) = counted(&[LATER, "close_timeout=30s"], [("gone", "x")]) else { return };
    sh(stage.dir(), "echo content > first");
    stage.double().fault(When::operation("PutObject").key("first"), Fault::Error(503, "SlowDown"));
    std::thread::scope(|scope| {
        let flushes = scope.spawn(|| flush(&stage));
        stage.store.eventually("the flush waits", |_| changes(&stage).of("PutObject") > 0);
        sh(stage.dir(), "echo content > second; rm gone");
        stage.store.eventually("what came is done", |store| store.keys() == ["second"]);
        assert!(!flushes.is_finished());
        stage.double().clear_faults();
        flushes.join().unwrap();
    });
    assert_eq!(stage.store.keys(), ["first", "second"]);
    // The delay is back.
    sh(stage.dir(), "echo content > third; rm first");
    assert!(stage.mount.status().contains("/third") && stage.mount.status().contains("/first"), "{}", stage.mount.status());
    assert_eq!(stage.store.keys(), ["first", "second"]);
}

/// From when the end of a mount is asked for nobody begins to write; what was begun ends, and is stored with the rest.
#[test]
fn an_ending_mount_refuses_new_writers() {
    let Some(mut stage) = counted(&[LATER], [("gone", "x"), ("kept", "x")]) else { return };
    sh(stage.dir(), "echo content > first");
    stage.double().fault(When::operation("PutObject").key("first"), Fault::Error(503, "SlowDown"));
    let open = fs::File::create(stage.path("open")).unwrap();
    let (dir, Stage { mount, store }) = (stage.dir().to_owned(), &mut stage);
    std::thread::scope(|scope| {
        let ends = scope.spawn(|| mount.umount());
        store.eventually("it takes no new file", |_| match fs::File::create_new(dir.join("late")) {
            Ok(_) => fs::remove_file(dir.join("late")).is_err(),
            Err(_) => true,
        });
        assert_eq!(errno(fs::File::create_new(dir.join("late"))), Errno::EROFS);
        assert_eq!(errno(fs::OpenOptions::new().write(true).open(dir.join("kept"))), Errno::EROFS);
        assert_eq!(errno(fs::create_dir(dir.join("d"))), Errno::EROFS);
        std::os::unix::fs::FileExt::write_all_at(&open, b"begun", 0).unwrap();
        close(open).unwrap();
        fs::rename(dir.join("open"), dir.join("renamed")).unwrap();
        fs::remove_file(dir.join("gone")).unwrap();
        store.eventually("what was begun is stored", |store| store.get("renamed").is_some() && store.get("gone").is_none());
        assert!(!ends.is_finished());
        store.as_double().unwrap().clear_faults();
        ends.join().unwrap();
    });
    assert_eq!(store.keys(), ["first", "kept", "renamed"]);
    assert_eq!(store.bytes("renamed"), "begun");
}

/// With the store gone flush, `packmule umount` and SIGTERM end `close_timeout` after the last progress, and say what is left.
#[test]
fn what_is_left_is_said() {
    let Some(mut stage) = counted(&[LATER, "close_timeout=3s", "retries=0"], [("gone", "x")]) else { return };
    sh(stage.dir(), "echo content > f; rm gone");
    stage.double().set_down(true);
    let said = flush_fails(&stage);
    for name in ["not uploaded, goes on in the background: s3://releases/f", "not deleted, goes on in the background: s3://releases/gone"] {
        assert!(said.contains(name), "{said}");
    }
    let mut command = stage.mount.command();
    command.arg("umount").arg(stage.dir()).stdout(Stdio::null()).stderr(Stdio::piped());
    let asked = command.spawn().unwrap();
    let said = asked.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&said.stderr);
    assert!(text.contains("s3://releases/f") && text.contains("s3://releases/gone"), "{text}");
    assert_eq!(said.status.code(), Some(1), "{text}");
    stage.mount.crash();
    // Nobody has it now, and it is told all the same.
    let told = String::from_utf8(output(stage.mount.command().arg("status")).stdout).unwrap();
    assert!(told.contains("left by an earlier mount") && told.contains("deleting  s3://releases/gone"), "{told}");
    stage.double().set_down(false);
    stage.mount.again();
    stage.store.eventually("what was left is done", |store| store.keys() == ["f"]);
    assert_eq!(stage.store.bytes("f"), "content\n");
}

/// Promise 26: "what closing promised is stored, or goes on at the next mount", and it is in its folder from the first look on, while it
/// is uploaded and after.
#[test]
fn what_a_crash_left_is_in_its_folder_at_once() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    store.put("d/old", "old");
    let faulty = Faulty::before(&store.endpoint());
    let mut mount = Mount::start(Setup::of(&store).through(&faulty.endpoint()).option(LATER));
    let mut names: Vec<String> = (0..100).map(|n| format!("f{n:03}")).collect();
    for name in &names {
        fs::write(mount.path("d").join(name), name).unwrap();
    }
    names.push("old".to_owned());
    mount.crash();
    // A listing tells of the moment at which it left the store; meanwhile more is published.
    faulty.fault(OnWire::any_of(&["ListObjects"]).containing("prefix=d"), Wire::Latency(Duration::from_millis(400)));
    mount.again();
    loop {
        let through = store.keys().len() == names.len();
        let seen = files::names(&mount.path("d"));
        let missing: Vec<_> = names.iter().filter(|name| !seen.contains(name)).collect();
        assert!(missing.is_empty() && seen.len() == names.len(), "{} names; not shown: {missing:?}", seen.len());
        if through {
            return;
        }
    }
}

/// Promise 26: "what closing promised is stored, or goes on at the next mount": the rename does, and what is queued goes with it.
#[test]
fn a_directory_s_rename_that_dies_forgets_no_queued_file() {
    let Some(mut stage) = counted(&[LATER], [("d/old", "old")]) else { return };
    fs::write(stage.path("d/queued"), "queued").unwrap();
    stage.double().fault(When::operation("CopyObject"), Fault::Stall(Duration::from_secs(60)));
    let (from, to) = (stage.path("d"), stage.path("e"));
    let renaming = std::thread::spawn(move || fs::rename(from, to));
    stage.store.eventually("the rename is under way", |store| store.as_double().unwrap().requests().of("CopyObject") > 0);
    stage.mount.kill();
    assert!(renaming.join().unwrap().is_err());
    stage.double().clear_faults();
    stage.mount.again();
    stage.mount.ask(&["flush"], stage.dir());
    stage.store.eventually("the rename has ended", |store| store.keys() == ["e/old", "e/queued"]);
    assert_eq!((stage.store.bytes("e/old"), stage.store.bytes("e/queued")), ("old".into(), "queued".into()));
    assert_eq!(fs::read(stage.path("e/queued")).unwrap(), b"queued");
}

/// A file that is written again while its upload runs, and renamed when that has ended: only what it holds by then gets the new name.
#[test]
fn a_rename_between_two_contents_moves_the_newer_one() {
    let Some(stage) = counted(&["write_back=2s"], [("to", "old")]) else { return };
    stage.double().fault(When::operation("PutObject").key("from").times(1), Fault::Delay(Duration::from_secs(4)));
    files::write(&stage.path("from"), b"earlier").unwrap();
    stage.store.eventually("its upload is under way", |_| stage.double().open() > 0);
    std::thread::sleep(Duration::from_secs(3));
    files::write(&stage.path("from"), b"later content").unwrap();
    stage.store.eventually("the earlier content is stored", |store| store.keys().contains(&"from".to_owned()));
    fs::rename(stage.path("from"), stage.path("to")).unwrap();
    assert!(["old", "later content"].iter().any(|content| stage.store.bytes("to") == *content), "{:?}", stage.store.bytes("to"));
    flush(&stage);
    assert_eq!(stage.store.keys(), ["to"]);
    assert_eq!(stage.store.bytes("to"), "later content");
}

/// Promise 11: "the name is gone at once and stays gone", of a file too that was an object under an earlier name.
#[test]
fn what_was_renamed_over_an_object_is_removed_with_it() {
    let Some(stage) = counted(&[LATER], [("d", "old")]) else { return };
    let file = OpenOptions::new().write(true).create_new(true).open(stage.path("a")).unwrap();
    for content in ["once", "twice"] {
        file.set_len(0).unwrap();
        file.write_all_at(content.as_bytes(), 0).unwrap();
        close(file.try_clone().unwrap()).unwrap();
        if content == "once" {
            flush(&stage);
            assert_eq!(stage.store.bytes("a"), "once");
        }
    }
    fs::rename(stage.path("a"), stage.path("d")).unwrap();
    close(file).unwrap();
    fs::remove_file(stage.path("d")).unwrap();
    flush(&stage);
    assert_eq!(stage.store.keys(), Vec::<String>::new());
    assert!(files::names(stage.dir()).is_empty());
}
