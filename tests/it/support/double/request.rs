//! Which S3 operation an HTTP request is: for counting and for faults, before s3s sees it.

use std::collections::BTreeMap;

use http::request::Parts;
use http::{HeaderMap, Method, Uri};
use percent_encoding::percent_decode_str;

/// Operation, bucket and key of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    pub operation: &'static str,
    pub bucket: String,
    pub key: String,
    /// The `prefix` of a listing.
    pub prefix: String,
    /// `x-amz-*` of the request, without what a signature needs.
    pub headers: BTreeMap<String, String>,
}

fn said(headers: &HeaderMap) -> BTreeMap<String, String> {
    let amz = headers.iter().filter(|(name, _)| name.as_str().starts_with("x-amz-"));
    let told = amz.filter(|(name, _)| !matches!(name.as_str(), "x-amz-date" | "x-amz-content-sha256" | "x-amz-security-token"));
    told.map(|(name, value)| (name.to_string(), value.to_str().unwrap_or_default().to_owned())).collect()
}

fn prefix(query: &str) -> String {
    let value = query.split('&').find_map(|pair| pair.strip_prefix("prefix=")).unwrap_or_default();
    percent_decode_str(value).decode_utf8_lossy().into_owned()
}

/// By method, path, query and headers, as S3 routes.
pub fn classify(parts: &Parts, domain: Option<&str>) -> Asked {
    let (bucket, key) = address(&parts.uri, &parts.headers, domain);
    let query = parts.uri.query().unwrap_or_default();
    let has = |name: &str| query.split('&').any(|pair| pair.split('=').next() == Some(name));
    let copies = parts.headers.contains_key("x-amz-copy-source");
    let operation = match (&parts.method, bucket.is_empty(), key.is_empty()) {
        (&Method::GET, true, _) => "ListBuckets",
        (&Method::GET, _, true) if has("location") => "GetBucketLocation",
        (&Method::GET, _, true) if has("ownershipControls") => "GetBucketOwnershipControls",
        (&Method::GET, _, true) if has("uploads") => "ListMultipartUploads",
        (&Method::GET, _, true) if query.contains("list-type=2") => "ListObjectsV2",
        (&Method::GET, _, true) => "ListObjects",
        (&Method::HEAD, _, true) => "HeadBucket",
        (&Method::PUT, _, true) => "CreateBucket",
        (&Method::DELETE, _, true) => "DeleteBucket",
        (&Method::POST, _, true) if has("delete") => "DeleteObjects",
        (&Method::GET, _, _) if has("tagging") => "GetObjectTagging",
        (&Method::GET, _, _) if has("acl") => "GetObjectAcl",
        (&Method::GET, _, _) if has("uploadId") => "ListParts",
        (&Method::GET, _, _) => "GetObject",
        (&Method::HEAD, _, _) => "HeadObject",
        (&Method::PUT, _, _) if has("tagging") => "PutObjectTagging",
        (&Method::PUT, _, _) if has("partNumber") && copies => "UploadPartCopy",
        (&Method::PUT, _, _) if has("partNumber") => "UploadPart",
        (&Method::PUT, _, _) if copies => "CopyObject",
        (&Method::PUT, _, _) => "PutObject",
        (&Method::DELETE, _, _) if has("uploadId") => "AbortMultipartUpload",
        (&Method::DELETE, _, _) => "DeleteObject",
        (&Method::POST, _, _) if has("uploads") => "CreateMultipartUpload",
        (&Method::POST, _, _) if has("uploadId") => "CompleteMultipartUpload",
        _ => "Other",
    };
    Asked { operation, bucket, key, prefix: prefix(query), headers: said(&parts.headers) }
}

fn address(uri: &Uri, headers: &HeaderMap, domain: Option<&str>) -> (String, String) {
    let path = percent_decode_str(uri.path()).decode_utf8_lossy();
    let path = path.strip_prefix('/').unwrap_or(&path);
    let host = headers.get("host").and_then(|h| h.to_str().ok()).unwrap_or_default();
    if let Some(bucket) = domain.and_then(|domain| host.strip_suffix(domain)).and_then(|host| host.strip_suffix('.')) {
        return (bucket.to_owned(), path.to_owned());
    }
    let (bucket, key) = path.split_once('/').unwrap_or((path, ""));
    (bucket.to_owned(), key.to_owned())
}

/// The region that a request was signed for, in its header or query.
pub fn signed_region(parts: &Parts) -> Option<String> {
    let header = parts.headers.get("authorization").and_then(|h| h.to_str().ok());
    let scope = match header {
        Some(header) => header.strip_prefix("AWS4-HMAC-SHA256")?.split("Credential=").nth(1)?.split([',', ' ']).next()?.to_owned(),
        None => {
            let pair = parts.uri.query()?.split('&').find_map(|pair| pair.strip_prefix("X-Amz-Credential="))?;
            percent_decode_str(pair).decode_utf8_lossy().into_owned()
        }
    };
    Some(scope.split('/').nth(2)?.to_owned())
}
