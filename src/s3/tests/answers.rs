//! Regions, credentials, portals, listings: what answers make the client do.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use std::sync::Arc;

use super::*;
use crate::s3::{Account as _, Checksum, Condition, CopyMetadata, CopySource, ErrorKind, GetRequest, ListRequest, PutOptions};

const EMPTY_LIST: &str = "<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>";

#[tokio::test]
async fn the_region_is_followed_once_a_bucket() {
    for first in [(|| reply("301 Moved Permanently", &[("x-amz-bucket-region", "eu-central-1")], "")) as fn() -> Reply, || {
        reply("400 Bad Request", &[], "<Error><Code>AuthorizationHeaderMalformed</Code><Region>eu-central-1</Region></Error>")
    }] {
        let server = Server::start(move |number, _| if number == 0 { first() } else { reply("200 OK", &[], EMPTY_LIST) }).await;
        let store = server.bucket(|_| {});
        store.list(ListRequest::default()).await.unwrap();
        store.list(ListRequest::default()).await.unwrap();
        assert_eq!(server.count(), 3);
        let scope = |index| server.request(index).header("authorization").unwrap().contains("/eu-central-1/s3/");
        assert!(!scope(0) && scope(1) && scope(2));
    }
}

#[tokio::test]
async fn a_head_learns_the_region_too() {
    let server = Server::start(|number, _| match number {
        0 => reply("400 Bad Request", &[("x-amz-bucket-region", "eu-north-1")], ""),
        _ => reply("200 OK", &[("etag", "\"e\"")], ""),
    })
    .await;
    server.bucket(|_| {}).head("k").await.unwrap();
    assert!(server.request(1).header("authorization").unwrap().contains("/eu-north-1/"));
}

#[tokio::test]
async fn a_forbidden_head_bucket_is_no_refusal() {
    let server =
        Server::start(
            |_, seen| if seen.line.starts_with("HEAD") { reply("403 Forbidden", &[], "") } else { reply("200 OK", &[], EMPTY_LIST) },
        )
        .await;
    let client = server.client(|_| {});
    assert_eq!(client.bucket("b").await.unwrap().bucket(), "b");
    client.bucket("b").await.unwrap();
    assert_eq!(server.count(), 1);
    client.probe("b", "p/", Duration::from_secs(2), Duration::from_secs(2)).await.unwrap();
    assert!(server.request(1).line.contains("prefix=p%2F"));
}

#[tokio::test]
async fn refused_credentials_are_read_again_once() {
    let file = passwd("OLD:S\n");
    let path = file.clone();
    let server = Server::start(move |_, seen| {
        if seen.header("authorization").unwrap().contains("OLD") {
            std::fs::write(&path, "NEW:S\n").unwrap();
            return refuse("403 Forbidden", "InvalidAccessKeyId");
        }
        reply("200 OK", &[], EMPTY_LIST)
    })
    .await;
    server.bucket(|config| config.passwd_file = Some(file)).list(ListRequest::default()).await.unwrap();
    assert_eq!(server.count(), 2);
    let always = Server::start(|_, _| refuse("403 Forbidden", "InvalidAccessKeyId")).await;
    let error = always.bucket(|_| {}).list(ListRequest::default()).await.unwrap_err();
    assert_eq!((error.kind, always.count()), (ErrorKind::Credentials, 2));
}

#[tokio::test]
async fn a_captive_portal_is_never_s3() {
    let server = Server::start(|_, _| reply("200 OK", &[("content-type", "text/html")], "<html><body>Log in<br></body></html>")).await;
    let store = server.bucket(|_| {});
    let source = CopySource { bucket: "b".into(), key: "k".into(), if_match: None, version_id: None, checksum: None };
    let keep = CopyMetadata::Keep { website_redirect: None, storage_class: None, acl: None };
    let body = Bytes::from_static(b"x");
    let kinds = [
        store.list(ListRequest::default()).await.map(drop).unwrap_err().kind,
        store.head("k").await.map(drop).unwrap_err().kind,
        store.get("k", GetRequest::default()).await.map(drop).unwrap_err().kind,
        store.get("k", GetRequest { range: Some(0..5), ..Default::default() }).await.map(drop).unwrap_err().kind,
        store.put("k", Arc::new(body), PutOptions::default()).await.map(drop).unwrap_err().kind,
        store.delete("k", None).await.unwrap_err().kind,
        store.delete_many(&[("k".into(), None)]).await.map(drop).unwrap_err().kind,
        store.copy("k2", source, keep, None).await.map(drop).unwrap_err().kind,
        store.abort_multipart("k", "u").await.unwrap_err().kind,
    ];
    assert_eq!(kinds, [ErrorKind::Protocol; 9]);
    let redirect = Server::start(|_, _| reply("302 Found", &[("location", "http://portal/login")], "")).await;
    let error = redirect.bucket(|_| {}).list(ListRequest::default()).await.unwrap_err();
    assert_eq!((error.kind, redirect.count()), (ErrorKind::Protocol, 1));
}

#[tokio::test]
async fn parts_are_listed_over_pages_with_their_checksums() {
    const PARTS: u64 = 2500;
    let server = Server::start(|_, seen| {
        let marker = seen.line.split("part-number-marker=").nth(1).and_then(|rest| rest.split(['&', ' ']).next());
        let after: u64 = marker.map_or(0, |marker| marker.parse().unwrap());
        let last = PARTS.min(after + 1000);
        let mut page = format!("<ListPartsResult><IsTruncated>{}</IsTruncated><NextPartNumberMarker>{last}</NextPartNumberMarker>", last < PARTS);
        for number in after + 1..=last {
            let sum = STANDARD.encode(number.to_be_bytes());
            page += &format!("<Part><PartNumber>{number}</PartNumber><ETag>&quot;e&quot;</ETag><Size>5</Size><ChecksumCRC64NVME>{sum}</ChecksumCRC64NVME></Part>");
        }
        reply("200 OK", &[], &(page + "</ListPartsResult>"))
    })
    .await;
    let parts = server.bucket(|_| {}).list_parts("k", "u").await.unwrap();
    assert_eq!((parts.len() as u64, server.count()), (PARTS, 3));
    for (part, number) in parts.iter().zip(1..) {
        assert_eq!((part.number, part.checksum), (number, Some(Checksum::Crc64Nvme(number.into()))));
    }
}

#[tokio::test]
async fn listings_go_over_pages() {
    let server = Server::start(|_, seen| {
        let line = &seen.line;
        if line.contains("uploadId") {
            let first = !line.contains("part-number-marker");
            let part = if first { 1 } else { 2 };
            return reply(
                "200 OK",
                &[],
                &format!("<ListPartsResult><IsTruncated>{first}</IsTruncated><NextPartNumberMarker>{part}</NextPartNumberMarker><Part><PartNumber>{part}</PartNumber><ETag>&quot;e&quot;</ETag><Size>5</Size></Part></ListPartsResult>"),
            );
        }
        if line.contains("uploads=") {
            let first = !line.contains("key-marker=a%2Bb");
            return reply(
                "200 OK",
                &[],
                &format!("<ListMultipartUploadsResult><EncodingType>url</EncodingType><IsTruncated>{first}</IsTruncated><NextKeyMarker>a%2Bb</NextKeyMarker><NextUploadIdMarker>i</NextUploadIdMarker><Upload><Key>a%2Bb</Key><UploadId>i</UploadId><Initiated>2024-01-01T00:00:00Z</Initiated></Upload></ListMultipartUploadsResult>"),
            );
        }
        let more = if line.contains("continuation-token") { "" } else { "<ContinuationToken>t</ContinuationToken>" };
        reply("200 OK", &[], &format!("<ListAllMyBucketsResult><Buckets><Bucket><Name>b</Name></Bucket></Buckets>{more}</ListAllMyBucketsResult>"))
    })
    .await;
    let client = server.client(|_| {});
    let store = client.open("b").unwrap();
    assert_eq!(store.list_parts("k", "u").await.unwrap().iter().map(|part| part.number).collect::<Vec<_>>(), [1, 2]);
    let uploads = store.list_uploads("a").await.unwrap();
    assert_eq!(uploads.iter().map(|upload| upload.key.as_str()).collect::<Vec<_>>(), ["a+b", "a+b"]);
    assert_eq!(client.buckets().await.unwrap().len(), 2);
    let usage = client.usage();
    let sent: Vec<_> = usage.requests.iter().map(|(operation, sent)| (operation.name(), *sent)).collect();
    assert_eq!(sent, [("ListParts", 2), ("ListMultipartUploads", 2), ("ListBuckets", 2)]);
    let told: usize = server.seen.lock().iter().map(|seen| seen.body.len()).sum();
    assert_eq!((usage.sent, told), (0, 0));
    assert!(usage.received > 500, "{usage:?}");
}

#[tokio::test]
async fn deletes_in_batches_and_alone() {
    let server = Server::start(|_, seen| {
        if seen.line.starts_with("HEAD") {
            return reply("200 OK", &[("etag", "\"e\"")], "");
        }
        if seen.line.starts_with("DELETE") {
            return reply("204 No Content", &[], "");
        }
        reply("200 OK", &[], "<DeleteResult><Error><Key>kept</Key><Code>PreconditionFailed</Code></Error><Error><Key>gone</Key><Code>NoSuchKey</Code></Error></DeleteResult>")
    })
    .await;
    let keys = [("a&b".to_owned(), Some(crate::s3::ETag::new("e"))), ("kept".into(), None), ("ctrl\u{1}".into(), None)];
    let failed = server.bucket(|_| {}).delete_many(&keys).await.unwrap();
    assert_eq!(failed.iter().map(|(key, error)| (key.as_str(), error.kind)).collect::<Vec<_>>(), [("kept", ErrorKind::PreconditionFailed)]);
    // Two find out that the store compares.
    assert_eq!(server.request(0).line, "HEAD /b/a%26b");
    assert!(!String::from_utf8(server.request(1).body.clone()).unwrap().contains("&quot;e&quot;"));
    let batch = server.request(2);
    assert!(String::from_utf8(batch.body.clone()).unwrap().contains("<Key>a&amp;b</Key><ETag>&quot;e&quot;</ETag>"));
    assert!(batch.header("content-md5").is_some());
    assert_eq!(server.request(3).line, "DELETE /b/ctrl%01");
}

#[tokio::test]
async fn keys_that_a_batch_failed_for_a_moment_are_deleted_alone() {
    let server = Server::start(|_, seen| {
        if seen.line.starts_with("DELETE") {
            return reply("204 No Content", &[], "");
        }
        reply("200 OK", &[], "<DeleteResult><Error><Key>a</Key><Code>InternalError</Code></Error><Error><Key>b</Key><Code>SlowDown</Code></Error><Error><Key>c</Key><Code>AccessDenied</Code></Error></DeleteResult>")
    })
    .await;
    let failed = server.bucket(|_| {}).delete_many(&["a", "b", "c", "d"].map(|key| (key.to_owned(), None))).await.unwrap();
    assert_eq!(failed.iter().map(|(key, error)| (key.as_str(), error.kind)).collect::<Vec<_>>(), [("c", ErrorKind::AccessDenied)]);
    let mut alone: Vec<_> = server.seen.lock().iter().map(|seen| seen.line.clone()).filter(|line| line.starts_with("DELETE")).collect();
    alone.sort();
    assert_eq!(alone, ["DELETE /b/a", "DELETE /b/b"]);
}

#[tokio::test]
async fn mount_wide_words_travel() {
    let server = Server::start(|_, _| reply("200 OK", &[("etag", "\"e\"")], "")).await;
    let store = server.bucket(|config| {
        config.requester_pays = true;
        config.expected_bucket_owner = Some("123".into());
        config.sse = Some("aws:kms".into());
        config.sse_kms_key_id = Some("key".into());
        config.storage_class = Some("STANDARD_IA".into());
        config.acl = Some("public-read".into());
        config.tags = vec![("team".into(), "a b".into()), ("x".into(), "1".into())];
    });
    let options = PutOptions {
        tags: vec![("x".into(), "2".into())],
        condition: Some(Condition::Matches(crate::s3::ETag::new("old"))),
        ..Default::default()
    };
    store.put("k", Arc::new(Bytes::from_static(b"x")), options).await.unwrap();
    let seen = server.request(0);
    for (name, value) in [
        ("x-amz-request-payer", "requester"),
        ("x-amz-expected-bucket-owner", "123"),
        ("x-amz-server-side-encryption", "aws:kms"),
        ("x-amz-server-side-encryption-aws-kms-key-id", "key"),
        ("x-amz-storage-class", "STANDARD_IA"),
        ("x-amz-acl", "public-read"),
        ("x-amz-tagging", "team=a%20b&x=2"),
        ("if-match", "\"old\""),
        ("content-length", "1"),
        ("x-amz-content-sha256", "UNSIGNED-PAYLOAD"),
    ] {
        assert_eq!(seen.header(name), Some(value), "{name}");
    }
}

#[tokio::test]
async fn a_proxy_gets_the_whole_url() {
    let proxy = Server::start(|_, _| reply("200 OK", &[("etag", "e")], "")).await;
    let store = proxy.bucket(|config| {
        config.proxy = config.endpoint_url.take();
        config.endpoint_url = Some("http://store.invalid:9000".parse().unwrap());
    });
    store.head("k").await.unwrap();
    assert_eq!(proxy.request(0).line, "HEAD http://store.invalid:9000/b/k");
    assert_eq!(proxy.request(0).header("host"), Some("store.invalid:9000"));
}
