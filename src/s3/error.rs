//! What a store answered when it did not do what was asked.

use std::fmt;

/// The kinds of failure that callers tell apart. Everything above decides by kind, never by text or status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// 404 for an object (`NoSuchKey`, or a HEAD without a body).
    NoSuchKey,
    /// `NoSuchBucket`.
    NoSuchBucket,
    /// `NoSuchUpload`: completed, aborted or never made.
    NoSuchUpload,
    /// 403 (`AccessDenied`, `AllAccessDisabled`, …).
    AccessDenied,
    /// No usable credentials, or the store does not know them (`InvalidAccessKeyId`, `SignatureDoesNotMatch`, `ExpiredToken`).
    Credentials,
    /// 412: the object is not the version that was named.
    PreconditionFailed,
    /// 409 on a conditional write, or another operation in the way (`ConditionalRequestConflict`, `OperationAborted`).
    Conflict,
    /// 409 `BucketNotEmpty`.
    NotEmpty,
    /// 409 `BucketAlreadyExists`, `BucketAlreadyOwnedByYou`.
    BucketExists,
    /// 416.
    InvalidRange,
    /// 403 `InvalidObjectState`: archived, a restore comes first.
    Archived,
    /// 503 `SlowDown`, 429, `RequestLimitExceeded`.
    Throttled,
    /// 5xx that is not throttling.
    Server,
    /// Nothing came in time.
    TimedOut,
    /// Refused, unreachable, not resolved, reset, TLS failure.
    Network,
    /// `QuotaExceeded`, 507, `XMinioStorageFull`.
    Quota,
    /// `EntityTooLarge`: over the store's limit.
    TooLarge,
    /// `KeyTooLongError`.
    KeyTooLong,
    /// `BadDigest`, `XAmzContentChecksumMismatch`, a length or checksum that does not agree, in either direction.
    BadDigest,
    /// 501, 405 or `NotImplemented`: the store lacks the operation or header.
    NotImplemented,
    /// `AccessControlListNotSupported`: ACLs are off for the bucket.
    AclNotSupported,
    /// The bucket is elsewhere and could not be followed (`PermanentRedirect`, `AuthorizationHeaderMalformed`).
    WrongRegion,
    /// `RequestTimeTooSkewed`.
    ClockSkew,
    /// What came is not S3 (a captive portal's HTML, XML that does not parse, an answer without an ETag).
    Protocol,
    /// 400 and everything else that asking again will not mend.
    InvalidRequest,
    /// Reading the bytes to upload failed on this machine.
    LocalIo,
}

impl ErrorKind {
    /// The same may succeed a moment later: the store or the way to it failed, nobody refused.
    pub fn passes(self) -> bool {
        matches!(self, ErrorKind::Network | ErrorKind::TimedOut | ErrorKind::Server | ErrorKind::Throttled)
    }
}

/// A failed store operation, with what a human needs to find the reason. Never holds a secret or a signed URL.
#[derive(Clone, Debug)]
pub struct S3Error {
    /// What callers decide by.
    pub kind: ErrorKind,
    /// S3's name of the operation, `PutObject`.
    pub operation: &'static str,
    /// `s3://bucket/key`.
    pub resource: String,
    /// HTTP status, 0 when none came.
    pub status: u16,
    /// S3's error code, where one came.
    pub code: Option<String>,
    /// S3's message or the transport's.
    pub message: String,
    /// `x-amz-request-id`.
    pub request_id: Option<String>,
}

impl S3Error {
    /// An error that this machine found, without an answer of the store.
    pub fn local(kind: ErrorKind, operation: &'static str, resource: impl Into<String>, message: impl Into<String>) -> Self {
        Self { kind, operation, resource: resource.into(), status: 0, code: None, message: message.into(), request_id: None }
    }
}

impl fmt::Display for S3Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: ", self.operation, self.resource)?;
        match &self.code {
            Some(code) if !self.message.is_empty() => write!(f, "{code}: {}", self.message)?,
            Some(code) => f.write_str(code)?,
            None if self.message.is_empty() => write!(f, "HTTP status {}", self.status)?,
            None => f.write_str(&self.message)?,
        }
        if let Some(id) = &self.request_id {
            write!(f, " (request id {id})")?;
        }
        Ok(())
    }
}

impl std::error::Error for S3Error {}
