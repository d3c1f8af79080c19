//! Attributes after the data: kept with the object by one coalesced copy in the background (promise 13).

use std::sync::Arc;
use std::time::SystemTime;

use super::attr::{self, Kind};
use super::error::{Error, Result};
use super::file::row_of;
use super::inode::{Node, Object, Place};
use super::remember::{Row, SLACK};
use super::{Ino, MtimeSource, Vfs};
use crate::s3::{ETag, PutOutcome, S3Error};
use crate::writeback::{Attributes, MetadataChange};

impl Vfs {
    /// Owner, mode or mtime of the inode changed: they travel with the content while it is unsent, else follow in the background.
    pub(super) async fn keep_attributes(&self, ino: Ino) {
        let Ok(place) = self.place(ino) else { return };
        self.catch_up(ino);
        let (kind, stored, mtime, staged, object) = {
            let table = self.table.lock();
            let Some(node) = table.get(ino).filter(|node| node.linked || node.is_local()) else { return };
            (node.kind, node.stored, node.mtime, node.file.staged.clone(), node.object.clone())
        };
        if kind == Kind::Directory {
            if ino != super::ROOT && !self.is_account(self.parent_of(ino)) {
                self.keep_directory_attributes(ino, &place).await;
            }
            return;
        }
        if let Some(staged) = staged {
            staged.set_attributes(|attributes| self.encode(attributes, kind, stored, mtime)).await;
            if staged.is_dirty() {
                return;
            }
        }
        let Some(object) = object else { return };
        {
            let table = self.table.lock();
            if let Some(row) = table.get(ino).and_then(|node| row_of(node, object.last_modified)) {
                self.memory.put(place.store.bucket(), &place.key, row);
            }
        }
        // Not into a tree that is being renamed: what is queued there after the copy would be of the old name.
        let guard = self.guards.try_key(place.store.bucket(), &place.key).filter(|_| self.place(ino).is_ok_and(|now| now.is(&place)));
        if let (Some(attributes), Some(_)) = (object.attributes, &guard) {
            self.send_attributes(ino, &place, &attributes);
            drop(guard);
            return self.writeback.metadata_recorded(place.store.bucket(), &place.key).await;
        }
        drop(guard);
        let Some(this) = self.shared() else { return };
        self.spawn(async move {
            // A rename takes as long as it takes; whoever wants the file meanwhile does not wait for this.
            let Ok((place, _guard)) = this.hold(|| this.place(ino)).await else { return };
            let sent = this.within(async {
                let order = this.order(ino)?;
                let _turn = order.lock().await;
                let wanted = this.table.lock().get(ino).map(|node| (node.stored, node.mtime)).ok_or(Error::Stale)?;
                let object = this.current_object(ino, &place).await?;
                // What the HEAD said of owner and mtime is older than what was set here.
                if let Some(node) = this.table.lock().get_mut(ino) {
                    (node.stored, node.mtime) = wanted;
                }
                this.send_attributes(ino, &place, &object.attributes.unwrap_or_default());
                Ok(())
            });
            if let Err(error) = sent.await {
                tracing::warn!("{}: attributes were not kept with the object: {error:?}", place.key);
            }
        });
    }

    fn parent_of(&self, ino: Ino) -> Ino {
        self.table.lock().get(ino).map_or(super::ROOT, |node| node.parent)
    }

    /// After a publication: what was set while it was on its way follows.
    pub(super) fn settle_attributes(&self, ino: Ino, place: &Place, travelled: &Attributes) {
        self.send_attributes(ino, place, travelled);
    }

    /// Queues a metadata copy if the object's attributes are not the inode's.
    fn send_attributes(&self, ino: Ino, place: &Place, current: &Attributes) {
        let (wanted, object) = {
            let table = self.table.lock();
            let Some(node) = table.get(ino).filter(|node| node.linked) else { return };
            let Some(object) = &node.object else { return };
            (self.wanted(node, current), object.clone())
        };
        if wanted.metadata == current.metadata && wanted.headers == current.headers {
            return;
        }
        self.queue_change(ino, place, change_of(place, &object, wanted));
    }

    /// The copy follows in the background, and the inode follows it.
    fn queue_change(&self, ino: Ino, place: &Place, change: MetadataChange) {
        let this = self.this.clone();
        let MetadataChange { bucket, key, etag: old, attributes: sent, .. } = change.clone();
        let done = move |result: std::result::Result<PutOutcome, S3Error>| match (this.upgrade(), result) {
            (Some(this), Ok(outcome)) => this.attributes_sent(ino, &bucket, &key, &old, outcome, sent),
            (_, Err(error)) => tracing::warn!("{key}: attributes were not kept with the object: {error}"),
            (None, Ok(_)) => {}
        };
        self.writeback.update_metadata(place.store.clone(), change, Box::new(done));
    }

    /// What the object should carry: an mtime that only write() made is not worth a copy.
    fn wanted(&self, node: &Node, current: &Attributes) -> Attributes {
        let mut wanted = current.clone();
        if self.config.ownership != Some(false) {
            attr::encode_stored(&mut wanted.metadata, node.kind, node.stored);
        }
        if node.mtime_set && self.config.mtime == MtimeSource::Store {
            attr::encode_mtime(&mut wanted.metadata, node.mtime);
        }
        wanted
    }

    /// The copy is in: the same version of the file under a new ETag.
    fn attributes_sent(&self, ino: Ino, bucket: &str, key: &str, old: &ETag, outcome: PutOutcome, sent: Attributes) {
        let Ok(place) = self.place(ino) else { return };
        if place.key != key || place.store.bucket() != bucket {
            return;
        }
        let versions = {
            let mut table = self.table.lock();
            let Some(node) = table.get_mut(ino) else { return };
            if node.file.told.as_ref() == Some(old) {
                node.file.told = Some(outcome.etag.clone());
            }
            let Some(object) = node.object.as_mut().filter(|object| object.etag == *old) else { return };
            let from = Self::version(&place, object);
            object.etag = outcome.etag.clone();
            object.version_id = outcome.version_id;
            object.last_modified = outcome.last_modified.unwrap_or_else(SystemTime::now);
            object.attributes = Some(sent);
            let to = Self::version(&place, object);
            let written = object.last_modified;
            if node.file.kernel_pages.as_ref() == Some(old) {
                node.file.kernel_pages = Some(outcome.etag);
            }
            node.file.epoch += 1;
            node.since = Some(std::time::Instant::now());
            (from, to, object.clone(), row_of(node, written))
        };
        let (from, to, object, row) = versions;
        if let Some(row) = row {
            self.memory.put(bucket, key, row);
        }
        let Some(this) = self.shared() else { return };
        self.spawn(async move {
            this.cache.rekey(&from, &to).await;
            // Before it followed it would be missing.
            this.note_made(&place, &object);
        });
    }

    /// Replaces an inode's headers or user metadata at the user's word (extended attributes).
    pub(super) async fn change_attributes(&self, ino: Ino, change: impl FnOnce(&mut Attributes) + Send) -> Result<()> {
        let order = self.order(ino)?;
        let _turn = order.lock().await;
        if let Some(staged) = self.staged_now(ino)?.filter(|staged| staged.is_dirty()) {
            staged.set_attributes(change).await;
            return Ok(());
        }
        let place = self.place(ino)?;
        let object = self.current_object(ino, &place).await?;
        // Owner, mode and times that wait for their copy go with this one.
        let pending = self.writeback.take_metadata(place.store.bucket(), &place.key);
        let (object, mut wanted) = {
            let table = self.table.lock();
            let node = table.get(ino).ok_or(Error::Stale)?;
            let object = node.object.clone().unwrap_or(object);
            let current = pending.unwrap_or_else(|| object.attributes.clone().unwrap_or_default());
            (object, self.wanted(node, &current))
        };
        change(&mut wanted);
        if let Some(known) = self.table.lock().get_mut(ino).and_then(|node| node.object.as_mut()) {
            known.attributes = Some(wanted.clone());
        }
        self.queue_change(ino, &place, change_of(&place, &object, wanted));
        self.writeback.metadata_recorded(place.store.bucket(), &place.key).await;
        Ok(())
    }

    /// Metadata that an earlier run was told and did not come to send: sent where the object is what it was.
    pub(super) async fn send_what_was_put_off(self: &Arc<Self>) {
        for journalled in self.writeback.unsent_metadata().await {
            let change = journalled.what.clone();
            let this = self.clone();
            self.spawn(async move {
                match this.send_again(&change).await {
                    Ok(()) => journalled.forget().await,
                    Err(error) => tracing::warn!("{}: attributes of an earlier run are not in S3 yet: {error:?}", change.key),
                }
            });
        }
    }

    async fn send_again(self: &Arc<Self>, change: &MetadataChange) -> Result<()> {
        let Some(store) = self.store_of(&change.bucket).await? else { return Ok(()) };
        match self.within(async { Ok(store.head(&change.key).await?) }).await {
            Ok(head) if head.etag == change.etag && head.last_modified <= change.last_modified + SLACK => {}
            // Somebody has written it since.
            Ok(_) | Err(Error::NoEntry) => return Ok(()),
            Err(error) => return Err(error),
        }
        if self.writeback.metadata_waits(&change.bucket, &change.key) {
            // Changed again since the mount, which is newer.
            return Ok(());
        }
        self.remember_sent(change, &change.etag, change.last_modified);
        let (this, sent) = (Arc::downgrade(self), change.clone());
        let done = move |result: std::result::Result<PutOutcome, S3Error>| match (this.upgrade(), result) {
            (Some(this), Ok(outcome)) => {
                this.remember_sent(&sent, &outcome.etag, outcome.last_modified.unwrap_or_else(SystemTime::now));
            }
            (_, Err(error)) => tracing::warn!("{}: attributes were not kept with the object: {error}", sent.key),
            (None, Ok(_)) => {}
        };
        self.writeback.update_metadata(store, change.clone(), Box::new(done));
        self.writeback.metadata_recorded(&change.bucket, &change.key).await;
        Ok(())
    }

    fn remember_sent(&self, change: &MetadataChange, etag: &ETag, written: SystemTime) {
        let decoded = attr::decode(&change.attributes.metadata);
        // Where a link points is in its body.
        if !decoded.symlink {
            self.memory.put(&change.bucket, &change.key, Row::of(etag.clone(), &decoded, written));
        }
    }
}

/// What the object is to carry, for the version that it is.
fn change_of(place: &Place, object: &Object, attributes: Attributes) -> MetadataChange {
    MetadataChange {
        bucket: place.store.bucket().to_owned(),
        key: place.key.clone(),
        etag: object.etag.clone(),
        size: object.size,
        last_modified: object.last_modified,
        attributes,
    }
}
