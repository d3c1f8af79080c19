//! Uploads against stores that refuse, forget and lose things.

use bytes::Bytes;
use std::sync::Arc;

use super::*;
use crate::s3::multipart::copy_object;
use crate::s3::{
    Checksum, ChecksumKind, Condition, CopyMetadata, CopySource, ETag, ErrorKind, GetRequest, ListRequest, Metadata, ObjectHead, Part,
    PutOptions,
};

fn body() -> Arc<Bytes> {
    Arc::new(Bytes::from_static(b"hello"))
}

/// MD5 of `hello`.
const HELLO: &str = "5d41402abc4b2a76b9719d911017c592";

fn md5() -> Checksum {
    Checksum::Md5(ETag::new(HELLO).md5().unwrap())
}

#[tokio::test]
async fn an_upload_is_repeated_from_its_beginning() {
    let server = Server::start(|number, _| match number {
        0 => Reply::Close,
        1 => refuse("503 Slow Down", "SlowDown"),
        _ => reply("200 OK", &[("etag", HELLO), ("date", "Wed, 21 Oct 2015 07:28:00 GMT")], ""),
    })
    .await;
    let outcome = server
        .bucket(|config| config.retries = 0)
        .put("k", body(), PutOptions { checksum: Some(md5()), ..Default::default() })
        .await
        .unwrap();
    assert!(outcome.last_modified.is_some());
    assert_eq!(server.count(), 3);
    assert!((0..3).all(|index| server.request(index).body == b"hello"));
    assert_eq!(server.request(2).header("content-md5"), Some("XUFAKrxLKna5cZ2REBfFkg=="));
}

#[tokio::test]
async fn a_store_without_acls_gets_none_again() {
    for refusal in [("400 Bad Request", "AccessControlListNotSupported"), ("403 Forbidden", "AccessDenied")] {
        let server = Server::start(move |_, seen| {
            if seen.header("x-amz-acl").is_some() { refuse(refusal.0, refusal.1) } else { reply("200 OK", &[("etag", "e")], "") }
        })
        .await;
        let store = server.bucket(|config| config.acl = Some("public-read".into()));
        store.put("k", body(), PutOptions::default()).await.unwrap();
        store.put("k", body(), PutOptions::default()).await.unwrap();
        assert_eq!(server.count(), 3, "{refusal:?}");
    }
    let denied = Server::start(|_, _| refuse("403 Forbidden", "AccessDenied")).await;
    let error = denied.bucket(|config| config.acl = Some("public-read".into())).put("k", body(), PutOptions::default()).await.unwrap_err();
    assert_eq!((error.kind, denied.count()), (ErrorKind::AccessDenied, 2));
}

#[tokio::test]
async fn refused_checksums_are_left_out_from_then_on() {
    let server = Server::start(|_, seen| {
        if seen.header("x-amz-checksum-crc64nvme").is_some() {
            refuse("501 Not Implemented", "NotImplemented")
        } else {
            reply("200 OK", &[("etag", "e")], "")
        }
    })
    .await;
    let store = server.bucket(|_| {});
    for _ in 0..2 {
        store.put("k", body(), PutOptions { checksum: Some(Checksum::Crc64Nvme(7)), ..Default::default() }).await.unwrap();
    }
    assert_eq!(server.count(), 3);
    assert_eq!(store.capabilities().upload_checksum, ChecksumKind::Off);
}

#[tokio::test]
async fn other_bytes_under_the_etag_are_an_error() {
    let server = Server::start(|_, _| reply("200 OK", &[("etag", "\"00000000000000000000000000000000\"")], "")).await;
    let error = server.bucket(|_| {}).put("k", body(), PutOptions { checksum: Some(md5()), ..Default::default() }).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::BadDigest);
}

#[tokio::test]
async fn a_refusal_after_a_lost_answer_may_be_our_own_success() {
    let server = Server::start(|number, seen| match number {
        0 => Reply::Close,
        _ if seen.line.starts_with("HEAD") => {
            Reply::Raw(format!("HTTP/1.1 200 OK\r\netag: \"{HELLO}\"\r\ncontent-length: 5\r\nconnection: close\r\n\r\n"))
        }
        _ => refuse("412 Precondition Failed", "PreconditionFailed"),
    })
    .await;
    let options = PutOptions { checksum: Some(md5()), condition: Some(Condition::Absent), ..Default::default() };
    let outcome = server.bucket(|_| {}).put("k", body(), options.clone()).await.unwrap();
    assert_eq!(outcome.etag.as_str(), HELLO);
    let taken = Server::start(|_, _| refuse("412 Precondition Failed", "PreconditionFailed")).await;
    let error = taken.bucket(|_| {}).put("k", body(), options).await.unwrap_err();
    assert_eq!((error.kind, taken.count()), (ErrorKind::PreconditionFailed, 1));
}

#[tokio::test]
async fn conditions_are_probed_on_a_marker() {
    let page = "<ListBucketResult><IsTruncated>false</IsTruncated><Contents><Key>d/</Key><Size>0</Size><ETag>e</ETag>\
        <LastModified>2026-01-01T00:00:00Z</LastModified></Contents></ListBucketResult>";
    let mode = [("etag", "e"), ("x-amz-meta-mode", "16877")];
    // Of a marker that was listed a HEAD tells what is in it; of one that was just made, the maker knows.
    for listed in [true, false] {
        let server = Server::start(move |_, seen| match seen.line.split(' ').next() {
            Some("HEAD") => reply("200 OK", &mode, ""),
            Some("GET") => reply("200 OK", &[], page),
            _ => reply("200 OK", &[("etag", "e")], ""),
        })
        .await;
        let store = server.bucket(|_| {});
        let metadata = Metadata::from([("mode".to_owned(), "16877".to_owned())]);
        if listed {
            store.list(ListRequest::default()).await.unwrap();
        } else {
            store.put("d/", Arc::new(Bytes::new()), PutOptions { metadata, ..Default::default() }).await.unwrap();
        }
        store.put("k", body(), PutOptions { condition: Some(Condition::Absent), ..Default::default() }).await.unwrap();
        assert_eq!(store.capabilities().conditional_writes, Some(false));
        let lines: Vec<String> = (1..server.count()).map(|index| server.request(index).line).collect();
        let (probe, asked) =
            if listed { (2, ["HEAD /b/d/", "PUT /b/d/", "PUT /b/k"].as_slice()) } else { (1, ["PUT /b/d/", "PUT /b/k"].as_slice()) };
        assert_eq!(lines, asked);
        assert_eq!(server.request(probe).header("if-none-match"), Some("*"));
        assert_eq!(server.request(probe).header("x-amz-meta-mode"), Some("16877"));
        assert_eq!(server.request(probe + 1).header("if-none-match"), None);
    }
}

#[tokio::test]
async fn a_deleted_marker_is_not_probed_back() {
    let server = Server::start(|_, seen| match seen.line.starts_with("DELETE") {
        true => reply("204 No Content", &[], ""),
        false => reply("200 OK", &[("etag", "e")], ""),
    })
    .await;
    let store = server.bucket(|_| {});
    store.put("d/", Arc::new(Bytes::new()), PutOptions::default()).await.unwrap();
    store.delete("d/", None).await.unwrap();
    store.put("k", body(), PutOptions { condition: Some(Condition::Absent), ..Default::default() }).await.unwrap();
    let lines: Vec<String> = (0..server.count()).map(|index| server.request(index).line).collect();
    assert_eq!(lines, ["PUT /b/d/", "DELETE /b/d/", "PUT /b/k"]);
}

#[tokio::test]
async fn a_200_may_be_an_error() {
    let server = Server::start(|number, _| match number {
        0 => reply("200 OK", &[], "\n<?xml version=\"1.0\"?>\n<Error><Code>InternalError</Code></Error>"),
        1 => reply("200 OK", &[], "<CompleteMultipartUploadResult><ETag>&quot;x-1&quot;</ETag></CompleteMultipartUploadResult>"),
        2 => reply("200 OK", &[], "<Error><Code>EntityTooSmall</Code></Error>"),
        _ => reply("200 OK", &[], "<CompleteMultipartUploadResult/>"),
    })
    .await;
    let store = server.bucket(|_| {});
    let parts = [Part { number: 1, etag: ETag::new("p"), size: 5, checksum: Some(Checksum::Crc64Nvme(1)) }];
    let options = || PutOptions { checksum: Some(Checksum::Crc64Nvme(1)), ..Default::default() };
    assert_eq!(store.complete_multipart("k", "u", &parts, 5, options()).await.unwrap().etag.as_str(), "x-1");
    assert_eq!(server.request(1).header("x-amz-mp-object-size"), Some("5"));
    assert_eq!(server.request(1).header("x-amz-checksum-type"), Some("FULL_OBJECT"));
    assert!(String::from_utf8_lossy(&server.request(1).body).contains("<ChecksumCRC64NVME>AAAAAAAAAAE=</ChecksumCRC64NVME>"));
    assert_eq!(store.complete_multipart("k", "u", &parts, 5, options()).await.unwrap_err().code.as_deref(), Some("EntityTooSmall"));
    assert_eq!(store.complete_multipart("k", "u", &parts, 5, options()).await.unwrap_err().kind, ErrorKind::Protocol);
}

#[tokio::test]
async fn the_answer_to_an_upload_is_compared_with_what_was_sent() {
    let (other, hello) = ("d41d8cd98f00b204e9800998ecf8427f", HELLO);
    let sum = Some(Checksum::Crc64Nvme(0x3377_8570_0652_4257));
    // A store that ignores the CRC and took damaged bytes: the same again, over those alone.
    let server = Server::start(move |number, _| reply("200 OK", &[("etag", if number == 0 { other } else { hello })], "")).await;
    let store = server.bucket(|_| {});
    let options = PutOptions { checksum: sum, condition: Some(Condition::Absent), ..Default::default() };
    assert_eq!(store.put("k", body(), options).await.unwrap().etag.as_str(), hello);
    assert_eq!(
        (server.request(0).header("if-none-match"), server.request(1).header("if-match")),
        (Some("*"), Some("\"d41d8cd98f00b204e9800998ecf8427f\""))
    );
    assert_eq!(store.capabilities().upload_checksum, ChecksumKind::Md5);
    // Its word about a part, and about the whole.
    let server = Server::start(move |number, _| match number {
        0 => reply("200 OK", &[("etag", hello), ("x-amz-checksum-crc64nvme", "M3eFcAZSQlY=")], ""),
        1 => reply("200 OK", &[("etag", other)], ""),
        2 => reply("200 OK", &[("etag", hello), ("content-type", "text/html")], "<html>Log in</html>"),
        3 => reply("200 OK", &[("etag", "not-md5")], ""),
        _ => reply("200 OK", &[], "<CompleteMultipartUploadResult><ETag>x-1</ETag><ChecksumCRC64NVME>M3eFcAZSQlY=</ChecksumCRC64NVME></CompleteMultipartUploadResult>"),
    })
    .await;
    let store = server.bucket(|_| {});
    for expected in [Some(ErrorKind::BadDigest), Some(ErrorKind::BadDigest), Some(ErrorKind::Protocol), None] {
        assert_eq!(store.upload_part("k", "u", 1, body(), sum).await.err().map(|error| error.kind), expected);
    }
    let parts = [Part { number: 1, etag: ETag::new(hello), size: 5, checksum: sum }];
    let options = PutOptions { checksum: sum, ..Default::default() };
    assert_eq!(store.complete_multipart("k", "u", &parts, 5, options).await.unwrap_err().kind, ErrorKind::BadDigest);
}

#[tokio::test]
async fn a_page_with_the_headers_of_an_object_is_not_taken_for_one() {
    let page = &[("etag", "\"6718f3a0-5e\""), ("content-type", "text/html")];
    let server = Server::start(move |number, _| match number {
        0 => reply("200 OK", &[("x-amz-request-id", "1")], "<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"),
        1 => reply("200 OK", &[page[0], page[1], ("x-amz-request-id", "2")], "<html>an object</html>"),
        _ => reply("200 OK", page, "<html>Log in</html>"),
    })
    .await;
    let store = server.bucket(|_| {});
    store.list(ListRequest::default()).await.unwrap();
    assert_eq!(store.get("k", GetRequest::default()).await.unwrap().range, 0..22);
    assert_eq!(store.get("k", GetRequest::default()).await.err().map(|error| error.kind), Some(ErrorKind::Protocol));
    assert_eq!(store.head("k").await.unwrap_err().kind, ErrorKind::Protocol);
    assert_eq!(store.delete("k", None).await.unwrap_err().kind, ErrorKind::Protocol);
}

#[tokio::test]
async fn a_create_whose_answer_was_lost_leaves_nothing() {
    let server = Server::start(|number, seen| match seen.line.as_str() {
        _ if number == 0 => Reply::Close,
        line if line.starts_with("POST") => reply("200 OK", &[], "<InitiateMultipartUploadResult><UploadId>mine</UploadId></InitiateMultipartUploadResult>"),
        line if line.starts_with("DELETE") => reply("204 No Content", &[], ""),
        line if line.contains("uploads=") => reply(
            "200 OK",
            &[],
            "<ListMultipartUploadsResult><Upload><Key>k</Key><UploadId>lost</UploadId><Initiated>2999-01-01T00:00:00Z</Initiated></Upload><Upload><Key>k</Key><UploadId>old</UploadId><Initiated>2001-01-01T00:00:00Z</Initiated></Upload><Upload><Key>kk</Key><UploadId>other</UploadId><Initiated>2999-01-01T00:00:00Z</Initiated></Upload></ListMultipartUploadsResult>",
        ),
        _ => reply("200 OK", &[], "<ListPartsResult/>"),
    })
    .await;
    assert_eq!(server.bucket(|_| {}).create_multipart("k", PutOptions::default()).await.unwrap(), "mine");
    let deleted: Vec<String> =
        server.seen.lock().iter().filter(|seen| seen.line.starts_with("DELETE")).map(|seen| seen.line.clone()).collect();
    assert_eq!(deleted, ["DELETE /b/k?uploadId=lost"]);
}

/// SeaweedFS reads again what it copies into an upload that has a checksum.
#[tokio::test]
async fn a_plain_upload_is_begun_without_a_checksum() {
    let server =
        Server::start(|_, _| reply("200 OK", &[], "<InitiateMultipartUploadResult><UploadId>u</UploadId></InitiateMultipartUploadResult>"))
            .await;
    let store = server.bucket(|_| {});
    assert!(store.capabilities().plain_copies);
    for (plain, algorithm) in [(true, None), (false, Some("CRC64NVME"))] {
        let number = server.count();
        store.create_multipart("k", PutOptions { plain, ..PutOptions::default() }).await.unwrap();
        assert_eq!(server.request(number).header("x-amz-checksum-algorithm"), algorithm);
    }
    // What was asked for by word is kept.
    let asked = server.bucket(|config| config.upload_checksum = Some(ChecksumKind::Crc64Nvme));
    assert!(!asked.capabilities().plain_copies);
}

fn large(size: u64) -> ObjectHead {
    ObjectHead {
        size,
        etag: ETag::new("src"),
        last_modified: std::time::SystemTime::UNIX_EPOCH,
        metadata: [("mtime".to_owned(), "1".to_owned())].into(),
        headers: crate::s3::ObjectHeaders { content_type: Some("video/mp4".into()), ..Default::default() },
        storage_class: None,
        version_id: None,
        checksum: None,
        restore: None,
        tag_count: 1,
    }
}

#[tokio::test]
async fn a_large_copy_sends_everything_again_or_leaves_nothing() {
    let (refused, never) = (Some(ErrorKind::PreconditionFailed), Some(ErrorKind::TimedOut));
    for fails in [None, refused, never] {
        let server = Server::start(move |_, seen| match seen.line.as_str() {
            line if line.starts_with("HEAD") => {
                Reply::Raw(format!("HTTP/1.1 200 OK\r\netag: \"new-2\"\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", 6u64 << 30))
            }
            line if line.contains("uploads=") => {
                reply("200 OK", &[], "<InitiateMultipartUploadResult><UploadId>u</UploadId></InitiateMultipartUploadResult>")
            }
            line if line.starts_with("DELETE") => reply("204 No Content", &[], ""),
            line if line.starts_with("POST") => {
                reply("200 OK", &[], "<CompleteMultipartUploadResult><ETag>new-2</ETag></CompleteMultipartUploadResult>")
            }
            line if fails == refused && line.contains("partNumber=3&") => refuse("412 Precondition Failed", "PreconditionFailed"),
            line if fails == never && line.contains("partNumber=3&") => refuse("500 Internal Server Error", "InternalError"),
            _ => reply("200 OK", &[], "<CopyPartResult><ETag>p</ETag></CopyPartResult>"),
        })
        .await;
        let store = server.bucket(|_| {});
        let source = CopySource { bucket: "b".into(), key: "a ä".into(), if_match: None, version_id: None, checksum: None };
        let keep = CopyMetadata::Keep { website_redirect: None, storage_class: None, acl: None };
        let limit = Duration::from_secs(if fails == never { 2 } else { 300 });
        let copied = copy_object(&*store, "to", source, &large(6 << 30), &[("t".into(), "v".into())], keep, limit).await;
        assert_eq!(copied.as_ref().err().map(|error| error.kind), fails);
        let all = server.seen.lock().clone();
        assert_eq!(all.iter().any(|seen| seen.line.starts_with("DELETE")), fails.is_some());
        assert_eq!(all[0].header("content-type"), Some("video/mp4"));
        assert_eq!(all[0].header("x-amz-meta-mtime"), Some("1"));
        assert_eq!(all[0].header("x-amz-tagging"), Some("t=v"));
        let part = all.iter().find(|seen| seen.line.contains("partNumber=1&")).unwrap();
        assert_eq!(part.header("x-amz-copy-source"), Some("b/a%20%C3%A4"));
        assert_eq!(part.header("x-amz-copy-source-if-match"), Some("\"src\""));
        assert_eq!(part.header("x-amz-copy-source-range"), Some("bytes=0-268435455"));
    }
}
