//! Names that come and go: renames, temporary names and deletions, promises 9 to 11. What file managers do stands in `desktop`.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt as _;

use nix::errno::Errno;

use crate::support::double::{Fault, When};
use crate::support::files::{self, close, errno, noise, sh};
use crate::support::mount::{Mount, Setup, can_mount};
use crate::support::stage::{Stage, on_every_store};
use crate::support::store::Store;

const MIB: usize = 1 << 20;

on_every_store! {
    /// Promise 10: "`*.part` and `.NAME.XXXXXX` count only when the writer is a program that works so … from any other they are ordinary files."
    fn other_programs_part_files(store) {
        let stage = Stage::new(store);
        sh(stage.dir(), "echo part > film.part; echo six > .film.Ab12Cd");
        assert_eq!(stage.store.keys(), [".film.Ab12Cd", "film.part"]);
        assert_eq!(stage.store.bytes("film.part"), "part\n");
    }

    /// Promise 10: "`ignore=` replaces the list, `ignore=+PATTERN` adds"
    fn the_list_of_temporary_names(store) {
        for (option, temporary) in [("ignore=*.scratch", &["a.scratch"][..]), ("ignore=+*.scratch", &[".goutputstream-A", "a.scratch"][..])] {
            let mut mount = Mount::start(Setup::of(&store).option(option));
            for name in ["a.scratch", ".goutputstream-A", "a.txt"] {
                files::write(&mount.path(name), b"x").unwrap();
            }
            let keys = store.keys();
            for name in [".goutputstream-A", "a.scratch", "a.txt"] {
                assert_eq!(keys.contains(&name.to_owned()), !temporary.contains(&name), "{option}: {name}, {keys:?}");
                fs::remove_file(mount.path(name)).unwrap();
            }
            mount.umount();
            assert_eq!(store.keys(), Vec::<String>::new(), "{option}");
        }
    }

    /// Promise 10: "Keys that exist in S3 under such names are files like any other."
    fn objects_with_temporary_names(store) {
        let names = [".goutputstream-OLD", ".~lock.a.odt#", "Thumbs.db", "film.crdownload"];
        for name in names {
            store.put(name, name);
        }
        let mut stage = Stage::new(store);
        assert_eq!(files::names(stage.dir()), names);
        for name in names {
            assert_eq!(fs::read(stage.path(name)).unwrap(), name.as_bytes());
            let file = OpenOptions::new().write(true).open(stage.path(name)).unwrap();
            file.write_all_at(b"!", 0).unwrap();
            close(file).unwrap();
            assert_eq!(stage.store.bytes(name), format!("!{}", &name[1..]), "{name}");
        }
        fs::rename(stage.path("film.crdownload"), stage.path("film.mkv")).unwrap();
        fs::remove_file(stage.path("Thumbs.db")).unwrap();
        stage.mount.remount();
        assert_eq!(files::names(stage.dir()), [".goutputstream-OLD", ".~lock.a.odt#", "film.mkv"]);
        assert_eq!(stage.store.keys(), [".goutputstream-OLD", ".~lock.a.odt#", "film.mkv"]);
    }

    /// Promise 11: "unlink sends its DELETE and returns its result."
    fn deleted_when_the_call_returns(store) {
        store.put("theirs", "x");
        let stage = Stage::new(store);
        files::write(&stage.path("ours"), b"x").unwrap();
        fs::remove_file(stage.path("theirs")).unwrap();
        assert_eq!(stage.store.keys(), ["ours"]);
        fs::remove_file(stage.path("ours")).unwrap();
        assert_eq!(stage.store.keys(), Vec::<String>::new());
        assert_eq!(errno(fs::remove_file(stage.path("ours"))), Errno::ENOENT);
    }
}

/// Promise 11: "unlink sends its DELETE and returns its result."
#[test]
fn a_refused_deletion_is_the_caller_s() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new(Store::double());
    stage.store.put("f", "stays");
    stage.double().fault(When::operation("DeleteObject"), Fault::Error(403, "AccessDenied"));
    assert_eq!(errno(fs::remove_file(stage.path("f"))), Errno::EACCES);
    assert_eq!(fs::read(stage.path("f")).unwrap(), b"stays");
    stage.double().clear_faults();
    fs::remove_file(stage.path("f")).unwrap();
    assert_eq!(stage.store.keys(), Vec::<String>::new());
}

/// Promise 10: "Other temporaries that fit one PUT are one PUT at the rename."
#[test]
fn a_small_temporary_file_is_one_put() {
    if !can_mount() {
        return;
    }
    let stage = Stage::with(Store::double(), &["metadata_ttl=1h"]);
    assert_eq!(files::names(stage.dir()), Vec::<String>::new());
    stage.double().reset_requests();
    files::write(&stage.path("page.html.crdownload"), b"<p>").unwrap();
    assert_eq!(stage.double().requests().total(), 0, "{:?}", stage.double().requests().summary());
    fs::rename(stage.path("page.html.crdownload"), stage.path("page.html")).unwrap();
    let requests = stage.double().requests();
    assert_eq!((requests.of("PutObject"), requests.total()), (1, 1), "{:?}", requests.summary());
    assert_eq!(stage.store.bytes("page.html"), "<p>");
}

/// Promise 9: "Rename of an open, dirty file carries its data to the new name, and the FLUSH that follows carries the error."
#[test]
fn the_close_after_a_rename_has_the_error() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new(Store::double());
    stage.store.put("target", "old");
    let file = File::create(stage.path("draft")).unwrap();
    file.write_all_at(b"new", 0).unwrap();
    stage.double().fault(When::operation("PutObject").key("target"), Fault::Error(403, "AccessDenied"));
    fs::rename(stage.path("draft"), stage.path("target")).unwrap();
    assert_eq!(close(file), Err(Errno::EACCES));
    assert_eq!(stage.store.keys(), ["target"]);
    assert_eq!(stage.store.bytes("target"), "old");
}

/// Promise 9: "Rename of a closed temporary name waits for its publication up to `close_timeout`; past that it returns 0 with the file
/// queued, and says so in status"
#[test]
fn a_rename_outlasts_close_timeout() {
    if !can_mount() {
        return;
    }
    let stage = Stage::with(Store::double(), &["close_timeout=2s", "metadata_ttl=1h"]);
    stage.store.put("film.mkv", "old");
    let bytes = noise(1, 3 * MIB);
    files::write(&stage.path("film.mkv.crdownload"), &bytes).unwrap();
    stage.double().fault(When::operation("PutObject"), Fault::Error(503, "SlowDown"));
    fs::rename(stage.path("film.mkv.crdownload"), stage.path("film.mkv")).unwrap();
    assert_eq!(stage.store.bytes("film.mkv"), "old");
    assert!(stage.mount.status().contains("/film.mkv"), "{}", stage.mount.status());
    assert!(fs::read(stage.path("film.mkv")).unwrap() == bytes);
    stage.double().clear_faults();
    stage.store.eventually("it is published after all", |store| store.bytes("film.mkv") == bytes);
    stage.store.eventually("status knows", |_| stage.mount.status().contains("everything is in S3"));
    assert_eq!(stage.store.keys(), ["film.mkv"]);
}

/// Promise 26: "what closing promised is stored, or goes on at the next mount": so does what such a rename has queued.
#[test]
fn a_rename_that_outlasted_close_timeout_is_resumed() {
    if !can_mount() {
        return;
    }
    for killed in [true, false] {
        let mut stage = Stage::with(Store::double(), &["close_timeout=2s", "retries=0"]);
        stage.store.put("film.mkv", "old");
        let bytes = noise(1, 3 * MIB);
        files::write(&stage.path("film.mkv.crdownload"), &bytes).unwrap();
        stage.double().fault(When::operation("PutObject"), Fault::Refuse);
        fs::rename(stage.path("film.mkv.crdownload"), stage.path("film.mkv")).unwrap();
        if killed {
            stage.mount.crash();
        } else {
            stage.mount.umount_leaving("film.mkv");
        }
        assert_eq!(stage.store.bytes("film.mkv"), "old");
        stage.double().clear_faults();
        stage.mount.again();
        stage.store.eventually("it is published after all", |store| store.bytes("film.mkv") == bytes);
        assert_eq!(stage.store.keys(), ["film.mkv"]);
    }
}
