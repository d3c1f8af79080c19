//! Options that change what a mount shows, and what travels with a request: promises 13, 28 and 29.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::time::{Duration, UNIX_EPOCH};

use nix::errno::Errno;

use crate::support::double::{Object, Options};
use crate::support::files::{self, errno, noise, sh};
use crate::support::mount::{Mount, Setup, can_mount};
use crate::support::stage::{Stage, on_every_store};
use crate::support::store::Store;

fn shown(stage: &Stage) -> String {
    sh(stage.dir(), "stat -c '%u %g %a' f d").trim().to_owned()
}

/// A stage with `f` and `d/g` in it.
fn with(store: Store, options: &[&str]) -> Stage {
    store.put("f", "x");
    store.put("d/g", "y");
    Stage::with(store, options)
}

fn mode_of(store: &Store, key: &str) -> Option<String> {
    store.get(key).unwrap().metadata.get("mode").cloned()
}

on_every_store! {
    /// Promise 28: "where `umask=`, `file_mode=` or `dir_mode=` is given, modes follow it"
    fn a_umask_alone(store) {
        let stage = with(store, &["umask=027", "uid=1234"]);
        let gid = nix::unistd::getgid();
        assert_eq!(shown(&stage), format!("1234 {gid} 640\n1234 {gid} 750"));
        sh(stage.dir(), "chmod 600 f; touch new; chmod 777 new");
        assert!(shown(&stage).contains("640"), "taken and not kept");
        stage.store.eventually("the new file is there", |store| store.get("new").is_some());
        assert_eq!(mode_of(&stage.store, "new"), None);
    }

    /// Promise 28: "changes are then taken and not kept, unless `ownership=store` is given too"
    fn ownership_in_the_store_with_an_owner_given(store) {
        let mut stage = with(store, &["uid=1234", "gid=5678", "file_mode=0640", "ownership=store"]);
        assert_eq!(shown(&stage), "1234 5678 640\n1234 5678 755");
        sh(stage.dir(), "chmod 600 f");
        stage.store.eventually("the mode is kept", |store| mode_of(store, "f").as_deref() == Some("33152"));
        stage.mount.remount();
        assert_eq!(shown(&stage), "1234 5678 600\n1234 5678 755");
    }

    /// Promise 28: "`ownership=off` shows the mount's own values and takes changes without keeping them."
    fn ownership_off(store) {
        store.put_with("theirs", "x", &[("mode", "33216"), ("uid", "77")]);
        let stage = with(store, &["ownership=off"]);
        assert_eq!(fs::read(stage.path("theirs")).unwrap(), b"x");
        let meta = fs::metadata(stage.path("theirs")).unwrap();
        assert_eq!((meta.mode() & 0o7777, meta.uid()), (0o644, nix::unistd::getuid().as_raw()));
        sh(stage.dir(), "chmod 600 f; touch -d '2001-02-03 04:05:06 UTC' f");
        stage.store.eventually("the time is kept", |store| store.get("f").unwrap().metadata.contains_key("mtime"));
        assert_eq!(mode_of(&stage.store, "f"), None);
        assert_eq!(mode_of(&stage.store, "theirs").as_deref(), Some("33216"), "what is there stays");
    }

    /// `symlinks=off`: none is made, and one that is there is the file that it is.
    fn links_are_files(store) {
        store.put_with("link", "target", &[("mode", "41471")]);
        let stage = with(store, &["symlinks=off"]);
        assert!(symlink("f", stage.path("other")).is_err());
        assert_eq!(fs::read(stage.path("link")).unwrap(), b"target");
        let meta = fs::symlink_metadata(stage.path("link")).unwrap();
        assert!(meta.is_file() && meta.len() == 6);
    }

    /// `mtime=local`: kept on this machine, over a remount, and not in the store.
    fn times_of_this_machine(store) {
        let mut stage = Stage::with(store, &["mtime=local"]);
        files::write(&stage.path("f"), b"x").unwrap();
        sh(stage.dir(), "touch -d '2001-02-03 04:05:06 UTC' f; mkdir d; touch -d '2001-02-03 04:05:06 UTC' d");
        stage.mount.remount();
        assert_eq!(sh(stage.dir(), "stat -c %Y f").trim(), "981173106");
        assert_eq!(stage.store.get("f").unwrap().metadata.get("mtime"), None);
    }

    /// `mtime=server`: the store's LastModified, whatever the metadata says.
    fn times_of_the_store(store) {
        store.put_with("theirs", "x", &[("mtime", "981173106")]);
        let mut stage = Stage::with(store, &["mtime=server"]);
        files::write(&stage.path("f"), b"x").unwrap();
        sh(stage.dir(), "touch -d '2001-02-03 04:05:06 UTC' f; cat theirs");
        stage.mount.remount();
        for name in ["f", "theirs"] {
            let modified = fs::metadata(stage.path(name)).unwrap().modified().unwrap();
            assert!(modified > UNIX_EPOCH + Duration::from_secs(1_500_000_000), "{name}: {modified:?}");
        }
        assert_eq!(stage.store.get("f").unwrap().metadata.get("mtime"), None);
    }

    /// A read-only mount changes nothing and still reads.
    fn read_only(store) {
        let stage = with(store, &["ro"]);
        assert_eq!(fs::read(stage.path("d/g")).unwrap(), b"y");
        let refused = [
            fs::write(stage.path("new"), b"x"),
            fs::write(stage.path("f"), b"x"),
            fs::rename(stage.path("f"), stage.path("g")),
            fs::remove_file(stage.path("f")),
            fs::create_dir(stage.path("e")),
            fs::remove_dir(stage.path("d")),
            symlink("f", stage.path("l")),
            fs::set_permissions(stage.path("f"), std::os::unix::fs::PermissionsExt::from_mode(0o600)),
        ];
        for (n, refused) in refused.into_iter().enumerate() {
            assert_eq!(errno(refused), Errno::EROFS, "{n}");
        }
        assert_eq!(stage.store.keys(), ["d/g", "f"]);
    }

    /// `allow_delete=no`: new files and changes, but nothing goes.
    fn nothing_is_deleted(store) {
        let stage = with(store, &["allow_delete=no"]);
        files::write(&stage.path("new"), b"new").unwrap();
        fs::create_dir(stage.path("e")).unwrap();
        for refused in [fs::remove_file(stage.path("f")), fs::remove_dir(stage.path("e")), fs::rename(stage.path("f"), stage.path("g"))] {
            assert_eq!(errno(refused), Errno::EPERM);
        }
        assert_eq!(stage.store.keys(), ["d/g", "e/", "f", "new"]);
    }
}

/// What is asked for every new object travels with each request that makes one: PUT, multipart upload and copy.
#[test]
fn what_every_object_gets_travels() {
    if !can_mount() {
        return;
    }
    let words = [
        "default_acl=bucket-owner-full-control",
        "storage_class=STANDARD_IA",
        "sse=aws:kms",
        "sse_kms_key_id=alias/packmule",
        "requester_pays",
        "expected_bucket_owner=123456789012",
    ];
    let stage = Stage::with(Store::double(), &words);
    files::write(&stage.path("small"), b"x").unwrap();
    files::write(&stage.path("big"), &noise(1, 9 << 20)).unwrap();
    fs::rename(stage.path("small"), stage.path("moved")).unwrap();
    assert_eq!(fs::read(stage.path("moved")).unwrap(), b"x");
    let requests = stage.double().requests();
    for operation in ["PutObject", "CreateMultipartUpload", "CopyObject"] {
        let entry = requests.log.iter().find(|entry| entry.operation == operation).unwrap_or_else(|| panic!("no {operation}"));
        for (name, value) in [
            ("x-amz-acl", "bucket-owner-full-control"),
            ("x-amz-storage-class", "STANDARD_IA"),
            ("x-amz-server-side-encryption", "aws:kms"),
            ("x-amz-server-side-encryption-aws-kms-key-id", "alias/packmule"),
        ] {
            assert_eq!(entry.headers.get(name).map(String::as_str), Some(value), "{operation}: {:?}", entry.headers);
        }
    }
    for entry in requests.log.iter().filter(|entry| entry.operation != "ListBuckets") {
        assert_eq!(entry.headers.get("x-amz-request-payer").map(String::as_str), Some("requester"), "{entry:?}");
        assert_eq!(entry.headers.get("x-amz-expected-bucket-owner").map(String::as_str), Some("123456789012"), "{entry:?}");
    }
}

/// A bucket whose ACLs are off takes the upload without one, at once and for good, and says so.
#[test]
fn an_acl_that_the_bucket_does_not_take() {
    if !can_mount() {
        return;
    }
    let stage = Stage::with(Store::double(), &["default_acl=public-read"]);
    for name in ["a", "b"] {
        files::write(&stage.path(name), b"x").unwrap();
    }
    let acls = stage.double().requests().log.iter().filter(|entry| entry.headers.contains_key("x-amz-acl")).count();
    assert_eq!(acls, 1);
    assert!(stage.mount.log().contains("ACL"), "{}", stage.mount.log());
    let taken = Stage::with(Store::double_with(Options { acls: true, ..Options::default() }), &["default_acl=public-read"]);
    files::write(&taken.path("a"), b"x").unwrap();
    assert!(taken.double().requests().log.iter().any(|entry| entry.headers.get("x-amz-acl").is_some_and(|acl| acl == "public-read")));
}

/// "an archived object lists, and opening it fails with EACCES and the remedy in the log"
#[test]
fn archived_objects() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    let put = |key: &str, object: Object| store.as_double().unwrap().put_object("releases", key, object);
    put("frozen", Object::new("cold bytes").class("GLACIER"));
    let mut thawed = Object::new("warm bytes").class("DEEP_ARCHIVE");
    thawed.restore = Some("ongoing-request=\"false\", expiry-date=\"Fri, 21 Dec 2040 00:00:00 GMT\"".to_owned());
    put("thawed", thawed);
    put("instant", Object::new("bytes").class("GLACIER_IR"));
    let mut mount = Mount::start(Setup::of(&store));
    assert_eq!(sh(mount.dir(), "stat -c '%n %s' *"), "frozen 10\ninstant 5\nthawed 10\n");
    for _ in 0..2 {
        assert_eq!(errno(fs::read(mount.path("frozen"))), Errno::EACCES);
        assert!(mount.log().contains("s3://releases/frozen is archived: restore it first (aws s3api restore-object)"), "{}", mount.log());
        assert_eq!(fs::read(mount.path("thawed")).unwrap(), b"warm bytes");
        assert_eq!(fs::read(mount.path("instant")).unwrap(), b"bytes");
        mount.remount();
    }
    fs::remove_file(mount.path("frozen")).unwrap();
    assert_eq!(store.keys(), ["instant", "thawed"]);
}
