//! Directories and renames: promises 18 to 21.

use std::fs;
use std::os::unix::fs::symlink;

use nix::errno::Errno;

use crate::support::files::{self, errno, noise, sh};
use crate::support::stage::{Stage, on_every_store};

on_every_store! {
    /// Promise 20: "mkdir writes a marker … rmdir of a non-empty directory is ENOTEMPTY"
    fn directories_have_markers(store) {
        let mut stage = Stage::new(store);
        fs::create_dir_all(stage.path("a/b")).unwrap();
        assert_eq!(stage.store.keys(), ["a/", "a/b/"]);
        assert_eq!(stage.store.bytes("a/"), "");
        assert_eq!(errno(fs::create_dir(stage.path("a"))), Errno::EEXIST);
        assert_eq!(errno(fs::remove_dir(stage.path("a"))), Errno::ENOTEMPTY);
        stage.mount.remount();
        assert_eq!(files::names(&stage.path("a")), ["b"]);
        assert_eq!(files::names(&stage.path("a/b")), Vec::<String>::new());
        fs::remove_dir(stage.path("a/b")).unwrap();
        fs::remove_dir(stage.path("a")).unwrap();
        assert_eq!(stage.store.keys(), Vec::<String>::new());
        assert_eq!(errno(fs::remove_dir(stage.path("a"))), Errno::ENOENT);
    }

    /// Directories without a marker are there because keys are below them.
    fn implied_directories(store) {
        store.put("x/y/z/deep", "bytes");
        store.put("x/top", "t");
        let stage = Stage::new(store);
        assert_eq!(files::names(stage.dir()), ["x"]);
        assert_eq!(files::names(&stage.path("x")), ["top", "y"]);
        assert_eq!(fs::read(stage.path("x/y/z/deep")).unwrap(), b"bytes");
        assert_eq!(errno(fs::remove_dir(stage.path("x/y"))), Errno::ENOTEMPTY);
        assert_eq!(errno(fs::read(stage.path("x/y"))), Errno::EISDIR);
        assert_eq!(errno(fs::read(stage.path("x/top/no"))), Errno::ENOTDIR);
    }

    /// Promise 20: "A directory does not vanish because its last file went: an implied one gets its marker 2 s later"
    fn an_emptied_directory_stays(store) {
        store.put("implied/only", "x");
        let mut stage = Stage::new(store);
        fs::remove_file(stage.path("implied/only")).unwrap();
        assert!(stage.path("implied").is_dir());
        stage.store.eventually("the emptied directory has a marker", |store| store.keys() == ["implied/"]);
        stage.mount.remount();
        assert_eq!(files::names(stage.dir()), ["implied"]);
    }

    /// Promise 20: "an implied one gets its marker 2 s later, unless it went too"
    fn a_removed_directory_stays_away(store) {
        store.put("implied/only", "x");
        store.put("stays", "x");
        let mut stage = Stage::new(store);
        sh(stage.dir(), "rm -r implied");
        assert!(!stage.path("implied").exists());
        // Past the two seconds, and past an unmount that sends at once what waits.
        std::thread::sleep(std::time::Duration::from_millis(2500));
        stage.mount.remount();
        assert_eq!(files::names(stage.dir()), ["stays"]);
        assert_eq!(stage.store.keys(), ["stays"]);
    }

    /// Promise 20: "judged by a listing at most `metadata_ttl` old; a file added meanwhile survives, only the marker goes"
    fn a_file_that_came_meanwhile_survives_rmdir(store) {
        let stage = Stage::with(store, &["metadata_ttl=1h"]);
        fs::create_dir(stage.path("d")).unwrap();
        assert_eq!(files::names(&stage.path("d")), Vec::<String>::new());
        stage.store.put("d/theirs", "theirs");
        // Whether it is noticed is the store's matter; that it is there afterwards is not.
        let _ = fs::remove_dir(stage.path("d"));
        assert_eq!(stage.store.bytes("d/theirs"), "theirs");
    }

    /// Promise 21: "are absent without a request unless a listing holds them"
    fn probed_names_that_exist(store) {
        for name in [".hidden", "autorun.inf", "d/.directory"] {
            store.put(name, name);
        }
        let stage = Stage::new(store);
        assert_eq!(files::names(stage.dir()), [".hidden", "autorun.inf", "d"]);
        assert_eq!(files::names(&stage.path("d")), [".directory"]);
        for name in [".hidden", "autorun.inf", "d/.directory"] {
            assert_eq!(fs::read(stage.path(name)).unwrap(), name.as_bytes());
        }
        files::write(&stage.path(".directory"), b"ours").unwrap();
        assert_eq!(fs::read(stage.path(".directory")).unwrap(), b"ours");
        assert_eq!(stage.store.bytes(".directory"), "ours");
    }

    /// Files are renamed, over others too.
    fn renames_files(store) {
        store.put("a", "bytes of a");
        store.put("b", "bytes of b");
        let stage = Stage::new(store);
        fs::create_dir(stage.path("d")).unwrap();
        fs::rename(stage.path("a"), stage.path("d/c")).unwrap();
        assert_eq!(stage.store.keys(), ["b", "d/", "d/c"]);
        fs::rename(stage.path("b"), stage.path("d/c")).unwrap();
        assert_eq!(stage.store.keys(), ["d/", "d/c"]);
        assert_eq!(stage.store.bytes("d/c"), "bytes of b");
        assert_eq!(fs::read(stage.path("d/c")).unwrap(), b"bytes of b");
        assert_eq!(errno(fs::rename(stage.path("none"), stage.path("x"))), Errno::ENOENT);
        files::write(&stage.path("e"), b"e").unwrap();
        sh(stage.dir(), "mv -n e d/c || true");
        assert_eq!(stage.store.bytes("d/c"), "bytes of b", "NOREPLACE");
        assert_eq!(errno(fs::rename(stage.path("e"), stage.path("d"))), Errno::EISDIR);
        assert_eq!(errno(fs::rename(stage.path("d"), stage.path("e"))), Errno::ENOTDIR);
    }

    /// Trees are renamed with all that is in them, unpublished files too.
    fn renames_trees(store) {
        for n in 0..30 {
            store.put(&format!("t/sub{}/f{n}", n % 3), format!("content {n}"));
        }
        let mut stage = Stage::new(store);
        fs::create_dir_all(stage.path("t/empty")).unwrap();
        let open = fs::File::create(stage.path("t/sub0/open")).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&open, b"open", 0).unwrap();
        fs::create_dir(stage.path("full")).unwrap();
        files::write(&stage.path("full/x"), b"x").unwrap();
        assert_eq!(errno(fs::rename(stage.path("t"), stage.path("full"))), Errno::ENOTEMPTY);
        assert_eq!(errno(fs::rename(stage.path("t"), stage.path("t/sub0/t"))), Errno::EINVAL);
        fs::create_dir(stage.path("target")).unwrap();
        fs::rename(stage.path("t"), stage.path("target")).unwrap();
        files::close(open).unwrap();
        let keys = stage.store.keys();
        assert!(!keys.iter().any(|key| key.starts_with("t/")), "{keys:?}");
        assert_eq!(stage.store.bytes("target/sub0/open"), "open");
        stage.mount.remount();
        assert_eq!(files::names(&stage.path("target")), ["empty", "sub0", "sub1", "sub2"]);
        for n in 0..30 {
            assert_eq!(fs::read_to_string(stage.path(&format!("target/sub{}/f{n}", n % 3))).unwrap(), format!("content {n}"));
        }
    }

    /// Files of a renamed tree that are open, or that are links, are what they were.
    fn open_files_of_a_renamed_tree(store) {
        let content = noise(1, 6 << 20);
        store.put("t/partly", content.clone());
        store.put("t/whole", "old");
        let mut stage = Stage::new(store);
        symlink("partly", stage.path("t/link")).unwrap();
        fs::create_dir(stage.path("t/empty")).unwrap();
        let (partly, whole) = (files::open_existing(&stage.path("t/partly")), fs::File::create(stage.path("t/whole")).unwrap());
        std::os::unix::fs::FileExt::write_all_at(&partly, b"new", 0).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&whole, b"new content", 0).unwrap();
        fs::rename(stage.path("t"), stage.path("u")).unwrap();
        assert_eq!(fs::read_link(stage.path("u/link")).unwrap().to_str(), Some("partly"));
        assert!(stage.path("u/empty").is_dir());
        let expected = [b"new", &content[3..]].concat();
        assert!(fs::read(stage.path("u/partly")).unwrap() == expected, "before the close");
        files::close(partly).unwrap();
        files::close(whole).unwrap();
        assert_eq!(stage.store.keys(), ["u/empty/", "u/link", "u/partly", "u/whole"]);
        assert!(stage.store.bytes("u/partly") == expected);
        assert_eq!(stage.store.bytes("u/whole"), "new content");
        stage.mount.remount();
        assert_eq!(files::names(stage.dir()), ["u"]);
    }

    /// What was renamed over is gone for good, published or not.
    fn removing_what_was_renamed_over(store) {
        let mut stage = Stage::new(store);
        sh(stage.dir(), "echo old > f; : > lock; mv lock f; rm f; echo old > g; : > g; rm g; echo old > h; echo new > t; mv t h; rm h");
        assert_eq!(files::names(stage.dir()), Vec::<String>::new());
        stage.mount.remount();
        assert_eq!(files::names(stage.dir()), Vec::<String>::new());
        assert_eq!(stage.store.keys(), Vec::<String>::new());
    }

    /// Directories without a marker are removed and renamed as others are, where the store keeps directories of its own too.
    fn implied_directories_move_and_go(store) {
        for key in ["gone/f", "old/sub/f", "old/g", "stays"] {
            store.put(key, "x");
        }
        let mut stage = Stage::new(store);
        sh(stage.dir(), "rm -r gone; mv old new");
        assert_eq!(files::names(stage.dir()), ["new", "stays"]);
        stage.mount.remount();
        assert_eq!(files::names(stage.dir()), ["new", "stays"]);
        assert_eq!(files::names(&stage.path("new")), ["g", "sub"]);
    }

    /// Attributes of directories that are still on their way do not bring the old names back.
    fn directories_with_attributes_move_and_go(store) {
        let mut stage = Stage::new(store);
        sh(stage.dir(), "mkdir -p a/sub c/sub; chmod 700 a/sub c/sub; touch -d '2001-02-03 UTC' a/sub a c/sub c; mv a b; rm -r c");
        std::thread::sleep(std::time::Duration::from_secs(3));
        assert_eq!(files::names(stage.dir()), ["b"]);
        assert_eq!(stage.store.keys(), ["b/", "b/sub/"]);
        stage.mount.remount();
        assert_eq!(files::names(stage.dir()), ["b"]);
    }

    /// A big file is renamed by copies inside the store, with its metadata.
    fn renames_a_big_file(store) {
        let stage = Stage::new(store);
        files::write(&stage.path("a.html"), &noise(1, 17 << 20)).unwrap();
        sh(stage.dir(), "touch -d '2001-02-03 04:05:06 UTC' a.html; mv a.html b.html");
        assert!(stage.store.bytes("b.html") == noise(1, 17 << 20));
        assert_eq!(stage.store.keys(), ["b.html"]);
        stage.store.eventually("the mtime moved along", |store| {
            store.get("b.html").unwrap().metadata.get("mtime").is_some_and(|m| m.starts_with("981173106"))
        });
        assert_eq!(sh(stage.dir(), "stat -c %Y b.html").trim(), "981173106");
    }

    /// readdir of a directory that is emptied meanwhile, and of one that is bigger than a page.
    fn big_directories(store) {
        let stage = Stage::new(store);
        sh(stage.dir(), "mkdir d; for i in $(seq 300); do echo $i > d/f$i; done; ls d | wc -l > count");
        assert_eq!(fs::read_to_string(stage.path("count")).unwrap().trim(), "300");
        assert_eq!(stage.store.keys().len(), 302);
        sh(stage.dir(), "rm -r d");
        assert_eq!(stage.store.keys(), ["count"]);
        assert!(!stage.path("d").exists());
    }

    /// Promise 21: "`.Trash`, `.Trash-UID` cannot be made (EACCES)"
    fn no_trash(store) {
        let stage = Stage::new(store);
        for name in [".Trash", ".Trash-0", ".Trash-1000"] {
            assert_eq!(errno(fs::create_dir(stage.path(name))), Errno::EACCES, "{name}");
        }
        assert_eq!(stage.store.keys(), Vec::<String>::new());
    }

    /// Promise 19: "Keys over 1024 bytes: ENAMETOOLONG at create", and names over 255 bytes.
    fn long_names(store) {
        let stage = Stage::new(store);
        let longest = "n".repeat(255);
        files::write(&stage.path(&longest), b"x").unwrap();
        assert_eq!(stage.store.bytes(&longest), "x");
        assert_eq!(errno(fs::create_dir(stage.path(&"n".repeat(256)))), Errno::ENAMETOOLONG);
        let deep = ["a".repeat(255), "b".repeat(255), "c".repeat(255), "d".repeat(200)].join("/");
        fs::create_dir_all(stage.path(&deep)).unwrap();
        assert_eq!(errno(files::write(&stage.path(&format!("{deep}/{}", "f".repeat(100))), b"x")), Errno::ENAMETOOLONG);
        files::write(&stage.path(&format!("{deep}/f")), b"x").unwrap();
        let too_long = stage.path(&format!("{deep}/{}", "g".repeat(100)));
        assert_eq!(errno(fs::create_dir(&too_long)), Errno::ENAMETOOLONG);
        assert_eq!(errno(std::os::unix::fs::symlink("f", &too_long)), Errno::ENAMETOOLONG);
        assert_eq!(errno(fs::rename(stage.path(&longest), &too_long)), Errno::ENAMETOOLONG);
        // A folder whose name fits, with a file in it whose key would not.
        fs::create_dir(stage.path("t")).unwrap();
        files::write(&stage.path(&format!("t/{}", "h".repeat(100))), b"x").unwrap();
        assert_eq!(errno(fs::rename(stage.path("t"), stage.path(&format!("{deep}/t")))), Errno::ENAMETOOLONG);
        assert_eq!(stage.store.bytes(&longest), "x");
        assert_eq!(files::names(&stage.path("t")), ["h".repeat(100)]);
        assert_eq!(files::names(&stage.path(&deep)), ["f"]);
    }

    /// Promise 19: "Names are bytes as given (no silent NFC); `é` composed and decomposed are two files"
    fn no_normalisation(store) {
        let mut stage = Stage::new(store);
        files::write(&stage.path("caf\u{e9}"), b"composed").unwrap();
        files::write(&stage.path("cafe\u{301}"), b"decomposed").unwrap();
        files::write(&stage.path("sp ace+plus%41&=?#\"'<>"), b"signs").unwrap();
        stage.mount.remount();
        assert_eq!(fs::read(stage.path("caf\u{e9}")).unwrap(), b"composed");
        assert_eq!(fs::read(stage.path("cafe\u{301}")).unwrap(), b"decomposed");
        assert_eq!(stage.store.bytes("sp ace+plus%41&=?#\"'<>"), "signs");
        assert_eq!(stage.store.keys().len(), 3);
    }

    /// "Hard links, device nodes, fifos, sockets" are refused, and say so.
    fn what_a_store_cannot_hold(store) {
        let stage = Stage::new(store);
        files::write(&stage.path("f"), b"x").unwrap();
        let refused = errno(fs::hard_link(stage.path("f"), stage.path("g")));
        assert!(matches!(refused, Errno::EPERM | Errno::EOPNOTSUPP | Errno::ENOSYS), "{refused}");
        let made = files::output(std::process::Command::new("mkfifo").arg(stage.path("fifo")));
        assert!(!made.status.success());
        assert_eq!(files::names(stage.dir()), ["f"]);
    }

    /// Links are renamed and removed as links.
    fn links_are_names_too(store) {
        let stage = Stage::new(store);
        fs::create_dir(stage.path("d")).unwrap();
        symlink("../f", stage.path("d/l")).unwrap();
        fs::rename(stage.path("d/l"), stage.path("d/m")).unwrap();
        assert_eq!(fs::read_link(stage.path("d/m")).unwrap().to_str(), Some("../f"));
        fs::remove_file(stage.path("d/m")).unwrap();
        assert_eq!(stage.store.keys(), ["d/"]);
    }
}
