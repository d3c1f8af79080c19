//! The Store client against stores that are not ours: every operation, on every store.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use packmule::s3::{
    Account as _, Checksum, Condition, CopyMetadata, CopySource, ErrorKind, GetRequest, ListRequest, Metadata, ObjectHeaders, PutOptions,
};

use crate::support::client::{block_on, connect, connect_with, get, get_with, source};
use crate::support::double::md5;
use crate::support::files::noise;
use crate::support::stage::on_every_store;
use crate::support::store::Store;
use crate::support::web;

const MIB: usize = 1 << 20;

fn with_metadata() -> PutOptions {
    PutOptions {
        headers: ObjectHeaders {
            content_type: Some("text/plain; charset=utf-8".to_owned()),
            cache_control: Some("max-age=60".to_owned()),
            content_disposition: Some("attachment".to_owned()),
            ..ObjectHeaders::default()
        },
        metadata: Metadata::from([("mtime".to_owned(), "981173106.25".to_owned()), ("mode".to_owned(), "33184".to_owned())]),
        ..PutOptions::default()
    }
}

fn from(store: &Store, key: &str) -> CopySource {
    CopySource { bucket: store.bucket().to_owned(), key: key.to_owned(), if_match: None, version_id: None, checksum: None }
}

fn links(store: &Store, sigv2: bool) {
    store.put("dir/r\u{e9}lease +1.txt", "for everybody");
    block_on(async {
        let s3 = connect_with(store, |config| config.sigv2 = sigv2).bucket;
        let query = [("response-content-disposition".to_owned(), "attachment; filename=\"x y.txt\"".to_owned())];
        let link = s3.presign_get("dir/r\u{e9}lease +1.txt", 60, &query).await.unwrap();
        let answer = web::get(&link);
        assert_eq!((answer.status, answer.text().as_str()), (200, "for everybody"), "{link}");
        assert_eq!(answer.headers.get("content-disposition").map(String::as_str), Some("attachment; filename=\"x y.txt\""));
        let forged = link.replace("lease", "lief");
        assert_ne!(web::get(&forged).status, 200);
        let expired = s3.presign_get("dir/r\u{e9}lease +1.txt", 1, &[]).await.unwrap();
        tokio::time::sleep(Duration::from_millis(2500)).await;
        assert_eq!(web::get(&expired).status, 403);
    });
}

on_every_store! {
    /// PutObject, HeadObject, GetObject, DeleteObject, with headers and metadata.
    fn put_head_get_delete(store) {
        block_on(async {
            let s3 = connect(&store).bucket;
            let bytes = noise(1, 100_000);
            let put = s3.put("dir/f", source(bytes.clone()), with_metadata()).await.unwrap();
            assert_eq!(put.etag.as_str(), md5(&bytes));
            let head = s3.head("dir/f").await.unwrap();
            assert_eq!((head.size, &head.etag), (100_000, &put.etag));
            assert_eq!(head.metadata, with_metadata().metadata);
            assert_eq!(head.headers.content_type.as_deref(), Some("text/plain; charset=utf-8"));
            assert_eq!(head.headers.cache_control.as_deref(), Some("max-age=60"));
            assert!(head.last_modified > SystemTime::now() - Duration::from_secs(60));
            assert_eq!(get(&s3, "dir/f").await.unwrap(), bytes);
            s3.delete("dir/f", None).await.unwrap();
            s3.delete("dir/f", None).await.unwrap();
            assert_eq!(s3.head("dir/f").await.unwrap_err().kind, ErrorKind::NoSuchKey);
            assert_eq!(get(&s3, "dir/f").await.unwrap_err().kind, ErrorKind::NoSuchKey);
        });
    }

    /// Ranges, and If-Match.
    fn ranges(store) {
        block_on(async {
            let s3 = connect(&store).bucket;
            let bytes = noise(2, 3 * MIB);
            let etag = s3.put("f", source(bytes.clone()), PutOptions::default()).await.unwrap().etag;
            for range in [0..1, 5..100_000, 3_000_000..3 * MIB as u64] {
                let request = GetRequest { range: Some(range.clone()), if_match: Some(etag.clone()), version_id: None };
                let part = get_with(&s3, "f", request).await.unwrap();
                assert!(part == bytes[range.start as usize..range.end as usize], "{range:?}");
            }
            let past = GetRequest { range: Some(4 * MIB as u64..5 * MIB as u64), ..GetRequest::default() };
            assert_eq!(get_with(&s3, "f", past).await.unwrap_err().kind, ErrorKind::InvalidRange);
            let other = s3.put("f", source("other"), PutOptions::default()).await.unwrap().etag;
            assert_ne!(other, etag);
            let stale = GetRequest { range: Some(0..2), if_match: Some(etag), version_id: None };
            assert_eq!(get_with(&s3, "f", stale).await.unwrap_err().kind, ErrorKind::PreconditionFailed);
        });
    }

    /// Preconditions of PutObject.
    fn conditional_put(store) {
        block_on(async {
            let s3 = connect(&store).bucket;
            let absent = PutOptions { condition: Some(Condition::Absent), ..PutOptions::default() };
            let first = s3.put("f", source("one"), absent.clone()).await.unwrap().etag;
            assert_eq!(s3.put("f", source("two"), absent).await.unwrap_err().kind, ErrorKind::PreconditionFailed);
            let over = |etag| PutOptions { condition: Some(Condition::Matches(etag)), ..PutOptions::default() };
            s3.put("f", source("three"), over(first.clone())).await.unwrap();
            assert_eq!(s3.put("f", source("four"), over(first)).await.unwrap_err().kind, ErrorKind::PreconditionFailed);
            assert_eq!(get(&s3, "f").await.unwrap(), "three");
        });
    }

    /// Listings: pages, delimiter, start-after.
    fn listings(store) {
        for n in 0..25 {
            store.put(&format!("d/f{n:02}"), "x");
            store.put(&format!("d/sub{:02}/x", n / 2), "y");
        }
        store.put("e", "z");
        block_on(async {
            let s3 = connect(&store).bucket;
            let (mut keys, mut prefixes, mut next, mut pages) = (Vec::new(), BTreeSet::new(), None, 0);
            loop {
                let request = ListRequest { prefix: "d/".to_owned(), delimited: true, continuation: next, max_keys: Some(7), ..ListRequest::default() };
                let page = s3.list(request).await.unwrap();
                keys.extend(page.entries.into_iter().map(|entry| entry.key));
                prefixes.extend(page.prefixes);
                pages += 1;
                next = page.next;
                if next.is_none() {
                    break;
                }
            }
            assert_eq!(keys, (0..25).map(|n| format!("d/f{n:02}")).collect::<Vec<_>>());
            assert_eq!(prefixes, (0..13).map(|n| format!("d/sub{n:02}/")).collect());
            assert!((6..=8).contains(&pages), "{pages} pages");
            let after = ListRequest { prefix: "d/f".to_owned(), start_after: Some("d/f20".to_owned()), ..ListRequest::default() };
            let rest = s3.list(after).await.unwrap();
            assert_eq!(rest.entries.iter().map(|entry| entry.key.as_str()).collect::<Vec<_>>(), ["d/f21", "d/f22", "d/f23", "d/f24"]);
            assert_eq!((rest.entries[0].size, rest.entries[0].etag.as_str()), (1, md5(b"x").as_str()));
            assert!(s3.list(ListRequest { prefix: "none".to_owned(), ..ListRequest::default() }).await.unwrap().entries.is_empty());
        });
    }

    /// Keys with every sign that a path or an XML text could trip over.
    fn keys_with_signs(store) {
        block_on(async {
            let s3 = connect(&store).bucket;
            let keys = ["sp ace", "plus+", "per%41cent", "amp&lt<>\"'", "q?x=1#y", "\u{fc}ml\u{e4}ut \u{65e5}\u{672c}\u{1f680}", "semi;colon,comma:", "eq=*~!$()[]{}|^`", "tail."];
            for key in keys {
                s3.put(key, source(key), PutOptions::default()).await.unwrap_or_else(|error| panic!("{key:?}: {error}"));
                assert_eq!(get(&s3, key).await.unwrap(), key);
            }
            let mut expected: Vec<_> = keys.map(str::to_owned).into();
            expected.sort();
            let listed: Vec<_> = s3.list(ListRequest::default()).await.unwrap().entries.into_iter().map(|entry| entry.key).collect();
            assert_eq!(listed, expected);
            assert_eq!(store.keys(), expected);
            for key in keys {
                let copy = format!("copy of {key}");
                let keep = CopyMetadata::Keep { website_redirect: None, storage_class: None, acl: None };
                s3.copy(&copy, from(&store, key), keep, None).await.unwrap_or_else(|error| panic!("{key:?}: {error}"));
                assert_eq!(get(&s3, &copy).await.unwrap(), key);
            }
            let all: Vec<_> = store.keys().into_iter().map(|key| (key, None)).collect();
            assert!(s3.delete_many(&all).await.unwrap().is_empty());
            assert_eq!(store.keys(), Vec::<String>::new());
        });
    }

    /// CopyObject keeps or replaces metadata.
    fn copies(store) {
        block_on(async {
            let s3 = connect(&store).bucket;
            let etag = s3.put("a", source("content"), with_metadata()).await.unwrap().etag;
            let keep = CopyMetadata::Keep { website_redirect: None, storage_class: None, acl: None };
            let copied = s3.copy("b", CopySource { if_match: Some(etag.clone()), ..from(&store, "a") }, keep.clone(), None).await.unwrap();
            assert_eq!(copied.etag, etag);
            let head = s3.head("b").await.unwrap();
            assert_eq!(head.metadata, with_metadata().metadata);
            assert_eq!(head.headers.cache_control.as_deref(), Some("max-age=60"));
            let changed = PutOptions { metadata: Metadata::from([("mtime".to_owned(), "5".to_owned())]), ..with_metadata() };
            s3.copy("a", from(&store, "a"), CopyMetadata::Replace(Box::new(changed.clone())), None).await.unwrap();
            assert_eq!(s3.head("a").await.unwrap().metadata, changed.metadata);
            let stale = CopySource { if_match: Some(packmule::s3::ETag::new("0123")), ..from(&store, "a") };
            assert_eq!(s3.copy("c", stale, keep.clone(), None).await.unwrap_err().kind, ErrorKind::PreconditionFailed);
            assert_eq!(s3.copy("c", from(&store, "none"), keep, None).await.unwrap_err().kind, ErrorKind::NoSuchKey);
        });
    }

    /// A multipart upload: parts in any order, one of them copied.
    fn multipart(store) {
        block_on(async {
            let s3 = connect(&store).bucket;
            let bytes = noise(5, 12 * MIB);
            store.put("source", bytes.clone());
            let id = s3.create_multipart("big", with_metadata()).await.unwrap();
            let last = s3.upload_part("big", &id, 3, source(&b"tail"[..]), None).await.unwrap();
            let second = s3.upload_part("big", &id, 2, source(bytes[5 * MIB..10 * MIB].to_vec()), None).await.unwrap();
            let first = s3.upload_part_copy("big", &id, 1, from(&store, "source"), 0..5 * MIB as u64).await.unwrap();
            let parts = s3.list_parts("big", &id).await.unwrap();
            assert_eq!(parts.iter().map(|part| (part.number, part.size)).collect::<Vec<_>>(), [(1, 5 << 20), (2, 5 << 20), (3, 4)]);
            assert!(store.get("big").is_none());
            assert_eq!(s3.list_uploads("b").await.unwrap().iter().map(|upload| upload.key.as_str()).collect::<Vec<_>>(), ["big"]);
            let size = 10 * MIB as u64 + 4;
            let done = s3.complete_multipart("big", &id, &[first, second, last], size, PutOptions::default()).await.unwrap();
            let expected = [&bytes[..10 * MIB], b"tail"].concat();
            assert!(store.bytes("big") == expected);
            let head = s3.head("big").await.unwrap();
            assert_eq!((head.size, head.etag), (size, done.etag));
            assert_eq!(head.metadata, with_metadata().metadata);
            assert!(s3.list_uploads("").await.unwrap().is_empty());
        });
    }

    /// "Part sent again under one number: the last one wins."
    fn a_part_sent_again(store) {
        block_on(async {
            let s3 = connect(&store).bucket;
            let id = s3.create_multipart("f", PutOptions::default()).await.unwrap();
            let before = s3.upload_part("f", &id, 1, source("to be sent again"), None).await.unwrap();
            let again = s3.upload_part("f", &id, 1, source("the last one"), None).await.unwrap();
            assert_ne!(before.etag, again.etag);
            assert_eq!(s3.list_parts("f", &id).await.unwrap().len(), 1);
            s3.complete_multipart("f", &id, &[again], 12, PutOptions::default()).await.unwrap();
            assert_eq!(store.bytes("f"), "the last one");
        });
    }

    /// An upload that is given up leaves nothing.
    fn abort(store) {
        block_on(async {
            let s3 = connect(&store).bucket;
            let id = s3.create_multipart("big", PutOptions::default()).await.unwrap();
            s3.upload_part("big", &id, 1, source("x"), None).await.unwrap();
            s3.abort_multipart("big", &id).await.unwrap();
            s3.abort_multipart("big", &id).await.unwrap();
            assert_eq!(s3.upload_part("big", &id, 1, source("x"), None).await.unwrap_err().kind, ErrorKind::NoSuchUpload);
            assert_eq!(store.unfinished_uploads(), Vec::<String>::new());
        });
    }

    /// Tags are set with the object and replaced later.
    fn tags(store) {
        block_on(async {
            let s3 = connect(&store).bucket;
            let tag = |key: &str, value: &str| (key.to_owned(), value.to_owned());
            let tags = vec![tag("stage", "release candidate"), tag("team", "a+b")];
            s3.put("f", source("x"), PutOptions { tags: tags.clone(), ..PutOptions::default() }).await.unwrap();
            let mut read = s3.get_tags("f").await.unwrap();
            read.sort();
            assert_eq!(read, tags);
            s3.put_tags("f", &[tag("only", "one")]).await.unwrap();
            assert_eq!(s3.get_tags("f").await.unwrap(), [tag("only", "one")]);
        });
    }

    /// The account: buckets are listed, made and removed.
    fn buckets(store) {
        block_on(async {
            let connected = connect(&store);
            let account = &connected.client;
            let name = format!("made-{}", store.bucket());
            account.create_bucket(&name).await.unwrap();
            let listed = account.buckets().await.unwrap();
            assert!(listed.iter().any(|bucket| bucket.name == name) && listed.iter().any(|bucket| bucket.name == store.bucket()));
            let bucket = account.bucket(&name).await.unwrap();
            bucket.put("f", source("x"), PutOptions::default()).await.unwrap();
            bucket.delete("f", None).await.unwrap();
            account.delete_bucket(&name).await.unwrap();
            assert_eq!(account.bucket(&name).await.unwrap_err().kind, ErrorKind::NoSuchBucket);
        });
    }

    /// A link works for any program, for a while, and only as signed.
    fn presigned_links(store) {
        links(&store, false);
    }

    /// The same with Signature Version 2.
    fn presigned_links_of_version_2(store) {
        links(&store, true);
    }

    /// Signature Version 2, for old stores.
    fn signature_version_2(store) {
        block_on(async {
            let s3 = connect_with(&store, |config| config.sigv2 = true).bucket;
            s3.put("d/a b+c", source("old ways"), with_metadata()).await.unwrap();
            assert_eq!(get(&s3, "d/a b+c").await.unwrap(), "old ways");
            assert_eq!(s3.list(ListRequest { prefix: "d/".to_owned(), delimited: true, ..ListRequest::default() }).await.unwrap().entries.len(), 1);
            let id = s3.create_multipart("m", PutOptions::default()).await.unwrap();
            let part = s3.upload_part("m", &id, 1, source("x"), None).await.unwrap();
            s3.complete_multipart("m", &id, &[part], 1, PutOptions::default()).await.unwrap();
            s3.delete("m", None).await.unwrap();
        });
    }

    /// ListObjects of the first version pages too.
    fn first_version_listings(store) {
        for n in 0..23 {
            store.put(&format!("d/f{n:02}"), "x");
        }
        block_on(async {
            let s3 = connect_with(&store, |config| config.list_objects_v1 = true).bucket;
            for delimited in [false, true] {
                let (mut keys, mut next) = (Vec::new(), None);
                loop {
                    let request = ListRequest { prefix: "d/".to_owned(), delimited, continuation: next, max_keys: Some(5), ..ListRequest::default() };
                    let page = s3.list(request).await.unwrap();
                    keys.extend(page.entries.into_iter().map(|entry| entry.key));
                    next = page.next;
                    if next.is_none() {
                        break;
                    }
                }
                assert_eq!(keys, (0..23).map(|n| format!("d/f{n:02}")).collect::<Vec<_>>());
            }
        });
    }

    /// A checksum that does not fit what arrives is refused, and nothing is stored.
    fn wrong_checksums_are_refused(store) {
        block_on(async {
            let s3 = connect(&store).bucket;
            for checksum in [Checksum::Md5([7; 16]), Checksum::Crc32c(7), Checksum::Crc64Nvme(7)] {
                let options = PutOptions { checksum: Some(checksum), ..PutOptions::default() };
                let refused = s3.put("f", source(Bytes::from_static(b"x")), options).await.unwrap_err();
                assert_eq!(refused.kind, ErrorKind::BadDigest, "{checksum:?}: {refused}");
            }
            assert!(store.get("f").is_none());
        });
    }
}
