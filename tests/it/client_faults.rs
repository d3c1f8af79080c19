//! The client when the store or the way to it misbehaves, and what it says to bad configuration: on the double.

use std::time::{Duration, Instant};

use packmule::s3::{Account as _, Condition, CopyMetadata, CopySource, ErrorKind, ListRequest, PutOptions};

use crate::support::client::{block_on, connect, connect_as, connect_with, get, source};
use crate::support::double::{self, Fault, Object, Options, When};
use crate::support::files::noise;
use crate::support::store::Store;

const BUCKET: &str = "releases";

/// Reads, writes and metadata requests are sent again after what passes.
#[test]
fn what_passes_is_tried_again() {
    let faults = [Fault::Error(503, "SlowDown"), Fault::Error(500, "InternalError"), Fault::Refuse, Fault::LostAnswer];
    for fault in faults {
        let store = Store::double();
        let double = store.as_double().unwrap();
        double.put_object(BUCKET, "f", Object::new("content"));
        double.fault(When::operation("GetObject").times(2), fault.clone());
        double.fault(When::operation("HeadObject").times(2), fault.clone());
        double.fault(When::operation("ListObjectsV2").times(2), fault.clone());
        double.fault(When::operation("PutObject").times(2), fault.clone());
        double.fault(When::operation("DeleteObject").times(2), fault.clone());
        block_on(async {
            let s3 = connect(&store).bucket;
            let what = format!("{fault:?}");
            assert_eq!(get(&s3, "f").await.expect(&what), "content");
            assert_eq!(s3.head("f").await.expect(&what).size, 7);
            assert_eq!(s3.list(ListRequest::default()).await.expect(&what).entries.len(), 1);
            s3.put("g", source("new"), PutOptions::default()).await.expect(&what);
            s3.delete("f", None).await.expect(&what);
        });
        assert_eq!(store.keys(), ["g"]);
        assert_eq!(store.bytes("g"), "new");
    }
}

/// A captive portal's page is no success of anything.
#[test]
fn html_is_not_s3() {
    let store = Store::double();
    store.as_double().unwrap().put_object(BUCKET, "f", Object::new("content"));
    store.as_double().unwrap().fault(When::any(), Fault::Html);
    block_on(async {
        let s3 = connect(&store).bucket;
        assert_eq!(get(&s3, "f").await.unwrap_err().kind, ErrorKind::Protocol);
        assert_eq!(s3.head("f").await.unwrap_err().kind, ErrorKind::Protocol);
        assert_eq!(s3.list(ListRequest::default()).await.unwrap_err().kind, ErrorKind::Protocol);
        assert_eq!(s3.put("g", source("x"), PutOptions::default()).await.unwrap_err().kind, ErrorKind::Protocol);
        assert_eq!(s3.create_multipart("g", PutOptions::default()).await.unwrap_err().kind, ErrorKind::Protocol);
    });
}

/// What does not pass is said at once.
#[test]
fn what_stays_is_not_tried_again() {
    let cases = [
        (403, "AccessDenied", ErrorKind::AccessDenied),
        (400, "InvalidArgument", ErrorKind::InvalidRequest),
        (501, "NotImplemented", ErrorKind::NotImplemented),
    ];
    for (status, code, kind) in cases {
        let store = Store::double();
        let double = store.as_double().unwrap();
        double.fault(When::operation("PutObject"), Fault::Error(status, code));
        let refused = block_on(async { connect(&store).bucket.put("f", source("x"), PutOptions::default()).await.unwrap_err() });
        assert_eq!(refused.kind, kind);
        assert_eq!(refused.code.as_deref(), Some(code));
        assert_eq!(refused.request_id.as_deref(), Some("FAULT0000000001"));
        assert_eq!(double.requests().of("PutObject"), 1, "{code}");
    }
}

/// "retries=5": then the last answer is the error.
#[test]
fn retries_end() {
    let store = Store::double();
    let double = store.as_double().unwrap();
    double.fault(When::any(), Fault::Error(500, "InternalError"));
    let error = block_on(async { connect_with(&store, |config| config.retries = 2).bucket.head("f").await.unwrap_err() });
    assert!(error.kind == ErrorKind::Server, "{error}");
    assert_eq!(double.requests().of("HeadObject"), 3);
}

/// "CopyObject, UploadPartCopy and CompleteMultipartUpload may answer 200 with an `<Error>` body"
#[test]
fn an_error_in_a_200_is_an_error() {
    let store = Store::double();
    let double = store.as_double().unwrap();
    double.put_object(BUCKET, "f", Object::new(noise(1, 6 << 20)));
    double.fault(When::operation("CopyObject"), Fault::ErrorIn200("AccessDenied"));
    double.fault(When::operation("UploadPartCopy"), Fault::ErrorIn200("AccessDenied"));
    double.fault(When::operation("CompleteMultipartUpload"), Fault::ErrorIn200("AccessDenied"));
    block_on(async {
        let s3 = connect(&store).bucket;
        let from = || CopySource { bucket: BUCKET.to_owned(), key: "f".to_owned(), if_match: None, version_id: None, checksum: None };
        let keep = CopyMetadata::Keep { website_redirect: None, storage_class: None, acl: None };
        assert_eq!(s3.copy("g", from(), keep, None).await.unwrap_err().kind, ErrorKind::AccessDenied);
        let id = s3.create_multipart("m", PutOptions::default()).await.unwrap();
        assert_eq!(s3.upload_part_copy("m", &id, 1, from(), 0..100).await.unwrap_err().kind, ErrorKind::AccessDenied);
        let part = s3.upload_part("m", &id, 1, source("x"), None).await.unwrap();
        assert_eq!(s3.complete_multipart("m", &id, &[part], 1, PutOptions::default()).await.unwrap_err().kind, ErrorKind::AccessDenied);
    });
    assert_eq!(store.keys(), ["f"]);
}

/// A body that ends early, or is reset, is an error of the stream, never a short success.
#[test]
fn a_short_body_is_no_success() {
    for fault in [Fault::Truncate(1000), Fault::Reset(1000)] {
        let store = Store::double();
        let double = store.as_double().unwrap();
        double.put_object(BUCKET, "f", Object::new(noise(1, 300_000)));
        double.fault(When::operation("GetObject"), fault.clone());
        let error = block_on(async { get(&connect(&store).bucket, "f").await.expect_err(&format!("{fault:?}")) });
        assert!(matches!(error.kind, ErrorKind::Network | ErrorKind::TimedOut | ErrorKind::Protocol), "{fault:?}: {error:?}");
    }
}

/// After a lost answer the second try of a conditional write meets our own object: 412 is all that the client can
/// say, and whoever asked looks at what is there.
#[test]
fn a_lost_answer_of_a_conditional_put() {
    let store = Store::double();
    store.as_double().unwrap().fault(When::operation("PutObject").times(1), Fault::LostAnswer);
    block_on(async {
        let s3 = connect(&store).bucket;
        let absent = PutOptions { condition: Some(Condition::Absent), ..PutOptions::default() };
        if let Err(error) = s3.put("f", source("ours"), absent).await {
            assert_eq!(error.kind, ErrorKind::PreconditionFailed, "{error}");
        }
    });
    assert_eq!(store.bytes("f"), "ours");
}

/// "request_timeout=20s without a byte moving"
#[test]
fn silence_times_out() {
    let store = Store::double();
    store.as_double().unwrap().fault(When::any(), Fault::Stall(Duration::from_secs(30)));
    let began = Instant::now();
    let error = block_on(async {
        let connected = connect_with(&store, |config| {
            config.request_timeout = Duration::from_secs(1);
            config.retries = 1;
        });
        connected.bucket.head("f").await.unwrap_err()
    });
    assert_eq!(error.kind, ErrorKind::TimedOut);
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
}

/// Wrong key, wrong secret: told apart from a refusal of rights.
#[test]
fn wrong_keys() {
    let store = Store::double();
    for (key, secret) in [("AKIDNOBODY0000000000", double::SECRET_KEY), (double::ACCESS_KEY, "wrong")] {
        let connected = connect_as(&store, key, secret, |_| ());
        let error = block_on(connected.bucket.list(ListRequest::default())).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Credentials, "{error}");
        assert!(!format!("{error:?} {error}").contains(secret), "a secret is shown");
    }
}

/// "region found by itself"
#[test]
fn the_region_is_found() {
    for told in [Some("us-east-1"), None] {
        let store = Store::double_with(Options { region: "eu-west-3".to_owned(), ..Options::default() });
        store.put("f", "x");
        block_on(async {
            let connected = connect_with(&store, |config| config.region = told.map(str::to_owned));
            let s3 = connected.client.probe(BUCKET, "", Duration::from_secs(5), Duration::from_secs(5)).await.unwrap();
            assert_eq!(get(&s3, "f").await.unwrap(), "x");
        });
    }
}

/// "Rights limited to the prefix are enough (a 403 of HeadBucket is no refusal)"
#[test]
fn rights_to_a_prefix_are_enough() {
    let store = Store::double();
    store.put("mine/f", "x");
    let double = store.as_double().unwrap();
    for operation in ["HeadBucket", "GetBucketLocation", "ListBuckets"] {
        double.fault(When::operation(operation), Fault::Error(403, "AccessDenied"));
    }
    block_on(async {
        let connected = connect(&store);
        let s3 = connected.client.probe(BUCKET, "mine/", Duration::from_secs(5), Duration::from_secs(5)).await.unwrap();
        assert_eq!(get(&s3, "mine/f").await.unwrap(), "x");
    });
}

/// No bucket of that name, and nobody at the endpoint.
#[test]
fn the_probe_says_what_is_wrong() {
    let store = Store::double();
    block_on(async {
        let connected = connect(&store);
        let error = connected.client.probe("no-such-bucket", "", Duration::from_secs(2), Duration::from_secs(2)).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::NoSuchBucket);
        let down = connect_with(&store, |config| {
            config.endpoint_url = Some("http://127.0.0.1:9".parse().unwrap());
            config.retries = 1;
        });
        let began = Instant::now();
        let error = down.client.probe(BUCKET, "", Duration::from_secs(2), Duration::from_secs(20)).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Network, "{error}");
        assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    });
}

/// Virtual-host style through `proxy=`: the host is a name that only the proxy knows.
#[test]
fn virtual_host_style_through_a_proxy() {
    let domain = "s3.store.test".to_owned();
    let store = Store::double_with(Options { domain: Some(domain.clone()), ..Options::default() });
    store.put("dir/f", "x");
    block_on(async {
        let connected = connect_with(&store, |config| {
            config.proxy = Some(store.endpoint().parse().unwrap());
            config.endpoint_url = Some(format!("http://{domain}").parse().unwrap());
            config.path_style = Some(false);
        });
        assert_eq!(get(&connected.bucket, "dir/f").await.unwrap(), "x");
        assert_eq!(connected.bucket.list(ListRequest::default()).await.unwrap().entries.len(), 1);
        assert!(connected.client.buckets().await.unwrap().iter().any(|bucket| bucket.name == BUCKET));
    });
}

/// Keys that a URL library would fold, and those that XML cannot carry: each is itself, in every operation.
#[test]
fn keys_that_are_no_paths() {
    let keys =
        ["a//b", "/leading", "p/../q", "p/./r", "..", ".", "../up", "a/", "a/..", "ctl\u{1}\u{1b}\u{7f}\n\t", "nul\0", "%2e%2e/x", "c:\\d"];
    let neighbours = ["b", "q", "r", "x", "up", "a/b", "leading"];
    let store = Store::double();
    for key in neighbours {
        store.put(key, "neighbour");
    }
    block_on(async {
        let s3 = connect(&store).bucket;
        for key in keys {
            s3.put(key, source(key), PutOptions::default()).await.unwrap_or_else(|error| panic!("PUT {key:?}: {error}"));
            assert_eq!(store.bytes(key), key.as_bytes());
            assert_eq!(get(&s3, key).await.unwrap_or_else(|error| panic!("GET {key:?}: {error}")), key);
            assert_eq!(s3.head(key).await.unwrap_or_else(|error| panic!("HEAD {key:?}: {error}")).size, key.len() as u64);
            let keep = CopyMetadata::Keep { website_redirect: None, storage_class: None, acl: None };
            let from = CopySource { bucket: BUCKET.to_owned(), key: key.to_owned(), if_match: None, version_id: None, checksum: None };
            s3.copy("copy", from, keep, None).await.unwrap_or_else(|error| panic!("copy of {key:?}: {error}"));
            assert_eq!(store.bytes("copy"), key.as_bytes());
            let id = s3.create_multipart(key, PutOptions::default()).await.unwrap();
            let part = s3.upload_part(key, &id, 1, source("m"), None).await.unwrap();
            s3.complete_multipart(key, &id, &[part], 1, PutOptions::default()).await.unwrap();
            assert_eq!(store.bytes(key), "m");
            let link = s3.presign_get(key, 60, &[]).await.unwrap();
            if !key.contains("..") && !key.contains("/.") && key != "." {
                assert_eq!(crate::support::web::get(&link).text(), "m", "{link}");
            }
        }
        let listed: Vec<_> = s3.list(ListRequest::default()).await.unwrap().entries.into_iter().map(|entry| entry.key).collect();
        assert_eq!(listed, store.keys());
        let (one_by_one, together) = keys.split_at(6);
        for key in one_by_one {
            s3.delete(key, None).await.unwrap();
        }
        let named: Vec<_> = together.iter().map(|key| ((*key).to_owned(), None)).collect();
        assert!(s3.delete_many(&named).await.unwrap().is_empty());
        s3.delete("copy", None).await.unwrap();
    });
    let mut left: Vec<_> = neighbours.map(str::to_owned).into();
    left.sort();
    assert_eq!(store.keys(), left);
}

/// DeleteObjects with ETags: what changed meanwhile stays, and is named.
#[test]
fn deletes_only_what_was_seen() {
    let store = Store::double();
    store.put("same", "1");
    store.put("changed", "2");
    block_on(async {
        let s3 = connect(&store).bucket;
        let keys: Vec<_> =
            s3.list(ListRequest::default()).await.unwrap().entries.into_iter().map(|entry| (entry.key, Some(entry.etag))).collect();
        store.put("changed", "by others");
        let failed = s3.delete_many(&keys).await.unwrap();
        assert_eq!(failed.iter().map(|(key, _)| key.as_str()).collect::<Vec<_>>(), ["changed"]);
        let etag = s3.head("changed").await.unwrap().etag;
        store.put("changed", "again");
        assert_eq!(s3.delete("changed", Some(etag)).await.unwrap_err().kind, ErrorKind::PreconditionFailed);
    });
    assert_eq!(store.keys(), ["changed"]);
}

/// An ACL that the bucket does not take is left out once it said so (facts: "Then upload without the ACL, once, and say so").
#[test]
fn a_refused_acl_is_left_out() {
    let store = Store::double();
    block_on(async {
        let s3 = connect_with(&store, |config| config.acl = Some("public-read".to_owned())).bucket;
        s3.put("f", source("x"), PutOptions::default()).await.unwrap();
        s3.put("g", source("x"), PutOptions::default()).await.unwrap();
    });
    assert_eq!(store.keys(), ["f", "g"]);
    assert_eq!(store.as_double().unwrap().requests().of("PutObject"), 3);
}

/// An archived object: said as such.
#[test]
fn archived_objects() {
    let store = Store::double();
    store.as_double().unwrap().put_object(BUCKET, "cold", Object::new("ice").class("DEEP_ARCHIVE"));
    block_on(async {
        let s3 = connect(&store).bucket;
        assert!(s3.head("cold").await.unwrap().is_archived());
        assert_eq!(get(&s3, "cold").await.unwrap_err().kind, ErrorKind::Archived);
    });
}
