//! Broken connections, short bodies, slow and failing stores.

use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::TryStreamExt as _;
use std::sync::Arc;

use super::*;
use crate::s3::{ETag, ErrorKind, GetRequest, ListRequest, PutOptions, Result, Source};

async fn read(store: &Arc<dyn Store>, request: GetRequest) -> Result<Vec<u8>> {
    let answer = store.get("k", request).await?;
    answer
        .body
        .try_fold(Vec::new(), |mut all, chunk| async move {
            all.extend_from_slice(&chunk);
            Ok(all)
        })
        .await
}

#[tokio::test]
async fn a_get_gives_exactly_what_was_announced() {
    let raw = |headers: &str, body: &str| Reply::Raw(format!("HTTP/1.1 {headers}\r\netag: \"e\"\r\nconnection: close\r\n\r\n{body}"));
    let server = Server::start(move |number, _| match number {
        0 => raw("206 Partial Content\r\ncontent-range: bytes 2-6/10\r\ncontent-length: 5", "23456"),
        1 => raw("206 Partial Content\r\ncontent-range: bytes 2-6/10\r\ncontent-length: 5", "234"),
        2 => raw("200 OK\r\ncontent-length: 10", "0123456789"),
        3 => raw("206 Partial Content\r\ncontent-range: bytes 0-6/10\r\ncontent-length: 7", "0123456"),
        4 => raw("206 Partial Content\r\ncontent-range: bytes 3-6/10\r\ncontent-length: 4", "3456"),
        5 => raw("206 Partial Content\r\ncontent-range: bytes 2-6/10\r\ncontent-length: 7", "2345678"),
        6 => raw("206 Partial Content\r\ncontent-range: bytes 2-4/5\r\ncontent-length: 3", "234"),
        _ => raw("200 OK\r\ncontent-length: 2", "01"),
    })
    .await;
    let store = server.bucket(|_| {});
    let ranged = || GetRequest { range: Some(2..7), ..Default::default() };
    assert_eq!(read(&store, ranged()).await.unwrap(), b"23456");
    assert_eq!(read(&store, ranged()).await.unwrap_err().kind, ErrorKind::Network);
    assert_eq!(read(&store, ranged()).await.unwrap(), b"23456");
    assert_eq!(read(&store, ranged()).await.unwrap(), b"23456");
    assert_eq!(read(&store, ranged()).await.unwrap_err().kind, ErrorKind::Protocol);
    assert_eq!(read(&store, ranged()).await.unwrap_err().kind, ErrorKind::Protocol);
    assert_eq!(read(&store, ranged()).await.unwrap(), b"234");
    assert_eq!(read(&store, ranged()).await.unwrap_err().kind, ErrorKind::InvalidRange);
}

#[tokio::test]
async fn another_version_is_no_answer() {
    let server = Server::start(|_, _| reply("200 OK", &[("etag", "\"new\"")], "x")).await;
    let request = GetRequest { if_match: Some(ETag::new("old")), ..Default::default() };
    assert_eq!(read(&server.bucket(|_| {}), request).await.unwrap_err().kind, ErrorKind::PreconditionFailed);
    assert_eq!(server.request(0).header("if-match"), Some("\"old\""));
}

#[tokio::test]
async fn reads_are_repeated_and_end() {
    let server = Server::start(|number, _| match number {
        0 => refuse("503 Slow Down", "SlowDown"),
        1 => Reply::Close,
        2 => refuse("500 Internal Server Error", "InternalError"),
        _ => reply("200 OK", &[("etag", "e")], ""),
    })
    .await;
    server.bucket(|_| {}).head("k").await.unwrap();
    assert_eq!(server.count(), 4);
    let down = Server::start(|_, _| refuse("500 Internal Server Error", "InternalError")).await;
    let error = down.bucket(|config| config.retries = 2).head("k").await.unwrap_err();
    assert_eq!((error.kind, down.count()), (ErrorKind::Server, 3));
    let missing = Server::start(|_, _| refuse("404 Not Found", "NoSuchKey")).await;
    assert_eq!(missing.bucket(|_| {}).head("k").await.unwrap_err().kind, ErrorKind::NoSuchKey);
    assert_eq!(missing.count(), 1);
}

#[tokio::test]
async fn a_silent_store_times_out() {
    let server = Server::start(|_, _| Reply::Silence).await;
    let store = server.bucket(|config| (config.request_timeout, config.retries) = (Duration::from_millis(200), 1));
    let error = store.head("k").await.unwrap_err();
    assert_eq!((error.kind, server.count()), (ErrorKind::TimedOut, 2));
    let stalls = Server::start(|_, _| Reply::Raw("HTTP/1.1 200 OK\r\netag: e\r\ncontent-length: 9\r\n\r\nabc".into())).await;
    let store = stalls.bucket(|config| config.request_timeout = Duration::from_millis(200));
    assert!(matches!(read(&store, GetRequest::default()).await.unwrap_err().kind, ErrorKind::Network | ErrorKind::TimedOut));
}

#[tokio::test]
async fn the_probe_gives_up_in_time() {
    let server = Server::start(|_, _| Reply::Silence).await;
    let start = Instant::now();
    let client = server.client(|_| {});
    let error = client.probe("b", "", Duration::from_millis(500), Duration::from_millis(900)).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::TimedOut);
    assert!(start.elapsed() < Duration::from_secs(2));
    let closed = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap()
    };
    let refused = server.client(|config| (config.endpoint_url, config.retries) = (Some(format!("http://{closed}").parse().unwrap()), 0));
    let start = Instant::now();
    let error = refused.probe("b", "", Duration::from_secs(2), Duration::from_secs(60)).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Network);
    assert!((1..4).contains(&start.elapsed().as_secs()));
}

/// Announces more than it gives.
struct Short;

impl Source for Short {
    fn len(&self) -> u64 {
        10
    }

    fn open(&self) -> futures::stream::BoxStream<'static, std::io::Result<Bytes>> {
        Box::pin(futures::stream::iter([Ok(Bytes::from_static(b"only"))]))
    }
}

#[tokio::test]
async fn a_source_that_fails_is_a_local_error() {
    let server = Server::start(|_, _| reply("200 OK", &[("etag", "e")], "")).await;
    let error = server.bucket(|_| {}).put("k", Arc::new(Short), PutOptions::default()).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::LocalIo);
}

#[tokio::test]
async fn bwlimit_paces_uploads() {
    let server = Server::start(|_, _| reply("200 OK", &[("etag", "e")], "")).await;
    let store = server.bucket(|config| config.bwlimit = Some(1_000_000));
    let start = Instant::now();
    store.put("k", Arc::new(Bytes::from(vec![0u8; 500_000])), PutOptions::default()).await.unwrap();
    assert!(start.elapsed() > Duration::from_millis(350), "{:?}", start.elapsed());
    assert_eq!(server.request(0).body.len(), 500_000);
}

#[tokio::test]
async fn a_wrong_clock_is_named() {
    let server = Server::start(|_, _| {
        reply("403 Forbidden", &[("date", "Wed, 21 Oct 2015 07:28:00 GMT")], "<Error><Code>RequestTimeTooSkewed</Code></Error>")
    })
    .await;
    let error = server.bucket(|_| {}).list(ListRequest::default()).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::ClockSkew);
    assert!(crate::s3::explain::explain(&error).contains("ahead of the store's"));
}
