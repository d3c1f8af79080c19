//! The kernel's operations by name, those that are under way, and how long each kind takes.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use crate::measure::Durations;

macro_rules! operations {
    ($($name:ident $word:literal),* $(,)?) => {
        /// A FUSE operation that is answered by a task.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(super) enum Operation { $($name),* }

        /// Their names, as fuse(4) has them in small letters.
        const NAMES: &[&str] = &[$($word),*];
    };
}

operations! {
    Lookup "lookup", Getattr "getattr", Setattr "setattr", Readlink "readlink", Mknod "mknod", Mkdir "mkdir", Unlink "unlink",
    Rmdir "rmdir", Symlink "symlink", Rename "rename", Open "open", Create "create", Read "read", Write "write",
    Flush "flush", Release "release", Fsync "fsync", Opendir "opendir", Readdir "readdir", Readdirplus "readdirplus",
    Releasedir "releasedir", Fsyncdir "fsyncdir", Statfs "statfs", Setxattr "setxattr", Getxattr "getxattr", Listxattr "listxattr",
    Removexattr "removexattr", Fallocate "fallocate", Lseek "lseek", CopyFileRange "copy_file_range",
}

/// What the operations of a mount came to.
#[derive(Debug)]
pub struct Operations {
    under_way: AtomicUsize,
    took: Box<[Durations]>,
}

impl Default for Operations {
    fn default() -> Self {
        Self { under_way: AtomicUsize::new(0), took: NAMES.iter().map(|_| Durations::default()).collect() }
    }
}

impl Operations {
    /// Operations without an answer yet.
    pub fn under_way(&self) -> usize {
        self.under_way.load(Ordering::Relaxed)
    }

    /// How long those of each kind took, by its name.
    pub fn took(&self) -> impl Iterator<Item = (&'static str, &Durations)> {
        NAMES.iter().copied().zip(&self.took)
    }
}

/// One operation under way; it is counted when its task ends in any way.
pub(super) struct UnderWay {
    all: Arc<Operations>,
    operation: Operation,
    began: Instant,
}

impl UnderWay {
    pub(super) fn begin(all: &Arc<Operations>, operation: Operation) -> Self {
        all.under_way.fetch_add(1, Ordering::Relaxed);
        Self { all: all.clone(), operation, began: Instant::now() }
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.all.under_way.fetch_sub(1, Ordering::Relaxed);
        self.all.took[self.operation as usize].observe(self.began.elapsed());
    }
}
