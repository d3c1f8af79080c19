//! The DELETE of a name that a temporary file is about to take (promise 11): Dolphin unlinks NAME and renames `NAME.part`
//! onto it. Held for a moment, the two are one overwrite, and at no time is there no object.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::error::Result;
use super::inode::{Object, Place};
use super::{Ino, Vfs};
use crate::s3::{ErrorKind, Store};
use crate::writeback::{Deletion, Journalled};

/// How long it is held.
const HOLD: Duration = Duration::from_secs(1);
/// Listings begun meanwhile still hold the name; the DELETE has ended by then, or has failed.
const HIDE: Duration = Duration::from_secs(2);

/// DELETEs that are held, by bucket and key.
#[derive(Default)]
pub struct HeldDeletes {
    held: Mutex<HashMap<(String, String), Journalled<Deletion>>>,
}

impl HeldDeletes {
    fn take(&self, place: &Place) -> Option<Journalled<Deletion>> {
        self.held.lock().remove(&(place.store.bucket().to_owned(), place.key.clone()))
    }
}

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

    /// Instead of the DELETE of an unlink.
    pub(super) async fn hold_delete(&self, place: &Place, object: &Object) -> Result<()> {
        let (bucket, key) = (place.store.bucket().to_owned(), place.key.clone());
        let deletion = Deletion { bucket: bucket.clone(), key: key.clone(), etag: object.etag.clone() };
        let journalled = self.writeback.journal(deletion).await?;
        self.held_deletes.held.lock().insert((bucket, key), journalled);
        let (Some(this), place) = (self.shared(), place.clone()) else { return Ok(()) };
        self.spawn(async move {
            this.pause(HOLD).await;
            if let Err(error) = this.settle_delete(&place).await {
                tracing::error!("{}: was unlinked and could not be deleted: {error:?}; it is tried again at the next mount", place.key);
            }
        });
        Ok(())
    }

    /// The name stays hidden while its DELETE is held.
    pub(super) fn hide(&self, parent: Ino, name: &OsStr) {
        if let Some(dir) = self.table.lock().dir_mut(parent) {
            dir.removed.insert(name.to_owned(), Instant::now() + HOLD + HIDE);
        }
    }

    /// Sends a DELETE that is held for this key: something else than the awaited rename wants it, or nobody came.
    pub(super) async fn settle_delete(&self, place: &Place) -> Result<()> {
        let Some(journalled) = self.held_deletes.take(place) else { return Ok(()) };
        let _guard = self.guards.key(place.store.bucket(), &place.key).await;
        delete_version(place.store.as_ref(), &journalled.what).await?;
        journalled.forget().await;
        Ok(())
    }

    /// What takes the name over replaces the version that was unlinked.
    pub(super) fn take_held_delete(&self, place: &Place) -> Option<Journalled<Deletion>> {
        self.held_deletes.take(place)
    }

    /// Deletions that an earlier run put off.
    pub(super) fn delete_what_was_put_off(self: &Arc<Self>) {
        for journalled in self.writeback.put_off() {
            let this = self.clone();
            self.spawn(async move {
                let deleted = match this.store_of(&journalled.what.bucket).await {
                    Ok(Some(store)) => delete_version(store.as_ref(), &journalled.what).await,
                    Ok(None) => return,
                    Err(error) => Err(error),
                };
                match deleted {
                    Ok(()) => journalled.forget().await,
                    Err(error) => tracing::warn!("{}: unlinked before, not deleted yet: {error:?}", journalled.what.key),
                }
            });
        }
    }
}

/// Deletes the version that was unlinked, and no other where the store can tell them apart.
async fn delete_version(store: &dyn Store, deletion: &Deletion) -> Result<()> {
    match store.delete(&deletion.key, Some(deletion.etag.clone())).await {
        Err(error) if matches!(error.kind, ErrorKind::PreconditionFailed | ErrorKind::Conflict | ErrorKind::NoSuchKey) => Ok(()),
        Err(error) if error.kind == ErrorKind::NotImplemented => Ok(store.delete(&deletion.key, None).await?),
        other => Ok(other?),
    }
}
