//! "Requests are the cost", of programs that copy, save and edit. On the double, which counts; what follows in the background counts too.

use std::fs::{self, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;

use bytes::Bytes;

use crate::support::double::{Object, Requests};
use crate::support::files::{self, close, noise, sh};
use crate::support::mount::can_mount;
use crate::support::stage::Stage;
use crate::support::store::Store;

const MIB: usize = 1 << 20;
const BIG: usize = 256 * MIB;
const BUCKET: &str = "releases";
/// XML of answers and requests.
const WORDS: u64 = 64 << 10;

/// A mount whose start is not counted.
fn counted(options: &[&str], objects: impl IntoIterator<Item = (&'static str, Bytes)>) -> Option<Stage> {
    if !can_mount() {
        return None;
    }
    let store = Store::double();
    for (key, bytes) in objects {
        store.as_double().unwrap().put_object(BUCKET, key, Object::new(bytes));
    }
    let stage = Stage::with(store, options);
    stage.double().reset_requests();
    Some(stage)
}

/// A file that lay there long ago, so that nothing is known of it from its upload.
fn big() -> Bytes {
    noise(1, BIG).into()
}

/// Waits for what follows in the background; gives all that was asked.
fn all_of(stage: &mut Stage) -> Requests {
    stage.mount.umount();
    stage.double().requests()
}

/// 200 files in 60 folders, with times and modes of their own.
fn tree(below: &Path) {
    let script = "for d in $(seq 0 59); do mkdir -p t/d$d; done
        for f in $(seq 0 199); do echo content $f > t/d$((f % 60))/f$f; done
        find t -type f -exec chmod 640 {} +
        find t -exec touch -d '2001-02-03 04:05:06 UTC' {} +";
    sh(below, script);
}

fn copied_tree(program: &str, markers: usize) {
    let Some(mut stage) = counted(&["metadata_ttl=1h"], []) else { return };
    let home = stage.store.home().to_owned();
    tree(&home);
    sh(stage.dir(), &format!("{program} {}/t .", home.display()));
    let requests = all_of(&mut stage);
    let files = requests.log.iter().filter(|asked| asked.operation == "PutObject" && !asked.key.ends_with('/')).count();
    assert_eq!(files, 200, "{:?}", requests.summary());
    assert_eq!(requests.of("CopyObject"), 0, "{:?}", requests.summary());
    // The tree's own folder is one more.
    assert!(requests.total() <= 200 + 61 * markers + 3, "{:?}", requests.summary());
    for n in 0..200 {
        let metadata = stage.store.get(&format!("t/d{}/f{n}", n % 60)).unwrap().metadata;
        assert!(markers == 1 || metadata.get("mtime").is_some_and(|mtime| mtime.starts_with("981173106")), "f{n}: {metadata:?}");
        assert_eq!(metadata.get("mode").map(String::as_str), Some("33184"), "f{n}: {metadata:?}");
    }
}

/// Promise 13: "mtime and mode known before the upload began travel with it"
#[test]
fn cp_r_of_200_files_in_60_directories() {
    copied_tree("cp -r", 1);
}

/// Promise 13: "mtime and mode known before the upload began travel with it", and a directory's are one marker more.
#[test]
fn cp_a_of_200_files_in_60_directories() {
    copied_tree("cp -a", 2);
}

/// Promise 10: "Other temporaries that fit one PUT are one PUT at the rename."
#[test]
fn rsync_a_of_200_files_in_60_directories() {
    copied_tree("rsync -a", 2);
}

/// Promise 13: "chown, chmod, utimens and ACL xattrs that change nothing cost nothing", of a directory too whose files came in between.
#[test]
fn a_directory_s_times_set_again() {
    let Some(mut stage) = counted(&[], []) else { return };
    let marker = |stage: &Stage| stage.store.get("d/").is_some_and(|seen| seen.metadata["mtime"].starts_with("981173106"));
    // As rsync does it: the times are written while the files come.
    sh(stage.dir(), "mkdir d; touch -d '2001-02-03 04:05:06 UTC' d; echo x > d/f");
    stage.store.eventually("the marker has its time", |_| marker(&stage));
    sh(stage.dir(), "echo x > d/g; touch -d '2001-02-03 04:05:06 UTC' d");
    assert_eq!(sh(stage.dir(), "stat -c %Y d").trim(), "981173106");
    let requests = all_of(&mut stage);
    assert!(marker(&stage));
    let markers = requests.log.iter().filter(|asked| asked.key == "d/").count();
    // One finds out whether the store honours conditions.
    assert!(markers <= 3, "{:?}", requests.summary());
}

/// Names of a listed directory are known, those that it does not hold too.
#[test]
fn names_that_do_not_exist_cost_nothing() {
    let Some(stage) = counted(&["metadata_ttl=1h"], [("d/f", Bytes::from_static(b"x"))]) else { return };
    assert_eq!(files::names(&stage.path("d")), ["f"]);
    stage.double().reset_requests();
    for name in ["g", "f.bak", "a/b", "F"] {
        assert!(!stage.path("d").join(name).exists(), "{name}");
    }
    let requests = stage.double().requests();
    assert_eq!(requests.total(), 0, "{:?}", requests.summary());
}

/// Promise 14: "a reader's open sends its first ranged GET with the known ETag", and nothing before it.
#[test]
fn the_first_byte_of_a_listed_file_is_one_get() {
    for wait in [0, 1500] {
        let Some(stage) = counted(&["metadata_ttl=1h"], [("d/f", noise(1, 64 << 10).into()), ("d/g", noise(2, 40 * MIB).into())]) else {
            return;
        };
        assert_eq!(files::names(&stage.path("d")), ["f", "g"]);
        std::thread::sleep(std::time::Duration::from_millis(wait));
        for name in ["d/f", "d/g"] {
            stage.double().reset_requests();
            fs::File::open(stage.path(name)).unwrap().read_exact(&mut [0]).unwrap();
            let requests = stage.double().requests();
            assert!(requests.of("GetObject") == 1 && requests.total() == 1, "{name}: {:?}", requests.summary());
        }
    }
}

/// Promise 4: "A new file closed empty is recorded at once and becomes an object if it is still empty 2 s later"
#[test]
fn touch_and_then_write() {
    let Some(mut stage) = counted(&[], []) else { return };
    sh(stage.dir(), "touch f; echo content > f");
    let requests = all_of(&mut stage);
    assert!(requests.of("PutObject") == 1 && requests.total() <= 2, "{:?}", requests.summary());
    assert_eq!(requests.of_any(&["HeadObject", "CopyObject", "GetObject"]), 0, "{:?}", requests.summary());
    assert_eq!(stage.store.bytes("f"), "content\n");
}

/// Promise 2: "With `write_back` close() returns 0 when bytes and intent are durable in the spool"
#[test]
fn saving_by_a_temporary_name_with_write_back() {
    for (temporary, saves) in [
        (".goutputstream-Ab12Cd", "cat f > /dev/null; echo new > TMP; mv TMP f"),
        ("f.tmp", "echo new > TMP; mv TMP f"),
        ("lu1234ab.tmp", "echo new > TMP; mv TMP f"),
        ("f~", "echo new > f.new; sync f.new; mv f.new f"),
        ("4913", "echo new > TMP; chmod 644 TMP; mv TMP f"),
    ] {
        let Some(mut stage) = counted(&["write_back=1h"], [("f", Bytes::from_static(b"old"))]) else { return };
        files::names(stage.dir());
        stage.double().reset_requests();
        sh(stage.dir(), &saves.replace("TMP", temporary));
        stage.mount.ask(&["flush"], stage.dir());
        assert_eq!(stage.store.bytes("f"), "new\n", "{temporary}");
        assert_eq!(stage.store.keys(), ["f"], "{temporary}");
        let requests = all_of(&mut stage);
        assert_eq!(requests.of("PutObject"), 1, "{temporary}: {:?}", requests.summary());
        assert!(requests.total() <= 1 + usize::from(saves.starts_with("cat")), "{temporary}: {:?}", requests.summary());
    }
}

/// Promise 7: "Only changed parts travel; the rest is copied inside S3."
#[test]
fn one_mebibyte_in_the_middle_of_256() {
    let old = big();
    let Some(mut stage) = counted(&[], [("f", old.clone())]) else { return };
    files::names(stage.dir());
    stage.double().reset_requests();
    let (at, change) = (BIG / 2 + 12_345, noise(2, MIB));
    let file = files::open_existing(&stage.path("f"));
    file.write_all_at(&change, at as u64).unwrap();
    close(file).unwrap();
    let requests = all_of(&mut stage);
    let new = stage.store.bytes("f");
    assert!(new.len() == BIG && new[..at] == old[..at] && new[at..at + MIB] == change[..] && new[at + MIB..] == old[at + MIB..]);
    assert!(requests.total() <= 7, "{:?}", requests.summary());
    let most = 8 * MIB as u64 + WORDS;
    assert!(requests.bytes_up <= most && requests.bytes_down <= most, "{} up, {} down", requests.bytes_up, requests.bytes_down);
}

/// Promise 7: "Only changed parts travel; the rest is copied inside S3."
#[test]
fn one_mebibyte_appended_to_256() {
    let old = big();
    let Some(mut stage) = counted(&[], [("f", old.clone())]) else { return };
    files::names(stage.dir());
    stage.double().reset_requests();
    let more = noise(2, MIB);
    let mut file = OpenOptions::new().append(true).open(stage.path("f")).unwrap();
    file.write_all(&more).unwrap();
    close(file).unwrap();
    let requests = all_of(&mut stage);
    let new = stage.store.bytes("f");
    assert!(new.len() == BIG + MIB && new[..BIG] == old[..] && new[BIG..] == more[..]);
    assert!(requests.total() <= 5, "{:?}", requests.summary());
    assert!(requests.bytes_up <= 2 * MIB as u64, "{} up", requests.bytes_up);
    assert!(requests.bytes_down <= WORDS, "{} down", requests.bytes_down);
}

/// A rename is one copy inside S3, and a delete.
#[test]
fn renaming_256_mebibytes() {
    let Some(mut stage) = counted(&[], [("f", big())]) else { return };
    files::names(stage.dir());
    stage.double().reset_requests();
    fs::rename(stage.path("f"), stage.path("g")).unwrap();
    assert_eq!(fs::metadata(stage.path("g")).unwrap().size(), BIG as u64);
    let requests = all_of(&mut stage);
    assert!(stage.store.keys() == ["g"] && stage.store.bytes("g") == big());
    assert!(requests.total() <= 5, "{:?}", requests.summary());
    assert!(requests.bytes_up <= WORDS && requests.bytes_down <= WORDS, "{} up, {} down", requests.bytes_up, requests.bytes_down);
}

/// Promise 7: "Only changed parts travel; the rest is copied inside S3.", of a copy inside the mount all of it.
#[test]
fn copying_256_mebibytes_inside_the_mount() {
    for options in [&[][..], &["write_back=1h"]] {
        let Some(mut stage) = counted(options, [("d/f", big())]) else { return };
        files::names(&stage.path("d"));
        std::thread::sleep(std::time::Duration::from_millis(1100));
        stage.double().reset_requests();
        sh(stage.dir(), "cp -p d/f g; stat -c %s g");
        let requests = all_of(&mut stage);
        assert!(stage.store.bytes("g") == big() && stage.store.bytes("d/f") == big());
        assert!(requests.total() <= 6, "{:?}", requests.summary());
        let most = MIB as u64 / 2;
        assert!(requests.bytes_up < most && requests.bytes_down < most, "{} up, {} down", requests.bytes_up, requests.bytes_down);
    }
}
