//! Every change of the spool on disk goes through here. What survives a power cut is then decided in one place (S3 does not
//! have these bytes yet), and the tests see what a cut leaves at any moment, or make the disk full.
//!
//! POSIX promises little: bytes of a file are durable after its fsync, names after that of their directory. A rename may
//! become durable before the bytes of what was renamed, so nothing durable is ever replaced by something that is not.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek};
use parking_lot::Mutex;

use crate::failpoint;

/// Disks give room away in blocks; nearly all in blocks of this size.
pub(crate) const BLOCK: u64 = 4096;

/// Bytes kept aside for records: those of a few hundred files can be replaced on a disk that others have filled.
const RESERVE: i64 = 1 << 20;

/// The disk that holds the spool. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Disk {
    /// The kernel's boot id: under the same kernel, what a killed process wrote is all there, fsynced or not. Empty where it
    /// cannot be read, which never equals another.
    pub boot: Arc<str>,
    /// A file of [`RESERVE`] bytes that gives way when a record cannot be written otherwise.
    reserve: Arc<Mutex<Option<PathBuf>>>,
    /// Sees every change before it is made, and may refuse it.
    #[cfg(test)]
    watch: Option<Arc<dyn Watch>>,
}

/// What is about to be changed.
#[cfg_attr(not(test), allow(dead_code, reason = "read by the tests that watch"))]
pub(crate) enum Change<'a> {
    /// A new directory.
    MakeDir(&'a Path),
    /// A new, empty file, or one that is emptied.
    Create(&'a Path),
    /// Bytes of a file.
    Write { path: &'a Path, at: u64, bytes: &'a [u8] },
    /// Its length.
    SetLen { path: &'a Path, len: u64 },
    /// Zeros in it.
    Punch { path: &'a Path, at: u64, len: u64 },
    /// fsync of a file.
    Sync(&'a Path),
    /// fsync of a directory.
    SyncDir(&'a Path),
    /// A file takes another's name.
    Rename { from: &'a Path, to: &'a Path },
    /// A file gets a second name.
    Link { from: &'a Path, to: &'a Path },
    /// A file goes.
    Remove(&'a Path),
}

/// A test that watches the disk.
#[cfg(test)]
pub(crate) trait Watch: Send + Sync {
    /// An error is what the disk answers.
    fn change(&self, change: &Change<'_>) -> io::Result<()>;
}

impl Default for Disk {
    fn default() -> Self {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        Self {
            boot: boot.trim().into(),
            reserve: Arc::default(),
            #[cfg(test)]
            watch: None,
        }
    }
}

impl Disk {
    /// The disk of a machine that was started as `boot`.
    #[cfg(test)]
    pub fn watched(boot: &str, watch: Arc<dyn Watch>) -> Self {
        Self { boot: boot.into(), watch: Some(watch), ..Self::default() }
    }

    fn before(&self, change: Change<'_>) -> io::Result<()> {
        match change {
            Change::MakeDir(_) => failpoint::pass("spool-make-dir"),
            Change::Create(_) => failpoint::pass("spool-create"),
            Change::Write { .. } => failpoint::pass("spool-write"),
            Change::SetLen { .. } => failpoint::pass("spool-set-len"),
            Change::Punch { .. } => failpoint::pass("spool-punch"),
            Change::Sync(_) => failpoint::pass("spool-sync"),
            Change::SyncDir(_) => failpoint::pass("spool-sync-dir"),
            Change::Rename { .. } | Change::Link { .. } => failpoint::pass("spool-rename"),
            Change::Remove(_) => failpoint::pass("spool-remove"),
        }
        #[cfg(test)]
        if let Some(watch) = &self.watch {
            return watch.change(&change);
        }
        Ok(())
    }

    /// Makes a directory for its owner alone, and what is missing above it; durable.
    pub fn make_dirs(&self, dir: &Path) -> io::Result<()> {
        if dir.is_dir() {
            return Ok(());
        }
        let parent = dir.parent().unwrap_or(Path::new("/"));
        self.make_dirs(parent)?;
        match self.make_dir(dir) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            made => made,
        }
    }

    /// Makes one directory, which must not exist; durable.
    pub fn make_dir(&self, dir: &Path) -> io::Result<()> {
        self.before(Change::MakeDir(dir))?;
        DirBuilder::new().mode(0o700).create(dir)?;
        self.sync_parent(dir)
    }

    /// A new, empty file for bytes.
    pub fn create(&self, path: &Path) -> io::Result<SpoolFile> {
        self.before(Change::Create(path))?;
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)?;
        Ok(SpoolFile { file, path: path.to_owned(), disk: self.clone() })
    }

    /// A file that is there.
    pub fn open(&self, path: &Path) -> io::Result<SpoolFile> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        Ok(SpoolFile { file, path: path.to_owned(), disk: self.clone() })
    }

    /// Puts a small file in place of what is there, in one step. `sync`: it survives a power cut once this returns. On a full
    /// disk the reserve gives way: what close() promises must not depend on what others leave.
    pub fn replace(&self, path: &Path, bytes: &[u8], sync: bool) -> io::Result<()> {
        match self.try_replace(path, bytes, sync) {
            Err(error) if is_full(&error) && self.give_way() => self.try_replace(path, bytes, sync),
            result => result,
        }
    }

    fn try_replace(&self, path: &Path, bytes: &[u8], sync: bool) -> io::Result<()> {
        // No other file of the spool has this name.
        let mut temp = path.as_os_str().to_owned();
        temp.push(".tmp");
        let temp = PathBuf::from(temp);
        self.before(Change::Create(&temp))?;
        let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temp)?;
        self.before(Change::Write { path: &temp, at: 0, bytes })?;
        file.write_all_at(bytes, 0)?;
        if sync {
            self.before(Change::Sync(&temp))?;
            file.sync_data()?;
        }
        self.before(Change::Rename { from: &temp, to: path })?;
        fs::rename(&temp, path)?;
        if sync { self.sync_parent(path) } else { Ok(()) }
    }

    /// Adds to the end of a small file, which is made where there is none. A power cut may lose it.
    pub fn append(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let mut file = OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
        self.before(Change::Write { path, at: file.metadata()?.len(), bytes })?;
        file.write_all(bytes)
    }

    /// Gives a file a second name. Durable with the next durable change in the directory of `to`.
    pub fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.before(Change::Link { from, to })?;
        fs::hard_link(from, to)
    }

    /// Removes a file. `sync`: it does not come back.
    pub fn remove(&self, path: &Path, sync: bool) -> io::Result<()> {
        self.before(Change::Remove(path))?;
        fs::remove_file(path)?;
        if sync { self.sync_parent(path) } else { Ok(()) }
    }

    /// Names in the directory of `path` are durable as they are now.
    pub fn sync_parent(&self, path: &Path) -> io::Result<()> {
        let Some(dir) = path.parent() else { return Ok(()) };
        self.before(Change::SyncDir(dir))?;
        File::open(dir)?.sync_all()
    }

    /// Sets bytes aside in `dir`, unless the disk is too full for that.
    pub fn set_aside(&self, dir: &Path) {
        let mut reserve = self.reserve.lock();
        if reserve.is_some() {
            return;
        }
        let path = dir.join("reserve");
        let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
        match file.and_then(|file| fallocate(file, FallocateFlags::empty(), 0, RESERVE).map_err(io::Error::from)) {
            Ok(()) => *reserve = Some(path),
            Err(error) => {
                tracing::debug!("{}: {error}", path.display());
                let _ = fs::remove_file(path);
            }
        }
    }

    /// Gives the reserve up; true where there was one.
    fn give_way(&self) -> bool {
        self.reserve.lock().take().is_some_and(|path| fs::remove_file(path).is_ok())
    }
}

/// Bytes of the blocks that a range touches.
pub(crate) fn whole_blocks(range: Range<u64>) -> u64 {
    range.end.saturating_add(BLOCK - 1) / BLOCK * BLOCK - range.start / BLOCK * BLOCK
}

/// No room, or no more of it for this user.
fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// A file that holds bytes which S3 does not have yet.
pub(crate) struct SpoolFile {
    file: File,
    path: PathBuf,
    disk: Disk,
}

impl SpoolFile {
    /// Reads at an offset; fewer bytes at the end.
    pub fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<usize> {
        self.file.read_at(buffer, at)
    }

    /// Its length in bytes.
    pub fn len(&self) -> io::Result<u64> {
        self.file.metadata().map(|metadata| metadata.len())
    }

    /// Bytes of the disk that it takes: blocks, and none for its holes.
    pub fn taken(&self) -> u64 {
        // POSIX leaves the unit open; Linux has 512 everywhere.
        self.file.metadata().map_or(0, |metadata| metadata.blocks() * 512)
    }

    /// Bytes of a range that are not on the disk yet, to the block. One that ends in what is there counts a block too many.
    pub fn holes(&self, range: Range<u64>) -> u64 {
        let end = range.end;
        let seek = |at: u64, whence, missing| lseek(&self.file, at as i64, whence).map_or(missing, |found| (found as u64).clamp(at, end));
        let (mut at, mut holes) = (range.start, 0);
        while at < end {
            // Past the end of the file neither is found: there all is a hole.
            let hole = seek(at, Whence::SeekHole, at);
            at = seek(hole, Whence::SeekData, end);
            holes += if hole < at { whole_blocks(hole..at) } else { 0 };
        }
        holes
    }

    /// Takes the blocks of a range that it covers, where the filesystem can.
    pub fn allocate(&self, at: u64, len: u64) -> io::Result<()> {
        match fallocate(&self.file, FallocateFlags::FALLOC_FL_KEEP_SIZE, at as i64, len as i64) {
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => Ok(()),
            allocated => Ok(allocated?),
        }
    }

    /// Writes all of it.
    pub fn write_all_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.disk.before(Change::Write { path: &self.path, at, bytes })?;
        self.file.write_all_at(bytes, at)
    }

    /// Cuts or extends it.
    pub fn set_len(&self, len: u64) -> io::Result<()> {
        self.disk.before(Change::SetLen { path: &self.path, len })?;
        self.file.set_len(len)
    }

    /// A hole where the filesystem has them, written zeros elsewhere.
    pub fn punch(&self, at: u64, len: u64) -> io::Result<()> {
        self.disk.before(Change::Punch { path: &self.path, at, len })?;
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        if fallocate(&self.file, flags, at as i64, len as i64).is_ok() {
            return Ok(());
        }
        let zeros = vec![0; 64 << 10];
        let mut at = at;
        let end = at + len;
        while at < end {
            let step = (end - at).min(zeros.len() as u64);
            self.file.write_all_at(&zeros[..step as usize], at)?;
            at += step;
        }
        Ok(())
    }

    /// Its bytes are durable.
    pub fn sync(&self) -> io::Result<()> {
        self.disk.before(Change::Sync(&self.path))?;
        self.file.sync_data()
    }
}
