//! DELETEs that wait: all of them with `write_back`, else that of a name which a temporary file is about to take (promise
//! 11): Dolphin unlinks NAME and renames `NAME.part` onto it. Held for a moment, the two are one overwrite, and at no time
//! is there no object.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use super::error::{Error, Result};
use super::inode::{Object, Place};
use super::path::name_of;
use super::queued::split;
use super::{Ino, Vfs};
use crate::s3::{ETag, ListPage, ListRequest, S3Error, Store};
use crate::writeback::{Deletion, Expect, Journalled, Writeback};

/// How long the DELETE of a name that is about to be taken is held.
const HOLD: Duration = Duration::from_secs(1);

impl Vfs {
    /// A temporary file beside it leads to this key.
    pub(super) fn is_about_to_be_replaced(&self, parent: Ino, key: &str) -> bool {
        let table = self.table.lock();
        let Some(dir) = table.dir(parent) else { return false };
        let nodes = dir.children.values().filter_map(|child| table.get(*child));
        nodes
            .filter_map(|node| node.file.staged.as_ref().filter(|_| node.file.temporary))
            .any(|staged| staged.guess().as_deref() == Some(key))
    }

    /// Deletes an object: this version of it where it is queued (`write_back`, or held for a moment), whatever is there else.
    pub(super) async fn delete(&self, place: &Place, etag: Option<ETag>, held: bool) -> Result<()> {
        self.writeback.release_copies(place.store.bucket(), &place.key).await;
        let queued = if self.writeback.queues(place.store.as_ref(), &place.key).await { self.config.write_back } else { Duration::ZERO };
        let delay = if held { queued.max(HOLD) } else { queued };
        if delay.is_zero() {
            return Ok(place.store.delete(&place.key, None).await?);
        }
        let deletion = Deletion { bucket: place.store.bucket().to_owned(), key: place.key.clone(), etag };
        Ok(self.writeback.delete_later(place.store.clone(), deletion, delay).await?)
    }

    /// Sends a DELETE that waits for this key: something else than a replacement wants it.
    pub(super) async fn settle_delete(&self, place: &Place) -> Result<()> {
        Ok(self.writeback.settle_delete(place.store.bucket(), &place.key).await?)
    }

    /// Where directories are real ones, a name that was removed as one kind is free for the other only when the store has let go of it.
    pub(super) async fn settle_other_kind(&self, place: &Place) -> Result<()> {
        if !place.store.capabilities().real_directories {
            return Ok(());
        }
        let other = |key: String| Place { store: place.store.clone(), key };
        match place.key.strip_suffix('/') {
            Some(file) => self.settle_delete(&other(file.to_owned())).await,
            None => self.settle_deletes_below(&other(format!("{}/", place.key))).await,
        }
    }

    /// Sends the DELETEs that wait below a directory: what lists or copies all of it must not find them.
    pub(super) async fn settle_deletes_below(&self, place: &Place) -> Result<()> {
        match self.within(async { Ok(self.writeback.settle_deletes_below(place.store.bucket(), &place.key).await?) }).await {
            // What the store refused to delete is there again, and is told of in status.
            Err(Error::TimedOut) => Err(Error::TimedOut),
            _ => Ok(()),
        }
    }

    /// Takes a DELETE that waits for this key: what comes replaces the version that was unlinked.
    pub(super) async fn take_delete(&self, place: &Place) -> Result<Option<Taken>> {
        let taken = self.within(async { Ok(self.writeback.take_delete(place.store.bucket(), &place.key).await) }).await?;
        Ok(taken.map(|deletion| Taken { deletion: Some(deletion), store: place.store.clone(), writeback: self.writeback.clone() }))
    }

    /// Ends what [`Vfs::take_delete`] took: it was replaced, or goes on.
    pub(super) async fn replaced<T>(&self, taken: Option<Taken>, result: Result<T>) -> Result<T> {
        if let Some(deletion) = taken.filter(|_| result.is_ok()).and_then(Taken::confirm) {
            deletion.forget().await;
        }
        result
    }

    /// A page of a listing, less what was removed here.
    pub(super) async fn list(&self, store: &dyn Store, request: ListRequest) -> Result<ListPage> {
        Ok(self.list_raw(store, request).await?)
    }

    /// As [`Vfs::list`], with the store's own words where it fails.
    pub(super) async fn list_raw(&self, store: &dyn Store, request: ListRequest) -> std::result::Result<ListPage, S3Error> {
        let since = Instant::now();
        let mut page = store.list(request).await?;
        self.writeback.hide_deleted(store.bucket(), since, &mut page);
        Ok(page)
    }

    /// True where something lies below a prefix.
    pub(super) async fn holds_names(&self, store: &dyn Store, prefix: String) -> Result<bool> {
        if self.writeback.is_deleted(store.bucket(), &prefix, Instant::now()) {
            return Ok(false);
        }
        let waits = self.writeback.deletes_below(store.bucket(), &prefix);
        let mut request = ListRequest { prefix, max_keys: (!waits).then_some(1), ..ListRequest::default() };
        loop {
            let page = self.list(store, request.clone()).await?;
            if !page.entries.is_empty() || !page.prefixes.is_empty() || page.next.is_none() {
                return Ok(!page.entries.is_empty() || !page.prefixes.is_empty());
            }
            request.continuation = page.next;
        }
    }

    /// From now on the write-back tells which names show again.
    pub(super) fn watch_deletes(self: &Arc<Self>) {
        let this = Arc::downgrade(self);
        self.writeback.on_kept(move |names| {
            if let Some(this) = this.upgrade() {
                this.show_again(names);
            }
        });
    }

    /// Keys that were to be deleted stay: their directories are listed anew.
    fn show_again(&self, names: &[(String, String)]) {
        let names: HashSet<(&str, &str)> =
            names.iter().map(|(bucket, key)| (bucket.as_str(), key.strip_suffix('/').unwrap_or(key))).collect();
        let directories: HashSet<(&str, &str)> = names.iter().map(|(bucket, key)| (*bucket, split(key).0)).collect();
        let known = self.table.lock().directories();
        let mut shown = Vec::new();
        for ino in known.into_iter().filter(|ino| !self.is_account(*ino)) {
            let Ok(place) = self.place(ino) else { continue };
            let bucket = place.store.bucket();
            if !directories.contains(&(bucket, place.key.as_str())) {
                continue;
            }
            let mut table = self.table.lock();
            let Some(dir) = table.dir_mut(ino) else { continue };
            dir.listing = None;
            for (_, key) in names.iter().filter(|(of, key)| *of == bucket && split(key).0 == place.key) {
                let name = name_of(split(key).1);
                dir.removed.remove(&name);
                dir.absent.remove(&name);
                shown.push((ino, name));
            }
        }
        for (ino, name) in shown {
            self.tell(|notify| notify.invalidate_entry(ino, &name));
        }
    }
}

/// A DELETE that [`Vfs::take_delete`] took out of the queue. Dropped without a word, by an error as by a deadline, it goes on.
pub(super) struct Taken {
    deletion: Option<Journalled<Deletion>>,
    store: Arc<dyn Store>,
    writeback: Writeback,
}

impl Taken {
    /// The version that was unlinked; `None`: whatever was there.
    pub(super) fn etag(&self) -> Option<&ETag> {
        self.deletion.as_ref().and_then(|deletion| deletion.what.etag.as_ref())
    }

    /// What a publication expects to find that comes instead.
    pub(super) fn replaced_by(&self) -> Expect {
        self.deletion.as_ref().map_or(Expect::NewFile, |deletion| deletion.what.replaced_by())
    }

    /// Something came in its place: its record is the caller's to forget.
    pub(super) fn confirm(mut self) -> Option<Journalled<Deletion>> {
        self.deletion.take()
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        if let Some(deletion) = self.deletion.take() {
            self.writeback.put_delete_back(self.store.clone(), deletion);
        }
    }
}

/// Stands for the object under a name whose DELETE was taken: what is staged over it replaces that.
pub(super) fn unlinked_object(etag: &ETag) -> Object {
    Object {
        etag: etag.clone(),
        size: 0,
        version_id: None,
        last_modified: SystemTime::now(),
        archived: false,
        checksum: None,
        attributes: None,
        decoded: true,
    }
}
