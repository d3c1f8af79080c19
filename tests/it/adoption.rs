//! A mount that died leaves a queue, and the next mount of the same bucket goes on with it, whatever its options but `spool_dir`,
//! user and read-only.

use std::fs;
use std::path::Path;

use crate::support::files::{self, sh};
use crate::support::mount::{Mount, Setup, can_mount};
use crate::support::store::Store;

const BUCKET: &str = "releases";

/// A mount whose spool lies with the store, where other mounts find it.
fn setup(store: &Store) -> Setup {
    let spool = store.home().join("spool");
    Setup::of(store).option(&format!("spool_dir={}", spool.display()))
}

/// Leaves an upload and a delete in the queue of a mount that dies.
fn die(store: &Store, setup: Setup, directory: &str) {
    let mut mount = Mount::start(setup.option("write_back=1h"));
    let place = mount.path(directory);
    files::write(&place.join("queued"), b"content").unwrap();
    sh(&place, "rm gone");
    mount.crash();
    assert_eq!(store.keys(), ["p/gone", "p/kept"], "nothing was to be sent yet");
}

fn store() -> Store {
    let store = Store::double();
    store.put("p/gone", "x");
    store.put("p/kept", "x");
    store
}

fn resumed(store: &Store, by: &str) {
    store.eventually(&format!("the queue is gone on with by {by}"), |store| store.keys() == ["p/kept", "p/queued"]);
    assert_eq!(store.bytes("p/queued"), "content");
}

/// Sub-directories of the spool.
fn folders(store: &Store) -> usize {
    fs::read_dir(store.home().join("spool")).unwrap().filter(|entry| entry.as_ref().unwrap().path().is_dir()).count()
}

/// Promise 26: "what close() promised is published or queued after the next mount", whatever its options are.
#[test]
fn whatever_the_options() {
    if !can_mount() {
        return;
    }
    let elsewhere = tempfile::tempdir().unwrap();
    let cache = format!("cache_dir={}", elsewhere.path().join("cache").display());
    let options: &[&[&str]] = &[
        &[],
        &["write_back=5s"],
        &["path_style=true"],
        &["region=eu-west-1"],
        &["upload_checksums=md5", "max_connections=2", "part_size=16M"],
        &["allow_delete=no", "on_conflict=fail", "close_timeout=1m"],
        &["sigv2=true", "listobjectsv1=true"],
        &[&cache],
    ];
    for words in options {
        let store = store();
        die(&store, setup(&store), "p");
        let next = words.iter().fold(setup(&store), |setup, word| setup.option(word));
        let mount = match Mount::try_start(next) {
            Ok(mount) => mount,
            Err(failure) => panic!("{words:?}: {failure:?}"),
        };
        resumed(&store, &format!("{words:?}"));
        assert_eq!(files::names(&mount.path("p")), ["kept", "queued"], "{words:?}");
    }
}

/// The endpoint by another name of this machine.
#[test]
fn another_spelling_of_the_endpoint() {
    if !can_mount() {
        return;
    }
    let store = store();
    die(&store, setup(&store), "p");
    let mut next = setup(&store);
    next.options[0] = next.options[0].replace("127.0.0.1", "localhost") + "/";
    let _mount = Mount::start(next);
    resumed(&store, "localhost");
}

/// Credentials from a profile instead of the environment.
#[test]
fn another_profile() {
    if !can_mount() {
        return;
    }
    let store = store();
    die(&store, setup(&store), "p");
    let file = store.home().join("credentials");
    let text = format!("[other]\naws_access_key_id={}\naws_secret_access_key={}\n", store.access_key(), store.secret_key());
    fs::write(&file, text).unwrap();
    let mut next = setup(&store).option("profile=other").env("AWS_SHARED_CREDENTIALS_FILE", file.to_str().unwrap());
    next.env.retain(|(name, _)| !name.contains("KEY"));
    let _mount = Mount::start(next);
    resumed(&store, "another profile");
}

/// A key outside of the mounted prefix is gone on with and never shown.
#[test]
fn another_prefix() {
    if !can_mount() {
        return;
    }
    for (first, directory, second) in [("", "p", "q/"), ("p/", "", "q/"), ("p/", "", ""), ("", "p", "p/")] {
        let store = store();
        store.put("q/other", "x");
        store.delete("q/other");
        die(&store, setup(&store).source(&format!("s3://{BUCKET}/{first}")), directory);
        let mount = Mount::start(setup(&store).source(&format!("s3://{BUCKET}/{second}")));
        let names = files::names(mount.dir());
        assert_eq!(names.contains(&"queued".to_owned()), second == "p/", "{names:?} of {second}");
        resumed(&store, second);
        assert!(!names.contains(&"gone".to_owned()));
    }
}

/// All buckets first and one of them then, at the same time each of the others; and the other way round.
#[test]
fn all_buckets_and_one_of_them() {
    if !can_mount() {
        return;
    }
    let store = store();
    let second = store.second_bucket();
    let mut all = Mount::start(setup(&store).source("s3://").option("write_back=1h"));
    files::write(&all.path(&format!("{BUCKET}/p/queued")), b"content").unwrap();
    sh(all.dir(), &format!("rm {BUCKET}/p/gone"));
    files::write(&all.path(&format!("{second}/f")), b"of the second").unwrap();
    all.crash();
    let one = Mount::start(setup(&store));
    resumed(&store, "one bucket");
    assert_eq!(store.keys_of(&second), Vec::<String>::new(), "that is not its business");
    assert_eq!(files::names(&one.path("p")), ["kept", "queued"]);
    // While that one runs.
    let mut other = Mount::start(setup(&store).source(&format!("s3://{second}")));
    store.eventually("the second bucket's mount goes on with its own", |store| store.keys_of(&second) == ["f"]);
    assert_eq!(files::names(other.dir()), ["f"]);
    store.eventually("it has told that it is mounted", |_| other.log().contains("mounted source"));
    other.umount();
    drop((one, other));

    die_again(&store);
    let _all = Mount::start(setup(&store).source("s3://"));
    resumed(&store, "all buckets");
}

fn die_again(store: &Store) {
    store.delete("p/queued");
    store.put("p/gone", "x");
    die(store, setup(store), "p");
}

/// A read-only mount goes on with nothing, and is in nobody's way.
#[test]
fn a_read_only_mount_leaves_the_queue_alone() {
    if !can_mount() {
        return;
    }
    let store = store();
    die(&store, setup(&store), "p");
    let folders_before = folders(&store);
    let reader = Mount::start(setup(&store).option("ro"));
    assert_eq!(files::names(&reader.path("p")), ["gone", "kept"]);
    assert_eq!(fs::read(reader.path("p/kept")).unwrap(), b"x");
    std::thread::sleep(std::time::Duration::from_secs(2));
    assert_eq!(store.keys(), ["p/gone", "p/kept"]);
    assert_eq!(folders(&store), folders_before);
    let told = reader.status();
    assert!(told.contains("read-only") && !told.contains("everything is in S3"), "{told}");
    let _writer = Mount::start(setup(&store));
    resumed(&store, "the writer beside the reader");
}

/// Two mounts of one bucket at one time never share a folder, and both bring theirs home.
#[test]
fn two_mounts_of_one_bucket() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    let mut mounts = [0, 1].map(|_| Mount::start(setup(&store).option("write_back=1h")));
    assert_eq!(folders(&store), 2);
    for (n, mount) in mounts.iter().enumerate() {
        files::write(&mount.path(&format!("of-{n}")), format!("{n}").as_bytes()).unwrap();
    }
    mounts[0].crash();
    // The third goes on with what the first left, and leaves the second alone.
    let third = Mount::start(setup(&store));
    store.eventually("the first one's is in S3", |store| store.keys() == ["of-0"]);
    mounts[1].umount();
    assert_eq!(store.keys(), ["of-0", "of-1"]);
    drop(third);
    assert!(Path::new(&store.home().join("spool")).is_dir());
}
