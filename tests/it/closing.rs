//! What a close publishes, what it does not, and what others see meanwhile: promises 2 to 8.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;

use crate::support::double::{Fault, When};
use crate::support::files::{self, close, errno, noise, sh};
use crate::support::mount::{Mount, Setup, can_mount};
use crate::support::stage::{Stage, on_every_store};
use crate::support::store::Store;

const MIB: usize = 1 << 20;

/// A process that inherits the open file as its output, and writes a line to it when its input ends.
fn heir(file: &File) -> Child {
    let mut command = Command::new("sh");
    command.args(["-c", "cat > /dev/null; echo two"]).stdin(Stdio::piped()).stdout(file.try_clone().unwrap());
    command.spawn().unwrap()
}

/// Lets an heir write and end.
fn inherit(mut heir: Child) {
    drop(heir.stdin.take());
    assert!(heir.wait().unwrap().success());
}

/// The kernel lets go of a file some time after its close has returned: by then it may be open again, and half written.
/// Promise 1: "Nothing in S3 comes or changes before a file is closed, and nobody sees part of one."
#[test]
fn a_file_that_is_open_again_is_not_published_by_the_end_of_the_last_handle() {
    if !can_mount() {
        return;
    }
    for options in [&[][..], &["write_back=50ms"]] {
        let store = Store::double();
        let setup = options.iter().fold(Setup::of(&store), |setup, word| setup.option(word));
        let stage = Stage { mount: Mount::start(setup.env(packmule::failpoint::VARIABLE, "released=3")), store };
        for turn in 0..100 {
            let whole = vec![turn; 3000];
            files::write(&stage.path("f"), &whole).unwrap();
            let again = File::create(stage.path("f")).unwrap();
            if turn % 3 > 0 {
                again.write_all_at(&whole[..1000], 0).unwrap();
            }
            std::thread::sleep(std::time::Duration::from_millis(turn as u64 % 7));
            let seen = stage.store.get("f").map(|seen| seen.bytes);
            assert!(seen.as_ref().is_none_or(|seen| seen.len() == 3000), "{options:?}, turn {turn}: {} bytes", seen.unwrap().len());
            again.write_all_at(&whole, 0).unwrap();
            close(again).unwrap();
        }
    }
}

on_every_store! {
    /// Promise 2: "With `write_back` close() returns 0 when bytes and intent are durable in the spool, and status shows the file until it is published."
    fn status_shows_what_is_queued(store) {
        let stage = Stage::with(store, &["write_back=1h"]);
        files::write(&stage.path("queued.bin"), &noise(1, 9 * MIB)).unwrap();
        assert!(stage.mount.status().contains("queued.bin"), "{}", stage.mount.status());
        assert_eq!(stage.store.keys(), Vec::<String>::new());
        stage.mount.ask(&["flush"], &stage.path("queued.bin"));
        assert!(stage.store.bytes("queued.bin") == noise(1, 9 * MIB));
        assert!(stage.mount.status().contains("everything is in S3"), "{}", stage.mount.status());
    }

    /// Promise 4: "What arrives after close (mmap stores, inherited descriptors) is published at RELEASE"
    fn what_is_written_after_the_close(store) {
        let stage = Stage::new(store);
        let file = File::create(stage.path("log")).unwrap();
        std::io::Write::write_all(&mut &file, b"one\n").unwrap();
        let heir = heir(&file);
        close(file).unwrap();
        assert_eq!(stage.store.bytes("log"), "one\n");
        inherit(heir);
        stage.store.eventually("the heir's line is in the bucket", |store| store.bytes("log") == "one\ntwo\n");
        // A temporary name that its writer has closed is whole, whoever else holds it.
        let file = File::create(stage.path("film.mkv.crdownload")).unwrap();
        std::io::Write::write_all(&mut &file, b"one\n").unwrap();
        let heir = self::heir(&file);
        close(file).unwrap();
        fs::rename(stage.path("film.mkv.crdownload"), stage.path("film.mkv")).unwrap();
        assert_eq!(stage.store.bytes("film.mkv"), "one\n");
        inherit(heir);
        stage.store.eventually("the heir's line is in the film", |store| store.bytes("film.mkv") == "one\ntwo\n");
        // Python's mapping keeps a descriptor of its own.
        let script = "import mmap, os\nfd = os.open('m', os.O_RDWR | os.O_CREAT)\nos.write(fd, b'0' * 5000)\nm = mmap.mmap(fd, 5000)\n\
                      os.close(fd)\nm[4990:4996] = b'stored'\nm.close()";
        files::run(stage.dir(), "python3", &["-c", script]);
        stage.store.eventually("the mapping's bytes are in the bucket", |store| store.bytes("m").ends_with(b"0stored0000"));
        assert_eq!(stage.store.size("m"), Some(5000));
    }

    /// Promise 4: "becomes an object if it is still empty 2 s later (sooner at fsync of its directory, flush or unmount)"
    fn empty_files_sooner(store) {
        let mut stage = Stage::new(store);
        File::create(stage.path("synced")).unwrap();
        File::open(stage.dir()).unwrap().sync_all().unwrap();
        assert_eq!(stage.store.keys(), ["synced"]);
        // The kernel lets go of a file after its close has returned: an heir holds it for certain.
        let file = File::create(stage.path("heired")).unwrap();
        let heir = heir(&file);
        close(file).unwrap();
        File::open(stage.dir()).unwrap().sync_all().unwrap();
        assert_eq!(stage.store.keys(), ["heired", "synced"]);
        inherit(heir);
        stage.store.eventually("the heir's line is in the bucket", |store| store.bytes("heired") == "two\n");
        File::create(stage.path("unmounted")).unwrap();
        stage.mount.umount();
        assert_eq!(stage.store.keys(), ["heired", "synced", "unmounted"]);
    }

    /// Promise 4: "O_TRUNC closed without data follows the same rule"
    fn emptied_files(store) {
        store.put("f", "content");
        store.put("g", "content");
        let mut stage = Stage::new(store);
        let emptied = OpenOptions::new().write(true).truncate(true).open(stage.path("f")).unwrap();
        assert_eq!(stage.store.bytes("f"), "content");
        assert_eq!(fs::metadata(stage.path("f")).unwrap().len(), 0);
        close(emptied).unwrap();
        stage.store.eventually("the emptied file is empty", |store| store.bytes("f").is_empty());
        sh(stage.dir(), ": > g");
        stage.mount.umount();
        assert_eq!(stage.store.bytes("g"), "");
    }

    /// Promise 5: "It does not publish a file that is still open for writing."
    fn fsync_of_an_open_file(store) {
        store.put("old", "before");
        let stage = Stage::new(store);
        for name in ["new", "old"] {
            let file = File::create(stage.path(name)).unwrap();
            file.write_all_at(&noise(2, 9 * MIB), 0).unwrap();
            file.sync_all().unwrap();
            assert!(stage.mount.status().contains(&format!("/{name}")), "{}", stage.mount.status());
            assert!(stage.store.get(name).is_none_or(|seen| seen.bytes == "before"), "{name} was published by fsync");
            close(file).unwrap();
            assert!(stage.store.bytes(name) == noise(2, 9 * MIB), "{name}");
        }
    }

    /// Promise 6: "A file whose write() failed is never published."
    /// Promise 27: "write() answers ENOSPC when that cannot fit … never ENOSPC of ours at close()"
    fn a_file_that_does_not_fit_the_spool(store) {
        store.put("f", "before");
        let mut stage = Stage::with(store, &["spool_size=12M"]);
        let file = File::create(stage.path("f")).unwrap();
        let chunk = noise(3, MIB);
        let failed = (0..20).find_map(|n| file.write_all_at(&chunk, n * MIB as u64).err().map(|error| (n, error)));
        let (written, error) = failed.unwrap();
        assert!(written >= 11, "no room after {written} MiB of 12");
        assert_eq!(error.raw_os_error(), Some(Errno::ENOSPC as i32));
        assert_ne!(close(file), Err(Errno::ENOSPC));
        stage.store.eventually("the name shows what S3 holds", |_| fs::read(stage.path("f")).unwrap() == b"before");
        // Its room is there for others again.
        files::write(&stage.path("g"), &noise(4, 11 * MIB)).unwrap();
        stage.mount.umount();
        assert_eq!(stage.store.keys(), ["f", "g"]);
        assert_eq!(stage.store.bytes("f"), "before");
        assert_eq!(stage.store.unfinished_uploads(), Vec::<String>::new());
    }
}

/// Promise 3: "With `write_back` the writer is held back only by spool space."
#[test]
fn write_back_writes_without_a_store() {
    if !can_mount() {
        return;
    }
    let mut stage = Stage::with(Store::double(), &["write_back=1h", "metadata_ttl=1h", "close_timeout=20s"]);
    assert_eq!(files::names(stage.dir()), Vec::<String>::new());
    stage.double().set_down(true);
    files::write(&stage.path("f"), &noise(1, 40 * MIB)).unwrap();
    assert!(fs::read(stage.path("f")).unwrap() == noise(1, 40 * MIB));
    stage.double().set_down(false);
    stage.mount.umount();
    assert!(stage.store.bytes("f") == noise(1, 40 * MIB));
}

/// Promise 4: "is published at RELEASE, its error in status"
#[test]
fn an_error_after_the_close_is_in_status() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new(Store::double());
    let file = File::create(stage.path("log")).unwrap();
    std::io::Write::write_all(&mut &file, b"one\n").unwrap();
    let heir = heir(&file);
    close(file).unwrap();
    stage.double().fault(When::operation("PutObject"), Fault::Error(403, "AccessDenied"));
    inherit(heir);
    stage.store.eventually("status tells of it", |_| {
        let status = stage.mount.status();
        status.contains("/log") && status.contains("AccessDenied")
    });
    assert_eq!(stage.store.bytes("log"), "one\n");
}

/// Promise 8: "lookup, getattr and readdir never wait for an upload"
#[test]
fn nobody_waits_for_an_upload() {
    if !can_mount() {
        return;
    }
    let stage = Stage::with(Store::double(), &["metadata_ttl=1h"]);
    fs::create_dir(stage.path("d")).unwrap();
    files::write(&stage.path("d/other"), b"other").unwrap();
    stage.double().fault(When::operation("PutObject"), Fault::Error(503, "SlowDown"));
    let closed = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            files::write(&stage.path("d/f"), b"content").unwrap();
            closed.store(true, Ordering::SeqCst);
        });
        stage.store.eventually("the upload is tried", |_| stage.double().requests().log.iter().any(|entry| entry.key == "d/f"));
        assert_eq!(files::names(&stage.path("d")), ["f", "other"]);
        assert_eq!(fs::metadata(stage.path("d/f")).unwrap().len(), 7);
        assert_eq!(fs::read(stage.path("d/f")).unwrap(), b"content");
        assert_eq!(errno(fs::metadata(stage.path("d/none"))), Errno::ENOENT);
        assert_eq!(fs::read(stage.path("d/other")).unwrap(), b"other");
        assert!(!closed.load(Ordering::SeqCst), "the upload had ended");
        stage.double().clear_faults();
    });
    assert_eq!(stage.store.bytes("d/f"), "content");
}
