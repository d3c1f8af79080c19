//! A file between its inode and the write-back: when content is staged, published, and handed to the cache.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;

use super::attr::{self, Kind, Stored};
use super::error::{Error, Result};
use super::handle::FileHandle;
use super::inode::{Node, Object, Place};
use super::remember::Row;
use super::versions::Start;
use super::{Ino, MtimeSource, Vfs};
use crate::cache::{CacheError, ObjectVersion, Reader};
use crate::failpoint;
use crate::writeback::{self, Attributes, Base, BaseError, BaseReader, Expect, OnConflict, Published, Staged, Target};

/// A new file closed empty becomes an object after it, if it is empty still (promise 4).
const EMPTY_DELAY: Duration = Duration::from_secs(2);

/// Bytes of the object that a staged file changes, through the cache.
struct CachedBase(Reader);

#[async_trait]
impl BaseReader for CachedBase {
    async fn read(&self, offset: u64, len: usize, until: u64) -> std::result::Result<Bytes, BaseError> {
        self.0.read_on(offset, len, until).await.map_err(|error| match error {
            CacheError::Stale => BaseError::Stale,
            CacheError::S3(error) => BaseError::S3(error),
            other => BaseError::Io(other.to_string()),
        })
    }
}

impl Vfs {
    /// The version of an object, as the cache names it.
    pub(super) fn version(place: &Place, object: &Object) -> ObjectVersion {
        ObjectVersion {
            bucket: place.store.bucket().to_owned(),
            key: place.key.clone(),
            etag: object.etag.clone(),
            size: object.size,
            version_id: object.version_id.clone(),
        }
    }

    /// The content that a handle changes, begun now if there is none.
    pub(super) async fn staged(&self, handle: &FileHandle) -> Result<Arc<Staged>> {
        let ino = handle.ino;
        if let Some(staged) = self.staged_now(ino)? {
            return Ok(staged);
        }
        let order = self.order(ino)?;
        let _turn = order.lock().await;
        // Who only appends, and is alone with the file, relies on no version: it goes behind what is there now (promise 14).
        let appends = handle.append && !handle.readable && self.handles.count(ino) == 1;
        if appends && self.writeback.on_conflict() != OnConflict::Fail {
            match self.staged_in_turn(ino).await {
                Err(Error::Stale) => {}
                other => return other,
            }
        }
        self.staged_from(ino, Start::Opened(handle.opened)).await
    }

    /// Content on the newest version that the store has. Call with the file's order held.
    pub(super) async fn staged_in_turn(&self, ino: Ino) -> Result<Arc<Staged>> {
        self.staged_from(ino, Start::Newest).await
    }

    /// As [`Vfs::staged`], on the version that is named. Call with the file's order held.
    pub(super) async fn staged_from(&self, ino: Ino, start: Start) -> Result<Arc<Staged>> {
        if let Some(staged) = self.staged_now(ino)? {
            return Ok(staged);
        }
        let place = self.place(ino)?;
        let object = self.patiently(self.start_from(ino, &place, start)).await?;
        let base = self.base_of(&place, &object);
        self.stage(ino, &place, object, Some(base)).await
    }

    /// Stages content that replaces `object`.
    async fn stage(&self, ino: Ino, place: &Place, object: Object, base: Option<Base>) -> Result<Arc<Staged>> {
        let expect = Expect::Version(object.etag.clone());
        let staged = self.writeback.stage(target(place), expect, base, self.kept_attributes(object)).await?;
        if self.table.lock().get(ino).is_some_and(|node| node.removed) {
            staged.set_held(true, None);
        }
        self.keep_staged(ino, staged.clone());
        Ok(staged)
    }

    /// An object as what staged content starts from.
    pub(super) fn base_of(&self, place: &Place, object: &Object) -> Base {
        let version = Self::version(place, object);
        Base {
            bucket: version.bucket.clone(),
            key: version.key.clone(),
            etag: version.etag.clone(),
            size: version.size,
            version_id: version.version_id.clone(),
            checksum: object.checksum,
            reader: Arc::new(CachedBase(self.cache.reader(place.store.clone(), version).exact())),
        }
    }

    /// Stages new content for an existing file (O_TRUNC, or a truncation to nothing): nothing of the object is kept but
    /// its headers and metadata. Call it with the file's order held.
    pub(super) async fn stage_anew(&self, ino: Ino, start: Start) -> Result<Arc<Staged>> {
        if let Some(staged) = self.staged_now(ino)? {
            staged.truncate(0).await?;
            return Ok(staged);
        }
        let place = self.place(ino)?;
        let object = self.patiently(self.start_from(ino, &place, start)).await?;
        self.stage(ino, &place, object, None).await
    }

    /// What new content of an object keeps of it: all but the time.
    fn kept_attributes(&self, object: Object) -> Attributes {
        let mut attributes = object.attributes.unwrap_or_default();
        if self.config.mtime == MtimeSource::Store {
            attr::encode_mtime(&mut attributes.metadata, SystemTime::now());
        }
        attributes
    }

    pub(super) fn keep_staged(&self, ino: Ino, staged: Arc<Staged>) {
        let mut table = self.table.lock();
        if let Some(node) = table.get_mut(ino) {
            node.size = staged.size();
            node.file.epoch += 1;
            node.file.told = None;
            node.file.staged = Some(staged);
        }
    }

    /// The staged content, if the file has any.
    pub(super) fn staged_now(&self, ino: Ino) -> Result<Option<Arc<Staged>>> {
        Ok(self.table.lock().get(ino).ok_or(Error::Stale)?.file.staged.clone())
    }

    pub(super) fn order(&self, ino: Ino) -> Result<Arc<tokio::sync::Mutex<()>>> {
        Ok(self.table.lock().get(ino).ok_or(Error::Stale)?.file.order.clone())
    }

    /// Publishes what the file holds and the store does not. Waits as long as `close_timeout` lets it.
    pub(super) async fn publish(&self, ino: Ino) -> Result<()> {
        let order = self.order(ino)?;
        let _turn = order.lock().await;
        self.publish_in_turn(ino).await
    }

    /// As [`Vfs::publish`], with the file's order held.
    pub(super) async fn publish_in_turn(&self, ino: Ino) -> Result<()> {
        self.publish_or(ino, false).await
    }

    /// As [`Vfs::publish_in_turn`]; what takes longer than `close_timeout` goes on without the caller (promise 9: a rename that
    /// fails makes Dolphin lose the old version).
    pub(super) async fn publish_patiently(&self, ino: Ino) -> Result<()> {
        self.publish_or(ino, true).await
    }

    async fn publish_or(&self, ino: Ino, queues: bool) -> Result<()> {
        let Some(staged) = self.staged_now(ino)? else { return Ok(()) };
        if !staged.is_dirty() {
            return Ok(());
        }
        let target = staged.target();
        let _guard = self.guards.key(target.store.bucket(), &target.key).await;
        let published = match staged.publish().await {
            Err(writeback::Error::TimedOut) if queues => {
                tracing::warn!("{}: not published within close_timeout: it stays queued", target.key);
                self.writeback.retry(staged.id()).await.map(|_| None)
            }
            published => published,
        };
        match published {
            Ok(Some(published)) => {
                self.published(ino, published);
                Ok(())
            }
            Ok(None) => {
                if !staged.is_held() {
                    self.follow_up(ino, &staged);
                }
                Ok(())
            }
            Err(error) => {
                tracing::error!("{}: not published: {error}", target.key);
                let error = error.into();
                self.detach(ino, &staged, error);
                Err(error)
            }
        }
    }

    /// A publication failed for good: its entry is parked in the spool, and the name shows what S3 holds (promise 24). Who has
    /// the file open is told at the next write, fsync or close.
    pub(super) fn detach(&self, ino: Ino, staged: &Arc<Staged>, error: Error) {
        staged.leave();
        let gone = {
            let mut table = self.table.lock();
            let Some(node) = table.get_mut(ino) else { return };
            if !node.file.staged.as_ref().is_some_and(|now| Arc::ptr_eq(now, staged)) {
                return;
            }
            node.file.staged = None;
            node.file.parked = Some(error);
            node.file.epoch += 1;
            node.checked = None;
            node.since = None;
            node.file.kernel_pages = None;
            if let Some(dir) = node.dir.as_deref_mut() {
                dir.marker = None;
            }
            let (parent, name, linked) = (node.parent, node.name.clone(), node.linked);
            // What is in a directory, and is here alone, is not lost with its marker.
            if linked && !table.get(ino).is_some_and(|node| table.holds_local(node)) {
                table.unlink(parent, &name);
            }
            if let Some(dir) = table.dir_mut(parent) {
                dir.listing = None;
            }
            (parent, name)
        };
        self.tell(|notify| notify.invalidate_entry(gone.0, &gone.1));
    }

    /// Takes note of a publication that nobody waited for (`write_back`).
    pub(super) fn catch_up(&self, ino: Ino) {
        let Ok(Some(published)) = self.staged_now(ino).map(|staged| staged.and_then(|staged| staged.published())) else { return };
        if self.table.lock().get(ino).is_some_and(|node| node.file.told.as_ref() != Some(&published.etag)) {
            self.published(ino, published);
        }
    }

    /// An object was published for the file: the node is of that version from now on.
    pub(super) fn published(&self, ino: Ino, published: Published) {
        if let Some(node) = self.table.lock().get_mut(ino) {
            node.file.told = Some(published.etag.clone());
        }
        let place = match self.place(ino) {
            Ok(place) if place.key == published.key && place.store.bucket() == published.bucket => place,
            // A conflict copy, or the file was renamed meanwhile: listings tell what its name means now.
            _ => return self.published_elsewhere(ino),
        };
        if place.key.ends_with('/') && self.table.lock().dir(ino).is_some() {
            return self.marker_published(ino, &place, &published);
        }
        let (row, reclaimed) = {
            let mut table = self.table.lock();
            let reclaimed = table.reclaim(ino);
            let Some(node) = table.get_mut(ino) else { return };
            node.object = Some(Object::from(&published));
            node.size = published.size;
            node.checked = Some(Instant::now());
            node.since = Some(Instant::now());
            node.file.unopened = true;
            node.file.kernel_pages = Some(published.etag.clone()).filter(|_| !published.rebased);
            let row = row_of(node, published.last_modified);
            table.confirm_above(ino);
            (row, reclaimed)
        };
        if let Some((parent, name)) = reclaimed {
            self.tell(|notify| notify.invalidate_entry(parent, &name));
        }
        if published.rebased {
            self.tell(|notify| notify.invalidate_inode(ino));
        }
        if let Some(row) = row {
            self.memory.put(&published.bucket, &published.key, row);
        }
        self.note_made(&place, &Object::from(&published));
        self.settle_attributes(ino, &place, &published.attributes);
    }

    fn published_elsewhere(&self, ino: Ino) {
        let mut table = self.table.lock();
        let Some(node) = table.get_mut(ino) else { return };
        node.checked = None;
        node.since = None;
        node.object = None;
        let parent = node.parent;
        if let Some(dir) = table.dir_mut(parent) {
            dir.listing = None;
        }
    }

    /// Records a file that was closed empty, and publishes it a moment later if it is empty still.
    pub(super) async fn publish_empty_later(&self, ino: Ino, staged: &Arc<Staged>) -> Result<()> {
        staged.publish_later(EMPTY_DELAY).await?;
        let (Some(this), staged) = (self.shared(), staged.clone()) else { return Ok(()) };
        self.spawn(async move {
            this.pause(EMPTY_DELAY).await;
            let Ok(order) = this.order(ino) else { return };
            let turn = order.lock().await;
            let same = this.staged_now(ino).ok().flatten().is_some_and(|now| Arc::ptr_eq(&now, &staged));
            if !same || staged.size() > 0 {
                return;
            }
            // One that was closed with content since, and is empty because somebody writes it anew, is not queued.
            if staged.is_queued() {
                // A failure is parked and in status: nobody waits for an answer here.
                let _ = this.publish_in_turn(ino).await;
            }
            drop(turn);
            this.retire(ino).await;
        });
        Ok(())
    }

    /// Nobody writes the file any more and all of it is published: the spool file becomes the cache's.
    pub(super) async fn retire(&self, ino: Ino) {
        let Ok(order) = self.order(ino) else { return };
        let _turn = order.lock().await;
        self.catch_up(ino);
        let (staged, version) = {
            let mut table = self.table.lock();
            let Some(node) = table.get_mut(ino) else { return };
            let done = |staged: &Staged| node.file.writers == 0 && !node.file.temporary && !staged.is_dirty();
            if !node.file.staged.as_ref().is_some_and(|staged| done(staged)) {
                return;
            }
            // Whoever writes from here on begins anew, after this; whoever reads waits for it.
            let Some(staged) = node.file.staged.take() else { return };
            node.file.retiring = true;
            (staged, node.object.clone().filter(|_| !node.removed))
        };
        let version = version.and_then(|object| self.place(ino).ok().map(|place| Self::version(&place, &object)));
        match version {
            Some(version) => {
                let path = staged.retire().await;
                failpoint::pass("retired");
                if let Some(path) = path
                    && let Err(error) = self.cache.adopt(version, &path).await
                {
                    tracing::debug!("cache: {error}");
                }
            }
            // Of no use to the cache: its object has another key, or none.
            None => staged.discard().await,
        }
        let mut table = self.table.lock();
        if let Some(node) = table.get_mut(ino) {
            node.file.retiring = false;
            node.file.epoch += 1;
        }
        table.release(ino);
    }

    /// Attributes for a new object: what of owner and mode is worth keeping, and the mtime known now.
    pub(super) fn fresh_attributes(&self, kind: Kind, wanted: Stored, mtime: SystemTime) -> (Stored, Attributes) {
        let stored = attr::worth_keeping(&self.config, kind, wanted);
        let mut attributes = Attributes { storage_class: self.config.storage_class.clone(), ..Attributes::default() };
        self.encode(&mut attributes, kind, stored, mtime);
        (stored, attributes)
    }

    /// Writes owner, mode and mtime into what travels with the content.
    pub(super) fn encode(&self, attributes: &mut Attributes, kind: Kind, stored: Stored, mtime: SystemTime) {
        if self.config.ownership != Some(false) || kind == Kind::Symlink {
            attr::encode_stored(&mut attributes.metadata, kind, stored);
        }
        if self.config.mtime == MtimeSource::Store {
            attr::encode_mtime(&mut attributes.metadata, mtime);
        }
    }
}

/// Where staged content goes.
pub(super) fn target(place: &Place) -> Target {
    Target { store: place.store.clone(), key: place.key.clone() }
}

/// What is remembered of a node that has an object, written at `written` by the store's clock.
pub(super) fn row_of(node: &Node, written: SystemTime) -> Option<Row> {
    Some(Row {
        etag: node.object.as_ref()?.etag.clone(),
        stored: node.stored,
        mtime: Some(node.mtime),
        atime: Some(node.atime),
        ctime: Some(node.ctime),
        target: (node.kind == Kind::Symlink).then(|| node.target.as_ref().map(|target| target.to_vec()).unwrap_or_default()),
        written,
    })
}
