//! Cache files that the kernel may read by itself (FUSE passthrough): nobody compares what is read from them then, so only those
//! all of whose blocks matched their sums in this mount (promise 16). They are never changed, only unlinked.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use super::block::EntryId;
use super::disk::FileName;
use super::entry::InUse;
use super::{Cache, ObjectVersion};

/// A cache file whose version counts as being read while this lives: whoever reads it by its descriptor asks the cache for nothing.
#[derive(Debug)]
pub struct ProvedFile {
    file: File,
    _in_use: InUse,
}

impl AsFd for ProvedFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Cache {
    /// The file of a version that is here whole and proved, opened for reading.
    pub async fn proved_file(&self, version: &ObjectVersion) -> Option<ProvedFile> {
        let id = EntryId::of(version);
        let proved = || self.inner.index.lock().shelf.touch(id).filter(|slot| slot.proved);
        proved()?;
        let in_use = InUse::new(self.inner.entry(version));
        // Looked at once it is in use: from here on it goes after all that is not.
        let slot = proved()?;
        let entry = in_use.entry();
        // What a reader has found bad since the shelf was told.
        if entry.loaded.initialized() && !entry.state().slot(slot.serial).proved {
            return None;
        }
        let (inner, size) = (Arc::clone(&self.inner), version.size);
        let opened = tokio::task::spawn_blocking(move || {
            let file = File::open(inner.disk.as_ref()?.data(FileName { id, serial: slot.serial })).ok()?;
            file.metadata().is_ok_and(|found| found.len() == size).then_some(ProvedFile { file, _in_use: in_use })
        });
        opened.await.ok()?
    }
}

#[cfg(test)]
impl ProvedFile {
    /// Of no cache.
    pub fn alone(file: File, version: ObjectVersion) -> Self {
        Self { file, _in_use: InUse::new(Arc::new(super::entry::Entry::new(0, version, false, Arc::default()))) }
    }
}
