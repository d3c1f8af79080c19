//! Our signatures and paths, judged by s3s, which verifies both versions by code that is not ours.

use std::sync::Arc;

use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use s3s::auth::SimpleAuth;
use s3s::dto::{DeleteObjectInput, DeleteObjectOutput, GetObjectInput, GetObjectOutput};
use s3s::{S3, S3Request, S3Response, S3Result};

use super::passwd;
use crate::s3::Store;
use crate::s3::client::{Client, ClientConfig};

/// Remembers the keys that it was told to delete.
#[derive(Clone, Default)]
struct Recorder(Arc<Mutex<Vec<String>>>);

#[async_trait::async_trait]
impl S3 for Recorder {
    async fn delete_object(&self, request: S3Request<DeleteObjectInput>) -> S3Result<S3Response<DeleteObjectOutput>> {
        self.0.lock().push(request.input.key);
        Ok(S3Response::new(DeleteObjectOutput::default()))
    }

    async fn get_object(&self, request: S3Request<GetObjectInput>) -> S3Result<S3Response<GetObjectOutput>> {
        self.0.lock().push(request.input.key);
        Ok(S3Response::new(GetObjectOutput::default()))
    }
}

async fn serve(recorder: Recorder) -> String {
    let mut builder = s3s::service::S3ServiceBuilder::new(recorder);
    builder.set_auth(SimpleAuth::from_single("AK", "SK"));
    let service = builder.build();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let service = service.clone();
            tokio::spawn(async move { hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await });
        }
    });
    url
}

fn bucket(url: &str, secret: &str, sigv2: bool) -> Arc<dyn Store> {
    let config = ClientConfig {
        endpoint_url: Some(url.parse().unwrap()),
        region: Some("us-east-1".into()),
        passwd_file: Some(passwd(&format!("AK:{secret}\n"))),
        sigv2,
        ..ClientConfig::default()
    };
    Client::new(config).unwrap().open("bucket").unwrap()
}

const KEYS: [&str; 10] =
    ["plain", "a b+c%/ä ö?#&=.txt", "a/../c", "a/./c", "../up", "x/..", "d//e", "/lead", "tilde~(1)'!*", "ctrl\u{1}\u{7f}"];

#[tokio::test]
async fn every_key_is_signed_as_the_store_sees_it() {
    let recorder = Recorder::default();
    let url = serve(recorder.clone()).await;
    let store = bucket(&url, "SK", false);
    for key in KEYS {
        store.delete(key, None).await.unwrap();
        assert_eq!(recorder.0.lock().pop().as_deref(), Some(key));
    }
    assert!(bucket(&url, "WRONG", false).delete("plain", None).await.is_err());
}

#[tokio::test]
async fn version_2_too() {
    let recorder = Recorder::default();
    let url = serve(recorder.clone()).await;
    let store = bucket(&url, "SK", true);
    for key in ["plain", "a b/ä.txt"] {
        store.delete(key, None).await.unwrap();
        assert_eq!(recorder.0.lock().pop().as_deref(), Some(key));
    }
    assert!(bucket(&url, "WRONG", true).delete("plain", None).await.is_err());
}

#[tokio::test]
async fn links_open() {
    let recorder = Recorder::default();
    let url = serve(recorder.clone()).await;
    for (sigv2, query) in [
        (
            false,
            vec![
                ("response-content-disposition".to_owned(), "attachment; filename=\"x y\"".to_owned()),
                ("x-link".to_owned(), "7".to_owned()),
            ],
        ),
        (true, vec![]),
    ] {
        let link = bucket(&url, "SK", sigv2).presign_get("a b/ä.txt", 60, &query).await.unwrap();
        let answer = reqwest::get(&link).await.unwrap();
        assert!(answer.status().is_success(), "{link}");
        assert_eq!(recorder.0.lock().pop().as_deref(), Some("a b/ä.txt"));
        let tampered = reqwest::get(link.replace("a%20b", "a%20c")).await.unwrap();
        assert_eq!(tampered.status(), 403);
    }
    let too_long = bucket(&url, "SK", false).presign_get("k", 604_801, &[]).await.unwrap_err();
    assert!(too_long.message.contains("7 days"));
}
