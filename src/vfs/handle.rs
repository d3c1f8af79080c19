//! Open files and directories.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use parking_lot::Mutex;

use super::error::{Error, Result};
use super::readdir::DirHandle;
use super::{Fh, Ino};
use crate::cache::Reader;
use crate::s3::ETag;

/// An open file.
pub struct FileHandle {
    /// Its inode.
    pub ino: Ino,
    /// When it was opened.
    pub opened: Instant,
    /// Thread group that opened it for writing: only its FLUSH is a close (promise 4). 0 where it only reads.
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
    /// Its opener closed it, and nobody wrote by it since. RELEASE comes later than close(2) returns.
    pub closed: AtomicBool,
    /// The version that it was opened with; `None` where that was no object's.
    pub version: Option<ETag>,
    /// It was read from the store's object.
    pub read: AtomicBool,
    /// The kernel reads by itself what it is open on.
    pub passed: AtomicBool,
    /// Its reader of the published object, and the file's epoch that it is of.
    pub reader: Mutex<Option<(u64, Arc<Reader>)>>,
}

impl FileHandle {
    /// Somebody writes by it.
    pub fn writes(&self) {
        self.wrote.store(true, Ordering::Relaxed);
        self.closed.store(false, Ordering::Relaxed);
    }
}

#[derive(Clone)]
enum Handle {
    File(Arc<FileHandle>),
    Directory(Arc<DirHandle>),
}

/// All handles.
#[derive(Default)]
pub struct Handles {
    open: Mutex<Open>,
    last: AtomicU64,
}

#[derive(Default)]
struct Open {
    handles: HashMap<Fh, Handle>,
    /// How many of them are on a file, by its inode.
    files: HashMap<Ino, usize>,
}

impl Handles {
    /// Adds an open file.
    pub fn add_file(&self, handle: FileHandle) -> Fh {
        *self.open.lock().files.entry(handle.ino).or_default() += 1;
        self.add(Handle::File(Arc::new(handle)))
    }

    /// Adds an open directory.
    pub fn add_directory(&self, handle: DirHandle) -> Fh {
        self.add(Handle::Directory(Arc::new(handle)))
    }

    fn add(&self, handle: Handle) -> Fh {
        let fh = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        self.open.lock().handles.insert(fh, handle);
        fh
    }

    /// The open file of this number; EBADF if there is none.
    pub fn file(&self, fh: Fh) -> Result<Arc<FileHandle>> {
        match self.open.lock().handles.get(&fh) {
            Some(Handle::File(handle)) => Ok(handle.clone()),
            _ => Err(Error::BadHandle),
        }
    }

    /// The open directory of this number.
    pub fn directory(&self, fh: Fh) -> Result<Arc<DirHandle>> {
        match self.open.lock().handles.get(&fh) {
            Some(Handle::Directory(handle)) => Ok(handle.clone()),
            _ => Err(Error::BadHandle),
        }
    }

    /// Closes a file.
    pub fn remove_file(&self, fh: Fh) -> Result<Arc<FileHandle>> {
        let handle = self.file(fh)?;
        let mut open = self.open.lock();
        if open.handles.remove(&fh).is_some()
            && let Entry::Occupied(mut count) = open.files.entry(handle.ino)
        {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
        Ok(handle)
    }

    /// Closes a directory.
    pub fn remove_directory(&self, fh: Fh) -> Result<Arc<DirHandle>> {
        let handle = self.directory(fh)?;
        self.open.lock().handles.remove(&fh);
        Ok(handle)
    }

    /// True while a handle is open on the inode.
    pub fn is_open(&self, ino: Ino) -> bool {
        self.count(ino) > 0
    }

    /// How many handles are open on the inode.
    pub fn count(&self, ino: Ino) -> usize {
        self.open.lock().files.get(&ino).copied().unwrap_or_default()
    }

    /// True while the inode is open for writing, and not closed by who opened it.
    pub fn is_written(&self, ino: Ino) -> bool {
        let writes = |handle: &Handle| match handle {
            Handle::File(file) => file.ino == ino && file.writable && !file.closed.load(Ordering::Relaxed),
            Handle::Directory(_) => false,
        };
        let open = self.open.lock();
        open.files.contains_key(&ino) && open.handles.values().any(writes)
    }
}
