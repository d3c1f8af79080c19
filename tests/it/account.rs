//! "one bucket, a prefix of it, or all buckets (each in its own region; mkdir and rmdir at the top make and remove buckets only
//! with `allow_bucket_changes`)"

use std::fs;
use std::os::unix::fs::FileExt as _;

use nix::errno::Errno;

use crate::support::double::{Fault, Object, Options, When};
use crate::support::files::{self, errno, noise, sh};
use crate::support::mount::{Mount, Setup, can_mount};
use crate::support::stage::{Stage, on_every_store};
use crate::support::store::Store;

/// A mount of every bucket.
fn whole_account(store: &Store, options: &[&str]) -> Mount {
    Mount::start(options.iter().fold(Setup::of(store).source("s3://"), |setup, word| setup.option(word)))
}

on_every_store! {
    /// "`s3://` for every bucket of the account"
    fn buckets_are_directories(store) {
        let second = store.second_bucket();
        store.put("d/f", "bytes of f");
        let mut mount = whole_account(&store, &[]);
        let names = files::names(mount.dir());
        assert!(names.contains(&store.bucket().to_owned()) && names.contains(&second), "{names:?}");
        assert!(fs::metadata(mount.path(&second)).unwrap().is_dir());
        assert_eq!(fs::read(mount.path(store.bucket()).join("d/f")).unwrap(), b"bytes of f");
        fs::create_dir(mount.path(&second).join("new")).unwrap();
        files::write(&mount.path(&second).join("new/g"), b"bytes of g").unwrap();
        assert_eq!(store.keys_of(&second), ["new/", "new/g"]);
        assert_eq!(errno(fs::read(mount.path("no-such-bucket/f"))), Errno::ENOENT);
        assert_eq!(errno(files::write(&mount.path("file-beside-buckets"), b"x")), Errno::EPERM);
        let stat = nix::sys::statvfs::statvfs(mount.dir()).unwrap();
        assert_eq!(stat.blocks_available() as u64 * stat.fragment_size() as u64, 1 << 50);
        mount.remount();
        assert_eq!(fs::read(mount.path(&second).join("new/g")).unwrap(), b"bytes of g");
    }

    /// Promise 9: "It never answers EXDEV": files, open ones and trees move from bucket to bucket.
    fn renames_between_buckets(store) {
        let second = store.second_bucket();
        store.put("a", noise(3, 6 << 20));
        store.put("t/sub/f", "deep");
        let mut mount = whole_account(&store, &[]);
        let (here, there) = (mount.path(store.bucket()), mount.path(&second));
        sh(&here, "touch -d '2001-02-03 04:05:06 UTC' a");
        fs::rename(here.join("a"), there.join("b")).unwrap();
        fs::rename(here.join("t"), there.join("u")).unwrap();
        let open = fs::File::create(here.join("open")).unwrap();
        open.write_all_at(b"written before, ", 0).unwrap();
        fs::rename(here.join("open"), there.join("moved")).unwrap();
        open.write_all_at(b"and after", 16).unwrap();
        files::close(open).unwrap();
        assert_eq!(store.keys(), Vec::<String>::new());
        assert_eq!(store.keys_of(&second).iter().filter(|key| !key.ends_with('/')).collect::<Vec<_>>(), ["b", "moved", "u/sub/f"]);
        mount.remount();
        assert!(fs::read(there.join("b")).unwrap() == noise(3, 6 << 20));
        assert_eq!(sh(&there, "stat -c %Y b").trim(), "981173106");
        assert_eq!(fs::read(there.join("moved")).unwrap(), b"written before, and after");
        assert_eq!(fs::read(there.join("u/sub/f")).unwrap(), b"deep");
        assert_eq!(files::names(&here), Vec::<String>::new());
    }

    /// "mkdir and rmdir at the top make and remove buckets only with `allow_bucket_changes`", else EPERM and a line in the log.
    fn buckets_are_made_and_removed_only_where_asked(store) {
        let (second, third) = (store.second_bucket(), format!("{}-third", store.bucket()));
        let mount = whole_account(&store, &[]);
        assert_eq!(errno(fs::create_dir(mount.path(&third))), Errno::EPERM);
        assert_eq!(errno(fs::remove_dir(mount.path(&second))), Errno::EPERM);
        assert_eq!(errno(fs::rename(mount.path(&second), mount.path(&third))), Errno::EPERM);
        assert_eq!(mount.log().matches("-o allow_bucket_changes").count(), 2, "{}", mount.log());
        drop(mount);
        let mut mount = whole_account(&store, &["allow_bucket_changes"]);
        assert_eq!(files::names(&mount.path(store.bucket())), Vec::<String>::new());
        store.put("kept", "kept");
        fs::create_dir(mount.path(&third)).unwrap();
        assert!(store.buckets().contains(&third));
        files::write(&mount.path(&third).join("f"), b"x").unwrap();
        assert_eq!(store.keys_of(&third), ["f"]);
        assert_eq!(errno(fs::create_dir(mount.path(&third))), Errno::EEXIST);
        assert_eq!(errno(fs::remove_dir(mount.path(&third))), Errno::ENOTEMPTY);
        assert_eq!(errno(fs::remove_dir(mount.path(store.bucket()))), Errno::ENOTEMPTY);
        assert_eq!(store.bytes("kept"), "kept");
        fs::remove_file(mount.path(&third).join("f")).unwrap();
        fs::remove_dir(mount.path(&third)).unwrap();
        fs::remove_dir(mount.path(&second)).unwrap();
        assert!(!store.buckets().contains(&third) && !store.buckets().contains(&second));
        mount.remount();
        assert!(!files::names(mount.dir()).contains(&third));
    }

    /// "a prefix of it": nothing outside is seen or changed.
    fn prefixes_are_mounted(store) {
        for key in ["pre/fix/f", "pre/other", "pre/fixed", "top"] {
            store.put(key, key);
        }
        let mut mount = Mount::start(Setup::of(&store).source(&format!("s3://{}/pre/fix", store.bucket())));
        assert_eq!(files::names(mount.dir()), ["f"]);
        assert_eq!(fs::read(mount.path("f")).unwrap(), b"pre/fix/f");
        fs::create_dir(mount.path("d")).unwrap();
        files::write(&mount.path("d/g"), b"g").unwrap();
        fs::rename(mount.path("f"), mount.path("d/f")).unwrap();
        assert_eq!(store.keys(), ["pre/fix/d/", "pre/fix/d/f", "pre/fix/d/g", "pre/fixed", "pre/other", "top"]);
        sh(mount.dir(), "rm -r d");
        mount.remount();
        assert_eq!(files::names(mount.dir()), Vec::<String>::new());
        assert_eq!(store.keys().iter().filter(|key| !key.ends_with('/')).collect::<Vec<_>>(), ["pre/fixed", "pre/other", "top"]);
    }

    /// A prefix that no key has yet is an empty folder, and exists once something is written.
    fn a_prefix_that_does_not_exist_yet(store) {
        let mut mount = Mount::start(Setup::of(&store).source(&format!("s3://{}/new/prefix/", store.bucket())));
        assert_eq!(files::names(mount.dir()), Vec::<String>::new());
        files::write(&mount.path("f"), b"x").unwrap();
        assert_eq!(store.bytes("new/prefix/f"), "x");
        mount.remount();
        assert_eq!(files::names(mount.dir()), ["f"]);
    }
}

/// "each in its own region", from the first request on and in copies between them.
#[test]
fn each_bucket_in_its_own_region() {
    if !can_mount() {
        return;
    }
    let store = Store::double_with(Options { region: "eu-west-3".to_owned(), ..Options::default() });
    let double = store.as_double().unwrap();
    double.create_bucket_in("ap-south-1", "faraway");
    double.put_object("faraway", "f", Object::new("far"));
    store.put("g", "near");
    // The account's own requests go where the configuration says; ListBuckets is answered in every region.
    let mount = Mount::start(Setup::of(&store).source("s3://").option("region=eu-west-3"));
    assert_eq!(files::names(mount.dir()), ["faraway", "releases"]);
    assert_eq!(fs::read(mount.path("faraway/f")).unwrap(), b"far");
    assert_eq!(fs::read(mount.path("releases/g")).unwrap(), b"near");
    files::write(&mount.path("faraway/h"), &noise(1, 9 << 20)).unwrap();
    fs::rename(mount.path("faraway/h"), mount.path("releases/h")).unwrap();
    fs::rename(mount.path("releases/g"), mount.path("faraway/g")).unwrap();
    assert_eq!((double.keys("faraway"), double.keys("releases")), (vec!["f".into(), "g".into()], vec!["h".to_owned()]));
    assert!(store.bytes("h") == noise(1, 9 << 20));
}

/// "Rights limited to the prefix are enough (a 403 of HeadBucket is no refusal)"
#[test]
fn rights_to_the_prefix_are_enough() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    store.put("pre/fix/f", "bytes");
    store.put("secret", "no");
    store.as_double().unwrap().fault(When::any().outside("pre/fix/"), Fault::Error(403, "AccessDenied"));
    let mut mount = Mount::start(Setup::of(&store).source("s3://releases/pre/fix/"));
    assert_eq!(fs::read(mount.path("f")).unwrap(), b"bytes");
    fs::create_dir_all(mount.path("d/e")).unwrap();
    files::write(&mount.path("d/e/small"), b"small").unwrap();
    files::write(&mount.path("big"), &noise(2, 9 << 20)).unwrap();
    sh(mount.dir(), "mv d g; chmod 600 g/e/small; mv big g/; rm f; ln -s e/small g/link; cat g/link; rm -r g");
    assert_eq!(files::names(mount.dir()), Vec::<String>::new());
    mount.remount();
    assert_eq!(files::names(mount.dir()), Vec::<String>::new());
    let log = mount.log();
    assert!(!log.contains("AccessDenied"), "{log}");
}

/// Of an account's buckets one may be closed to us: the others are not harmed.
#[test]
fn a_bucket_that_refuses_us() {
    if !can_mount() {
        return;
    }
    let stage = {
        let store = Store::double();
        store.as_double().unwrap().create_bucket("closed");
        store.put("f", "open");
        Stage { mount: whole_account(&store, &[]), store }
    };
    assert_eq!(files::names(stage.dir()), ["closed", "releases"]);
    assert_eq!(fs::read(stage.path("releases/f")).unwrap(), b"open");
    stage.double().fault(When::bucket("closed"), Fault::Error(403, "AccessDenied"));
    sh(stage.dir(), "ls -l");
    assert_eq!(
        errno(fs::read_dir(stage.path("closed")).and_then(|mut entries| entries.next().unwrap_or_else(|| panic!("no error")))),
        Errno::EACCES
    );
    assert_eq!(fs::read(stage.path("releases/f")).unwrap(), b"open");
}

/// Promise 25: "resumed at the next mount of the bucket (or of all)", by itself or by `flush`, though the bucket is away when that starts.
#[test]
fn a_bucket_that_is_away_at_the_start() {
    if !can_mount() {
        return;
    }
    for resumed in ["by flush", "by itself"] {
        let store = Store::double();
        let second = store.second_bucket();
        let double = store.as_double().unwrap();
        for key in ["removed", "d/"] {
            double.put_object(&second, key, Object::new(""));
        }
        let mut mount = whole_account(&store, &["write_back=1h", "retries=0"]);
        let there = mount.path(&second);
        assert_eq!(files::names(&there), ["d", "removed"]);
        sh(&there, "rm removed; rmdir d; echo content > queued");
        mount.crash();
        double.fault(When::bucket(&second), Fault::Error(500, "InternalError"));
        mount.again();
        let status = mount.status();
        for name in ["removed", "d/", "queued"] {
            assert!(status.contains(&format!("s3://{second}/{name}")), "{name} is not in {status}");
        }
        double.clear_faults();
        assert!(files::names(&there).iter().all(|name| name == "queued"), "{resumed}: {:?}", files::names(&there));
        if resumed == "by flush" {
            mount.ask(&["flush"], mount.dir());
            assert_eq!(store.keys_of(&second), ["queued"]);
        } else {
            store.eventually("it goes on", |store| store.keys_of(&second) == ["queued"]);
        }
        store.eventually("nothing is left", |_| mount.status().contains("everything is in S3"));
    }
}

/// "listing the account asks once; each bucket's region once", whatever is looked at.
#[test]
fn an_account_is_listed_once_and_each_region_asked_for_once() {
    if !can_mount() {
        return;
    }
    let store = Store::double();
    let double = store.as_double().unwrap();
    for n in 0..12 {
        let (name, region) = (format!("bucket-{n:02}"), if n % 3 == 0 { "us-east-1" } else { "eu-west-3" });
        double.create_bucket_in(region, &name);
        double.put_object(&name, "d/f", Object::new("content"));
    }
    let mount = whole_account(&store, &["metadata_ttl=1h", "negative_metadata_ttl=1h"]);
    double.reset_requests();
    sh(
        mount.dir(),
        "ls; ls -l; stat bucket-*; ls -l bucket-*; cat bucket-*/d/f; find . -type f; ls -l; test ! -e no-such-bucket; test ! -e .git",
    );
    let requests = double.requests();
    assert!(requests.of("ListBuckets") <= 1, "{:?}", requests.summary());
    for n in 0..12 {
        let of_it: Vec<_> =
            requests.log.iter().filter(|asked| asked.bucket == format!("bucket-{n:02}")).map(|asked| asked.operation).collect();
        // Two folders, what may follow the second one, and one file; its region, which a refusal tells where it is not the account's own.
        let elsewhere = usize::from(n % 3 != 0);
        assert!(of_it.len() <= 5 + elsewhere, "{n}: {of_it:?}");
        let others = of_it.iter().filter(|operation| !matches!(**operation, "ListObjectsV2" | "GetObject"));
        assert!(others.count() <= 1 + elsewhere, "{n}: {of_it:?}");
    }
}
