//! What file managers do, call by call, as their logs showed it: GLib's (Thunar, Nautilus, Nemo, Caja, PCManFM) and Dolphin's.
//!
//! The calls are made by Python under the program's name, because a name ending in `.part` is a temporary one from some programs
//! only.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::support::double::{Fault, When};
use crate::support::files::{self, noise, output};
use crate::support::mount::can_mount;
use crate::support::stage::{Stage, on_every_store};
use crate::support::store::Store;

const MIB: usize = 1 << 20;
/// 2009-02-13.
const MTIME: i64 = 1_234_567_890;

/// Dolphin's copy of one file: `python - SOURCE TARGET`.
const DOLPHIN: &str = r"
import os, sys
source, target = sys.argv[1:3]
os.statvfs(os.path.dirname(target))
replaces = os.path.exists(target)
part = target + '.part'
fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
os.fchmod(fd, 0o644)
with open(source, 'rb') as data:
    while chunk := data.read(1 << 20):
        os.write(fd, chunk)
os.utime(fd, (1234567890, 1234567890))
os.close(fd)
os.chown(part, os.getuid(), -1)
os.chown(part, -1, os.getgid())
if replaces:
    os.unlink(target)
os.rename(part, target)
";

/// GLib's copy of one file. While it is written the window reads the beginning of it; mode and time come after the close, by path.
const GLIB: &str = r"
import os, sys
source, target = sys.argv[1:3]
folder = os.path.dirname(target)
os.statvfs(folder)
old = None
try:
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
except FileExistsError:
    old = os.open(target, os.O_WRONLY)
    fd = os.open(folder + '/.goutputstream-A1B2C3', os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
with open(source, 'rb') as data:
    while chunk := data.read(1 << 20):
        os.write(fd, chunk)
if old is None:
    with open(target, 'rb') as window, open(source, 'rb') as data:
        assert window.read(16384) == data.read(16384)
else:
    os.fsync(fd)
    os.rename(folder + '/.goutputstream-A1B2C3', target)
os.fstat(fd)
os.close(fd)
if old is not None:
    os.close(old)
os.chmod(target, 0o644)
os.utime(target, (1234567890, 1234567890))
";

/// Copies `bytes` to a path of the mount as `program` does.
#[track_caller]
fn copy(stage: &Stage, program: &str, script: &str, bytes: &[u8], to: &str) {
    let source = stage.store.home().join("source");
    fs::write(&source, bytes).unwrap();
    let output = run_as(stage.store.home(), program, script, &[&source, &stage.path(to)]);
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Runs a script by a Python that is called `program`.
fn run_as(home: &Path, program: &str, script: &str, args: &[&Path]) -> std::process::Output {
    let path = home.join(program);
    if !path.exists() {
        let python = files::run(home, "python3", &["-c", "import os, sys; print(os.path.realpath(sys.executable))"]);
        std::os::unix::fs::symlink(python.trim(), &path).unwrap();
    }
    output(Command::new(&path).arg("-c").arg(script).args(args))
}

/// Looks at the store all the time that `work` takes: the object is never gone, and never half of one.
fn always_there(store: &Store, key: &str, versions: &[&[u8]], work: impl FnOnce() + Send) {
    let (done, until) = (AtomicBool::new(false), Instant::now() + Duration::from_secs(60));
    std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) && Instant::now() < until {
                let seen = store.get(key).map(|seen| seen.bytes);
                assert!(
                    seen.as_ref().is_some_and(|seen| versions.iter().any(|version| seen == version)),
                    "{key}: {:?}",
                    seen.map(|s| s.len())
                );
            }
        });
        work();
        done.store(true, Ordering::Relaxed);
        watcher.join().unwrap();
    });
}

/// No request ever named a temporary name, and nothing of an upload is left.
fn no_trace(store: &Store) {
    if let Some(double) = store.as_double() {
        let log = double.requests().log;
        let named: Vec<_> = log.iter().filter(|entry| entry.key.contains(".part") || entry.key.contains(".goutputstream")).collect();
        assert!(named.is_empty(), "{named:?}");
    }
    assert_eq!(store.unfinished_uploads(), Vec::<String>::new());
}

fn mtime_of(store: &Store, key: &str) -> i64 {
    let text = store.get(key).unwrap().metadata.get("mtime").cloned().unwrap_or_default();
    text.split('.').next().unwrap().parse().unwrap_or_default()
}

on_every_store! {
    /// Promise 10: "the rename completes it": new files, of one PUT and of several parts
    fn dolphin_copies_new_files(store) {
        let mut stage = Stage::new(store);
        for (name, size) in [("empty.txt", 0), ("small.html", 1000), ("large.bin", 20 * MIB + 5)] {
            copy(&stage, "kioworker", DOLPHIN, &noise(1, size), name);
            if size > 0 {
                assert!(stage.store.bytes(name) == noise(1, size), "{name}");
            }
            assert_eq!(fs::metadata(stage.path(name)).unwrap().mtime(), MTIME, "{name}");
        }
        stage.mount.remount();
        if let Some(double) = stage.store.as_double() {
            // The time of the large one came when its upload had begun.
            let log = double.requests().log;
            let copied: Vec<_> = log.iter().filter(|entry| entry.operation == "CopyObject").map(|entry| entry.key.as_str()).collect();
            assert!(copied.iter().all(|key| *key == "large.bin"), "{copied:?}");
        }
        assert_eq!(stage.store.keys(), ["empty.txt", "large.bin", "small.html"]);
        for key in stage.store.keys() {
            assert_eq!(mtime_of(&stage.store, &key), MTIME, "{key}");
            assert_eq!(fs::metadata(stage.path(&key)).unwrap().mtime(), MTIME, "{key}");
        }
        assert!(stage.store.get("small.html").unwrap().content_type.unwrap().starts_with("text/html"));
        assert!(fs::read(stage.path("large.bin")).unwrap() == noise(1, 20 * MIB + 5));
        no_trace(&stage.store);
    }

    /// Promise 11: "a rename onto NAME makes both one overwrite": at no moment is there no object
    fn dolphin_replaces_files(store) {
        for (name, size) in [("small.html", 1000), ("large.bin", 12 * MIB)] {
            store.put(name, noise(2, size));
        }
        let mut stage = Stage::new(store);
        for (name, size) in [("small.html", 1200), ("large.bin", 20 * MIB)] {
            let old = stage.store.bytes(name);
            let new = noise(3, size);
            always_there(&stage.store, name, &[&old, &new], || copy(&stage, "kioworker", DOLPHIN, &new, name));
            assert!(stage.store.bytes(name) == new, "{name}");
            assert!(fs::read(stage.path(name)).unwrap() == new, "{name}");
        }
        if let Some(double) = stage.store.as_double() {
            assert_eq!(double.requests().of("DeleteObject"), 0);
        }
        stage.mount.umount();
        // The DELETE that was held has not come after all.
        assert_eq!(stage.store.keys(), ["large.bin", "small.html"]);
        assert_eq!(mtime_of(&stage.store, "large.bin"), MTIME);
        no_trace(&stage.store);
    }

    /// Promise 13: "(GLib, Dolphin, `cp -a`, rsync set them after the data) are true on this mount at once … and reach S3"
    fn glib_copies_new_files(store) {
        let mut stage = Stage::new(store);
        for (name, size) in [("small.html", 1000), ("large.bin", 20 * MIB + 5)] {
            copy(&stage, "thunar", GLIB, &noise(4, size), name);
            assert!(stage.store.bytes(name) == noise(4, size), "{name}");
            assert_eq!(fs::metadata(stage.path(name)).unwrap().mtime(), MTIME, "{name}");
        }
        stage.mount.umount();
        for key in ["small.html", "large.bin"] {
            assert_eq!(mtime_of(&stage.store, key), MTIME, "{key}");
        }
        no_trace(&stage.store);
    }

    /// Promise 10: "`.goutputstream-*` just after the same process opened NAME for writing"
    fn glib_replaces_files(store) {
        for (name, size) in [("small.html", 1000), ("large.bin", 12 * MIB)] {
            store.put(name, noise(5, size));
        }
        let mut stage = Stage::new(store);
        for (name, size) in [("small.html", 1200), ("large.bin", 20 * MIB)] {
            let old = stage.store.bytes(name);
            let new = noise(6, size);
            always_there(&stage.store, name, &[&old, &new], || copy(&stage, "thunar", GLIB, &new, name));
            assert!(stage.store.bytes(name) == new, "{name}");
        }
        stage.mount.umount();
        assert_eq!(stage.store.keys(), ["large.bin", "small.html"]);
        assert_eq!(mtime_of(&stage.store, "small.html"), MTIME);
        no_trace(&stage.store);
    }

    /// Promise 10: "a wrong guess is aborted and sent again from the spool"
    fn a_part_file_that_becomes_another_name(store) {
        let stage = Stage::new(store);
        let elsewhere = DOLPHIN.replace("os.rename(part, target)", "os.rename(part, target + '.old')");
        copy(&stage, "kioworker", &elsewhere, &noise(8, 1000), "small");
        assert!(stage.store.bytes("small.old") == noise(8, 1000));
        copy(&stage, "kioworker", &elsewhere, &noise(8, 20 * MIB + 5), "large");
        assert!(stage.store.bytes("large.old") == noise(8, 20 * MIB + 5));
        // As Chrome does it; what lies under the guessed and the final name was known.
        for taken in [&[][..], &["Unconfirmed 1"], &["film.mkv"]] {
            taken.iter().for_each(|name| files::write(&stage.path(name), b"before").unwrap());
            files::write(&stage.path("Unconfirmed 1.crdownload"), &noise(9, 20 * MIB)).unwrap();
            fs::rename(stage.path("Unconfirmed 1.crdownload"), stage.path("film.mkv")).unwrap();
            assert!(stage.store.bytes("film.mkv") == noise(9, 20 * MIB), "{taken:?}");
            assert_eq!(stage.store.get("Unconfirmed 1").map(|seen| seen.bytes), taken.contains(&"Unconfirmed 1").then(|| "before".into()));
            fs::remove_file(stage.path("film.mkv")).unwrap();
            let _ = fs::remove_file(stage.path("Unconfirmed 1"));
        }
        assert_eq!(stage.store.keys(), ["large.old", "small.old"]);
        stage.store.eventually("the wrong upload is aborted", |store| store.unfinished_uploads().is_empty());
    }

    /// Promise 10: "other temporary names stay in the spool and are visible after a remount"
    fn a_temporary_name_outlives_the_mount(store) {
        let mut stage = Stage::new(store);
        let bytes = noise(7, 9 * MIB);
        fs::create_dir(stage.path("dir")).unwrap();
        let file = File::create(stage.path("dir/setup.exe.crdownload")).unwrap();
        file.write_all_at(&bytes, 0).unwrap();
        file.set_modified(std::time::UNIX_EPOCH + Duration::from_secs(MTIME as u64)).unwrap();
        files::close(file).unwrap();
        stage.mount.remount();
        assert_eq!(stage.store.keys(), ["dir/"]);
        // One that was being made when the mount ended is aborted by the next one.
        stage.store.eventually("its upload is aborted", |store| store.unfinished_uploads().is_empty());
        assert_eq!(files::names(&stage.path("dir")), ["setup.exe.crdownload"]);
        assert!(fs::read(stage.path("dir/setup.exe.crdownload")).unwrap() == bytes);
        assert!(stage.mount.status().contains("not uploaded"), "{}", stage.mount.status());
        assert!(fs::remove_dir(stage.path("dir")).is_err(), "it holds a file");
        stage.mount.crash();
        stage.mount.again();
        fs::rename(stage.path("dir/setup.exe.crdownload"), stage.path("dir/setup.exe")).unwrap();
        assert!(stage.store.bytes("dir/setup.exe") == bytes);
        assert_eq!(files::names(&stage.path("dir")), ["setup.exe"]);
        assert!(stage.mount.status().contains("everything is in S3"), "{}", stage.mount.status());
    }

    /// Promise 10: "`packmule flush FILE --as-is` publishes it."
    fn a_temporary_name_is_published_as_it_is(store) {
        let stage = Stage::new(store);
        files::write(&stage.path("film.mkv.crdownload"), b"half").unwrap();
        assert_eq!(stage.store.keys(), Vec::<String>::new());
        let flushed = output(stage.mount.command().arg("flush").arg(stage.path("film.mkv.crdownload")).arg("--as-is"));
        assert!(flushed.status.success(), "{}", String::from_utf8_lossy(&flushed.stderr));
        assert_eq!(stage.store.bytes("film.mkv.crdownload"), "half");
        assert_eq!(fs::read(stage.path("film.mkv.crdownload")).unwrap(), b"half");
        fs::remove_file(stage.path("film.mkv.crdownload")).unwrap();
        assert_eq!(stage.store.keys(), Vec::<String>::new());
    }

    /// Promise 10: "Junk (`.DS_Store`, `Thumbs.db`, `._*`, lock files) lives until unmount"
    fn junk_ends_with_the_mount(store) {
        let mut stage = Stage::new(store);
        let junk = [".DS_Store", "._letter.odt", ".~lock.letter.odt#", "Thumbs.db"];
        for name in junk {
            files::write(&stage.path(name), b"junk").unwrap();
            assert_eq!(fs::read(stage.path(name)).unwrap(), b"junk");
        }
        assert_eq!(files::names(stage.dir()), junk);
        assert!(stage.mount.status().contains("everything is in S3"), "{}", stage.mount.status());
        stage.mount.remount();
        assert_eq!(files::names(stage.dir()), Vec::<String>::new());
        files::write(&stage.path("Thumbs.db"), b"junk").unwrap();
        stage.mount.crash();
        stage.mount.again();
        assert_eq!(files::names(stage.dir()), Vec::<String>::new());
        assert_eq!(stage.store.keys(), Vec::<String>::new());
    }

    /// Promise 11: "the DELETE of NAME journalled and held for 1 s": no rename comes, or the program dies before
    fn a_held_delete_is_not_forgotten(store) {
        store.put("a", "old");
        store.put("b", "old");
        let mut stage = Stage::new(store);
        let unlink_only = DOLPHIN.replace("os.rename(part, target)", "");
        copy(&stage, "kioworker", &unlink_only, b"new", "a");
        assert_eq!(files::names(stage.dir()), ["a.part", "b"]);
        assert_eq!(stage.store.bytes("a"), "old");
        stage.store.eventually("the object is deleted", |store| store.keys() == ["b"]);
        copy(&stage, "kioworker", &unlink_only, b"new", "b");
        let unlinked = Instant::now();
        stage.mount.crash();
        if unlinked.elapsed() < Duration::from_millis(500) {
            assert_eq!(stage.store.keys(), ["b"]);
        }
        stage.mount.again();
        stage.store.eventually("the object is deleted after the crash", |store| store.keys().is_empty());
        assert_eq!(files::names(stage.dir()), ["a.part", "b.part"]);
        fs::rename(stage.path("b.part"), stage.path("b")).unwrap();
        assert_eq!(stage.store.bytes("b"), "new");
    }

    /// Promise 2: "With `write_back` …": what became an object behind the scenes is a file like any other
    fn a_queued_file_becomes_an_object(store) {
        let stage = Stage::with(store, &["write_back=1s"]);
        files::write(&stage.path("f"), b"one").unwrap();
        files::write(&stage.path("g"), b"two").unwrap();
        stage.store.eventually("both are published", |store| store.keys() == ["f", "g"]);
        stage.store.eventually("status knows", |_| stage.mount.status().contains("everything is in S3"));
        assert_eq!(fs::read(stage.path("f")).unwrap(), b"one");
        fs::remove_file(stage.path("f")).unwrap();
        stage.store.eventually("deleted", |store| store.keys() == ["g"]);
        fs::rename(stage.path("g"), stage.path("h")).unwrap();
        stage.store.eventually("renamed", |store| store.keys() == ["h"]);
    }
}

/// Promise 10: "`NAME.part` sends its parts to an upload of that key before FLUSH answers, at any size (… a failure shows at FLUSH, which
/// Dolphin reports"
#[test]
fn dolphin_hears_of_a_refusal_at_the_close() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new(Store::double());
    stage.store.put("a", "old");
    stage.double().fault(When::operation("CreateMultipartUpload"), Fault::Error(403, "AccessDenied"));
    let source = stage.store.home().join("source");
    fs::write(&source, "new").unwrap();
    let told = "\ntry: os.close(fd)\nexcept PermissionError: sys.exit('refused at the close')\n";
    let copied = run_as(stage.store.home(), "kioworker", &DOLPHIN.replace("\nos.close(fd)\n", told), &[&source, &stage.path("a")]);
    assert_eq!(String::from_utf8_lossy(&copied.stderr), "refused at the close\n");
    assert_eq!(stage.store.keys(), ["a"]);
    assert_eq!(stage.store.bytes("a"), "old");
}
