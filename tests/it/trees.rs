//! Renames of directories: what a crash, a refusal or somebody else leaves of them, and what status says.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use nix::errno::Errno;
use packmule::failpoint;
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};

use crate::support::double::{Fault, Object, When, md5};
use crate::support::files::{self, errno};
use crate::support::mount::{Mount, Setup, can_mount};
use crate::support::stage::{Stage, on_every_store, torture};
use crate::support::store::Store;

/// Each moment of a rename that a crash may choose.
const MOMENTS: [&str; 6] = ["tree-recorded", "tree-copied:1", "tree-copied:7", "tree-verified", "tree-batch-deleted", "tree-deleted"];

/// What lies below a directory: files in marked directories, and in one without a marker.
fn tree(name: &str) -> BTreeMap<String, String> {
    let files = (0..12).map(|n| (format!("{name}/d{}/f{n:02}", n % 4), format!("content {n}")));
    let markers = (0..3).map(|n| (format!("{name}/d{n}/"), String::new()));
    files.chain(markers).collect()
}

fn put_all(store: &Store, objects: &BTreeMap<String, String>) {
    objects.iter().for_each(|(key, bytes)| store.put(key, bytes.as_bytes()));
}

/// Files by key; markers are the store's own business.
fn files_of(store: &Store) -> BTreeMap<String, String> {
    let keys = store.keys().into_iter().filter(|key| !key.ends_with('/'));
    let seen = keys.filter_map(|key| store.get(&key).map(|seen| (key, String::from_utf8_lossy(&seen.bytes).into_owned())));
    seen.collect()
}

fn only_files(objects: BTreeMap<String, String>) -> BTreeMap<String, String> {
    objects.into_iter().filter(|(key, _)| !key.ends_with('/')).collect()
}

/// A mount of the store that is killed in the middle of `mv t u`.
fn killed_while_renaming(store: &Store, moment: &str, options: &[&str], prepare: impl Fn(&Mount)) -> Mount {
    killed_between(store, moment, options, ["t", "u"], prepare)
}

fn killed_between(store: &Store, moment: &str, options: &[&str], [from, to]: [&str; 2], prepare: impl Fn(&Mount)) -> Mount {
    let setup = options.iter().fold(Setup::of(store).env(failpoint::VARIABLE, moment), |setup, word| setup.option(word));
    let mut mount = Mount::start(setup);
    prepare(&mount);
    fs::rename(mount.path(from), mount.path(to)).unwrap_err();
    assert!(mount.was_killed(Duration::from_secs(20)), "{moment}: not passed");
    mount
}

/// What `packmule status --json` tells of renames.
fn renames(mount: &Mount) -> Vec<serde_json::Value> {
    let status: serde_json::Value = serde_json::from_str(&mount.ask(&["status", "--json"], mount.dir())).unwrap();
    status[0]["renames"].as_array().unwrap().clone()
}

fn is_renamed(mount: &Mount, store: &Store, [from, to]: [&str; 2], what: &str) {
    let expected = only_files(tree(to));
    store.eventually(what, |store| files_of(store) == expected);
    let old = format!("{from}/");
    store.eventually(&format!("{what}: nothing is left"), |store| !store.keys().iter().any(|key| key.starts_with(&old)));
    store.eventually(&format!("{what}: it has ended"), |_| renames(mount).is_empty());
    assert!(!mount.path(from).exists(), "{what}");
    assert_eq!(files::names(&mount.path(to)), ["d0", "d1", "d2", "d3"], "{what}");
    assert_eq!(fs::read_to_string(mount.path(to).join("d1/f05")).unwrap(), "content 5", "{what}");
}

on_every_store! {
    /// Promise 26: "kill -9 at any moment"
    fn a_rename_that_dies_is_ended_by_the_next_mount(store) {
        for (nth, moment) in MOMENTS.into_iter().enumerate() {
            let (from, to) = (format!("t{nth}"), format!("u{nth}"));
            put_all(&store, &tree(&from));
            let mut mount = killed_between(&store, moment, &[], [&from, &to], |_| {});
            // Each file is readable under one of its names at least.
            let left = files_of(&store);
            for (key, bytes) in only_files(tree(&from)) {
                let moved = key.replacen(&from, &to, 1);
                assert!([left.get(&key), left.get(&moved)].contains(&Some(&bytes)), "{moment}: {key} is lost: {left:?}");
            }
            mount.again();
            is_renamed(&mount, &store, [&from, &to], moment);
            drop(mount);
            files_of(&store).keys().for_each(|key| store.delete(key));
        }
    }

    /// What waits in the spool below the old name is published below the new one, also what is to replace an object that was copied.
    fn queued_files_follow_a_rename_that_died(store) {
        for (nth, moment) in MOMENTS.into_iter().enumerate() {
            let (from, to) = (format!("t{nth}"), format!("u{nth}"));
            put_all(&store, &tree(&from));
            let mut mount = killed_between(&store, moment, &["write_back=1h"], [&from, &to], |mount| {
                files::write(&mount.path(&from).join("d0/f00"), b"replaced").unwrap();
                files::write(&mount.path(&from).join("d0/new"), b"new").unwrap();
            });
            mount.again();
            let mut expected = only_files(tree(&to));
            expected.insert(format!("{to}/d0/f00"), "replaced".to_owned());
            expected.insert(format!("{to}/d0/new"), "new".to_owned());
            store.eventually(&format!("{moment}: published"), |store| {
                files::output(mount.command().arg("flush").arg(mount.dir()));
                files_of(store) == expected
            });
            assert_eq!(fs::read_to_string(mount.path(&to).join("d0/f00")).unwrap(), "replaced", "{moment}");
            drop(mount);
            files_of(&store).keys().for_each(|key| store.delete(key));
        }
    }

    /// Promise 26: "a folder that was being renamed has its new name once the next mount has ended that, and what others changed in it
    /// meanwhile stays as it is". What others have put under either name meanwhile is neither replaced nor deleted, and status says so.
    fn what_others_did_after_a_crash_stays(store) {
        put_all(&store, &tree("t"));
        // One copy after the other, in the order of keys: d0/, d0/f00, d0/f04 are copied.
        let mut mount = killed_while_renaming(&store, "tree-copied:3", &["max_connections=1"], |_| {});
        assert!(store.get("u/d0/f04").is_some() && store.get("u/d2/f02").is_none(), "{:?}", store.keys());
        // In the store's clock it is later.
        std::thread::sleep(Duration::from_millis(2100));
        for key in ["t/d0/f00", "t/d3/f03", "t/d3/extra"] {
            store.put(key, "theirs");
        }
        // As long as ours.
        store.put("u/d2/f02", "content ?");
        mount.again();
        let mut expected = only_files(tree("u"));
        expected.remove("u/d3/f03");
        for (key, bytes) in [("t/d0/f00", "theirs"), ("t/d3/f03", "theirs"), ("t/d3/extra", "theirs"), ("u/d2/f02", "content ?")] {
            expected.insert(key.to_owned(), bytes.to_owned());
        }
        expected.insert("t/d2/f02".to_owned(), "content 2".to_owned());
        store.eventually("the rest is renamed", |store| files_of(store) == expected);
        store.eventually("status says so", |_| mount.status().contains("4 objects stay under the old name"));
        assert_eq!(renames(&mount)[0]["phase"], "done");
    }
}

/// The copies that a crash leaves are not made again, and between two batches of deletes only the rest is deleted.
#[test]
fn a_rename_goes_on_where_it_was() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    for (moment, copies) in [("tree-copied:900", 300), ("tree-verified", 0), ("tree-batch-deleted:1", 0)] {
        (0..1100).for_each(|n| store.put(&format!("t/f{n:04}"), n.to_string()));
        let mut mount = killed_while_renaming(&store, moment, &[], |_| {});
        store.as_double().unwrap().reset_requests();
        mount.again();
        store.eventually(moment, |store| {
            let keys = store.keys();
            keys.len() == 1100 && keys.iter().all(|key| key.starts_with("u/"))
        });
        let requests = store.as_double().unwrap().requests();
        assert!(requests.of("CopyObject") <= copies, "{moment}: {:?}", requests.summary());
        assert_eq!(store.bytes("u/f0999"), "999");
        drop(mount);
        store.keys().iter().for_each(|key| store.delete(key));
    }
}

/// ETags of objects that were sent in parts, or are encrypted, are not those of their copies: the list of copies tells them, and where
/// that is lost, too, their checksums.
#[test]
fn copies_are_known_without_their_etags() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    let double = store.as_double().unwrap();
    for lost in [false, true] {
        for (key, bytes) in only_files(tree("t")) {
            let object = Object::new(bytes.into_bytes());
            double.put_object("releases", &key, Object { etag: format!("{}-2", object.etag), ..object });
        }
        let mut mount = killed_while_renaming(&store, "tree-verified", &[], |_| {});
        let state = mount.home().join("state");
        let list = files::tree(&state).into_keys().find(|path| path.extension().is_some_and(|extension| extension == "copies"));
        let list = state.join(list.unwrap());
        let text = fs::read(&list).unwrap();
        assert_eq!(text.iter().filter(|byte| **byte == b'\n').count(), 12);
        if lost {
            fs::write(&list, &text[..text.len() / 2]).unwrap();
        }
        double.reset_requests();
        mount.again();
        is_renamed(&mount, &store, ["t", "u"], &format!("lost {lost}"));
        let requests = double.requests();
        assert_eq!(requests.of("CopyObject"), 0, "lost {lost}: {:?}", requests.summary());
        drop(mount);
        store.keys().iter().for_each(|key| store.delete(key));
    }
}

/// An ETag that looks like an MD5 and is none (as where objects are encrypted) is found out once, not for each copy.
#[test]
fn etags_of_encrypted_objects_say_nothing() {
    if !can_mount() {
        return;
    }
    let stage = Stage::with(Store::double(), &["max_connections=2"]);
    for (key, bytes) in only_files(tree("t")) {
        let etag = md5(format!("encrypted {key}").as_bytes());
        stage.double().put_object("releases", &key, Object { etag, ..Object::new(bytes.into_bytes()) });
    }
    stage.double().reset_requests();
    fs::rename(stage.path("t"), stage.path("u")).unwrap();
    assert_eq!(files_of(&stage.store), only_files(tree("u")));
    let requests = stage.double().requests();
    // Two for each copy that is under way just then, and one of the deletes.
    assert!(requests.of("HeadObject") <= 2 * 2 + 1, "{:?}", requests.summary());
}

/// A file that waits since an earlier mount, and that nobody has looked at, is renamed with its directory while it is sent.
#[test]
fn a_file_of_an_earlier_mount_follows_a_rename() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    put_all(&store, &tree("t"));
    let mut mount = Mount::start(Setup::of(&store).option("write_back=1h"));
    files::write(&mount.path("t/d0/new"), b"new").unwrap();
    mount.crash();
    store.as_double().unwrap().fault(When::operation("PutObject").key("t/d0/new"), Fault::Delay(Duration::from_secs(2)));
    mount.again();
    fs::rename(mount.path("t"), mount.path("u")).unwrap();
    mount.ask(&["flush"], mount.dir());
    let mut expected = only_files(tree("u"));
    expected.insert("u/d0/new".to_owned(), "new".to_owned());
    assert_eq!(files_of(&store), expected);
    assert_eq!(fs::read_to_string(mount.path("u/d0/new")).unwrap(), "new");
}

/// A source that is gone by then ends it.
#[test]
fn a_rename_whose_source_is_gone_has_ended() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    put_all(&store, &tree("t"));
    let mut mount = killed_while_renaming(&store, "tree-copied:3", &[], |_| {});
    store.keys().iter().filter(|key| key.starts_with("t/")).for_each(|key| store.delete(key));
    mount.again();
    store.eventually("it has ended", |_| renames(&mount).is_empty());
    mount.remount();
    assert_eq!(renames(&mount), Vec::<serde_json::Value>::new());
}

/// Status shows how far it is.
#[test]
fn status_shows_how_far_a_rename_is() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new(Store::double());
    put_all(&stage.store, &tree("t"));
    stage.double().fault(When::operation("CopyObject").key("u/d3/f03"), Fault::Error(503, "SlowDown"));
    std::thread::scope(|scope| {
        let renamed = scope.spawn(|| fs::rename(stage.path("t"), stage.path("u")));
        stage.store.eventually("all but one are copied", |_| renames(&stage.mount).iter().any(|rename| rename["done"] == 14));
        let rename = renames(&stage.mount)[0].clone();
        let names = (rename["from"].as_str().unwrap(), rename["to"].as_str().unwrap());
        assert_eq!(names, ("s3://releases/t/", "s3://releases/u/"));
        let bytes: usize = only_files(tree("t")).values().map(String::len).sum();
        assert_eq!((rename["phase"].as_str(), rename["objects"].as_u64()), (Some("copying"), Some(15)), "{rename}");
        assert_eq!((rename["bytes"].as_u64(), rename["copied"].as_u64()), (Some(bytes as u64), Some(bytes as u64 - 9)), "{rename}");
        let status = stage.mount.status();
        assert!(status.contains("rename of s3://releases/t/ to s3://releases/u/: copying: 14 of 15 objects"), "{status}");
        stage.double().clear_faults();
        renamed.join().unwrap().unwrap();
    });
    assert!(renames(&stage.mount).is_empty() && files_of(&stage.store) == only_files(tree("u")));
}

/// "refused over `rename_limit` with a message that says how many objects"
#[test]
fn more_than_rename_limit_is_refused_with_the_number() {
    if !can_mount() {
        return;
    }
    let stage = Stage::with(Store::double(), &["rename_limit=10"]);
    (0..1234).for_each(|n| stage.store.put(&format!("t/f{n}"), "x"));
    assert_eq!(errno(fs::rename(stage.path("t"), stage.path("u"))), Errno::EFBIG);
    for said in [stage.mount.status(), stage.mount.log()] {
        assert!(said.contains("s3://releases/t/ holds 1,234 objects, more than rename_limit=10"), "{said}");
    }
    assert!(stage.store.keys().iter().all(|key| key.starts_with("t/")) && stage.store.keys().len() == 1234);
}

/// "a failed half leaves both readable and says so": a copy, or the deletes, are refused. Nothing is deleted, and nothing goes on later.
#[test]
fn a_failed_half_leaves_both_readable() {
    if !can_mount() {
        return;
    }
    for (operation, key) in [("CopyObject", Some("u/d3/f03")), ("DeleteObjects", None)] {
        let mut stage = Stage::new(Store::double());
        put_all(&stage.store, &tree("t"));
        let when = When::operation(operation);
        let when = key.map_or(when.clone(), |key| when.key(key));
        stage.double().fault(when, Fault::Error(403, "AccessDenied"));
        assert_eq!(errno(fs::rename(stage.path("t"), stage.path("u"))), Errno::EACCES, "{operation}");
        stage.double().clear_faults();
        let status = stage.mount.status();
        let told = ["rename of s3://releases/t/ to s3://releases/u/: failed", "denied", "nothing of it is deleted", "new name too"];
        assert!(told.iter().all(|told| status.contains(told)), "{operation}: {status}");
        let left = files_of(&stage.store);
        assert!(only_files(tree("t")).iter().all(|(key, bytes)| left.get(key) == Some(bytes)), "{operation}: {left:?}");
        assert_eq!(left.contains_key("u/d3/f03"), key.is_none(), "{left:?}");
        assert_eq!(fs::read_to_string(stage.path("t/d1/f05")).unwrap(), "content 5");
        assert_eq!(fs::read_to_string(stage.path("u/d1/f05")).unwrap(), "content 5");
        stage.mount.remount();
        assert_eq!(renames(&stage.mount), Vec::<serde_json::Value>::new(), "{operation}");
        assert_eq!(files_of(&stage.store), left, "{operation}");
    }
}

/// A copy that is not there, or has another size, when the new name is listed: nothing is deleted.
#[test]
fn copies_are_looked_at_before_anything_is_deleted() {
    if !can_mount() {
        return;
    }
    for theirs in [None, Some("of another size")] {
        let stage = Stage::with(Store::double(), &["max_connections=1"]);
        put_all(&stage.store, &tree("t"));
        stage.double().fault(When::operation("CopyObject").key("u/d3/f11"), Fault::Error(503, "SlowDown"));
        std::thread::scope(|scope| {
            let renamed = scope.spawn(|| fs::rename(stage.path("t"), stage.path("u")));
            stage.store.eventually("all but one are copied", |_| renames(&stage.mount).iter().any(|rename| rename["done"] == 14));
            match theirs {
                Some(theirs) => stage.store.put("u/d1/f05", theirs),
                None => stage.store.delete("u/d1/f05"),
            }
            stage.double().clear_faults();
            assert_eq!(errno(renamed.join().unwrap()), Errno::EIO);
        });
        let left = files_of(&stage.store);
        assert!(only_files(tree("t")).iter().all(|(key, bytes)| left.get(key) == Some(bytes)), "{left:?}");
        let status = stage.mount.status();
        assert!(status.contains("s3://releases/u/d1/f05") && status.contains("nothing of it is deleted"), "{status}");
    }
}

/// A copy whose ETag and checksum are not those of its source: nothing is deleted.
#[test]
fn a_damaged_copy_is_found() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new(Store::double());
    put_all(&stage.store, &tree("t"));
    // The store has lost a bit of it since it made its sums.
    stage.double().put_object("releases", "t/d3/f03", Object { bytes: "content 2".into(), ..Object::new("content 3") });
    assert_eq!(errno(fs::rename(stage.path("t"), stage.path("u"))), Errno::EIO);
    let status = stage.mount.status();
    assert!(status.contains("s3://releases/t/d3/f03: its copy holds other bytes"), "{status}");
    assert!(only_files(tree("t")).keys().all(|key| stage.store.get(key).is_some()));
}

/// What the store refuses after a crash is said with both names, and tried again by the next mount.
#[test]
fn a_rename_that_cannot_be_ended_is_said() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    put_all(&store, &tree("t"));
    let mut mount = killed_while_renaming(&store, "tree-copied:3", &["max_connections=1", "write_back=1h"], |_| {});
    let double = store.as_double().unwrap();
    double.fault(When::operation("CopyObject").key("u/d3/f03"), Fault::Error(403, "AccessDenied"));
    mount.again();
    store.eventually("it is said", |_| {
        let status = mount.status();
        let told = ["rename of s3://releases/t/ to s3://releases/u/: failed", "denied", "the next mount goes on", "earlier mount"];
        told.iter().all(|told| status.contains(told))
    });
    assert_eq!(fs::read_to_string(mount.path("t/d3/f03")).unwrap(), "content 3");
    assert_eq!(fs::read_to_string(mount.path("u/d0/f00")).unwrap(), "content 0");
    // What is put there now is no part of it, neither in the spool nor in S3.
    std::thread::sleep(Duration::from_millis(2100));
    store.put("t/in S3", "later");
    files::write(&mount.path("t/in the spool"), b"later").unwrap();
    mount.crash();
    double.clear_faults();
    mount.again();
    let mut expected = only_files(tree("u"));
    expected.extend(["t/in S3", "t/in the spool"].map(|key| (key.to_owned(), "later".to_owned())));
    store.eventually("the next mount ends it", |store| {
        files::output(mount.command().arg("flush").arg(mount.dir()));
        files_of(store) == expected
    });
}

/// While the store does not answer it waits for that, and then goes on.
#[test]
fn a_rename_goes_on_after_an_outage() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    put_all(&store, &tree("t"));
    let mut mount = killed_while_renaming(&store, "tree-copied:3", &["close_timeout=1s", "max_connections=1"], |_| {});
    let double = store.as_double().unwrap();
    double.fault(When::operation("CopyObject"), Fault::Error(500, "InternalError"));
    mount.again();
    store.eventually("it waits", |_| renames(&mount).iter().any(|rename| rename["phase"] == "waiting"));
    double.clear_faults();
    is_renamed(&mount, &store, ["t", "u"], "after the outage");
}

/// While the deletes are not answered all of it is under the new name, and the rest follows when they are.
#[test]
fn deletes_that_meet_an_outage_follow_later() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new(Store::double());
    put_all(&stage.store, &tree("t"));
    stage.double().fault(When::operation("DeleteObjects"), Fault::Error(500, "InternalError"));
    fs::rename(stage.path("t"), stage.path("u")).unwrap();
    assert_eq!(fs::read_to_string(stage.path("u/d1/f05")).unwrap(), "content 5");
    stage.store.eventually("it waits", |_| renames(&stage.mount).iter().any(|rename| rename["phase"] == "waiting"));
    stage.double().clear_faults();
    is_renamed(&stage.mount, &stage.store, ["t", "u"], "later");
}

/// From one bucket to another: only a mount of both goes on, and status tells of it until then.
#[test]
fn a_rename_between_buckets_is_ended_by_a_mount_of_both() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    let second = store.second_bucket();
    put_all(&store, &tree("t"));
    let setup = Setup::of(&store).source("s3://").env(failpoint::VARIABLE, "tree-copied:3");
    let mut mount = Mount::start(setup);
    fs::rename(mount.path("releases/t"), mount.path(&second).join("u")).unwrap_err();
    assert!(mount.was_killed(Duration::from_secs(20)));
    let told = files::output(mount.command().arg("status"));
    let told = String::from_utf8_lossy(&told.stdout).into_owned();
    assert!(told.contains(&format!("rename of s3://releases/t/ to s3://{second}/u/: waiting  (begun by an earlier mount)")), "{told}");
    mount.again();
    store.eventually("the first bucket is empty", |store| store.keys().is_empty());
    store.eventually("it has ended", |_| renames(&mount).is_empty());
    let expected: Vec<String> = tree("u").into_keys().collect();
    assert_eq!(store.keys_of(&second), expected);
}

/// Promise 26: "Whatever moment packmule is killed at": all is under one of the two names in the end, queued files too.
#[test]
fn a_rename_killed_at_any_moment() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    for seed in 0..if torture() { 120 } else { 10 } {
        let mut rng = SmallRng::seed_from_u64(seed);
        put_all(&store, &tree("t"));
        let setup = Setup::of(&store).option("max_connections=4").option("write_back=50ms");
        let mut mount = Mount::start(setup);
        let double = store.as_double().unwrap();
        double.fault(When::operation("CopyObject"), Fault::Delay(Duration::from_millis(5)));
        double.fault(When::operation("DeleteObjects"), Fault::Delay(Duration::from_millis(20)));
        for name in ["d0/f00", "d1/new"] {
            files::write(&mount.path("t").join(name), b"queued").unwrap();
        }
        let (from, to) = (mount.path("t"), mount.path("u"));
        std::thread::scope(|scope| {
            let renamed = scope.spawn(|| fs::rename(&from, &to));
            std::thread::sleep(Duration::from_millis(rng.random_range(0..200)));
            mount.kill();
            drop(renamed.join().unwrap());
        });
        double.clear_faults();
        mount.again();
        let expected = |name: &str| {
            let mut expected = only_files(tree(name));
            expected.extend(["d0/f00", "d1/new"].map(|queued| (format!("{name}/{queued}"), "queued".to_owned())));
            expected
        };
        store.eventually(&format!("seed {seed}: one name has all of it"), |store| {
            let files = files_of(store);
            files == expected("t") || files == expected("u")
        });
        drop(mount);
        store.keys().iter().for_each(|key| store.delete(key));
    }
}
