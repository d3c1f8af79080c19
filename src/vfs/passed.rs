//! Files that the kernel reads by itself (FUSE passthrough): large ones that the cache has whole and proved, opened for reading.
//!
//! The kernel takes an inode's handles all through its page cache, or all to one backing file; an open that mixes the two is EIO
//! (fs/fuse/iomode.c). It counts a handle from its open's answer to just before its RELEASE; we from before that answer to after that
//! RELEASE, so that what is open here is never less than what is open there. Whoever opens a file for writing that is passed through
//! gets another inode, by ESTALE: who has the old one open reads on what it opened.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use super::error::{Error, Result};
use super::handle::FileHandle;
use super::inode::FileState;
use super::{Fh, Ino, Vfs};
use crate::cache::ProvedFile;
use crate::s3::ETag;

/// Smaller files gain nothing, and a log that somebody follows (`tail -f`) stays with us.
const LEAST: u64 = 8 << 20;

/// A cache file in the kernel's hands.
pub struct Backing {
    /// The kernel's number for it, once it has one: ends with the last handle.
    pub registration: Mutex<Option<Arc<dyn Any + Send + Sync>>>,
    /// In use for as long as it has that number, so that it is dropped last.
    pub file: ProvedFile,
}

/// Whether this mount passes files through.
#[derive(Default)]
pub(super) struct Passing(AtomicBool);

/// How the handles of a file are open.
#[derive(Default)]
pub struct Modes {
    /// Through the kernel's page cache.
    cached: u32,
    /// Passed through, and to what, which is that version's.
    passed: u32,
    backing: Option<(ETag, Arc<Backing>)>,
}

/// A cache file that the kernel may read, and the version that it is of.
pub(super) struct Passable {
    etag: ETag,
    file: ProvedFile,
}

impl Modes {
    /// A handle more: what it is passed through to. `None`: it goes through the page cache.
    fn open(&mut self, passable: Option<Passable>) -> Option<Arc<Backing>> {
        if self.passed == 0 && self.cached == 0 {
            let backing = |passable: Passable| (passable.etag, Arc::new(Backing { registration: Mutex::default(), file: passable.file }));
            self.backing = passable.map(backing);
        }
        *if self.backing.is_some() { &mut self.passed } else { &mut self.cached } += 1;
        self.backing.as_ref().map(|(_, backing)| backing.clone())
    }

    /// A handle less. Gives what the kernel lets go of, to be dropped where a slow close(2) harms nobody.
    fn close(&mut self, passed: bool) -> Option<Arc<Backing>> {
        let count = if passed { &mut self.passed } else { &mut self.cached };
        *count = count.saturating_sub(1);
        if self.passed > 0 {
            return None;
        }
        self.backing.take().map(|(_, backing)| backing)
    }
}

impl FileState {
    /// A handle is added of the version `etag`. An error where the kernel reads the file by itself, and this handle is of another version,
    /// or not to be read so.
    pub(super) fn open_mode(&mut self, etag: Option<&ETag>, by_us: bool, passable: Option<Passable>) -> Result<Option<Arc<Backing>>> {
        let other = self.modes.backing.as_ref().is_some_and(|(of, _)| Some(of) != etag);
        if self.modes.passed > 0 && (by_us || other) {
            return Err(Error::Stale);
        }
        let clean = passable.filter(|passable| self.staged.is_none() && !self.retiring && Some(&passable.etag) == etag);
        Ok(self.modes.open(clean))
    }

    /// A handle is gone.
    pub(super) fn close_mode(&mut self, handle: &FileHandle) -> Option<Arc<Backing>> {
        self.modes.close(handle.passed.load(Ordering::Relaxed))
    }
}

/// While it lives the kernel begins to read the file by itself for nobody: it is being changed without a handle.
pub(super) struct Unpassed<'a> {
    vfs: &'a Vfs,
    ino: Ino,
}

impl Drop for Unpassed<'_> {
    fn drop(&mut self) {
        if let Some(node) = self.vfs.table.lock().get_mut(self.ino) {
            node.file.modes.close(false);
        }
    }
}

impl Vfs {
    /// The kernel takes backing files.
    pub fn pass_through(&self) {
        self.passing.0.store(true, Ordering::Relaxed);
    }

    /// A change by name is about to be made. ESTALE where the kernel reads the file by itself.
    pub(super) fn unpassed(&self, ino: Ino) -> Result<Unpassed<'_>> {
        let opened = self.table.lock().get_mut(ino).ok_or(Error::Stale)?.file.open_mode(None, true, None);
        match opened {
            Ok(_) => Ok(Unpassed { vfs: self, ino }),
            Err(_) => Err(self.forget_name(ino)),
        }
    }

    /// The cache file that may be passed through for a handle that reads this inode.
    pub(super) async fn passable(&self, ino: Ino) -> Option<Passable> {
        if !self.passing.0.load(Ordering::Relaxed) {
            return None;
        }
        let place = self.place(ino).ok()?;
        let version = {
            let table = self.table.lock();
            let node = table.get(ino)?;
            let object = node.object.as_ref().filter(|object| object.size >= LEAST && node.file.staged.is_none())?;
            Self::version(&place, object)
        };
        let file = self.cache.proved_file(&version).await?;
        Some(Passable { etag: version.etag, file })
    }

    /// The kernel does not take the backing file: from now on it takes none, and this handle goes through the page cache.
    pub fn not_passed(&self, fh: Fh) -> Result<()> {
        self.passing.0.store(false, Ordering::Relaxed);
        let handle = self.handles.file(fh)?;
        if handle.passed.swap(false, Ordering::Relaxed)
            && let Some(node) = self.table.lock().get_mut(handle.ino)
        {
            drop(node.file.modes.close(true));
            node.file.modes.cached += 1;
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::cache::ObjectVersion;

    fn file() -> Option<Passable> {
        let etag = ETag::new("e");
        let version = ObjectVersion { bucket: "b".into(), key: "k".into(), etag: etag.clone(), size: LEAST, version_id: None };
        Some(Passable { etag, file: ProvedFile::alone(tempfile::tempfile().unwrap(), version) })
    }

    #[test]
    fn the_handles_of_a_file_are_all_of_one_mode() {
        let mut modes = Modes::default();
        assert!(modes.open(None).is_none());
        assert!(modes.open(file()).is_none(), "one goes through the page cache");
        modes.close(false);
        modes.close(false);
        let first = modes.open(file()).unwrap();
        assert!(Arc::ptr_eq(&first, &modes.open(file()).unwrap()), "all to the same");
        assert!(Arc::ptr_eq(&first, &modes.open(None).unwrap()));
        modes.close(true);
        modes.close(true);
        assert!(modes.passed == 1 && modes.backing.is_some());
        modes.close(true);
        assert!(modes.open(None).is_none());
    }
}
