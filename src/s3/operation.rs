//! S3's operations by name, and how often each was sent.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::measure::Durations;

macro_rules! operations {
    ($($name:ident),* $(,)?) => {
        /// An operation of the S3 API.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        #[allow(missing_docs)]
        pub enum Operation { $($name),* }

        impl Operation {
            const ALL: &'static [Operation] = &[$(Operation::$name),*];

            /// S3's own name, as in its documentation and CloudTrail.
            pub fn name(self) -> &'static str {
                match self { $(Operation::$name => stringify!($name)),* }
            }
        }
    };
}

operations! {
    HeadObject, GetObject, PutObject, DeleteObject, DeleteObjects, CopyObject, ListObjectsV2, ListObjects,
    CreateMultipartUpload, UploadPart, UploadPartCopy, CompleteMultipartUpload, AbortMultipartUpload, ListParts, ListMultipartUploads,
    GetObjectTagging, PutObjectTagging, GetObjectAcl, GetBucketOwnershipControls, HeadBucket, ListBuckets, CreateBucket, DeleteBucket,
    GetBucketVersioning, GetBucketLifecycleConfiguration, GetPublicAccessBlock, ListObjectVersions,
}

/// Requests sent, by operation; retries count.
#[derive(Debug, Default)]
pub struct Counters {
    sent: [AtomicU64; Operation::ALL.len()],
    /// Until the head of the answer came, or none did.
    took: [Durations; Operation::ALL.len()],
    /// By HTTP status; 0 where no answer came.
    answers: parking_lot::Mutex<BTreeMap<(Operation, u16), u64>>,
}

impl Counters {
    /// One more.
    pub fn count(&self, operation: Operation) {
        self.sent[operation as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// How one ended: its HTTP status, 0 where no answer came, and the time until its head was there.
    pub fn answered(&self, operation: Operation, status: u16, took: Duration) {
        self.took[operation as usize].observe(took);
        *self.answers.lock().entry((operation, status)).or_default() += 1;
    }

    /// How many ended with which HTTP status (0: no answer).
    pub fn answers(&self) -> BTreeMap<(Operation, u16), u64> {
        self.answers.lock().clone()
    }

    /// How long those of each kind took, until the head of the answer came.
    pub fn took(&self) -> impl Iterator<Item = (Operation, &Durations)> {
        Operation::ALL.iter().copied().zip(&self.took)
    }

    /// Those that were sent at all.
    pub fn snapshot(&self) -> Vec<(Operation, u64)> {
        let all = Operation::ALL.iter().zip(&self.sent);
        all.map(|(operation, sent)| (*operation, sent.load(Ordering::Relaxed))).filter(|(_, sent)| *sent > 0).collect()
    }
}

/// What was asked of a store.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Requests sent, by operation; those that were sent at all.
    pub requests: Vec<(Operation, u64)>,
    /// Bytes of bodies sent.
    pub sent: u64,
    /// Bytes of bodies received.
    pub received: u64,
}
