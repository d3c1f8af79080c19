//! Answers read: errors by kind, heads of objects, times.

use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::{HeaderMap, StatusCode};

use super::xml::Element;
use super::{Checksum, ETag, ErrorKind, Metadata, ObjectHead, ObjectHeaders, S3Error};

/// A header's text; what is not ASCII is read as UTF-8.
pub fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned()).filter(|value| !value.is_empty())
}

/// The error code that came, its message, and the region that it names.
#[derive(Debug, Default, Clone)]
pub struct ErrorBody {
    /// `<Code>`.
    pub code: Option<String>,
    /// `<Message>`.
    pub message: String,
    /// `<Region>`, or AWS's header.
    pub region: Option<String>,
    /// `<RequestId>`.
    pub request_id: Option<String>,
}

/// Reads an error's body; no body and no XML give an empty one.
pub fn error_body(headers: &HeaderMap, body: &[u8]) -> ErrorBody {
    let mut read = ErrorBody { region: text(headers, "x-amz-bucket-region"), ..ErrorBody::default() };
    if let Ok(root) = Element::parse(body) {
        let error = if root.name == "Error" {
            Some(&root)
        } else {
            root.child("Error").or_else(|| root.child("Errors").and_then(|e| e.child("Error")))
        };
        if let Some(error) = error {
            read.code = error.text_of("Code").map(str::to_owned);
            read.message = error.text_of("Message").unwrap_or("").to_owned();
            read.region = read.region.or_else(|| error.text_of("Region").map(str::to_owned));
            read.request_id = error.text_of("RequestId").map(str::to_owned);
        }
    }
    read.request_id = text(headers, "x-amz-request-id").or(read.request_id);
    read
}

/// The kind of an S3 error code (AWS "List of error codes", and those of MinIO, Ceph, Garage, SeaweedFS).
fn kind_of_code(code: &str) -> Option<ErrorKind> {
    Some(match code {
        "NoSuchKey" | "NoSuchVersion" => ErrorKind::NoSuchKey,
        "NoSuchBucket" => ErrorKind::NoSuchBucket,
        "NoSuchUpload" => ErrorKind::NoSuchUpload,
        "AccessDenied" | "AllAccessDisabled" | "AccountProblem" | "NotSignedUp" | "UnauthorizedAccess" | "XAmzAccessDenied" => {
            ErrorKind::AccessDenied
        }
        "InvalidAccessKeyId"
        | "SignatureDoesNotMatch"
        | "ExpiredToken"
        | "InvalidToken"
        | "TokenRefreshRequired"
        | "InvalidSecurity"
        | "InvalidClientTokenId" => ErrorKind::Credentials,
        // versitygw: a name is a directory by now, or one above it a file. Nothing that passes by itself.
        "PreconditionFailed" | "ExistingObjectIsDirectory" | "ExistingObjectIsFile" | "ObjectParentIsFile" => ErrorKind::PreconditionFailed,
        "ConditionalRequestConflict" | "OperationAborted" => ErrorKind::Conflict,
        "BucketNotEmpty" => ErrorKind::NotEmpty,
        "BucketAlreadyExists" | "BucketAlreadyOwnedByYou" => ErrorKind::BucketExists,
        "InvalidRange" => ErrorKind::InvalidRange,
        "InvalidObjectState" => ErrorKind::Archived,
        "SlowDown"
        | "SlowDownRead"
        | "SlowDownWrite"
        | "RequestLimitExceeded"
        | "Throttling"
        | "ThrottlingException"
        | "TooManyRequests"
        | "ServiceUnavailable"
        | "Busy"
        | "TooManyRequestsException" => ErrorKind::Throttled,
        "InternalError" | "InternalFailure" => ErrorKind::Server,
        "RequestTimeout" => ErrorKind::TimedOut,
        "QuotaExceeded" | "XMinioStorageFull" | "XMinioAdminBucketQuotaExceeded" | "InsufficientStorage" => ErrorKind::Quota,
        "EntityTooLarge" | "MaxMessageLengthExceeded" => ErrorKind::TooLarge,
        "KeyTooLongError" | "KeyTooLong" | "XMinioInvalidObjectName" => ErrorKind::KeyTooLong,
        "BadDigest" | "XAmzContentChecksumMismatch" | "XAmzContentSHA256Mismatch" | "IncompleteBody" | "InvalidDigest" => {
            ErrorKind::BadDigest
        }
        // Our own XML, which is well-formed and names the parts as they were answered, was damaged on its way.
        "MalformedXML" | "InvalidPart" | "InvalidPartOrder" => ErrorKind::BadDigest,
        "NotImplemented" | "MethodNotAllowed" => ErrorKind::NotImplemented,
        "AccessControlListNotSupported" => ErrorKind::AclNotSupported,
        "PermanentRedirect"
        | "AuthorizationHeaderMalformed"
        | "Redirect"
        | "TemporaryRedirect"
        | "IllegalLocationConstraintException"
        | "InvalidRegion" => ErrorKind::WrongRegion,
        "RequestTimeTooSkewed" | "RequestExpired" => ErrorKind::ClockSkew,
        _ => return None,
    })
}

fn kind_of_status(status: StatusCode) -> ErrorKind {
    match status.as_u16() {
        301 | 307 | 308 => ErrorKind::WrongRegion,
        300..=399 => ErrorKind::Protocol,
        401 => ErrorKind::Credentials,
        403 => ErrorKind::AccessDenied,
        404 => ErrorKind::NoSuchKey,
        405 | 501 => ErrorKind::NotImplemented,
        408 => ErrorKind::TimedOut,
        409 => ErrorKind::Conflict,
        412 => ErrorKind::PreconditionFailed,
        413 => ErrorKind::TooLarge,
        416 => ErrorKind::InvalidRange,
        429 | 503 => ErrorKind::Throttled,
        507 => ErrorKind::Quota,
        500..=599 => ErrorKind::Server,
        _ => ErrorKind::InvalidRequest,
    }
}

/// From here on S3 refuses signed requests (`RequestTimeTooSkewed`).
pub const SKEW_MOST: Duration = Duration::from_secs(15 * 60);

/// The store's clock, by its `Date`.
fn their_clock(headers: &HeaderMap) -> Option<SystemTime> {
    httpdate::parse_http_date(headers.get("date")?.to_str().ok()?).ok()
}

/// What the store's clock told at a moment of the past by ours, judged by an answer that has just come.
pub fn by_their_clock(headers: &HeaderMap, moment: SystemTime) -> SystemTime {
    let ago = moment.elapsed().unwrap_or_default();
    their_clock(headers).map_or(moment, |now| now - ago)
}

/// How far this machine's clock is off the store's; `None` within the 15 minutes that S3 allows.
fn skew(headers: &HeaderMap) -> Option<String> {
    let theirs = their_clock(headers)?;
    let ours = SystemTime::now();
    let (difference, word) = match ours.duration_since(theirs) {
        Ok(ahead) => (ahead, "ahead of"),
        Err(behind) => (behind.duration(), "behind"),
    };
    (difference >= SKEW_MOST).then(|| {
        format!("this machine's clock is {} {word} the store's", humantime::format_duration(Duration::from_secs(difference.as_secs())))
    })
}

/// The error that an answer means.
pub fn error(operation: &'static str, resource: &str, status: StatusCode, headers: &HeaderMap, body: &ErrorBody) -> S3Error {
    let mut kind = body.code.as_deref().and_then(kind_of_code).unwrap_or_else(|| kind_of_status(status));
    // A HEAD has no body: 404 of a bucket is known by the operation, a skewed clock by the Date.
    if kind == ErrorKind::NoSuchKey
        && body.code.is_none()
        && matches!(operation, "HeadBucket" | "ListObjectsV2" | "ListObjects" | "DeleteBucket")
    {
        kind = ErrorKind::NoSuchBucket;
    }
    let mut message = body.message.clone();
    if matches!(kind, ErrorKind::ClockSkew | ErrorKind::AccessDenied)
        && let Some(difference) = skew(headers)
        && (kind == ErrorKind::ClockSkew || body.code.is_none())
    {
        kind = ErrorKind::ClockSkew;
        message = difference;
    }
    if kind == ErrorKind::Protocol && message.is_empty() {
        message = format!("redirected ({status}): what answers is not S3");
    }
    S3Error {
        kind,
        operation,
        resource: resource.to_owned(),
        status: status.as_u16(),
        code: body.code.clone(),
        message,
        request_id: body.request_id.clone(),
    }
}

/// `Last-Modified` and the like; the epoch where it does not parse.
pub fn http_date(headers: &HeaderMap, name: &str) -> Option<SystemTime> {
    headers.get(name).and_then(|value| value.to_str().ok()).and_then(|value| httpdate::parse_http_date(value).ok())
}

/// An ISO 8601 time of an XML answer.
pub fn iso_date(text: &str) -> Option<SystemTime> {
    text.trim().parse::<jiff::Timestamp>().ok().map(SystemTime::from)
}

fn full_checksum(headers: &HeaderMap) -> Option<Checksum> {
    // The checksum of parts (COMPOSITE, `…-N`) says nothing about the whole object's bytes.
    if text(headers, "x-amz-checksum-type").is_some_and(|kind| kind != "FULL_OBJECT") {
        return None;
    }
    checksum(headers)
}

/// The checksum that the answer to an upload repeats.
pub fn checksum(headers: &HeaderMap) -> Option<Checksum> {
    let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let crc = crc_of(header("x-amz-checksum-crc64nvme"), header("x-amz-checksum-crc32c"));
    crc.or_else(|| decoded(header("x-amz-checksum-sha1")).map(Checksum::Sha1))
}

/// The checksum that an answer gives of a part (`Part` of ListParts, CopyPartResult).
pub fn part_checksum(part: &Element) -> Option<Checksum> {
    crc_of(part.text_of("ChecksumCRC64NVME"), part.text_of("ChecksumCRC32C"))
}

fn crc_of(crc64nvme: Option<&str>, crc32c: Option<&str>) -> Option<Checksum> {
    let crc64 = decoded(crc64nvme).map(|bytes| Checksum::Crc64Nvme(u64::from_be_bytes(bytes)));
    crc64.or_else(|| decoded(crc32c).map(|bytes| Checksum::Crc32c(u32::from_be_bytes(bytes))))
}

fn decoded<const N: usize>(base64: Option<&str>) -> Option<[u8; N]> {
    STANDARD.decode(base64?.trim()).ok()?.try_into().ok()
}

/// The head of an object of `size` bytes in all. `None` without an ETag: what answers is not S3.
pub fn object_head(headers: &HeaderMap, size: u64) -> Option<ObjectHead> {
    let mut metadata = Metadata::new();
    for (name, value) in headers {
        if let Some(name) = name.as_str().strip_prefix("x-amz-meta-") {
            metadata.insert(name.to_owned(), super::rfc2047::decode(&String::from_utf8_lossy(value.as_bytes())));
        }
    }
    Some(ObjectHead {
        size,
        etag: ETag::new(text(headers, "etag")?),
        last_modified: http_date(headers, "last-modified").unwrap_or(SystemTime::UNIX_EPOCH),
        metadata,
        headers: ObjectHeaders {
            content_type: text(headers, "content-type"),
            cache_control: text(headers, "cache-control"),
            content_disposition: text(headers, "content-disposition"),
            content_encoding: text(headers, "content-encoding").map(without_chunking).filter(|value| !value.is_empty()),
            content_language: text(headers, "content-language"),
            expires: text(headers, "expires"),
            website_redirect: text(headers, "x-amz-website-redirect-location"),
        },
        storage_class: text(headers, "x-amz-storage-class"),
        version_id: version(headers),
        checksum: full_checksum(headers),
        restore: text(headers, "x-amz-restore"),
        tag_count: text(headers, "x-amz-tagging-count").and_then(|count| count.parse().ok()).unwrap_or(0),
    })
}

/// `aws-chunked` is how some clients sent the bytes, not how they are stored; a few stores keep the word.
fn without_chunking(encoding: String) -> String {
    encoding.split(',').map(str::trim).filter(|word| *word != "aws-chunked").collect::<Vec<_>>().join(",")
}

/// `x-amz-version-id`; `null` is an unversioned object's.
pub fn version(headers: &HeaderMap) -> Option<String> {
    text(headers, "x-amz-version-id").filter(|version| version != "null")
}

/// `bytes 0-9/100` as (start, end exclusive, size).
pub fn content_range(value: &str) -> Option<(u64, u64, u64)> {
    let (range, size) = value.trim().strip_prefix("bytes")?.trim_start_matches([' ', '=']).split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last, size) = (first.parse().ok()?, last.parse::<u64>().ok()?, size.parse().ok()?);
    (first <= last && last < size).then(|| (first, last + 1, size))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use http::HeaderValue;

    fn kind(status: u16, body: &str) -> ErrorKind {
        let headers = HeaderMap::new();
        let body = error_body(&headers, body.as_bytes());
        error("GetObject", "s3://b/k", StatusCode::from_u16(status).unwrap(), &headers, &body).kind
    }

    #[test]
    fn codes_go_before_statuses() {
        assert_eq!(kind(404, "<Error><Code>NoSuchBucket</Code></Error>"), ErrorKind::NoSuchBucket);
        assert_eq!(kind(400, "<Error><Code>AccessControlListNotSupported</Code></Error>"), ErrorKind::AclNotSupported);
        assert_eq!(kind(403, "<Error><Code>SignatureDoesNotMatch</Code></Error>"), ErrorKind::Credentials);
        assert_eq!(kind(404, ""), ErrorKind::NoSuchKey);
        assert_eq!(kind(302, "<html>"), ErrorKind::Protocol);
        assert_eq!(kind(418, "tea"), ErrorKind::InvalidRequest);
        assert_eq!(kind(503, ""), ErrorKind::Throttled);
    }

    #[test]
    fn regions_come_from_header_or_body() {
        let garage = error_body(
            &HeaderMap::new(),
            b"<Error><Code>AuthorizationHeaderMalformed</Code><Message>x</Message><Resource>/</Resource><Region>garage</Region></Error>",
        );
        assert_eq!(garage.region.as_deref(), Some("garage"));
        let mut headers = HeaderMap::new();
        headers.insert("x-amz-bucket-region", HeaderValue::from_static("eu-central-1"));
        assert_eq!(error_body(&headers, b"").region.as_deref(), Some("eu-central-1"));
    }

    #[test]
    fn a_skewed_clock_is_told_even_without_a_body() {
        let mut headers = HeaderMap::new();
        let theirs = SystemTime::now() - Duration::from_secs(3600);
        headers.insert("date", HeaderValue::from_str(&httpdate::fmt_http_date(theirs)).unwrap());
        let told = error("HeadObject", "s3://b/k", StatusCode::FORBIDDEN, &headers, &ErrorBody::default());
        assert_eq!(told.kind, ErrorKind::ClockSkew);
        assert!(told.message.contains("1h") && told.message.contains("ahead"));
    }

    #[test]
    fn heads() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("etag", "\"abc\""),
            ("last-modified", "Wed, 21 Oct 2015 07:28:00 GMT"),
            ("x-amz-meta-mtime", "1.5"),
            ("content-encoding", "aws-chunked,gzip"),
            ("x-amz-checksum-crc64nvme", "AAAAAAAAAAE="),
            ("x-amz-checksum-type", "FULL_OBJECT"),
            ("x-amz-version-id", "null"),
            ("x-amz-tagging-count", "2"),
        ] {
            headers.insert(name, HeaderValue::from_static(value));
        }
        let head = object_head(&headers, 7).unwrap();
        assert_eq!((head.etag.as_str(), head.size, head.tag_count), ("abc", 7, 2));
        assert_eq!(head.checksum, Some(Checksum::Crc64Nvme(1)));
        assert_eq!(head.headers.content_encoding.as_deref(), Some("gzip"));
        assert_eq!(head.metadata["mtime"], "1.5");
        assert!(head.version_id.is_none());
        headers.remove("etag");
        assert!(object_head(&headers, 7).is_none());
    }

    #[test]
    fn ranges() {
        assert_eq!(content_range("bytes 0-9/100"), Some((0, 10, 100)));
        for bad in ["bytes 5-4/100", "bytes 0-100/100", "bytes */100", "0-9/100", "bytes 0-18446744073709551615/18446744073709551615"] {
            assert_eq!(content_range(bad), None, "{bad}");
        }
    }
}
