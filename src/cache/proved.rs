//! Cache files that the kernel may read by itself (FUSE passthrough): nobody compares what is read from them then, so only those
//! all of whose blocks matched their sums in this mount (promise 16). They are never changed, only unlinked.

use std::fs::File;
use std::sync::{Arc, Weak};

use super::block::EntryId;
use super::disk::FileName;
use super::{Cache, ObjectVersion};

impl Cache {
    /// The file of a version that is here whole and proved.
    pub async fn proved_file(&self, version: &ObjectVersion) -> Option<File> {
        let id = EntryId::of(version);
        let (slot, entry) = {
            let mut index = self.inner.index.lock();
            (index.shelf.touch(id)?, index.entries.get(&id).and_then(Weak::upgrade))
        };
        // What a reader has found bad since the shelf was told.
        let still = entry.filter(|entry| entry.loaded.initialized()).is_none_or(|entry| entry.state().slot(slot.serial).proved);
        if !slot.proved || !still {
            return None;
        }
        let (inner, size) = (Arc::clone(&self.inner), version.size);
        let opened = tokio::task::spawn_blocking(move || {
            let file = File::open(inner.disk.as_ref()?.data(FileName { id, serial: slot.serial })).ok()?;
            file.metadata().is_ok_and(|found| found.len() == size).then_some(file)
        });
        opened.await.ok()?
    }
}
