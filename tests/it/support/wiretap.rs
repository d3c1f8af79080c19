//! Names S3 requests as they pass: a client that does not pipeline begins every request at the start of what it sends.

use std::collections::BTreeMap;

use parking_lot::Mutex;

/// Requests seen, by S3's names.
#[derive(Debug, Default)]
pub struct Wiretap(Mutex<BTreeMap<&'static str, u64>>);

impl Wiretap {
    /// Counts what `bytes`, one read from a client, begins.
    pub fn note(&self, bytes: &[u8]) {
        if let Some(operation) = operation(bytes) {
            *self.0.lock().entry(operation).or_default() += 1;
        }
    }

    /// The counts so far.
    pub fn counts(&self) -> BTreeMap<&'static str, u64> {
        self.0.lock().clone()
    }

    /// Forgets them.
    pub fn reset(&self) {
        self.0.lock().clear();
    }
}

/// The operation of a path-style request whose head `bytes` begins with; nothing where no head begins.
pub fn operation(bytes: &[u8]) -> Option<&'static str> {
    // A body may be binary: look no further than its first line before it proves to be a head.
    let end = bytes.iter().take(8 << 10).position(|byte| *byte == b'\r')?;
    let line = std::str::from_utf8(&bytes[..end]).ok()?.strip_suffix(" HTTP/1.1")?;
    let (method, target) = line.split_once(' ')?;
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let key = path.trim_start_matches('/').split_once('/').is_some_and(|(_, key)| !key.is_empty());
    let asks = |name: &str| query.split('&').any(|pair| pair.split('=').next() == Some(name));
    let copies = || bytes[end..].windows(17).take(16 << 10).any(|text| text.eq_ignore_ascii_case(b"x-amz-copy-source"));
    Some(match (method, key) {
        ("GET", false) if asks("uploads") => "ListMultipartUploads",
        ("GET", false) if asks("list-type") || asks("prefix") => "ListObjects",
        ("GET", false) => "GetBucket",
        ("HEAD", false) => "HeadBucket",
        ("POST", false) if asks("delete") => "DeleteObjects",
        ("PUT", false) => "PutBucket",
        ("GET", true) if asks("uploadId") => "ListParts",
        ("GET", true) => "GetObject",
        ("HEAD", true) => "HeadObject",
        ("PUT", true) if asks("tagging") => "PutObjectTagging",
        ("PUT", true) if asks("partNumber") => {
            if copies() {
                "UploadPartCopy"
            } else {
                "UploadPart"
            }
        }
        ("PUT", true) => {
            if copies() {
                "CopyObject"
            } else {
                "PutObject"
            }
        }
        ("POST", true) if asks("uploads") => "CreateMultipartUpload",
        ("POST", true) => "CompleteMultipartUpload",
        ("DELETE", true) if asks("uploadId") => "AbortMultipartUpload",
        ("DELETE", true) => "DeleteObject",
        _ => return None,
    })
}

#[test]
fn requests_are_named_and_bodies_are_not() {
    let name = |head: &str| operation(format!("{head} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes());
    assert_eq!(name("PUT /releases/a/b.bin?partNumber=3&uploadId=x"), Some("UploadPart"));
    assert_eq!(name("POST /releases/a?uploads"), Some("CreateMultipartUpload"));
    assert_eq!(name("GET /releases/?list-type=2&prefix=a%2F"), Some("ListObjects"));
    assert_eq!(name("HEAD /releases"), Some("HeadBucket"));
    assert_eq!(operation(b"PUT /b/k HTTP/1.1\r\nX-Amz-Copy-Source: /b/j\r\n\r\n"), Some("CopyObject"));
    assert_eq!(operation(b"GET up and go\r\n"), None);
    assert_eq!(operation(&[0xff, b'\r', b'\n']), None);
}
