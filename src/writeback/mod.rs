//! Write-back: bytes that an application writes wait in a spool file until they are an object.
//!
//! A [`Staged`] file is the data plane (write, read, truncate); one uploader task owns the state of every upload
//! ([`state`]) and starts bounded transfers; a manifest beside each spool file makes it survive a crash. Nothing
//! half-written is ever published, and what cannot be published stays, parked, with its reason.
//!
//! Lock order: an entry's `writer` (async, held while its spool file changes) → its `intent` → its `content`
//! (leaves, never held across `.await`).

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::oneshot;

use crate::s3::{Account, Checksum, ETag, ErrorKind, ListPage, Metadata, ObjectHeaders, PutOutcome, S3Error, Store};

mod abandoned;
mod adopt;
mod alive;
mod behind;
mod body;
mod commit;
pub(crate) mod content;
mod copied;
mod copy_out;
mod deletes;
mod disk;
mod entry;
mod intent;
mod job;
mod journal;
mod listed;
pub(crate) mod manifest;
mod metacopy;
pub mod offline;
mod pace;
mod plan;
mod publish;
mod reason;
mod recover;
mod renames;
mod rights;
mod rolling;
mod sent;
mod spool;
mod staged;
mod state;
mod status;
mod transfer;
mod uploader;

#[cfg(test)]
mod fake;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_durable;
#[cfg(test)]
mod tests_power;
#[cfg(test)]
mod tests_resume;

pub use copy_out::{Kept, Run};
pub use journal::{Deletion, Journalled, MetadataChange};
pub use manifest::Phase;
pub use renames::{CopiesMade, CopyMade, RenameRecord, RenameStage, TreeRename};
pub use staged::Staged;
pub use status::{ConflictCopy, DeleteStatus, DrainReport, EntryStatus, Pending};

use deletes::Way;
use entry::Shared;
use uploader::Message;

/// Where a staged file is to be published.
#[derive(Clone, Debug)]
pub struct Target {
    /// The bucket.
    pub store: Arc<dyn Store>,
    /// The key in it.
    pub key: String,
}

impl Target {
    /// True of the same key in the same bucket.
    fn is(&self, other: &Target) -> bool {
        self.key == other.key && self.store.bucket() == other.store.bucket()
    }
}

/// What publication expects to find under the key.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Expect {
    /// Whatever is there is replaced.
    Anything,
    /// O_EXCL: nothing; a taken key is [`Error::Exists`] (promise 12).
    Absent,
    /// Nothing that we knew of; a conflict is judged by `on_conflict`.
    NewFile,
    /// This version.
    Version(ETag),
}

/// Reads bytes of the object that a staged file started from. Implemented above, over the cache.
#[async_trait]
pub trait BaseReader: Send + Sync {
    /// Bytes from `offset`, `len` of them unless the object ends before. The next reads are of what follows, up to `until`.
    async fn read(&self, offset: u64, len: usize, until: u64) -> Result<Bytes, BaseError>;
}

/// Why base bytes could not be read.
#[derive(Clone, Debug)]
pub enum BaseError {
    /// The object is another version now, or gone.
    Stale,
    /// The store refused.
    S3(S3Error),
    /// This machine failed.
    Io(String),
}

/// The object that a staged file changes (opened without O_TRUNC).
#[derive(Clone)]
pub struct Base {
    /// Its bucket.
    pub bucket: String,
    /// Its key.
    pub key: String,
    /// Its ETag: server-side copies are conditional on it.
    pub etag: ETag,
    /// Its size in bytes.
    pub size: u64,
    /// Its version, on versioned buckets.
    pub version_id: Option<String>,
    /// Its whole checksum, where it is known.
    pub checksum: Option<Checksum>,
    /// Gives its bytes.
    pub reader: Arc<dyn BaseReader>,
}

/// What is stored with the content.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Attributes {
    /// User metadata (`x-amz-meta-*`).
    pub metadata: Metadata,
    /// Stored headers; where `None`, those of [`Hooks::headers`].
    pub headers: ObjectHeaders,
    /// Storage class to keep; `None`: the mount's.
    pub storage_class: Option<String>,
    /// Tags to keep.
    pub tags: Vec<(String, String)>,
}

/// The key that a temporary name will probably be renamed to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guess {
    /// Its upload gets the parts while the application writes.
    pub key: String,
    /// All of them are sent before [`Staged::publish`] answers, at any size; else only those of a file that needs several.
    pub eager: bool,
}

/// Upward hooks; the composition root supplies them.
pub trait Hooks: Send + Sync + 'static {
    /// Headers for a new object by its final key; [`Attributes::headers`] win where they are set.
    fn headers(&self, bucket: &str, key: &str) -> ObjectHeaders;
    /// After publication (CloudFront, caches). May be called again for the same object after a crash. Must not block.
    fn published(&self, published: &Published);
    /// So many bytes are wanted on the spool's disk: what can be had again (a cache) gives way. May block.
    fn make_room(&self, bytes: u64);
}

/// A publication that succeeded.
#[derive(Clone, Debug)]
pub struct Published {
    /// Bucket.
    pub bucket: String,
    /// Key: another than asked for where a conflict was kept beside.
    pub key: String,
    /// The new object's ETag.
    pub etag: ETag,
    /// Its version, on versioned buckets.
    pub version_id: Option<String>,
    /// Its size in bytes.
    pub size: u64,
    /// Its whole checksum, where it was sent with one.
    pub checksum: Option<Checksum>,
    /// The store's `LastModified` or `Date`, else this machine's clock.
    pub last_modified: SystemTime,
    /// What travelled with it.
    pub attributes: Attributes,
    /// What was appended went behind somebody else's change: before it, the file is another one than it was.
    pub rebased: bool,
    /// The key existed before (or may have: nothing was expected).
    pub replaced: bool,
}

/// Why a staged file could not be written or published.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// The spool cannot hold it (ENOSPC, at write time only).
    #[error("the spool is full: raise spool_size or lower min_free_space")]
    NoSpace,
    /// A write of this file failed before (EIO).
    #[error("a write to this file failed, so it is not published")]
    Poisoned,
    /// O_EXCL and the name is taken in S3 (EEXIST).
    #[error("the name was taken in S3 meanwhile")]
    Exists,
    /// The object it changes was changed or removed by somebody else (ESTALE).
    #[error("the object was changed or removed by somebody else")]
    Stale,
    /// As [`Error::Stale`], and what it keeps of that version cannot be had any more (ESTALE).
    #[error(
        "the object was changed or removed by somebody else, and the rest of the version that this file changes cannot be had any more"
    )]
    BaseGone,
    /// Over the store's largest object (EFBIG).
    #[error("larger than the store's largest object")]
    TooLarge,
    /// No byte moved for `close_timeout` (ETIMEDOUT).
    #[error("nothing could be stored within close_timeout")]
    TimedOut,
    /// Unlinked or superseded.
    #[error("the file was removed or replaced")]
    Discarded,
    /// The store refused for good.
    #[error("{0}")]
    S3(S3Error),
    /// The spool file does not hold what was written into it (EIO).
    #[error("this machine changed bytes that were written")]
    Damaged,
    /// The spool's disk failed.
    #[error("the spool failed: {0}")]
    Io(Arc<std::io::Error>),
}

impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Self {
        match error.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => Error::NoSpace,
            _ => Error::Io(Arc::new(error)),
        }
    }
}

impl From<BaseError> for Error {
    fn from(error: BaseError) -> Self {
        match error {
            BaseError::Stale => Error::Stale,
            BaseError::S3(error) if matches!(error.kind, ErrorKind::PreconditionFailed | ErrorKind::NoSuchKey) => Error::Stale,
            BaseError::S3(error) => Error::S3(error),
            BaseError::Io(text) => Error::from(std::io::Error::other(text)),
        }
    }
}

/// What to do with somebody else's change found at publication (`on_conflict=`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum OnConflict {
    /// Ours is published beside theirs, under a name that says so.
    #[default]
    Keep,
    /// Ours replaces theirs.
    Overwrite,
    /// close() fails with ESTALE and ours is parked.
    Fail,
}

/// How the spool is to be run.
#[derive(Clone, Debug)]
pub struct SpoolConfig {
    /// Parent directory; a locked sub-directory of our own is made in it.
    pub dir: PathBuf,
    /// The service, however its endpoint is spelled. What earlier mounts left is gone on with …
    pub service: String,
    /// … for this bucket; `None`: for all of its buckets.
    pub bucket: Option<String>,
    /// Nothing is written: nothing is gone on with, nor locked.
    pub read_only: bool,
    /// Most bytes of the disk that spool files and their records may take.
    pub max_size: u64,
    /// Bytes to leave free on the disk.
    pub min_free_space: u64,
    /// Fixed part size in bytes; `None`: 8 MiB, growing.
    pub part_size: Option<u64>,
    /// Most transfers at once.
    pub max_connections: usize,
    /// The process's memory target in bytes; bounds what transfers hold at once.
    pub memory_limit: u64,
    /// How long writes and closes wait after the last progress.
    pub close_timeout: Duration,
    /// Zero: close waits for publication. Else publication follows by this delay.
    pub write_back: Duration,
    /// What to do with somebody else's change.
    pub on_conflict: OnConflict,
}

/// The write-back layer of one mount. Cheap to clone.
#[derive(Clone)]
pub struct Writeback {
    shared: Arc<Shared>,
}

impl Writeback {
    /// Locks a sub-directory of the spool, goes on with what earlier runs left for the same buckets, resumes the
    /// uploads that were promised and starts the uploader. Fails where the spool cannot be made or locked.
    pub async fn open(config: SpoolConfig, account: Arc<dyn Account>, hooks: Arc<dyn Hooks>) -> Result<Writeback, Error> {
        Self::open_on(disk::Disk::default(), config, account, hooks).await
    }

    async fn open_on(disk: disk::Disk, config: SpoolConfig, account: Arc<dyn Account>, hooks: Arc<dyn Hooks>) -> Result<Writeback, Error> {
        let dir = config.dir.clone();
        let whose = adopt::Whose { service: config.service.clone(), bucket: config.bucket.clone() };
        let (spool, found) = match config.read_only {
            true => (spool::Spool::of_nobody(disk, &dir), Vec::new()),
            false => spool::blocking(move || spool::Spool::open(disk, &dir, &whose)).await?,
        };
        let (shared, inbox) = Shared::new(config, spool, hooks);
        uploader::start(shared.clone(), inbox);
        let redirecting = shared.clone();
        let found = spool::blocking(move || Ok(redirecting.renames.redirect(&redirecting.spool.disk, found))).await?;
        abandoned::resume(&shared, &account);
        recover::resume(&shared, found, &account).await;
        deletes::start(shared.clone());
        Ok(Writeback { shared })
    }

    /// Stages a file for `target`; no request is made. `base` is the object whose bytes remain where nothing is written.
    pub async fn stage(&self, target: Target, expect: Expect, base: Option<Base>, attributes: Attributes) -> Result<Arc<Staged>, Error> {
        let entry = entry::Entry::create(&self.shared, target, expect, base, attributes).await?;
        Ok(Arc::new(Staged::new(entry)))
    }

    /// What an earlier run left and that belongs into its directory: files that are queued, and temporary names. Given once.
    pub fn recovered(&self) -> Vec<Arc<Staged>> {
        let entries = std::mem::take(&mut *self.shared.recovered.lock());
        entries.into_iter().map(|entry| Arc::new(Staged::new(entry))).collect()
    }

    /// True where publications and deletes are queued: with `write_back`, in a bucket that the credentials may write to. Asks that once
    /// a bucket, of `key`.
    pub async fn queues(&self, store: &dyn Store, key: &str) -> bool {
        self.shared.queues(store, key).await
    }

    /// Deletes in the background, in batches, after about `delay`; durable when this returns. Until then [`Writeback::hide_deleted`]
    /// hides the key. A newer call for the same key replaces an older one.
    pub async fn delete_later(&self, store: Arc<dyn Store>, deletion: Deletion, delay: Duration) -> Result<(), Error> {
        deletes::delete_later(&self.shared, Way::Store(store), deletion, delay).await
    }

    /// Takes a delete back: something replaces the key. It stays on record until it is forgotten; what was on its way is waited for.
    pub async fn take_delete(&self, bucket: &str, key: &str) -> Option<Journalled<Deletion>> {
        self.shared.deletes.take(bucket, key).await
    }

    /// What [`Writeback::take_delete`] took is to go on: nothing came in its place.
    pub fn put_delete_back(&self, store: Arc<dyn Store>, deletion: Journalled<Deletion>) {
        self.shared.deletes.queue(Way::Store(store), deletion, Duration::ZERO);
    }

    /// Sends a delete that waits for the key and waits for its end. Fails where the store refuses it.
    pub async fn settle_delete(&self, bucket: &str, key: &str) -> Result<(), S3Error> {
        self.shared.deletes.settle(bucket, key, true).await
    }

    /// As [`Writeback::settle_delete`], of all keys below a prefix.
    pub async fn settle_deletes_below(&self, bucket: &str, prefix: &str) -> Result<(), S3Error> {
        self.shared.deletes.settle(bucket, prefix, false).await
    }

    /// True while the delete of a key below the prefix waits.
    pub fn deletes_below(&self, bucket: &str, prefix: &str) -> bool {
        self.shared.deletes.any_below(bucket, prefix)
    }

    /// True of a key whose delete waits, or ended after `since`: what was asked at that time may tell of it still.
    pub fn is_deleted(&self, bucket: &str, key: &str, since: Instant) -> bool {
        self.shared.deletes.hides(bucket, key, since)
    }

    /// Takes out of a page that was asked for at `since` what [`Writeback::is_deleted`] is true of.
    pub fn hide_deleted(&self, bucket: &str, since: Instant, page: &mut ListPage) {
        self.shared.deletes.hide(bucket, since, page);
    }

    /// `kept` is told of keys (bucket, key) that stay though their delete was promised. Only the first call counts.
    pub fn on_kept(&self, kept: impl Fn(&[(String, String)]) + Send + Sync + 'static) {
        self.shared.deletes.on_kept(Box::new(kept));
    }

    /// How many deletes wait or were refused, and the first `most` of them, the refused ones before the others.
    pub fn deletes(&self, most: usize) -> (usize, Vec<DeleteStatus>) {
        self.shared.deletes.status(most)
    }

    /// What is on its way; what waits for somebody's word is not.
    pub fn pending(&self) -> Pending {
        self.shared.pending()
    }

    /// Metadata that an earlier run put off and did not come to send: the newest of each object. Given once.
    pub async fn unsent_metadata(&self) -> Vec<Journalled<MetadataChange>> {
        let found = std::mem::take(&mut *self.shared.metadata.lock());
        let mut newest = std::collections::HashMap::new();
        for journalled in found {
            let object = (journalled.what.bucket.clone(), journalled.what.key.clone());
            if let Some(older) = newest.insert(object, journalled) {
                older.forget().await;
            }
        }
        newest.into_values().collect()
    }

    /// The object under this key is about to go, or to be another: what is copied from it and not published yet has its bytes when this
    /// returns, or will not be had.
    pub async fn release_copies(&self, bucket: &str, key: &str) {
        copied::release(&self.shared, bucket, key, None).await;
    }

    /// That version of an object was copied to another key: what is copied from it and not published yet is copied from there.
    pub fn move_copies(&self, bucket: &str, key: &str, etag: &ETag, to: &Base) {
        copied::follow(&self.shared, (bucket, key), etag, to);
    }

    /// Headers that a new object gets by its key alone.
    pub fn default_headers(&self, bucket: &str, key: &str) -> ObjectHeaders {
        self.shared.hooks.headers(bucket, key)
    }

    /// Every entry of the spool that is not published: being written, queued, on its way, unfinished or parked.
    pub fn status(&self) -> Vec<EntryStatus> {
        self.shared.status()
    }

    /// Starts what is queued or deferred at once, and what is queued or removed meanwhile, and waits until nothing is left, or no
    /// byte moved for `deadline`.
    /// Files that are still open stay in the spool, as do temporary names.
    pub async fn drain(&self, deadline: Duration) -> DrainReport {
        publish::drain(&self.shared, deadline).await
    }

    /// Sends a delete that waits, or was refused, and waits for its end. `None` where no delete has the number.
    pub async fn delete_again(&self, id: u64) -> Option<Result<(), Error>> {
        deletes::send_again(&self.shared, id).await
    }

    /// Queues a parked or unfinished entry again, durably: once this returns a crash forgets it no more than any other that is
    /// queued. False where there is none of this number. Where that cannot be written down it stays parked.
    pub async fn retry(&self, id: u64) -> Result<bool, Error> {
        let Some(entry) = self.shared.entry(id) else { return Ok(false) };
        // At once: who looks before the uploader has come to it must not find it parked.
        entry.intent.lock().revive();
        if let Err(error) = entry.persist_durably().await {
            self.shared.send(Message::Park(id, error.clone()));
            return Err(error);
        }
        self.shared.send(Message::Retry { id, reply: None });
        Ok(true)
    }

    /// Publishes a parked or unfinished entry and waits for it, as long as bytes move; a failure parks it again. `None`
    /// where there is no such entry. One that a write failed of is [`Error::Poisoned`] (promise 6); a
    /// temporary name gives way to the one that it was to get, where that is known.
    pub async fn publish_again(&self, id: u64) -> Option<Result<Option<Published>, Error>> {
        if let Some(Err(error)) = recover::reach(&self.shared, id).await {
            return Some(Err(error));
        }
        let entry = self.shared.entry(id)?;
        {
            let mut intent = entry.intent.lock();
            if intent.poisoned {
                return Some(Err(Error::Poisoned));
            }
            // Nobody will rename it any more.
            if let Some(key) = intent.guess.take().filter(|_| intent.held) {
                let target = Target { key, ..intent.target.clone() };
                intent.go_to(target);
                intent.expect = Expect::NewFile;
            }
        }
        let (reply, answer) = oneshot::channel();
        self.shared.send(Message::Retry { id, reply: Some(reply) });
        Some(answer.await.unwrap_or(Err(Error::Discarded)))
    }

    /// The run of at most `len` of an entry's bytes at `offset`. `fetch`: what it has in common with the object that it changes
    /// comes from there; else that is missing. `None` where there is no such entry.
    pub async fn run(&self, id: u64, offset: u64, len: usize, fetch: bool) -> Option<Result<Run, Error>> {
        if let Some(entry) = self.shared.entry(id) {
            return Some(copy_out::run(&entry, offset, len, fetch).await);
        }
        let stranded = self.shared.stranded.lock().get(&id).map(|stranded| stranded.found.open(&self.shared.spool.disk, id))?;
        let run = spool::blocking(move || stranded?.ok_or(std::io::ErrorKind::NotFound)?.run(offset, len)).await;
        Some(run)
    }

    /// Files of this mount that were published beside somebody else's change, the newest last.
    pub fn conflicts(&self) -> Vec<ConflictCopy> {
        self.shared.conflicts.lock().iter().cloned().collect()
    }

    /// What to do with somebody else's change.
    pub fn on_conflict(&self) -> OnConflict {
        self.shared.config.on_conflict
    }

    /// The key of ours where somebody else's change keeps `key`: `name (conflict of HOST DATE).ext`.
    pub fn key_beside(key: &str) -> String {
        commit::key_beside(key)
    }

    /// Ours was kept beside `key`: status says so.
    pub fn kept_beside(&self, bucket: &str, key: &str, kept_as: &str) {
        self.shared.kept_beside(bucket, key, kept_as);
    }

    /// Somebody else than a staged file has put an object under the key: what was parked for it is wanted no more (promise 24).
    pub async fn supersede(&self, bucket: &str, key: &str) {
        publish::supersede(&self.shared, bucket, key, u64::MAX).await;
    }

    /// Throws a parked or unfinished entry away, or takes a delete back. False where there is none of this number.
    pub async fn discard(&self, id: u64) -> bool {
        match self.shared.entry(id) {
            Some(entry) => {
                publish::discard(&entry).await;
                true
            }
            None => self.shared.deletes.dismiss(id).await || publish::discard_stranded(&self.shared, id).await,
        }
    }

    /// Metadata that came after publication (mtime, mode): one coalesced copy in the background about 1 s after the
    /// last call, conditional on `etag`; a failure is only logged. `on_done` gets the copy's outcome. Newer calls for
    /// the same key replace older ones, whose `on_done` is dropped; a publication of the key cancels it. A crash before
    /// does not lose it once [`Writeback::metadata_recorded`] has returned: see [`Writeback::unsent_metadata`].
    pub fn update_metadata(
        &self,
        store: Arc<dyn Store>,
        change: MetadataChange,
        on_done: Box<dyn FnOnce(Result<PutOutcome, S3Error>) + Send>,
    ) {
        metacopy::schedule(&self.shared, store, change, on_done);
    }

    /// Waits until what [`Writeback::update_metadata`] queued for the key is in the spool (or sent, or wanted no more).
    pub async fn metadata_recorded(&self, bucket: &str, key: &str) {
        self.shared.copies.recorded(bucket, key).await;
    }

    /// True while a metadata copy of the key waits or runs.
    pub fn metadata_waits(&self, bucket: &str, key: &str) -> bool {
        self.shared.copies.has(bucket, key)
    }

    /// Takes back what [`Writeback::update_metadata`] queued for the key and did not begin to send.
    pub fn take_metadata(&self, bucket: &str, key: &str) -> Option<Attributes> {
        self.shared.copies.cancel(bucket, key)
    }

    /// Cancels what [`Writeback::update_metadata`] queued for the key, and waits for a copy that runs already; gives the
    /// attributes that had not been sent.
    pub async fn cancel_metadata(&self, bucket: &str, key: &str) -> Option<Attributes> {
        self.shared.copies.settle(bucket, key).await
    }

    /// Sends what [`Writeback::update_metadata`] queued below a prefix and waits for it.
    pub async fn finish_metadata_below(&self, bucket: &str, prefix: &str) {
        self.shared.copies.finish_below(bucket, prefix).await;
    }
}
