//! Block cache of object versions: what is read is kept on disk, and read ahead where the reader goes.
//!
//! A [`Reader`] is pinned to one [`ObjectVersion`]; every GET carries `If-Match`, so bytes of two versions never mix.
//! An `Entry` is one version's sparse file, shared by its readers: `block` says which blocks are here and what they sum to,
//! `fetch` brings the missing ones (one flight a block, over `download`, which resumes), `window` says what to bring ahead
//! (and `distance` over how many connections), `evict` and `disk` keep the directory within its bounds and across restarts. The
//! cache can only be wrong by missing: every block read from disk is compared with its CRC-32C, and a surprise is a block to be
//! fetched again.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;

use crate::s3::{ETag, S3Error, Store};
use inner::Inner;

mod adopt;
pub(crate) mod block;
mod coming;
mod disk;
mod distance;
mod download;
mod entry;
mod evict;
mod fetch;
mod inner;
mod memory;
mod pinned;
mod proved;
mod reader;
mod upkeep;
mod whole;
mod window;

#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_flights;

pub use block::EntryId;
pub use coming::Download;
pub use pinned::Pin;
pub use proved::ProvedFile;
pub use reader::Reader;
pub use upkeep::{CacheReport, CacheWish};

/// A read ends within this time, by bytes or by an error (promise 22).
pub const READ_DEADLINE: Duration = Duration::from_secs(90);

/// Shutdown waits so long for the sums of adopted files.
const SUM_DEADLINE: Duration = Duration::from_secs(10);

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
    /// The endpoint is plain HTTP: whole objects are verified against their whole checksum (promise 16).
    pub checks_ranges_over_http: bool,
}

impl CacheConfig {
    /// Of a cache that takes nothing in: what it holds is within its bounds.
    fn unbounded(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            identity: String::new(),
            max_size: u64::MAX,
            min_free_space: 0,
            memory_limit: 0,
            read_ahead: None,
            max_connections: 1,
            checks_ranges_over_http: false,
        }
    }
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
    inner: Arc<Inner>,
    /// One adopted file is summed at a time: it competes with the copy that goes on.
    summing: Arc<Semaphore>,
}

impl Cache {
    /// Opens the cache. Where its directory cannot be used, reads go through memory and one warning says so.
    pub async fn open(config: CacheConfig) -> std::io::Result<Arc<Cache>> {
        let cache = Self::of(tokio::task::spawn_blocking(move || Inner::open(config)).await.map_err(std::io::Error::other)?);
        if cache.inner.disk.is_some() {
            tokio::spawn(Inner::save_forever(Arc::downgrade(&cache.inner)));
        }
        Ok(cache)
    }

    fn of(inner: Inner) -> Arc<Cache> {
        Arc::new(Cache { inner: Arc::new(inner), summing: Arc::new(Semaphore::new(1)) })
    }

    /// A reader of one version. Cheap; makes no request.
    pub fn reader(self: &Arc<Self>, store: Arc<dyn Store>, version: ObjectVersion) -> Reader {
        Reader::new(Arc::clone(&self.inner), store, version)
    }

    /// All blocks of the version are here.
    pub fn is_complete(&self, version: &ObjectVersion) -> bool {
        version.size == 0 || self.inner.is_complete(EntryId::of(version))
    }

    /// Takes a closed spool file with exactly `version.size` valid bytes as the version's cache file, by rename; where that
    /// cannot be (another filesystem, no disk cache, an empty file), the file is removed. Its sums are computed in the background.
    /// An error says that the file could not be removed, or had another size.
    pub async fn adopt(self: &Arc<Self>, version: ObjectVersion, path: &Path) -> std::io::Result<()> {
        let (inner, path) = (Arc::clone(&self.inner), path.to_owned());
        let adopted = tokio::task::spawn_blocking(move || inner.adopt(&version, &path)).await.map_err(std::io::Error::other)??;
        let Some(entry) = adopted else { return Ok(()) };
        let (inner, summing) = (Arc::clone(&self.inner), Arc::clone(&self.summing));
        tokio::spawn(async move {
            let _one = summing.acquire().await.ok();
            let summed = tokio::task::spawn_blocking(move || inner.sum_adopted(&entry)).await;
            if let Err(error) = summed {
                tracing::debug!(%error, "adopted file not summed");
            }
        });
        Ok(())
    }

    /// The same bytes under another key or ETag (metadata copy, rename): the cache file and its readers follow.
    pub async fn rekey(&self, from: &ObjectVersion, to: &ObjectVersion) {
        if from == to || from.size != to.size {
            return;
        }
        let entry = self.inner.entry(from);
        self.inner.load(&entry).await;
        let (inner, from, to) = (Arc::clone(&self.inner), from.clone(), to.clone());
        self.blocking(move || inner.rekey(&entry, &from, &to)).await;
    }

    /// Forgets every version of the key. Readers of it keep what they have open.
    pub async fn remove(&self, bucket: &str, key: &str) {
        let (inner, bucket, key) = (Arc::clone(&self.inner), bucket.to_owned(), key.to_owned());
        self.blocking(move || inner.remove(&bucket, &key)).await;
    }

    /// Others want so many bytes on the cache's disk: what nobody reads goes. Blocks.
    pub fn give_way(&self, bytes: u64) {
        self.inner.give_way(bytes);
    }

    /// What is cached on disk.
    pub fn usage(&self) -> CacheUsage {
        let (files, bytes) = self.inner.usage();
        CacheUsage { files, bytes }
    }

    /// Writes the sidecars: what the next mount needs to know of the cached blocks. Adopted files are summed first.
    pub async fn shutdown(&self) {
        if tokio::time::timeout(SUM_DEADLINE, self.summing.acquire()).await.is_err() {
            tracing::debug!("adopted files that were not summed yet are not kept");
        }
        let inner = Arc::clone(&self.inner);
        self.blocking(move || inner.save(true)).await;
    }

    async fn blocking(&self, work: impl FnOnce() + Send + 'static) {
        if let Err(error) = tokio::task::spawn_blocking(work).await {
            tracing::warn!(%error, "cache: background work failed");
        }
    }
}
