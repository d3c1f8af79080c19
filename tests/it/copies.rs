//! `cp` inside the mount: the store copies (promise 7), and the copy is what the source was, whatever becomes of that meanwhile.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use nix::errno::Errno;

use crate::support::files::{self, close, noise, sh};
use crate::support::mount::{Mount, Setup, can_mount};
use crate::support::stage::{Stage, on_every_store};
use crate::support::store::Store;

const MIB: usize = 1 << 20;
const SIZE: usize = 20 * MIB;

/// A copy that is not closed yet.
fn begun(from: &Path, to: &Path) -> (File, File) {
    let (mut from, mut to) = (File::open(from).unwrap(), File::options().read(true).write(true).create_new(true).open(to).unwrap());
    // By copy_file_range(2).
    assert_eq!(std::io::copy(&mut from, &mut to).unwrap(), SIZE as u64);
    (from, to)
}

fn stage(store: Store, options: &[&str]) -> (Stage, Vec<u8>) {
    let bytes = noise(1, SIZE);
    store.put("a", bytes.clone());
    (Stage::with(store, options), bytes)
}

on_every_store! {
    /// Promise 8: "A file being written or uploaded is read by everybody on the mount from the local copy"
    fn a_copy_is_read_and_changed_before_it_is_closed(store) {
        let (stage, mut bytes) = stage(store, &[]);
        let (_, to) = begun(&stage.path("a"), &stage.path("b"));
        assert_eq!(stage.store.keys(), ["a"], "it shows before it is closed");
        assert!(fs::read(stage.path("b")).unwrap() == bytes);
        to.write_all_at(b"changed", 9_000_000).unwrap();
        to.set_len(17_000_000).unwrap();
        to.write_all_at(b"end", 18_000_000).unwrap();
        bytes[9_000_000..9_000_007].copy_from_slice(b"changed");
        bytes.truncate(17_000_000);
        bytes.resize(18_000_000, 0);
        bytes.extend_from_slice(b"end");
        assert!(fs::read(stage.path("b")).unwrap() == bytes);
        close(to).unwrap();
        assert!(stage.store.bytes("b") == bytes && stage.store.bytes("a") == noise(1, SIZE));
        if let Some(double) = stage.store.as_double() {
            assert!(double.requests().of("UploadPartCopy") > 0, "{:?}", double.requests().summary());
        }
        assert!(fs::read(stage.path("b")).unwrap() == bytes);
    }

    /// Promise 2: "close() returns 0 only when the object is in S3 under its name, byte for byte"
    fn what_becomes_of_the_source_is_not_the_copy_s(store) {
        let (stage, bytes) = stage(store, &[]);
        for (turn, change) in ["rm a", "echo new > a", "mv a c", "echo new > d; mv d a", "chmod 600 a; sleep 2", "truncate -s 5 a"].iter().enumerate() {
            let copy = format!("b{turn}");
            let (from, to) = begun(&stage.path("a"), &stage.path(&copy));
            drop(from);
            sh(stage.dir(), change);
            close(to).unwrap();
            assert!(stage.store.bytes(&copy) == bytes, "{change}");
            assert!(fs::read(stage.path(&copy)).unwrap() == bytes, "{change}");
            sh(stage.dir(), &format!("mv {copy} a"));
        }
    }

    /// Promise 2: "close() returns 0 only when the object is in S3 under its name, byte for byte", where the folder of the source is renamed.
    fn the_folder_of_the_source_is_renamed(store) {
        let bytes = noise(1, SIZE);
        store.put("d/e/a", bytes.clone());
        let stage = Stage::new(store);
        let (from, to) = begun(&stage.path("d/e/a"), &stage.path("b"));
        fs::rename(stage.path("d"), stage.path("new")).unwrap();
        drop(from);
        close(to).unwrap();
        assert!(stage.store.bytes("b") == bytes && stage.store.bytes("new/e/a") == bytes);
    }

    /// Promise 5: "fsync makes the bytes durable in the spool, listed and recoverable."
    fn a_synced_copy_needs_no_source(store) {
        let (mut stage, bytes) = stage(store, &[]);
        let (from, to) = begun(&stage.path("a"), &stage.path("b"));
        to.sync_all().unwrap();
        stage.mount.crash();
        drop((from, to));
        stage.store.delete("a");
        stage.mount.again();
        let status = stage.mount.status();
        let id = status.split_once("packmule recover ").and_then(|(_, rest)| rest.split(' ').next()).unwrap_or_else(|| panic!("{status}"));
        let kept = stage.store.home().join("kept");
        let said = files::output(stage.mount.command().args(["recover", id]).arg(&kept));
        assert!(said.status.success(), "{said:?}");
        assert!(fs::read(&kept).unwrap() == bytes);
        stage.mount.umount_leaving("b");
    }
}

/// Promise 15: "If it was replaced and cannot be had any more: ESTALE. Never a mixture": a source that others replace.
#[test]
fn a_source_that_others_replace() {
    if !can_mount() {
        return;
    }
    let (mut stage, bytes) = stage(Store::double(), &[]);
    let (_from, to) = begun(&stage.path("a"), &stage.path("b"));
    stage.store.put("a", noise(2, SIZE));
    match close(to) {
        Ok(()) => assert!(stage.store.bytes("b") == bytes),
        Err(error) => {
            assert_eq!(error, Errno::ESTALE);
            assert_eq!(stage.store.keys(), ["a"]);
        }
    }
    assert_eq!(stage.store.unfinished_uploads(), Vec::<String>::new());
    stage.mount.umount_leaving("b");
}

/// A source that goes between the look at it and the note of who takes its bytes.
#[test]
fn a_source_that_is_removed_while_it_is_looked_at() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    let bytes = noise(1, SIZE);
    store.put("a", bytes.clone());
    store.put("d/a", bytes.clone());
    let stage = Stage { mount: Mount::start(Setup::of(&store).env(packmule::failpoint::VARIABLE, "copy-looked=600")), store };
    for (from, to, gone) in [("a", "b", "rm a"), ("d/a", "c", "mv d e; rm -r e")] {
        let (source, copy) = (stage.path(from), stage.path(to));
        let begins = std::thread::spawn(move || begun(&source, &copy));
        std::thread::sleep(std::time::Duration::from_millis(200));
        sh(stage.dir(), gone);
        let (_source, copy) = begins.join().unwrap();
        close(copy).unwrap();
        assert!(stage.store.bytes(to) == bytes, "{gone}");
    }
}

/// From bucket to bucket, in the account's mount.
#[test]
fn copies_from_bucket_to_bucket() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    let second = store.second_bucket();
    store.put("a", noise(1, SIZE));
    let mount = Mount::start(Setup::of(&store).source("s3://"));
    let double = store.as_double().unwrap();
    files::names(&mount.path(store.bucket()));
    files::names(&mount.path(&second));
    double.reset_requests();
    sh(mount.dir(), &format!("cp {}/a {second}/b", store.bucket()));
    assert!(double.object(&second, "b").unwrap().bytes == noise(1, SIZE));
    let requests = double.requests();
    assert!(requests.of("UploadPartCopy") > 0 && requests.bytes_up < MIB as u64, "{:?}", requests.summary());
}

/// Promise 2: "With `write_back` close() returns 0 when bytes and intent are durable in the spool": of a copy they are in S3.
#[test]
fn copies_with_write_back_outlive_their_source() {
    if !can_mount() {
        return;
    }
    let (mut stage, bytes) = stage(Store::double(), &["write_back=1h"]);
    sh(stage.dir(), "cp a b; cp a lu1234ab.tmp; rm a; mv lu1234ab.tmp c");
    stage.mount.ask(&["flush"], stage.dir());
    assert_eq!(stage.store.keys(), ["b", "c"]);
    assert!(stage.store.bytes("b") == bytes && stage.store.bytes("c") == bytes);
    stage.mount.umount();
}
