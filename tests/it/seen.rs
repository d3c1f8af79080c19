//! "Seen in today's filesystems": each defect has a test that fails where it is. Those that no other suite holds are here.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::double::{Fault, When};
use crate::support::files::{self, close, errno, noise, output, sh};
use crate::support::mount::{Mount, Setup, can_mount, is_mounted, packmule, wait};
use crate::support::stage::Stage;
use crate::support::store::Store;

const MIB: usize = 1 << 20;

/// The defect, and the tests that prove its absence: `FILE::NAME`, below tests/it/ or src/.
const SEEN: &[(&str, &[&str])] = &[
    (
        "an empty object written at open for overwrite, so that a crash leaves 0 bytes",
        &["seen::an_overwrite_that_dies_leaves_the_old_object"],
    ),
    (
        "a half-written file published after a kill",
        &["outages::killed_while_it_uploads", "seen::an_overwrite_that_dies_leaves_the_old_object"],
    ),
    ("CompleteMultipartUpload's 200 with <Error> taken for success", &["failing::error_in_the_200_of_complete"]),
    ("CompleteMultipartUpload's 200 without an ETag taken for success", &["s3/tests/uploads::a_200_may_be_an_error"]),
    ("a captive portal's 200 + HTML taken for a stored PUT", &["failing::a_captive_portal_is_no_success"]),
    (
        "a captive portal's page taken for file content or an empty listing",
        &["seen::a_captive_portal_is_neither_content_nor_an_empty_folder"],
    ),
    ("a body shorter than asked whose Content-Length agrees", &["seen::a_shorter_body_is_not_the_end_of_the_file"]),
    ("an expired token turning a read into 0 bytes and success", &["seen::an_expired_token_is_an_error_of_read"]),
    ("403 shown as ENOENT, ENOTDIR or an empty folder", &["seen::a_403_is_eacces", "failing::refusals_of_reading"]),
    ("page 2 of a listing failing or cut, and the part shown as whole", &["seen::half_a_listing_is_never_shown_as_whole"]),
    ("the answer to a PUT never compared with what was sent", &["s3/tests/uploads::other_bytes_under_the_etag_are_an_error"]),
    ("ftruncate on an open file that does nothing", &["write::truncates_both_ways", "seen::ftruncate_of_an_open_file_holds"]),
    ("a rename over a file just read that shows the old bytes", &["seen::a_rename_over_a_file_just_read"]),
    ("a reader that gets old and new blocks", &["versions::a_reader_of_what_is_replaced"]),
    ("new bytes cut at the old length", &["read::another_mount_reads_after_close", "read::another_client_s_change_is_seen"]),
    ("unmount returning while closed files exist only locally", &["outages::the_command_waits", "fstab::mount_and_umount"]),
    ("a key over 1024 bytes found out only after close()", &["namespace::long_names"]),
    ("a missing bucket found out only after close()", &["start::no_such_bucket"]),
    ("read-only credentials found out only after close()", &["seen::read_only_credentials_are_told_at_close"]),
    ("NFC and NFD names merged", &["namespace::no_normalisation"]),
    ("one damaged byte of the cache file served", &["versions::a_damaged_cache_is_asked_again"]),
    ("one key with a control character that makes its folder unlistable", &["names::every_key_shows_and_reads"]),
    ("a stat, unlink or ls that hangs for minutes while the store answers 503", &["seen::nothing_hangs_while_the_store_answers_503"]),
    ("one stalled read that blocks other files", &["seen::a_stalled_read_blocks_no_other_file"]),
    (
        "a stale mountpoint after a crash that the next mount refuses",
        &["seen::a_dead_mount_is_taken_away", "seen::a_killed_mount_that_cannot_end_is_taken_away"],
    ),
    ("a mount over a folder that is already mounted", &["start::a_mountpoint_in_use"]),
    ("a mount over a folder that is not empty", &["start::bad_mountpoints", "seen::a_folder_that_is_not_empty_needs_a_word"]),
];

/// Every test that the table names exists.
#[test]
fn every_defect_has_its_test() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for (defect, tests) in SEEN {
        assert!(!tests.is_empty(), "{defect}");
        for test in *tests {
            let (file, name) = test.rsplit_once("::").unwrap();
            let folder = if file.contains('/') { "src" } else { "tests/it" };
            let text = fs::read_to_string(root.join(folder).join(format!("{file}.rs"))).unwrap_or_else(|error| panic!("{test}: {error}"));
            assert!(text.contains(&format!("fn {name}(")), "{defect}: there is no {test}");
        }
    }
}

fn stage(options: &[&str], objects: &[(&str, Vec<u8>)]) -> Option<Stage> {
    if !can_mount() {
        return None;
    }
    let store = Store::double();
    for (key, bytes) in objects {
        store.put(key, bytes.clone());
    }
    Some(Stage::with(store, options))
}

/// An error of the first names that a directory gives, or of any after them.
fn list(dir: &Path) -> std::io::Result<usize> {
    fs::read_dir(dir)?.try_fold(0, |count, entry| entry.map(|_| count + 1))
}

/// Opened for overwrite, and killed before the first write, in mid-file, and right before the close.
#[test]
fn an_overwrite_that_dies_leaves_the_old_object() {
    let good = noise(1, 3 * MIB);
    let Some(mut stage) = stage(&[], &[("f", good.clone())]) else { return };
    let etag = stage.store.get("f").unwrap().etag;
    for written in [0, 1000, 20 * MIB] {
        let file = File::create(stage.path("f")).unwrap();
        file.write_all_at(&noise(2, written), 0).unwrap();
        if written > 8 * MIB {
            stage.store.eventually("parts are on their way", |store| !store.unfinished_uploads().is_empty());
        }
        assert_eq!(stage.store.get("f").unwrap().etag, etag, "changed with {written} bytes written");
        stage.mount.crash();
        drop(file);
        assert!(stage.store.bytes("f") == good, "{written} bytes");
        stage.mount.again();
        assert!(fs::read(stage.path("f")).unwrap() == good, "{written} bytes");
    }
    stage.mount.umount_leaving("f");
    assert!(stage.store.bytes("f") == good);
}

#[test]
fn a_captive_portal_is_neither_content_nor_an_empty_folder() {
    let Some(stage) = stage(&["metadata_ttl=0", "retries=1"], &[("d/f", b"content".to_vec()), ("d/g", b"content".to_vec())]) else {
        return;
    };
    assert_eq!(files::names(&stage.path("d")), ["f", "g"]);
    stage.double().fault(When::any(), Fault::Html);
    assert!(fs::read(stage.path("d/f")).is_err());
    assert!(list(&stage.path("d")).is_err());
    assert_ne!(errno(fs::metadata(stage.path("d/f"))), Errno::ENOENT);
    stage.double().clear_faults();
    assert_eq!(files::names(&stage.path("d")), ["f", "g"]);
    assert_eq!(fs::read(stage.path("d/f")).unwrap(), b"content");
}

/// The whole object, a window of it, and the end of it come short.
#[test]
fn a_shorter_body_is_not_the_end_of_the_file() {
    for (size, comes) in [(5000, 1000), (5000, 0), (12 * MIB, 100_000), (12 * MIB, 0)] {
        let bytes = noise(size as u64, size);
        let Some(stage) = stage(&["retries=1"], &[("f", bytes.clone())]) else { return };
        stage.double().fault(When::operation("GetObject").times(1), Fault::Shorter(comes));
        assert!(fs::read(stage.path("f")).is_ok_and(|read| read == bytes), "{size}: one short body is asked for again");
        let Some(other) = self::stage(&["retries=1"], &[("f", bytes.clone())]) else { return };
        other.double().fault(When::operation("GetObject"), Fault::Shorter(comes));
        let mut seen = Vec::new();
        match File::open(other.path("f")).and_then(|mut file| file.read_to_end(&mut seen)) {
            Ok(_) => assert!(seen == bytes, "{size}: {} bytes and success", seen.len()),
            Err(_) => assert!(bytes.starts_with(&seen), "{size}: other bytes"),
        }
    }
}

#[test]
fn an_expired_token_is_an_error_of_read() {
    for (status, code) in [(400, "ExpiredToken"), (403, "ExpiredToken"), (403, "InvalidAccessKeyId"), (400, "TokenRefreshRequired")] {
        let bytes = noise(3, 12 * MIB);
        let Some(stage) = stage(&["metadata_ttl=0", "retries=1"], &[("f", bytes.clone()), ("g", b"x".to_vec())]) else { return };
        let mut file = File::open(stage.path("f")).unwrap();
        file.read_exact(&mut [0; 4096]).unwrap();
        stage.double().fault(When::any(), Fault::Error(status, code));
        assert_eq!(errno(fs::read(stage.path("g"))), Errno::EACCES, "{code}");
        let mut rest = Vec::new();
        // What was fetched ahead may come, and then an error: never an early end.
        match file.read_to_end(&mut rest) {
            Ok(_) => assert!(rest == bytes[4096..], "{code}: {} bytes and success", rest.len()),
            Err(error) => assert_eq!(error.raw_os_error(), Some(Errno::EACCES as i32), "{code}"),
        }
        stage.double().clear_faults();
        assert!(fs::read(stage.path("f")).unwrap() == bytes, "{code}");
    }
}

#[test]
fn a_403_is_eacces() {
    let objects = [("d/f", b"x".to_vec()), ("d/sub/g", b"x".to_vec())];
    let Some(stage) = stage(&["metadata_ttl=0", "negative_metadata_ttl=0"], &objects) else { return };
    assert_eq!(files::names(&stage.path("d")), ["f", "sub"]);
    stage.double().fault(When::any(), Fault::Error(403, "AccessDenied"));
    // The kernel may answer from what it was told for a second.
    std::thread::sleep(Duration::from_millis(1100));
    for name in ["d/f", "d/none", "d/sub", "d/sub/g", "none"] {
        assert_eq!(errno(fs::metadata(stage.path(name))), Errno::EACCES, "stat {name}");
    }
    for name in ["d", "d/sub", ""] {
        assert_eq!(errno(list(&stage.path(name))), Errno::EACCES, "ls {name}");
    }
    assert_eq!(errno(fs::remove_file(stage.path("d/f"))), Errno::EACCES);
    assert_eq!(errno(fs::remove_dir(stage.path("d/sub"))), Errno::EACCES);
    assert_eq!(errno(fs::rename(stage.path("d/f"), stage.path("d/h"))), Errno::EACCES);
    stage.double().clear_faults();
    assert_eq!(stage.store.keys(), ["d/f", "d/sub/g"]);
}

/// Whatever ends page 2, whoever lists hears of it, and nothing of it is kept as if it were all.
#[test]
fn half_a_listing_is_never_shown_as_whole() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    let names: Vec<String> = (0..2500).map(|n| format!("f{n:04}")).collect();
    for name in &names {
        store.put(&format!("d/{name}"), "x");
    }
    let faults = [
        Fault::Error(503, "SlowDown"),
        Fault::Error(403, "AccessDenied"),
        Fault::ErrorIn200("InternalError"),
        Fault::Html,
        Fault::Refuse,
        Fault::Reset(20_000),
        Fault::Truncate(20_000),
        Fault::Shorter(20_000),
        Fault::Shorter(0),
    ];
    let stage = Stage::with(store, &["metadata_ttl=1h", "retries=1"]);
    for fault in faults {
        stage.mount.ask(&["refresh"], stage.dir());
        let shown = format!("{fault:?}");
        stage.double().fault(When::operation("ListObjectsV2").after(1), fault);
        assert!(list(&stage.path("d")).is_err(), "{shown}: ls shows a part and says that it is all");
        assert_ne!(errno(fs::metadata(stage.path("d/f2400-none"))), Errno::ENOENT, "{shown}: what was not listed is not known");
        stage.double().clear_faults();
        assert!(files::names(&stage.path("d")) == names, "{shown}: a part was kept");
        assert!(stage.path("d/f2400").exists(), "{shown}");
    }
    // A tool that deletes what the source lacks must not delete a thing when the listing fails.
    let target = stage.store.home().join("copy");
    fs::create_dir(&target).unwrap();
    sh(stage.dir(), &format!("rsync -a d/ {}", target.display()));
    assert_eq!(list(&target).unwrap(), 2500);
    stage.mount.ask(&["refresh"], stage.dir());
    stage.double().fault(When::operation("ListObjectsV2").after(1), Fault::Error(500, "InternalError"));
    let mut rsync = std::process::Command::new("rsync");
    let said = output(rsync.args(["-a", "--delete"]).arg(format!("{}/", stage.path("d").display())).arg(&target));
    assert!(!said.status.success(), "{said:?}");
    assert_eq!(list(&target).unwrap(), 2500, "rsync --delete destroyed data");
}

/// Longer and shorter, while it is open: seen by fstat, by stat, by readers, and in the store.
#[test]
fn ftruncate_of_an_open_file_holds() {
    for options in [&[][..], &["write_back=1h"]] {
        let Some(mut stage) = stage(options, &[("old", b"0123456789".to_vec())]) else { return };
        let old = files::open_existing(&stage.path("old"));
        let mut new = File::create(stage.path("new")).unwrap();
        new.write_all(b"0123456789").unwrap();
        for (name, file) in [("old", &old), ("new", &new)] {
            for (size, expected) in [(4, "0123"), (7, "0123\0\0\0"), (2, "01")] {
                file.set_len(size).unwrap();
                assert_eq!(file.metadata().unwrap().len(), size, "{name}");
                assert_eq!(fs::metadata(stage.path(name)).unwrap().len(), size, "{name}");
                assert_eq!(fs::read(stage.path(name)).unwrap(), expected.as_bytes(), "{name}");
            }
        }
        close(old).unwrap();
        close(new).unwrap();
        stage.mount.umount();
        assert_eq!((stage.store.bytes("old"), stage.store.bytes("new")), ("01".into(), "01".into()));
    }
}

/// The name shows the new bytes at once, for new and for known sizes, published or queued, and in the page cache too.
#[test]
fn a_rename_over_a_file_just_read() {
    for options in [&["metadata_ttl=1h"][..], &["metadata_ttl=1h", "write_back=1h"]] {
        for (old, new) in [(100_000, 100_000), (100_000, 50), (50, 100_000)] {
            let (old, new) = (noise(1, old), noise(2, new));
            let Some(stage) = stage(options, &[("f", old.clone()), ("there", new.clone())]) else { return };
            let reader = File::open(stage.path("f")).unwrap();
            assert!(fs::read(stage.path("f")).unwrap() == old);
            fs::rename(stage.path("there"), stage.path("f")).unwrap();
            assert!(fs::read(stage.path("f")).unwrap() == new, "a renamed object");
            files::write(&stage.path("made"), &old).unwrap();
            fs::rename(stage.path("made"), stage.path("f")).unwrap();
            assert_eq!(fs::metadata(stage.path("f")).unwrap().len(), old.len() as u64);
            assert!(fs::read(stage.path("f")).unwrap() == old, "a file just made");
            drop(reader);
        }
    }
}

/// The bucket can be listed and read, not written: whoever copies hears of it from close(), with `write_back` too.
#[test]
fn read_only_credentials_are_told_at_close() {
    let sources = [("s3://releases", ""), ("s3://", "releases/")];
    for (options, (source, below)) in [&[][..], &["write_back=1h"]].into_iter().flat_map(|options| sources.map(|source| (options, source)))
    {
        if !can_mount() {
            return;
        }
        let store = Store::double();
        store.put("f", "before");
        for operation in ["PutObject", "UploadPart", "CreateMultipartUpload", "DeleteObject", "DeleteObjects"] {
            store.as_double().unwrap().fault(When::operation(operation), Fault::Error(403, "AccessDenied"));
        }
        let setup = options.iter().fold(Setup::of(&store).source(source), |setup, word| setup.option(word));
        let stage = Stage { mount: Mount::start(setup), store };
        let path = |name: &str| stage.path(&format!("{below}{name}"));
        assert_eq!(fs::read(path("f")).unwrap(), b"before");
        for name in ["f", "new"] {
            let file = File::create(path(name)).unwrap();
            file.write_all_at(b"content", 0).unwrap();
            assert_eq!(close(file), Err(Errno::EACCES), "{name} {options:?} {source}");
        }
        assert_eq!(errno(fs::remove_file(path("f"))), Errno::EACCES, "{options:?} {source}");
        assert_eq!(fs::read(path("f")).unwrap(), b"before");
    }
}

#[test]
fn nothing_hangs_while_the_store_answers_503() {
    let objects = ["stat", "remove", "list", "read"].map(|dir| (format!("{dir}/f"), b"x".to_vec()));
    let objects: Vec<(&str, Vec<u8>)> = objects.iter().map(|(key, bytes)| (key.as_str(), bytes.clone())).collect();
    let Some(stage) = stage(&["metadata_ttl=0", "negative_metadata_ttl=0"], &objects) else { return };
    for dir in ["stat", "remove", "list", "read"] {
        assert_eq!(files::names(&stage.path(dir)), ["f"]);
    }
    stage.double().fault(When::any(), Fault::Error(503, "SlowDown"));
    let began = Instant::now();
    let stage = &stage;
    type Call = fn(&Stage) -> std::io::Result<()>;
    let calls: [(&str, Call); 6] = [
        ("stat", |stage| fs::metadata(stage.path("stat/none")).map(drop)),
        ("stat of a known name", |stage| fs::metadata(stage.path("stat/f")).map(drop)),
        ("unlink", |stage| fs::remove_file(stage.path("remove/f"))),
        ("ls", |stage| list(&stage.path("list")).map(drop)),
        ("read", |stage| fs::read(stage.path("read/f")).map(drop)),
        ("mkdir", |stage| fs::create_dir(stage.path("new"))),
    ];
    std::thread::scope(|scope| {
        for (what, call) in calls {
            scope.spawn(move || {
                let ended = errno(call(stage));
                assert!(began.elapsed() < Duration::from_secs(90), "{what} took {:?}", began.elapsed());
                assert_ne!(ended, Errno::ENOENT, "{what}");
            });
        }
    });
    stage.double().clear_faults();
    assert_eq!(files::names(&stage.path("list")), ["f"]);
    assert_eq!(fs::read(stage.path("read/f")).unwrap(), b"x");
}

#[test]
fn a_stalled_read_blocks_no_other_file() {
    let big = noise(5, 24 * MIB);
    let Some(stage) = stage(&["metadata_ttl=1h"], &[("d/slow", big.clone()), ("d/f", noise(6, 9 * MIB)), ("d/g", b"x".to_vec())]) else {
        return;
    };
    let answered = AtomicBool::new(false);
    stage.double().fault(When::operation("GetObject").key("d/slow"), Fault::StallBody(50_000, Duration::from_secs(300)));
    std::thread::scope(|scope| {
        let blocked: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    let read = fs::read(stage.path("d/slow"));
                    assert!(answered.load(Ordering::SeqCst), "the stalled read ended before the others");
                    assert!(read.is_err() || read.unwrap() == big);
                })
            })
            .collect();
        stage.store.eventually("the read is stalled", |_| stage.double().open() > 0 || stage.double().requests().of("GetObject") > 0);
        assert!(fs::read(stage.path("d/f")).unwrap() == noise(6, 9 * MIB));
        assert_eq!(fs::read(stage.path("d/g")).unwrap(), b"x");
        assert_eq!(files::names(&stage.path("d")), ["f", "g", "slow"]);
        assert_eq!(fs::metadata(stage.path("d/slow")).unwrap().len(), big.len() as u64);
        files::write(&stage.path("d/new"), b"new").unwrap();
        fs::remove_file(stage.path("d/g")).unwrap();
        answered.store(true, Ordering::SeqCst);
        stage.double().clear_faults();
        for reader in blocked {
            reader.join().unwrap();
        }
    });
}

/// kill -9, and mounted again over what is left of it.
#[test]
fn a_dead_mount_is_taken_away() {
    let Some(mut stage) = stage(&[], &[("f", b"content".to_vec())]) else { return };
    kill(Pid::from_raw(i32::try_from(stage.mount.pid()).unwrap()), Signal::SIGKILL).unwrap();
    stage
        .store
        .eventually("the mount is dead", |_| fs::metadata(stage.dir()).is_err_and(|error| error.raw_os_error() == Some(libc::ENOTCONN)));
    assert!(is_mounted(stage.dir()), "the dead mount is in the way");
    let setup = Setup::of(&stage.store);
    let mut command = stage.mount.command();
    command.arg("mount").arg(&setup.source).arg(stage.dir()).args(["-o", &setup.options.join(",")]);
    let said = output(&mut command);
    let seen = fs::read(stage.path("f"));
    let ended = output(stage.mount.command().arg("umount").arg(stage.dir()));
    stage.mount.crash();
    assert!(said.status.success(), "{said:?}");
    assert_eq!(seen.unwrap(), b"content");
    assert!(ended.status.success(), "{ended:?}");
}

/// State of a thread of the mount's, by name (proc_pid_stat(5)).
fn thread_state(pid: u32, name: &str) -> Option<char> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten();
    let stats = threads.filter_map(|thread| fs::read_to_string(thread.path().join("stat")).ok());
    stats.filter_map(|stat| stat.split_once(&format!("({name}) "))?.1.chars().next()).next()
}

/// kill -9 while the program tells the kernel of a change in a folder where somebody waits for the program: it waits for his lock
/// and cannot end, so its connection stays open, and whoever asks the mount would wait for ever.
#[test]
fn a_killed_mount_that_cannot_end_is_taken_away() {
    let options = ["write_back=1s", "metadata_ttl=1h"];
    let Some(mut stage) = stage(&options, &[("f", b"content".to_vec())]) else { return };
    for by_command in [true, false] {
        assert_eq!(files::names(stage.dir()), ["f"]);
        for operation in ["DeleteObject", "DeleteObjects"] {
            stage.double().fault(When::operation(operation), Fault::Error(403, "AccessDenied"));
        }
        stage.double().fault(When::operation("PutObject").key("link"), Fault::Stall(Duration::from_secs(120)));
        fs::remove_file(stage.path("f")).unwrap();
        let link = stage.path("link");
        let waiting = std::thread::spawn(move || std::os::unix::fs::symlink("f", link));
        let pid = stage.mount.pid();
        stage.store.eventually("the kernel keeps the notice waiting", |_| thread_state(pid, "notifier") == Some('D'));
        let mut killed = stage.mount.kill_unwatched();
        stage.store.eventually("it is killed", |_| thread_state(pid, "packmule") == Some('Z'));
        assert!(wait(&mut killed, Duration::from_millis(300)).is_none(), "it could end: this tests nothing");
        assert!(!waiting.is_finished());
        stage.double().clear_faults();
        if by_command {
            let said = output(stage.mount.command().arg("umount").arg(stage.dir()));
            assert!(said.status.success() && !is_mounted(stage.dir()), "{said:?}");
        }
        stage.mount.again();
        assert!(waiting.join().unwrap().is_err());
        assert!(wait(&mut killed, Duration::from_secs(20)).is_some(), "it still cannot end");
        assert_eq!(fs::read(stage.path("f")).unwrap(), b"content");
    }
}

#[test]
fn a_folder_that_is_not_empty_needs_a_word() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    store.put("f", "content");
    let point = store.home().join("full");
    fs::create_dir(&point).unwrap();
    fs::write(point.join("mine"), "mine").unwrap();
    let mounted = |more: &str| {
        let setup = Setup::of(&store);
        let mut command = packmule(store.home(), &setup.env);
        command.arg("mount").arg(&setup.source).arg(&point).args(["-o", &format!("{}{more}", setup.options.join(","))]);
        output(&mut command)
    };
    assert!(!mounted("").status.success() && !is_mounted(&point));
    let said = mounted(",nonempty");
    let names = files::names(&point);
    let ended = output(packmule(store.home(), &[]).arg("umount").arg(&point));
    assert!(said.status.success(), "{said:?}");
    assert_eq!(names, ["f"]);
    assert!(ended.status.success(), "{ended:?}");
    assert_eq!(fs::read(point.join("mine")).unwrap(), b"mine");
}
