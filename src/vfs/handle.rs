//! Open files and directories.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

use super::error::{Error, Result};
use super::readdir::DirHandle;
use super::{Fh, Ino};
use crate::cache::Reader;

/// An open file.
pub struct FileHandle {
    /// Its inode.
    pub ino: Ino,
    /// Thread group that opened it: only its FLUSH is a close (semantics 4).
    pub opener: u32,
    /// Open for reading.
    pub readable: bool,
    /// Open for writing.
    pub writable: bool,
    /// O_APPEND.
    pub append: bool,
    /// O_TRUNC.
    pub truncated: bool,
    /// It wrote or truncated.
    pub wrote: AtomicBool,
    /// Its reader of the published object, and the file's epoch that it is of.
    pub reader: Mutex<Option<(u64, Arc<Reader>)>>,
}

#[derive(Clone)]
enum Handle {
    File(Arc<FileHandle>),
    Directory(Arc<DirHandle>),
}

/// All handles.
#[derive(Default)]
pub struct Handles {
    open: Mutex<HashMap<Fh, Handle>>,
    last: AtomicU64,
}

impl Handles {
    /// Adds an open file.
    pub fn add_file(&self, handle: FileHandle) -> Fh {
        self.add(Handle::File(Arc::new(handle)))
    }

    /// Adds an open directory.
    pub fn add_directory(&self, handle: DirHandle) -> Fh {
        self.add(Handle::Directory(Arc::new(handle)))
    }

    fn add(&self, handle: Handle) -> Fh {
        let fh = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        self.open.lock().insert(fh, handle);
        fh
    }

    /// The open file of this number; EBADF if there is none.
    pub fn file(&self, fh: Fh) -> Result<Arc<FileHandle>> {
        match self.open.lock().get(&fh) {
            Some(Handle::File(handle)) => Ok(handle.clone()),
            _ => Err(Error::BadHandle),
        }
    }

    /// The open directory of this number.
    pub fn directory(&self, fh: Fh) -> Result<Arc<DirHandle>> {
        match self.open.lock().get(&fh) {
            Some(Handle::Directory(handle)) => Ok(handle.clone()),
            _ => Err(Error::BadHandle),
        }
    }

    /// Closes a file.
    pub fn remove_file(&self, fh: Fh) -> Result<Arc<FileHandle>> {
        let handle = self.file(fh)?;
        self.open.lock().remove(&fh);
        Ok(handle)
    }

    /// Closes a directory.
    pub fn remove_directory(&self, fh: Fh) -> Result<Arc<DirHandle>> {
        let handle = self.directory(fh)?;
        self.open.lock().remove(&fh);
        Ok(handle)
    }

    /// True while a handle is open on the inode.
    pub fn is_open(&self, ino: Ino) -> bool {
        self.open.lock().values().any(|handle| matches!(handle, Handle::File(file) if file.ino == ino))
    }
}
