//! S3's operations by name, and how often each was sent.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! operations {
    ($($name:ident),* $(,)?) => {
        /// An operation of the S3 API.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
}

impl Counters {
    /// One more.
    pub fn count(&self, operation: Operation) {
        self.sent[operation as usize].fetch_add(1, Ordering::Relaxed);
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
