//! What the store refused, or did not answer, lately: with the ids under which its owner finds the requests.

use std::collections::VecDeque;
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::{ErrorKind, S3Error};

/// So many are kept, the newest.
const KEPT: usize = 10;

/// What a mount asks to know how a bucket is set up, and does without where it has no right to know: few policies for uploads grant it.
const ASKED_AROUND: [&str; 5] = [
    "GetBucketOwnershipControls",
    "GetBucketVersioning",
    "GetBucketLifecycleConfiguration",
    "GetPublicAccessBlock",
    "ListMultipartUploads",
];

/// A request that failed in the end; several in a row for one reason are one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Failure {
    /// When the last of them failed, in seconds since 1970.
    pub at: u64,
    /// S3's name of the operation.
    pub operation: String,
    /// `s3://bucket/key` of the last, as it is: any byte may be in it.
    pub resource: String,
    /// HTTP status, 0 where no answer came.
    pub status: u16,
    /// S3's error code, where one came.
    pub code: Option<String>,
    /// S3's message or the transport's.
    pub message: String,
    /// `x-amz-request-id` of the last.
    pub request_id: Option<String>,
    /// How many in a row.
    pub count: u64,
}

impl Failure {
    fn of(error: &S3Error) -> Self {
        Self {
            at: SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs(),
            operation: error.operation.to_owned(),
            resource: error.resource.clone(),
            status: error.status,
            code: error.code.clone(),
            message: error.message.clone(),
            request_id: error.request_id.clone(),
            count: 1,
        }
    }

    fn has_reason_of(&self, other: &Self) -> bool {
        (&self.operation, self.status, &self.code) == (&other.operation, other.status, &other.code)
            && (self.code.is_some() || self.message == other.message)
    }
}

/// The last failures of a client.
#[derive(Debug, Default)]
pub(super) struct Failures(Mutex<VecDeque<Failure>>);

impl Failures {
    /// One more, unless it is one of the answers by which the mount learns how things are.
    pub fn note(&self, error: &S3Error) {
        if is_an_answer(error.kind) || error.kind == ErrorKind::AccessDenied && ASKED_AROUND.contains(&error.operation) {
            return;
        }
        let new = Failure::of(error);
        let mut kept = self.0.lock();
        match kept.back_mut() {
            Some(last) if last.has_reason_of(&new) => *last = Failure { count: last.count + 1, ..new },
            _ => kept.push_back(new),
        }
        if kept.len() > KEPT {
            kept.pop_front();
        }
    }

    /// The oldest first.
    pub fn snapshot(&self) -> Vec<Failure> {
        self.0.lock().iter().cloned().collect()
    }
}

/// Absence, a version that was replaced, a folder with something in it, what a store does not know: asked for, and answered.
fn is_an_answer(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::NoSuchKey
            | ErrorKind::NoSuchUpload
            | ErrorKind::PreconditionFailed
            | ErrorKind::InvalidRange
            | ErrorKind::NotEmpty
            | ErrorKind::BucketExists
            | ErrorKind::NotImplemented
            | ErrorKind::AclNotSupported
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(kind: ErrorKind, key: &str, code: Option<&str>, id: &str) -> S3Error {
        let error = S3Error::local(kind, "PutObject", format!("s3://b/{key}"), "no");
        S3Error { status: 403, code: code.map(str::to_owned), request_id: Some(id.to_owned()), ..error }
    }

    #[test]
    fn the_last_ones_are_kept_and_a_row_is_one() {
        let failures = Failures::default();
        failures.note(&error(ErrorKind::NoSuchKey, "k", Some("NoSuchKey"), "0"));
        let unknown = S3Error { operation: "GetBucketOwnershipControls", ..error(ErrorKind::AccessDenied, "", Some("AccessDenied"), "0") };
        failures.note(&unknown);
        assert_eq!(failures.snapshot(), Vec::new());
        failures.note(&error(ErrorKind::AccessDenied, "a", Some("AccessDenied"), "1"));
        failures.note(&error(ErrorKind::AccessDenied, "b", Some("AccessDenied"), "2"));
        let kept = failures.snapshot();
        assert_eq!((kept.len(), kept[0].count, kept[0].resource.as_str()), (1, 2, "s3://b/b"));
        assert_eq!(kept[0].request_id.as_deref(), Some("2"));
        for number in 0..30 {
            failures.note(&error(ErrorKind::Server, "c", Some(&format!("Code{number}")), "3"));
        }
        let kept = failures.snapshot();
        assert_eq!((kept.len(), kept[9].code.as_deref()), (10, Some("Code29")));
    }
}
