//! The object store as the rest of packmule sees it: one [`Store`] a bucket, speaking S3's own nouns.
//!
//! Nothing above this module knows HTTP, XML or signatures; nothing in it knows files, inodes or mounts.
//! Implementations retry by idempotency and kind of failure (see [`crate::aws::retry`]) and never sleep past
//! the caller: a dropped future stops its request.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;

mod acl;
pub mod bucket;
pub mod client;
pub(crate) mod delete;
pub mod endpoint;
pub mod error;
pub mod explain;
mod failures;
pub(crate) mod list;
pub mod multipart;
mod object;
pub mod operation;
mod proof;
mod request;
pub mod response;
pub mod rfc2047;
pub mod settings;
pub mod slow;
pub mod sweep;
mod upload;
pub mod xml;

pub use acl::Acl;
pub use error::{ErrorKind, S3Error};
pub use failures::Failure;

/// Result of a store operation.
pub type Result<T, E = S3Error> = std::result::Result<T, E>;

/// User metadata (`x-amz-meta-*`): lower-case names without the prefix. S3 keeps at most 2 KiB of it.
pub type Metadata = BTreeMap<String, String>;

/// An entity tag without its quotes. Some stores (SeaweedFS in CopyObject) send it bare, AWS sends it quoted:
/// both parse to the same value.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct ETag(String);

impl ETag {
    /// Takes an ETag as a header or a listing spells it; quotes are taken off.
    pub fn new(raw: impl AsRef<str>) -> Self {
        Self(raw.as_ref().trim().trim_matches('"').to_owned())
    }

    /// The bare value, without quotes.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The value as `If-Match` and CompleteMultipartUpload want it.
    pub fn quoted(&self) -> String {
        format!("\"{}\"", self.0)
    }

    /// The MD5 of the whole object, where the ETag is one: 32 hex digits, no part count.
    pub fn md5(&self) -> Option<[u8; 16]> {
        if self.0.len() != 32 {
            return None;
        }
        let mut out = [0u8; 16];
        for (byte, pair) in out.iter_mut().zip(self.0.as_bytes().chunks_exact(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
        }
        Some(out)
    }
}

impl fmt::Debug for ETag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.0)
    }
}

impl fmt::Display for ETag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A whole-object or part checksum, as `x-amz-checksum-*` carries it (big-endian bytes, base64 on the wire).
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
pub enum Checksum {
    /// CRC-64/NVME; on AWS always of the full object, whatever the number of parts.
    Crc64Nvme(u64),
    /// CRC-32C (Castagnoli).
    Crc32c(u32),
    /// MD5, sent as `Content-MD5`.
    Md5([u8; 16]),
    /// SHA-1; how symbolic links are marked in listings (promise 29).
    Sha1([u8; 20]),
}

impl Checksum {
    /// How it is computed; [`ChecksumKind::Off`] of SHA-1, which only marks links.
    pub fn kind(&self) -> ChecksumKind {
        match self {
            Checksum::Crc64Nvme(_) => ChecksumKind::Crc64Nvme,
            Checksum::Crc32c(_) => ChecksumKind::Crc32c,
            Checksum::Md5(_) => ChecksumKind::Md5,
            Checksum::Sha1(_) => ChecksumKind::Off,
        }
    }
}

/// Headers stored with an object beside its user metadata. `None`: not set.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ObjectHeaders {
    /// `Content-Type`.
    pub content_type: Option<String>,
    /// `Cache-Control`.
    pub cache_control: Option<String>,
    /// `Content-Disposition`.
    pub content_disposition: Option<String>,
    /// `Content-Encoding`.
    pub content_encoding: Option<String>,
    /// `Content-Language`.
    pub content_language: Option<String>,
    /// `Expires`, as stored.
    pub expires: Option<String>,
    /// `x-amz-website-redirect-location`. CopyObject never carries it over: it must be sent again.
    pub website_redirect: Option<String>,
}

/// What HeadObject (and the head of a GetObject answer) tells.
#[derive(Clone, Debug)]
pub struct ObjectHead {
    /// Size of the whole object in bytes.
    pub size: u64,
    /// Entity tag.
    pub etag: ETag,
    /// `Last-Modified`, to the second.
    pub last_modified: SystemTime,
    /// User metadata.
    pub metadata: Metadata,
    /// Stored headers.
    pub headers: ObjectHeaders,
    /// `x-amz-storage-class`; absent means STANDARD.
    pub storage_class: Option<String>,
    /// `x-amz-version-id` on versioned buckets.
    pub version_id: Option<String>,
    /// The full-object checksum, where the store sent one.
    pub checksum: Option<Checksum>,
    /// `x-amz-restore`, as sent: an archived object being or already restored.
    pub restore: Option<String>,
    /// `x-amz-tagging-count`; 0 when absent.
    pub tag_count: u32,
}

impl ObjectHead {
    /// True when the object's class needs a restore before it can be read (GLACIER, DEEP_ARCHIVE) and none is ready.
    pub fn is_archived(&self) -> bool {
        let restored = self.restore.as_deref().is_some_and(|r| r.contains("ongoing-request=\"false\""));
        is_archive_class(self.storage_class.as_deref()) && !restored
    }
}

/// True for storage classes whose objects cannot be read before a restore. GLACIER_IR can be read at once.
pub fn is_archive_class(class: Option<&str>) -> bool {
    matches!(class, Some("GLACIER" | "DEEP_ARCHIVE"))
}

/// One object of a listing.
#[derive(Clone, Debug)]
pub struct ListEntry {
    /// The whole key, URL-decoded.
    pub key: String,
    /// Size in bytes.
    pub size: u64,
    /// Entity tag.
    pub etag: ETag,
    /// Last modification, to the millisecond where the store gives it.
    pub last_modified: SystemTime,
    /// Storage class; `None` when the listing leaves it out.
    pub storage_class: Option<String>,
    /// True when the listing says the object was written with checksum algorithm SHA1 (a possible symbolic link).
    pub sha1: bool,
}

/// One page of ListObjectsV2 (or V1, by `listobjectsv1`).
#[derive(Clone, Debug, Default)]
pub struct ListPage {
    /// Objects, in the store's key order.
    pub entries: Vec<ListEntry>,
    /// Common prefixes, whole (with the request's prefix and the trailing delimiter).
    pub prefixes: Vec<String>,
    /// Pass it as [`ListRequest::continuation`] to get the next page; `None` on the last one.
    pub next: Option<String>,
}

/// What to list.
#[derive(Clone, Debug, Default)]
pub struct ListRequest {
    /// Only keys that begin with it.
    pub prefix: String,
    /// Fold keys at the first `/` after the prefix.
    pub delimited: bool,
    /// Only keys after this one.
    pub start_after: Option<String>,
    /// [`ListPage::next`] of the page before.
    pub continuation: Option<String>,
    /// At most so many keys and prefixes; `None`: the store's 1000.
    pub max_keys: Option<u32>,
}

/// A part of an object to read.
#[derive(Clone, Debug, Default)]
pub struct GetRequest {
    /// Byte range; `None` is the whole object. An empty object answers a range with [`ErrorKind::InvalidRange`].
    pub range: Option<Range<u64>>,
    /// Fail with [`ErrorKind::PreconditionFailed`] unless the object still has this ETag.
    pub if_match: Option<ETag>,
    /// Read this version instead of the current one.
    pub version_id: Option<String>,
}

/// A GetObject answer: the head has come, the bytes follow.
pub struct GetObject {
    /// Head of the whole object (`size` is the object's, not the range's).
    pub head: ObjectHead,
    /// The range that the body holds, as the store confirmed it (`Content-Range`).
    pub range: Range<u64>,
    /// The bytes: exactly `range.end - range.start` of them, else the stream ends with an error.
    pub body: BoxStream<'static, Result<Bytes>>,
}

/// Where uploaded bytes come from: it must give the same bytes each time it is opened, for retries.
pub trait Source: Send + Sync + 'static {
    /// Length in bytes.
    fn len(&self) -> u64;

    /// True when there are no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A fresh stream of all bytes in chunks of at most 1 MiB. May count bytes as they leave (progress).
    fn open(&self) -> BoxStream<'static, std::io::Result<Bytes>>;

    /// The request that sent them has failed; it may be sent again after a pause.
    fn refused(&self) {}
}

/// Keys of one DeleteObjects (S3's own limit).
pub const DELETE_MOST: usize = 1000;
/// Most keys and prefixes that one page of a listing holds.
pub const LIST_MOST: usize = 1000;

/// Deletes this version of a key, and no other where the store can tell them apart; `None`: whatever is there.
///
/// # Errors
/// As [`Store::delete`].
pub async fn delete_version(store: &dyn Store, key: &str, etag: Option<ETag>) -> Result<()> {
    let told = etag.is_some();
    match store.delete(key, etag).await {
        Err(error) if error.kind == ErrorKind::NotImplemented && told => store.delete(key, None).await,
        other => other,
    }
}

/// Bytes already in memory are a source.
impl Source for Bytes {
    fn len(&self) -> u64 {
        Bytes::len(self) as u64
    }

    fn open(&self) -> BoxStream<'static, std::io::Result<Bytes>> {
        Box::pin(futures::stream::iter((!Bytes::is_empty(self)).then(|| Ok(self.clone()))))
    }
}

/// Precondition of a write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    /// `If-None-Match: *`: only where no object has the key.
    Absent,
    /// `If-Match`: only over this version.
    Matches(ETag),
}

/// How an object is to be stored. Mount-wide words (ACL, SSE, storage class, requester pays) are the client's own
/// and are added by it.
#[derive(Clone, Debug, Default)]
pub struct PutOptions {
    /// Stored headers.
    pub headers: ObjectHeaders,
    /// User metadata.
    pub metadata: Metadata,
    /// Precondition; left out when the store is known not to honour it.
    pub condition: Option<Condition>,
    /// Checksum of the body (of the full object, for CompleteMultipartUpload), verified by the store.
    pub checksum: Option<Checksum>,
    /// Overrides the mount's storage class (a copy keeps its source's).
    pub storage_class: Option<String>,
    /// Object tags to set.
    pub tags: Vec<(String, String)>,
    /// Instead of the mount's own ACL (a copy keeps its source's).
    pub acl: Option<Acl>,
    /// Of CreateMultipartUpload: no checksum of the whole is kept, and its parts may carry none but Content-MD5.
    pub plain: bool,
}

/// What a write answered.
#[derive(Clone, Debug)]
pub struct PutOutcome {
    /// The new object's (or part's) ETag.
    pub etag: ETag,
    /// Its version, on versioned buckets.
    pub version_id: Option<String>,
    /// The store's `LastModified` of a copy, or its `Date`; `None` where neither came.
    pub last_modified: Option<SystemTime>,
}

/// The source of a server-side copy.
#[derive(Clone, Debug)]
pub struct CopySource {
    /// Bucket of the source (may differ from the target's).
    pub bucket: String,
    /// Key of the source.
    pub key: String,
    /// `x-amz-copy-source-if-match`.
    pub if_match: Option<ETag>,
    /// Copy this version.
    pub version_id: Option<String>,
    /// Checksum of the whole source, where it is known.
    pub checksum: Option<Checksum>,
}

/// What happens to headers and metadata in a CopyObject.
#[derive(Clone, Debug)]
pub enum CopyMetadata {
    /// Taken from the source (tags too). What is no part of it is given here.
    Keep {
        /// `x-amz-website-redirect-location` of the copy.
        website_redirect: Option<String>,
        /// Storage class of the copy; without it S3 makes it STANDARD.
        storage_class: Option<String>,
        /// As [`PutOptions::acl`].
        acl: Option<Acl>,
    },
    /// Replaced by these (tags are kept from the source).
    Replace(Box<PutOptions>),
}

/// A finished part.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Part {
    /// 1 to 10,000.
    pub number: u32,
    /// ETag that UploadPart or UploadPartCopy answered.
    pub etag: ETag,
    /// Size in bytes.
    pub size: u64,
    /// Its checksum, where it was sent with one or the store told it: some stores want each again at the end.
    #[serde(default)]
    pub checksum: Option<Checksum>,
}

/// An unfinished multipart upload.
#[derive(Clone, Debug)]
pub struct PendingUpload {
    /// The key it is for.
    pub key: String,
    /// Its id.
    pub upload_id: String,
    /// When it was created.
    pub initiated: SystemTime,
}

/// What this store can do. AWS's values by default; probed or configured elsewhere.
#[derive(Clone, Debug)]
pub struct Capabilities {
    /// Largest object in bytes: 50 TB (decimal) on AWS, 5 TiB elsewhere.
    pub max_object_size: u64,
    /// Largest CopyObject, PutObject and part in bytes (5 GiB).
    pub max_single_copy: u64,
    /// Conditional PutObject and CompleteMultipartUpload are honoured; `None`: not known yet.
    pub conditional_writes: Option<bool>,
    /// DeleteObjects works.
    pub delete_many: bool,
    /// DeleteObjects compares ETags; `None`: not known yet.
    pub conditional_deletes: Option<bool>,
    /// The store may keep directories of its own (SeaweedFS does), which stay when the last key below them goes, until their
    /// marker is deleted, had they one or not.
    pub real_directories: bool,
    /// A copy of what has no checksum of the whole is better begun [`PutOptions::plain`]: such a store reads all that it copies to compute one
    /// (SeaweedFS takes 1.5 s for 256 MiB instead of 0.8). AWS has checksums of its objects.
    pub plain_copies: bool,
    /// Checksum to send with uploads.
    pub upload_checksum: ChecksumKind,
}

/// Which checksum is sent with uploads (`upload_checksums=`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum ChecksumKind {
    /// None: for stores that refuse the headers.
    Off,
    /// `Content-MD5`.
    Md5,
    /// `x-amz-checksum-crc32c`.
    Crc32c,
    /// `x-amz-checksum-crc64nvme`, full object.
    #[default]
    Crc64Nvme,
}

/// One bucket.
///
/// Every method may fail with any [`ErrorKind`]; only the ones that the caller is expected to tell apart are named.
#[async_trait]
pub trait Store: Send + Sync + fmt::Debug + 'static {
    /// The bucket's name, as copy sources and messages need it.
    fn bucket(&self) -> &str;

    /// What the store can do, as known now.
    fn capabilities(&self) -> Capabilities;

    /// HeadObject. [`ErrorKind::NoSuchKey`] where there is none.
    async fn head(&self, key: &str) -> Result<ObjectHead>;

    /// GetObject. Retries until the head of the answer has come; the body is the caller's to resume.
    async fn get(&self, key: &str, request: GetRequest) -> Result<GetObject>;

    /// One page of a listing.
    async fn list(&self, request: ListRequest) -> Result<ListPage>;

    /// PutObject. [`ErrorKind::PreconditionFailed`] when `options.condition` does not hold.
    async fn put(&self, key: &str, body: Arc<dyn Source>, options: PutOptions) -> Result<PutOutcome>;

    /// DeleteObject. A key that does not exist is no error (S3's own rule).
    async fn delete(&self, key: &str, if_match: Option<ETag>) -> Result<()>;

    /// DeleteObjects, at most 1000 keys a call, each with the ETag it must still have, if given. Keys that XML cannot carry are deleted one by one.
    /// Answers the keys that failed.
    async fn delete_many(&self, keys: &[(String, Option<ETag>)]) -> Result<Vec<(String, S3Error)>>;

    /// CopyObject (at most [`Capabilities::max_single_copy`] bytes). A 200 with an `<Error>` body is an error.
    async fn copy(&self, key: &str, source: CopySource, metadata: CopyMetadata, condition: Option<Condition>) -> Result<PutOutcome>;

    /// CreateMultipartUpload: headers, metadata, tags, storage class are fixed here. Answers the upload id.
    async fn create_multipart(&self, key: &str, options: PutOptions) -> Result<String>;

    /// UploadPart. Sent again under the same number, the last one wins.
    async fn upload_part(&self, key: &str, upload_id: &str, number: u32, body: Arc<dyn Source>, checksum: Option<Checksum>)
    -> Result<Part>;

    /// UploadPartCopy of a byte range. A 200 with an `<Error>` body is an error.
    async fn upload_part_copy(&self, key: &str, upload_id: &str, number: u32, source: CopySource, range: Range<u64>) -> Result<Part>;

    /// CompleteMultipartUpload. A 200 with an `<Error>` body, or without an ETag, is an error.
    /// `options.condition` and `options.checksum` (full object) travel; `size` becomes `x-amz-mp-object-size`.
    async fn complete_multipart(&self, key: &str, upload_id: &str, parts: &[Part], size: u64, options: PutOptions) -> Result<PutOutcome>;

    /// AbortMultipartUpload. An upload that is gone is no error.
    async fn abort_multipart(&self, key: &str, upload_id: &str) -> Result<()>;

    /// ListParts, all pages.
    async fn list_parts(&self, key: &str, upload_id: &str) -> Result<Vec<Part>>;

    /// ListMultipartUploads under a prefix, all pages.
    async fn list_uploads(&self, prefix: &str) -> Result<Vec<PendingUpload>>;

    /// GetObjectTagging.
    async fn get_tags(&self, key: &str) -> Result<Vec<(String, String)>>;

    /// PutObjectTagging: replaces all tags.
    async fn put_tags(&self, key: &str, tags: &[(String, String)]) -> Result<()>;

    /// GetObjectAcl; `None` where the bucket has ACLs off (which is asked once), a private one where it cannot be read.
    async fn get_acl(&self, key: &str) -> Result<Option<Acl>>;

    /// A GET link for the key, valid for `expires` seconds, signed with the mount's signature version.
    async fn presign_get(&self, key: &str, expires_seconds: u64, query: &[(String, String)]) -> Result<String>;
}

/// A bucket of the account.
#[derive(Clone, Debug)]
pub struct BucketEntry {
    /// Its name.
    pub name: String,
    /// When it was made.
    pub created: Option<SystemTime>,
}

/// The account: every bucket of it, each behind a [`Store`] of its own region.
#[async_trait]
pub trait Account: Send + Sync + fmt::Debug + 'static {
    /// ListBuckets, all pages.
    async fn buckets(&self) -> Result<Vec<BucketEntry>>;

    /// The bucket's store; its region is found once. [`ErrorKind::NoSuchBucket`] where there is none.
    async fn bucket(&self, name: &str) -> Result<Arc<dyn Store>>;

    /// CreateBucket in the mount's region.
    async fn create_bucket(&self, name: &str) -> Result<()>;

    /// DeleteBucket. [`ErrorKind::NotEmpty`] while it holds objects.
    async fn delete_bucket(&self, name: &str) -> Result<()>;
}

#[cfg(test)]
mod tests;
