//! The store behind a test: the double or SeaweedFS, looked into the same way.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::Method;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use tempfile::TempDir;

use super::cluster::{self, Cluster};
use super::double::{self, Double, Object};
use super::seaweed::Seaweed;
use super::web::{self, Answer};

/// Which store.
pub enum Backend {
    Double(Double),
    Seaweed(&'static Seaweed),
}

/// An object as the store gives it to others.
#[derive(Clone, Debug)]
pub struct Seen {
    pub bytes: Bytes,
    /// User metadata, names without `x-amz-meta-`.
    pub metadata: BTreeMap<String, String>,
    pub content_type: Option<String>,
    pub etag: String,
}

/// A bucket of its own in a store.
pub struct Store {
    backend: Backend,
    bucket: String,
    home: TempDir,
}

impl Store {
    /// A double with AWS's defaults.
    pub fn double() -> Self {
        Self::double_with(double::Options::default())
    }

    pub fn double_with(options: double::Options) -> Self {
        Self { backend: Backend::Double(Double::with(options, &["releases"])), bucket: "releases".to_owned(), home: home() }
    }

    /// A new bucket of the one SeaweedFS.
    pub fn seaweed() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        // A cluster may have had tests before.
        let run = cluster::given().map_or_else(String::new, |_| format!("{}-", std::process::id()));
        let bucket = format!("releases-{run}{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let store = Self::seaweed_bucket(&bucket);
        let made = store.send(Method::PUT, "", &[], Vec::new());
        assert_eq!(made.status, 200, "{}", made.text());
        store
    }

    /// A bucket of the one SeaweedFS that is there.
    pub fn seaweed_bucket(bucket: &str) -> Self {
        Self { backend: Backend::Seaweed(Seaweed::shared()), bucket: bucket.to_owned(), home: home() }
    }

    /// The double, for tests that count or break.
    pub fn as_double(&self) -> Option<&Double> {
        match &self.backend {
            Backend::Double(double) => Some(double),
            Backend::Seaweed(_) => None,
        }
    }

    pub fn endpoint(&self) -> String {
        match &self.backend {
            Backend::Double(double) => double.endpoint(),
            Backend::Seaweed(seaweed) => seaweed.endpoint().to_owned(),
        }
    }

    pub fn access_key(&self) -> &'static str {
        match &self.backend {
            Backend::Double(_) => double::ACCESS_KEY,
            Backend::Seaweed(seaweed) => seaweed.access_key(),
        }
    }

    pub fn secret_key(&self) -> &'static str {
        match &self.backend {
            Backend::Double(_) => double::SECRET_KEY,
            Backend::Seaweed(seaweed) => seaweed.secret_key(),
        }
    }

    /// A folder that lives as long as the store.
    pub fn home(&self) -> &Path {
        self.home.path()
    }

    pub fn bucket(&self) -> &str {
        &self.bucket
    }

    /// One more bucket, with a name of its own.
    pub fn second_bucket(&self) -> String {
        let name = format!("{}-second", self.bucket);
        match self.as_double() {
            Some(double) => double.create_bucket(&name),
            None => assert_eq!(self.send_to(&name, Method::PUT, "", &[], Vec::new()).status, 200),
        }
        name
    }

    /// Names of all buckets.
    pub fn buckets(&self) -> Vec<String> {
        if let Some(double) = self.as_double() {
            return double.buckets();
        }
        let page = self.send_to("", Method::GET, "", &[], Vec::new()).text();
        elements(&page, "Name").map(str::to_owned).collect()
    }

    /// All keys, in order.
    pub fn keys(&self) -> Vec<String> {
        self.keys_of(&self.bucket)
    }

    /// All keys of a bucket, in order.
    pub fn keys_of(&self, bucket: &str) -> Vec<String> {
        if let Some(double) = self.as_double() {
            return double.keys(bucket);
        }
        let mut keys = Vec::new();
        let mut token: Option<String> = None;
        loop {
            let mut query = "?list-type=2&encoding-type=url".to_owned();
            if let Some(token) = &token {
                query += &format!("&continuation-token={}", utf8_percent_encode(token, NON_ALPHANUMERIC));
            }
            let page = self.send_to(bucket, Method::GET, &query, &[], Vec::new()).text();
            keys.extend(elements(&page, "Key").map(|key| percent_decode_str(&key.replace('+', " ")).decode_utf8_lossy().into_owned()));
            token = elements(&page, "NextContinuationToken").next().map(str::to_owned);
            if token.is_none() {
                return keys;
            }
        }
    }

    /// What another client gets for this key.
    pub fn get(&self, key: &str) -> Option<Seen> {
        if let Some(double) = self.as_double() {
            return double.object(&self.bucket, key).map(|object| Seen {
                bytes: object.bytes,
                metadata: object.metadata,
                content_type: object.headers.content_type,
                etag: object.etag,
            });
        }
        let answer = self.send(Method::GET, &path(key), &[], Vec::new());
        if answer.status == 404 {
            return None;
        }
        assert_eq!(answer.status, 200, "GET {key}: {}", answer.text());
        let named = |(name, value): (&String, &String)| Some((name.strip_prefix("x-amz-meta-")?.to_owned(), value.clone()));
        Some(Seen {
            metadata: answer.headers.iter().filter_map(named).collect(),
            content_type: answer.headers.get("content-type").cloned(),
            etag: answer.headers.get("etag").cloned().unwrap_or_default().trim_matches('"').to_owned(),
            bytes: answer.body,
        })
    }

    /// The bytes of a key that must be there.
    pub fn bytes(&self, key: &str) -> Bytes {
        self.get(key).unwrap_or_else(|| panic!("no object {key:?}; there are {:?}", self.keys())).bytes
    }

    /// Another client's PUT.
    pub fn put(&self, key: &str, bytes: impl Into<Vec<u8>>) {
        self.put_with(key, bytes, &[]);
    }

    /// Another client's PUT with user metadata.
    pub fn put_with(&self, key: &str, bytes: impl Into<Vec<u8>>, metadata: &[(&str, &str)]) {
        let bytes = bytes.into();
        if let Some(double) = self.as_double() {
            let object = metadata.iter().fold(Object::new(bytes), |object, (name, value)| object.meta(name, value));
            return double.put_object(&self.bucket, key, object);
        }
        let names: Vec<String> = metadata.iter().map(|(name, _)| format!("x-amz-meta-{name}")).collect();
        let headers: Vec<(&str, &str)> = names.iter().zip(metadata).map(|(name, (_, value))| (name.as_str(), *value)).collect();
        let answer = self.send(Method::PUT, &path(key), &headers, bytes);
        assert_eq!(answer.status, 200, "PUT {key}: {}", answer.text());
    }

    /// Bytes of an object.
    pub fn size(&self, key: &str) -> Option<u64> {
        self.head(key).map(|(size, _)| size)
    }

    /// Bytes of an object, and its ETag.
    pub fn head(&self, key: &str) -> Option<(u64, String)> {
        if self.as_double().is_some() {
            return self.get(key).map(|seen| (seen.bytes.len() as u64, seen.etag));
        }
        let answer = self.send(Method::HEAD, &path(key), &[], Vec::new());
        let header = |name: &str| answer.headers.get(name).cloned();
        if answer.status == 200 { Some((header("content-length")?.parse().ok()?, header("etag")?)) } else { None }
    }

    /// Another client's DELETE.
    pub fn delete(&self, key: &str) {
        match self.as_double() {
            Some(double) => double.delete_object(&self.bucket, key),
            None => assert_eq!(self.send(Method::DELETE, &path(key), &[], Vec::new()).status, 204),
        }
    }

    /// Switches versions on in a bucket of SeaweedFS.
    pub fn keep_versions(&self) {
        let configuration =
            "<VersioningConfiguration xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><Status>Enabled</Status></VersioningConfiguration>";
        assert_eq!(self.send(Method::PUT, "?versioning", &[], configuration.into()).status, 200);
    }

    /// Keys of uploads that were begun and neither completed nor aborted.
    pub fn unfinished_uploads(&self) -> Vec<String> {
        if let Some(double) = self.as_double() {
            return double.unfinished_uploads(&self.bucket).into_iter().map(|(key, _)| key).collect();
        }
        let page = self.send(Method::GET, "?uploads", &[], Vec::new()).text();
        elements(&page, "Key").map(str::to_owned).collect()
    }

    /// Waits until `holds` is true of the store; background copies and markers take their time.
    pub fn eventually(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        let patience = if self.as_cluster().is_some() { cluster::PATIENCE } else { Duration::from_secs(20) };
        let until = Instant::now() + patience;
        while !holds(self) {
            assert!(
                Instant::now() < until,
                "not within {patience:?}: {what}; keys: {:?}; uploads: {:?}",
                self.keys(),
                self.unfinished_uploads()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// A request about the bucket (`rest`: what follows its name), not signed but to a cluster.
    pub fn send(&self, method: Method, rest: &str, headers: &[(&str, &str)], body: Vec<u8>) -> Answer {
        self.send_to(&self.bucket, method, rest, headers, body)
    }

    fn send_to(&self, bucket: &str, method: Method, rest: &str, headers: &[(&str, &str)], body: Vec<u8>) -> Answer {
        if let Some(cluster) = self.as_cluster() {
            return cluster.send(&method, &format!("{bucket}{rest}"), headers, &body);
        }
        let url = format!("{}/{bucket}{rest}", self.endpoint());
        web::send(method, &url, headers, body).unwrap()
    }

    /// A store whose nodes may go and come under a test.
    fn as_cluster(&self) -> Option<&'static Cluster> {
        if self.as_double().is_some() { None } else { cluster::given() }
    }

    pub fn region(&self) -> &'static str {
        self.as_cluster().map_or(cluster::REGION, |cluster| &cluster.region)
    }
}

fn home() -> TempDir {
    tempfile::Builder::new().prefix("packmule-it-").tempdir().unwrap()
}

/// S3's own rule for signed paths, and plain enough for unsigned ones.
const KEY: &AsciiSet = &NON_ALPHANUMERIC.remove(b'/').remove(b'.').remove(b'-').remove(b'_').remove(b'~');

fn path(key: &str) -> String {
    format!("/{}", utf8_percent_encode(key, KEY))
}

/// The texts of all elements of a name; enough for the listings of a store that is known.
fn elements<'a>(xml: &'a str, name: &str) -> impl Iterator<Item = &'a str> {
    let (open, close) = (format!("<{name}>"), format!("</{name}>"));
    let mut rest = xml;
    std::iter::from_fn(move || {
        let (_, after) = rest.split_once(open.as_str())?;
        let (text, after) = after.split_once(close.as_str())?;
        rest = after;
        Some(text)
    })
}
