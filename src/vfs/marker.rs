//! A directory's marker: the object of no content that keeps an empty directory, and its owner, mode and times (promise 20).

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use super::attr::{self, Kind, Stored};
use super::error::{Error, Result};
use super::file::target;
use super::inode::{Node, Place};
use super::remember::Row;
use super::{Ino, Vfs};
use crate::s3::{self, ETag, ErrorKind, PutOptions};
use crate::writeback::{Attributes, Expect, Published, Staged};

/// How long an implied directory that lost its last name may stay without a marker (promise 20), and how long
/// changes of a marker's attributes are gathered.
const MARKER_DELAY: Duration = Duration::from_secs(2);
/// What every S3 browser knows a directory by.
const MARKER_TYPE: &str = "application/x-directory";

impl Vfs {
    /// After a name left `dir`: a directory that nothing else holds gets its marker a moment later, unless it went too.
    pub(super) fn keep_directory(&self, dir: Ino) {
        {
            let mut table = self.table.lock();
            if dir == super::ROOT || table.get(dir).is_none_or(|node| !node.linked) {
                return;
            }
            let queued = table.get(dir).is_some_and(|node| node.file.staged.is_some());
            let Some(state) = table.dir_mut(dir) else { return };
            if state.marker == Some(true) || queued || state.keeping || state.store.is_some() {
                return;
            }
            let removed = &state.removed;
            let others =
                state.listing.as_ref().is_some_and(|listing| listing.entries.iter().any(|entry| !removed.contains_key(&entry.name())));
            let children: Vec<Ino> = state.children.values().copied().collect();
            // What is here alone holds nothing there.
            let holds = |node: &Node| node.object.is_some() || node.kind == Kind::Directory;
            if others || children.into_iter().any(|child| table.get(child).is_some_and(holds)) {
                return;
            }
            if let Some(state) = table.dir_mut(dir) {
                state.keeping = true;
            }
        }
        self.marker_later(dir);
    }

    /// Writes the marker's attributes a moment later, together with what changes until then.
    pub(super) fn touch_marker(&self, dir: Ino) {
        {
            let mut table = self.table.lock();
            let Some(state) = table.dir_mut(dir) else { return };
            if std::mem::replace(&mut state.marker_dirty, true) || state.keeping {
                return;
            }
        }
        self.marker_later(dir);
    }

    fn marker_later(&self, dir: Ino) {
        let Some(this) = self.shared() else { return };
        self.spawn(async move {
            this.pause(MARKER_DELAY).await;
            let wanted = {
                let mut table = this.table.lock();
                let linked = table.get(dir).is_some_and(|node| node.linked);
                let Some(state) = table.dir_mut(dir) else { return };
                let wanted = linked && (std::mem::take(&mut state.keeping) || state.marker_dirty);
                state.keeping = false;
                state.marker_dirty = false;
                wanted
            };
            if wanted && let Err(error) = this.within(this.write_marker(dir)).await {
                tracing::warn!("directory marker: {error:?}");
            }
            this.table.lock().release(dir);
        });
    }

    /// PUTs the marker of a directory with the attributes that it has now, unless it was written with those: rsync sets a directory's
    /// times before its files and again after them.
    pub(super) async fn write_marker(&self, dir: Ino) -> Result<()> {
        let (place, _guard) = self.hold(|| self.place(dir)).await?;
        let (stored, mtime) = {
            let table = self.table.lock();
            let node = table.get(dir).filter(|node| node.linked).ok_or(Error::NoEntry)?;
            let state = node.dir.as_deref().ok_or(Error::NotDirectory)?;
            let mtime = state.set_mtime.unwrap_or(node.mtime);
            let written = state.written.as_ref().filter(|_| state.marker == Some(true));
            if written.is_some_and(|(key, stored, time)| (key, stored, time) == (&place.key, &node.stored, &mtime)) {
                return Ok(());
            }
            (node.stored, mtime)
        };
        self.put_marker(&place, stored, mtime).await?;
        if let Some(state) = self.table.lock().dir_mut(dir) {
            state.mark();
            state.written = Some((place.key, stored, mtime));
        }
        Ok(())
    }

    /// Makes the marker of a new directory: at once, or, where publications are queued, as one of them, which is given.
    pub(super) async fn make_marker(&self, place: &Place, stored: Stored, mtime: SystemTime) -> Result<Option<Arc<Staged>>> {
        if !self.writeback.queues(place.store.as_ref(), &place.key).await {
            self.put_marker(place, stored, mtime).await?;
            self.writeback.supersede(place.store.bucket(), &place.key).await;
            return Ok(None);
        }
        let attributes = self.marker_attributes(stored, mtime);
        let staged = self.writeback.stage(target(place), Expect::Anything, None, attributes).await?;
        if let Err(error) = staged.publish().await {
            staged.discard().await;
            return Err(error.into());
        }
        self.remember_directory(place, stored, mtime);
        Ok(Some(staged))
    }

    /// A marker that was queued is in S3.
    pub(super) fn marker_published(&self, dir: Ino, place: &Place, published: &Published) {
        let sent = attr::decode(&published.attributes.metadata);
        let changed = {
            let mut table = self.table.lock();
            let Some(node) = table.get_mut(dir) else { return };
            (node.checked, node.since) = (Some(Instant::now()), Some(Instant::now()));
            let stored = node.stored;
            let Some(state) = node.dir.as_deref_mut() else { return };
            state.mark();
            let changed = sent.stored != stored || state.set_mtime.is_some_and(|mtime| sent.mtime != Some(mtime));
            state.written = sent.mtime.map(|mtime| (place.key.clone(), sent.stored, mtime));
            table.confirm_above(dir);
            changed
        };
        if changed {
            self.touch_marker(dir);
        }
    }

    /// Owner, mode or time of a directory were set: they travel with a marker that is queued, else follow a moment later.
    pub(super) async fn keep_directory_attributes(&self, dir: Ino, place: &Place) {
        let (staged, stored, mtime) = {
            let table = self.table.lock();
            let Some(node) = table.get(dir) else { return };
            let set = node.dir.as_deref().and_then(|state| state.set_mtime);
            (node.file.staged.clone(), node.stored, set.unwrap_or(node.mtime))
        };
        self.remember_directory(place, stored, mtime);
        match staged.filter(|staged| staged.is_dirty()) {
            // Where it is on its way already, its arrival shows that more is to follow.
            Some(staged) => staged.set_attributes(|attributes| *attributes = self.marker_attributes(stored, mtime)).await,
            None => self.touch_marker(dir),
        }
        // Until then only this knows.
        self.memory.written().await;
    }

    /// PUTs a marker object and remembers what a store that drops a marker's metadata (SeaweedFS) would forget.
    pub(super) async fn put_marker(&self, place: &Place, stored: Stored, mtime: SystemTime) -> s3::Result<()> {
        let Attributes { headers, metadata, .. } = self.marker_attributes(stored, mtime);
        let options = PutOptions { headers, metadata, ..PutOptions::default() };
        place.store.put(&place.key, Arc::new(bytes::Bytes::new()), options).await?;
        self.remember_directory(place, stored, mtime);
        Ok(())
    }

    /// What a marker carries. Of no storage class: it is to be there at once.
    fn marker_attributes(&self, stored: Stored, mtime: SystemTime) -> Attributes {
        let mut attributes = Attributes::default();
        attributes.headers.content_type = Some(MARKER_TYPE.to_owned());
        self.encode(&mut attributes, Kind::Directory, stored, mtime);
        attributes
    }

    /// As [`Vfs::remember_directory`], of a marker that is queued, or was.
    pub(super) fn remember_marker(&self, place: &Place, attributes: &Attributes) {
        let decoded = attr::decode(&attributes.metadata);
        self.remember_directory(place, decoded.stored, decoded.mtime.unwrap_or_else(SystemTime::now));
    }

    /// Directories are remembered by key alone: a listing never shows the ETag of a marker.
    pub(super) fn remember_directory(&self, place: &Place, stored: attr::Stored, mtime: SystemTime) {
        let row =
            Row { etag: directory_tag(), stored, mtime: Some(mtime), atime: None, ctime: None, target: None, written: SystemTime::now() };
        self.memory.put(place.store.bucket(), &place.key, row);
    }

    /// What is remembered of a directory.
    pub(super) async fn recall_directory(&self, place: &Place) -> Option<Row> {
        self.memory.get(place.store.bucket(), &place.key, &directory_tag(), SystemTime::UNIX_EPOCH).await
    }

    /// DELETEs a marker. A store that shows directories of its own may answer that it is not empty: then it has names.
    pub(super) async fn delete_marker(&self, place: &Place) -> Result<()> {
        match place.store.delete(&place.key, None).await {
            Err(error) if error.kind == ErrorKind::NotEmpty => {
                // Of names that it holds, some are directories without a key.
                self.table.lock().surveys.found_unfit(place);
                Err(Error::NotEmpty)
            }
            other => Ok(other?),
        }
    }
}

/// An earlier run left it: the marker of a directory, not an object whose name is empty.
pub(super) fn is_marker(staged: &Staged) -> bool {
    let is_directory = || staged.attributes().headers.content_type.as_deref() == Some(MARKER_TYPE);
    staged.size() == 0 && staged.target().key.ends_with('/') && is_directory()
}

/// Stands for the ETag that a listing never shows of a directory.
pub(super) fn directory_tag() -> ETag {
    ETag::new("directory")
}
