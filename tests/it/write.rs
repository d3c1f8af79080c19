//! Writing: promises 1 to 12.

use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::FileExt as _;

use nix::errno::Errno;

use crate::support::files::{self, close, errno, noise, sh};
use crate::support::stage::{Stage, on_every_store};

const MIB: usize = 1 << 20;

on_every_store! {
    /// Promise 2: "close() returns 0 only when the object is in S3 under its name, byte for byte"
    fn close_publishes_byte_for_byte(store) {
        let stage = Stage::new(store);
        for (name, size) in [("one", 1), ("page", 4096), ("odd", MIB + 1), ("parts", 21 * MIB + 7)] {
            let bytes = noise(size as u64, size);
            files::write(&stage.path(name), &bytes).unwrap();
            assert!(stage.store.bytes(name) == bytes, "{name} differs in the bucket");
            assert!(fs::read(stage.path(name)).unwrap() == bytes, "{name} differs in the mount");
        }
        assert_eq!(stage.store.keys(), ["odd", "one", "page", "parts"]);
        assert_eq!(stage.store.unfinished_uploads(), Vec::<String>::new());
    }

    /// Promise 1: "No object exists, and none changes, before close. Nobody can read part of a file in S3."
    fn nothing_shows_before_close(store) {
        store.put("old", "before");
        let stage = Stage::new(store);
        let new = File::create(stage.path("new")).unwrap();
        new.write_all_at(&noise(1, 20 * MIB), 0).unwrap();
        let old = File::create(stage.path("old")).unwrap();
        old.write_all_at(b"after", 0).unwrap();
        assert_eq!(stage.store.keys(), ["old"]);
        assert_eq!(stage.store.bytes("old"), "before");
        close(new).unwrap();
        close(old).unwrap();
        assert_eq!(stage.store.keys(), ["new", "old"]);
        assert_eq!(stage.store.bytes("old"), "after");
        assert!(stage.store.bytes("new") == noise(1, 20 * MIB));
    }

    /// Writes in any order, holes read as zeros.
    fn writes_in_any_order(store) {
        let stage = Stage::new(store);
        let file = File::create(stage.path("f")).unwrap();
        let bytes = noise(3, 18 * MIB);
        for (index, chunk) in bytes.chunks(MIB).enumerate().collect::<Vec<_>>().into_iter().rev() {
            file.write_all_at(chunk, (index * MIB) as u64).unwrap();
        }
        // Written once more after it may have been sent, and a hole of 3 MiB behind the end.
        file.write_all_at(b"again", 100).unwrap();
        file.write_all_at(b"end", (21 * MIB) as u64).unwrap();
        close(file).unwrap();
        let mut expected = bytes;
        expected[100..105].copy_from_slice(b"again");
        expected.resize(21 * MIB, 0);
        expected.extend_from_slice(b"end");
        assert!(stage.store.bytes("f") == expected);
        assert!(fs::read(stage.path("f")).unwrap() == expected);
    }

    /// Promise 8: "A file being written or uploaded is read by everybody on the mount from the local copy"
    fn others_read_what_is_written(store) {
        let stage = Stage::new(store);
        let file = File::create(stage.path("f")).unwrap();
        file.write_all_at(b"hello world", 0).unwrap();
        assert_eq!(fs::read(stage.path("f")).unwrap(), b"hello world");
        assert_eq!(fs::metadata(stage.path("f")).unwrap().len(), 11);
        let other = files::open_existing(&stage.path("f"));
        other.write_all_at(b"WORLD", 6).unwrap();
        let mut seen = [0; 11];
        file.set_len(11).unwrap();
        File::open(stage.path("f")).unwrap().read_exact(&mut seen).unwrap();
        assert_eq!(&seen, b"hello WORLD");
        close(file).unwrap();
        close(other).unwrap();
        assert_eq!(stage.store.bytes("f"), "hello WORLD");
    }

    /// Promise 14: "O_APPEND writes at the size so learned"
    fn appends(store) {
        store.put("log", "one\n");
        let stage = Stage::new(store);
        let mut file = OpenOptions::new().append(true).open(stage.path("log")).unwrap();
        file.write_all(b"two\n").unwrap();
        close(file).unwrap();
        sh(stage.dir(), "echo three >> log; echo first >> new; echo second >> new");
        assert_eq!(stage.store.bytes("log"), "one\ntwo\nthree\n");
        assert_eq!(stage.store.bytes("new"), "first\nsecond\n");
    }

    /// Promise 4: "O_TRUNC closed without data follows the same rule; truncate(path) publishes before it returns."
    fn truncates_both_ways(store) {
        store.put("f", "0123456789");
        let stage = Stage::new(store);
        let truncate = |size| nix::unistd::truncate(&stage.path("f"), size).unwrap();
        truncate(4);
        assert_eq!(stage.store.bytes("f"), "0123");
        truncate(6);
        assert_eq!(stage.store.bytes("f"), "0123\0\0".as_bytes());
        let file = files::open_existing(&stage.path("f"));
        file.set_len(2).unwrap();
        file.set_len(3).unwrap();
        close(file).unwrap();
        assert_eq!(stage.store.bytes("f"), "01\0".as_bytes());
        truncate(0);
        assert_eq!(stage.store.bytes("f"), "");
        sh(stage.dir(), "truncate -s 3 f; truncate -s 0 f");
        stage.store.eventually("the emptied file is empty", |store| store.bytes("f").is_empty());
    }

    /// Promise 4: "A new file closed empty is recorded at once and becomes an object if it is still empty 2 s later"
    fn empty_files_become_objects(store) {
        let mut stage = Stage::new(store);
        sh(stage.dir(), "touch a; : > b");
        assert_eq!(files::names(stage.dir()), ["a", "b"]);
        stage.store.eventually("both empty files are objects", |store| store.keys() == ["a", "b"]);
        assert_eq!(stage.store.bytes("a"), "");
        sh(stage.dir(), "touch c");
        stage.mount.umount();
        assert_eq!(stage.store.keys(), ["a", "b", "c"]);
    }

    /// Promise 4: "A FLUSH by another process than the opener's (`make > log`, `(a; b) > f`) publishes nothing: the opener's does"
    fn a_shell_group_publishes_once_and_whole(store) {
        let stage = Stage::new(store);
        sh(stage.dir(), "(echo a; /bin/echo b; /bin/echo c) > f");
        assert_eq!(stage.store.bytes("f"), "a\nb\nc\n");
        if let Some(double) = stage.store.as_double() {
            assert_eq!(double.requests().of("PutObject"), 1, "{:?}", double.requests().summary());
        }
    }

    /// An unlinked file lives on for those who hold it open, and for nobody else.
    fn unlinked_while_open(store) {
        store.put("old", "bytes of old");
        let stage = Stage::new(store);
        let mut old = File::open(stage.path("old")).unwrap();
        let new = OpenOptions::new().read(true).write(true).create_new(true).open(stage.path("new")).unwrap();
        new.write_all_at(b"bytes of new", 0).unwrap();
        fs::remove_file(stage.path("old")).unwrap();
        fs::remove_file(stage.path("new")).unwrap();
        assert_eq!(errno(fs::metadata(stage.path("new"))), Errno::ENOENT);
        new.write_all_at(b"more", 12).unwrap();
        let mut seen = [0; 16];
        new.read_exact_at(&mut seen, 0).unwrap();
        assert_eq!(&seen, b"bytes of newmore");
        close(new).unwrap();
        let mut text = String::new();
        // The object is gone from the store: the bytes, or ESTALE, but never an empty file.
        match old.read_to_string(&mut text) {
            Ok(_) => assert_eq!(text, "bytes of old"),
            Err(error) => assert_eq!(error.raw_os_error(), Some(Errno::ESTALE as i32)),
        }
        assert_eq!(stage.store.keys(), Vec::<String>::new());
    }

    /// Who has a file open may change it when its name is gone or another's, and nobody sees it.
    fn changed_after_it_was_deleted(store) {
        store.put("deleted", "bytes of deleted");
        store.put("replaced", "bytes of replaced");
        store.put("other", "other");
        let stage = Stage::new(store);
        let (deleted, replaced) = (files::open_existing(&stage.path("deleted")), files::open_existing(&stage.path("replaced")));
        fs::remove_file(stage.path("deleted")).unwrap();
        fs::rename(stage.path("other"), stage.path("replaced")).unwrap();
        for (file, expected) in [(deleted, "BYTES of deleted"), (replaced, "BYTES of replaced")] {
            file.write_all_at(b"BYTES", 0).unwrap();
            let mut seen = vec![0; expected.len()];
            file.read_exact_at(&mut seen, 0).unwrap();
            assert_eq!(String::from_utf8_lossy(&seen), expected);
            file.set_len(0).unwrap();
            assert_eq!(file.metadata().unwrap().len(), 0);
            close(file).unwrap();
        }
        assert_eq!(stage.store.keys(), ["replaced"]);
        assert_eq!(stage.store.bytes("replaced"), "other");
        assert_eq!(fs::read(stage.path("replaced")).unwrap(), b"other");
    }

    /// A file that is open, changed in part and renamed still has the rest of its bytes.
    fn changed_in_part_and_renamed(store) {
        let content = noise(3, 6 << 20);
        store.put("a", content.clone());
        let stage = Stage::new(store);
        let file = files::open_existing(&stage.path("a"));
        file.write_all_at(b"one", 0).unwrap();
        fs::rename(stage.path("a"), stage.path("b")).unwrap();
        file.write_all_at(b"two", 3).unwrap();
        let expected = [b"onetwo", &content[6..]].concat();
        assert!(fs::read(stage.path("b")).unwrap() == expected);
        close(file).unwrap();
        assert_eq!(stage.store.keys(), ["b"]);
        assert!(stage.store.bytes("b") == expected);
    }

    /// With `write_back`: what was published in the background is renamed, changed and removed like any file.
    fn names_follow_what_write_back_published(store) {
        let mut stage = Stage::with(store, &["write_back=1s"]);
        for name in ["gone", "moved", "changed"] {
            files::write(&stage.path(name), name.as_bytes()).unwrap();
        }
        stage.store.eventually("all are objects", |store| store.keys() == ["changed", "gone", "moved"]);
        sh(stage.dir(), "chmod 600 changed; mv moved new; rm gone; echo soon > soon; mv soon later; echo never > never; rm never");
        stage.mount.remount();
        assert_eq!(files::names(stage.dir()), ["changed", "later", "new"]);
        assert_eq!(stage.store.keys(), ["changed", "later", "new"]);
        assert_eq!(sh(stage.dir(), "cat new later; stat -c %a changed"), "movedsoon\n600\n");
    }

    /// "flock and fcntl work between processes of one machine"
    fn locks_between_processes(store) {
        let stage = Stage::new(store);
        files::write(&stage.path("f"), b"0123456789").unwrap();
        let other = r#"
import fcntl, sys
f = open("f", "r+")
def held(lock):
    try:
        lock()
    except OSError:
        return "held"
    return "free"
print(held(lambda: fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)), held(lambda: fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB, 5, 0)),
      held(lambda: fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB, 5, 5)))
"#;
        let others = || files::run(stage.dir(), "python3", &["-c", other]).trim().to_owned();
        assert_eq!(others(), "free free free");
        let file = files::open_existing(&stage.path("f"));
        file.lock().unwrap();
        assert_eq!(others(), "held free free", "flock");
        file.unlock().unwrap();
        let range = nix::libc::flock { l_type: nix::libc::F_WRLCK as i16, l_whence: 0, l_start: 0, l_len: 5, l_pid: 0 };
        nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_SETLK(&range)).unwrap();
        assert_eq!(others(), "free held free", "fcntl locks five bytes");
        close(file).unwrap();
        assert_eq!(others(), "free free free");
    }

    /// Promise 9: "Rename of an open, dirty file carries its data to the new name"
    fn renamed_while_open(store) {
        store.put("target", "old");
        let stage = Stage::new(store);
        let mut file = File::create(stage.path("draft")).unwrap();
        file.write_all(b"begin ").unwrap();
        fs::rename(stage.path("draft"), stage.path("target")).unwrap();
        file.write_all(b"end").unwrap();
        close(file).unwrap();
        assert_eq!(stage.store.keys(), ["target"]);
        assert_eq!(stage.store.bytes("target"), "begin end");
        assert_eq!(files::names(stage.dir()), ["target"]);
    }

    /// Several descriptors on one file see one file.
    fn several_descriptors(store) {
        let stage = Stage::new(store);
        let one = File::create(stage.path("f")).unwrap();
        let two = files::open_existing(&stage.path("f"));
        let three = one.try_clone().unwrap();
        one.write_all_at(b"aaaa", 0).unwrap();
        two.write_all_at(b"bb", 1).unwrap();
        close(one).unwrap();
        three.write_all_at(b"c", 3).unwrap();
        close(two).unwrap();
        close(three).unwrap();
        assert_eq!(stage.store.bytes("f"), "abbc");
    }

    /// fallocate makes room, punches holes, and what it says is published.
    fn fallocate_reserves_and_punches(store) {
        let stage = Stage::new(store);
        let path = stage.path("f");
        files::write(&path, &[7; 10_000]).unwrap();
        sh(stage.dir(), "fallocate -l 20000 f; fallocate -p -o 1000 -l 2000 f");
        let mut expected = vec![7; 10_000];
        expected[1000..3000].fill(0);
        expected.resize(20_000, 0);
        assert!(fs::read(&path).unwrap() == expected);
        assert!(stage.store.bytes("f") == expected);
    }

    /// A name that was published is written again: the last content counts.
    fn overwritten_again_and_again(store) {
        let stage = Stage::new(store);
        for round in 0..8_u8 {
            files::write(&stage.path("f"), &vec![round; 1000 * usize::from(round)]).unwrap();
            if round > 0 {
                assert_eq!(stage.store.bytes("f"), vec![round; 1000 * usize::from(round)]);
            }
        }
    }

    /// "Content-Type from the final name"
    fn content_type_follows_the_name(store) {
        let stage = Stage::new(store);
        sh(stage.dir(), "echo x > a.html; echo x > b.bin; mv b.bin b.css; echo '{}' > c.json");
        let kind = |key: &str| stage.store.get(key).unwrap().content_type.unwrap_or_default();
        assert!(kind("a.html").starts_with("text/html"), "{}", kind("a.html"));
        assert!(kind("c.json").starts_with("application/json"), "{}", kind("c.json"));
    }

    /// Promise 10: "Temporary names … never become objects under that name … the rename completes it"
    fn a_desktop_replaces_a_file(store) {
        store.put("letter.odt", "old");
        let stage = Stage::new(store);
        let part = stage.path(".goutputstream-A1B2C3");
        let mut file = File::create(&part).unwrap();
        file.write_all(&noise(9, 9 * MIB)).unwrap();
        file.sync_all().unwrap();
        fs::rename(&part, stage.path("letter.odt")).unwrap();
        close(file).unwrap();
        assert_eq!(stage.store.keys(), ["letter.odt"]);
        assert!(stage.store.bytes("letter.odt") == noise(9, 9 * MIB));
        files::write(&stage.path(".~lock.letter.odt#"), b",me,host,;").unwrap();
        assert_eq!(stage.store.keys(), ["letter.odt"]);
        assert_eq!(fs::read(stage.path(".~lock.letter.odt#")).unwrap(), b",me,host,;");
        assert_eq!(stage.store.unfinished_uploads(), Vec::<String>::new());
    }

    /// Promise 2: "With `write_back` close() returns 0 when bytes and intent are durable in the spool"
    fn write_back_publishes_later_and_at_umount(store) {
        let mut stage = Stage::with(store, &["write_back=1h"]);
        files::write(&stage.path("f"), b"one").unwrap();
        files::write(&stage.path("f"), b"two").unwrap();
        files::write(&stage.path("g"), b"other").unwrap();
        assert_eq!(stage.store.keys(), Vec::<String>::new());
        assert_eq!(fs::read(stage.path("f")).unwrap(), b"two");
        stage.mount.umount();
        assert_eq!(stage.store.keys(), ["f", "g"]);
        assert_eq!(stage.store.bytes("f"), "two");
    }

    /// Promise 26: "kill -9 at any moment: what close() promised is published or queued after the next mount"
    fn a_crash_keeps_what_close_promised(store) {
        let mut stage = Stage::with(store, &["write_back=1h"]);
        files::write(&stage.path("promised"), &noise(5, 9 * MIB)).unwrap();
        let open = File::create(stage.path("open")).unwrap();
        open.write_all_at(b"never closed", 0).unwrap();
        open.sync_all().unwrap();
        stage.mount.crash();
        drop(open);
        assert_eq!(stage.store.keys(), Vec::<String>::new());
        stage.mount.again();
        stage.store.eventually("the promised file shows", |_| files::names(stage.dir()) == ["promised"]);
        stage.mount.umount_leaving("open");
        assert_eq!(stage.store.keys(), ["promised"]);
        assert!(stage.store.bytes("promised") == noise(5, 9 * MIB));
        assert_eq!(stage.store.unfinished_uploads(), Vec::<String>::new());
    }
}
