//! Objects that one CopyObject does not take: renamed by parallel UploadPartCopy. They are zeros, which take no memory.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::time::Duration;

use crate::support::double::{ALL_USERS, Double, Fault, Object, Options, When};
use crate::support::files;
use crate::support::mount::can_mount;
use crate::support::stage::Stage;
use crate::support::store::Store;

const GIB: usize = 1 << 30;
const BUCKET: &str = "releases";

fn with_everything(size: usize) -> Object {
    let mut object =
        Object::zeros(size).meta("mtime", "981173106").meta("mode", "33184").meta("owner-of-it", "somebody").class("STANDARD_IA");
    object.headers.content_type = Some("video/x-matroska".to_owned());
    object.headers.cache_control = Some("max-age=60".to_owned());
    object.headers.content_disposition = Some("attachment".to_owned());
    object.headers.content_language = Some("de".to_owned());
    object.tags = vec![("project".to_owned(), "x & y".to_owned()), ("cost".to_owned(), "1".to_owned())];
    object.grants = vec![("READ".to_owned(), ALL_USERS.to_owned())];
    object
}

fn stage(options: &[&str], size: usize) -> Option<Stage> {
    if !can_mount() {
        return None;
    }
    let store = Store::double_with(Options { acls: true, ..Options::default() });
    store.as_double().unwrap().put_object(BUCKET, "old", with_everything(size));
    let stage = Stage::with(store, options);
    assert_eq!(files::names(stage.dir()), ["old"]);
    stage.double().reset_requests();
    Some(stage)
}

fn etag(double: &Double, key: &str) -> Option<String> {
    double.object(BUCKET, key).map(|object| object.etag)
}

/// Promise 13: "Headers, tags, storage class and encryption survive it, and renames"
#[test]
fn twelve_gibibytes_are_renamed() {
    let size = 12 * GIB;
    let Some(stage) = stage(&[], size) else { return };
    let double = stage.double();
    double.fault(When::operation("UploadPartCopy"), Fault::Delay(Duration::from_millis(300)));
    fs::rename(stage.path("old"), stage.path("new.mkv")).unwrap();
    assert_eq!(fs::metadata(stage.path("new.mkv")).unwrap().size(), size as u64);
    assert_eq!(double.keys(BUCKET), ["new.mkv"]);
    let (before, after) = (with_everything(size), double.object(BUCKET, "new.mkv").unwrap());
    assert_eq!(after.bytes.len(), size);
    assert_eq!((after.metadata, after.headers), (before.metadata, before.headers));
    assert_eq!((after.tags, after.storage_class, after.grants), (before.tags, before.storage_class, before.grants));
    let requests = double.requests();
    assert_eq!(requests.of("UploadPartCopy"), size.div_ceil(256 << 20), "{:?}", requests.summary());
    assert!(requests.peak >= 16, "{} at once", requests.peak);
    // HEAD and tags of the source, Create, Complete, HEAD of the copy, and the DELETE; that there are ACLs, and the source's.
    assert!(requests.total() <= 48 + 6 + 2, "{:?}", requests.summary());
    assert!(requests.bytes_up < 64 << 10 && requests.bytes_down < 64 << 10, "{} up, {} down", requests.bytes_up, requests.bytes_down);
    assert_eq!(double.unfinished_uploads(BUCKET), []);
}

/// Somebody else replaces it in the middle: what they wrote stays, and nothing of the copy does.
#[test]
fn a_source_that_is_replaced_while_it_is_copied() {
    let Some(stage) = stage(&[], 6 * GIB) else { return };
    let double = stage.double();
    double.fault(When::operation("UploadPartCopy").after(4), Fault::Delay(Duration::from_secs(3)));
    std::thread::scope(|scope| {
        let renamed = scope.spawn(|| fs::rename(stage.path("old"), stage.path("new")));
        stage.store.eventually("parts are copied", |_| double.requests().of("UploadPartCopy") >= 4);
        double.put_object(BUCKET, "old", Object::new("theirs"));
        assert!(renamed.join().unwrap().is_err());
    });
    assert_eq!(double.keys(BUCKET), ["old"]);
    assert_eq!(stage.store.bytes("old"), "theirs");
    assert_eq!(double.unfinished_uploads(BUCKET), []);
    stage.mount.ask(&["refresh"], stage.dir());
    assert_eq!(fs::read(stage.path("old")).unwrap(), b"theirs");
    assert_eq!(files::names(stage.dir()), ["old"]);
}

/// What cannot be renamed is what it was, and no upload is left behind.
#[test]
fn a_part_that_fails_leaves_the_old_name() {
    for operation in ["UploadPartCopy", "CompleteMultipartUpload"] {
        let Some(stage) = stage(&["retries=1"], 6 * GIB) else { return };
        let double = stage.double();
        let before = etag(double, "old");
        double
            .fault(When::operation(operation).after(if operation == "UploadPartCopy" { 3 } else { 0 }), Fault::Error(403, "AccessDenied"));
        assert_eq!(files::errno(fs::rename(stage.path("old"), stage.path("new"))), nix::errno::Errno::EACCES, "{operation}");
        assert_eq!((double.keys(BUCKET), etag(double, "old")), (vec!["old".to_owned()], before), "{operation}");
        assert_eq!(double.unfinished_uploads(BUCKET), [], "{operation}");
        assert_eq!(files::names(stage.dir()), ["old"], "{operation}");
        double.clear_faults();
        fs::rename(stage.path("old"), stage.path("new")).unwrap();
        assert_eq!(double.keys(BUCKET), ["new"], "{operation}");
    }
}
