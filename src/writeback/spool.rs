//! The spool directory: one locked sub-directory a mount, a sparse file and a record an entry, and their space.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::Error;
use super::journal::{Journalled, PutOff};
use super::manifest::Record;

/// Runs file work on the blocking pool.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> Result<T, Error> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(Error::from),
        Err(join) => Err(Error::from(io::Error::other(join))),
    }
}

/// Sub-directories of the spool that this process holds the locks of.
pub(crate) struct Spool {
    /// Where new entries go.
    own: Locked,
    /// Those of earlier runs; their entries stay in them.
    adopted: Vec<Locked>,
}

/// A sub-directory, flock()ed until this is dropped.
struct Locked {
    dir: PathBuf,
    _lock: File,
}

/// An entry that an earlier run left.
pub(crate) struct Found {
    /// Path of its bytes.
    pub data: PathBuf,
    /// Path of its record.
    pub record_path: PathBuf,
    /// What it is.
    pub record: Record,
}

impl Spool {
    /// Takes over every unlocked sub-directory of the identity, or makes one. Those that are locked or of other
    /// identities are not touched.
    pub fn open(parent: &Path, identity: &str) -> io::Result<(Spool, Vec<Found>)> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
        let (mut locked, mut found) = (Vec::new(), Vec::new());
        for entry in fs::read_dir(parent)? {
            let entry = entry?;
            let dir = entry.path();
            if !entry.file_type()?.is_dir() || fs::read_to_string(dir.join("identity")).ok().as_deref() != Some(identity) {
                continue;
            }
            let Some(lock) = lock_patiently(&dir)? else { continue };
            found.extend(scan(&dir)?);
            let empty = fs::read_dir(&dir)?.flatten().all(|e| matches!(e.file_name().to_str(), Some("identity" | "lock")));
            // One empty directory is enough.
            if empty && !locked.is_empty() {
                fs::remove_dir_all(&dir)?;
            } else {
                locked.push(Locked { dir, _lock: lock });
            }
        }
        let own = match locked.pop() {
            Some(own) => own,
            None => Self::create(parent, identity)?,
        };
        Ok((Spool { own, adopted: locked }, found))
    }

    fn create(parent: &Path, identity: &str) -> io::Result<Locked> {
        for _ in 0..100 {
            let dir = parent.join(format!("{:016x}", rand::random::<u64>()));
            match fs::DirBuilder::new().mode(0o700).create(&dir) {
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
                made => made?,
            }
            // Locked before it has an identity: a mount that starts at the same time cannot take it for an orphan.
            if let Some(lock) = lock(&dir)? {
                fs::write(dir.join("identity"), identity)?;
                return Ok(Locked { dir, _lock: lock });
            }
        }
        Err(io::Error::other(format!("no sub-directory could be made in {}", parent.display())))
    }

    /// What earlier runs put off, the oldest first.
    pub fn put_off<T: PutOff>(&self) -> Vec<Journalled<T>> {
        let dirs = self.adopted.iter().chain([&self.own]);
        let files = dirs.filter_map(|locked| fs::read_dir(&locked.dir).ok()).flatten().flatten().map(|entry| entry.path());
        let mut journalled: Vec<_> = files.filter(|path| path.extension().is_some_and(|extension| extension == T::EXTENSION)).collect();
        journalled.sort_by_key(|path| path.file_stem().and_then(|number| number.to_str()?.parse::<u64>().ok()));
        journalled.into_iter().filter_map(|path| Journalled::read(&path)).collect()
    }

    /// Path of an entry's bytes.
    pub fn data(&self, id: u64) -> PathBuf {
        self.own.dir.join(format!("{id}.data"))
    }

    /// Path of an entry's record.
    pub fn record(&self, id: u64) -> PathBuf {
        self.own.dir.join(format!("{id}.json"))
    }

    /// A new, empty spool file.
    pub fn create_file(path: &Path) -> io::Result<File> {
        OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)
    }

    /// A spool file that is there.
    pub fn open_file(path: &Path) -> io::Result<File> {
        OpenOptions::new().read(true).write(true).open(path)
    }

    /// Bytes that the spool's disk has left for us.
    pub fn free(&self) -> u64 {
        nix::sys::statvfs::statvfs(&self.own.dir).map_or(0, |s| s.blocks_available().saturating_mul(s.fragment_size()))
    }
}

/// Entries with a readable record and their file. Spool files without a record hold nothing that was promised.
fn scan(dir: &Path) -> io::Result<Vec<Found>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        match path.extension().and_then(|e| e.to_str()) {
            Some("json") => match Record::load(&path) {
                Ok(record) if path.with_extension("data").exists() => {
                    found.push(Found { data: path.with_extension("data"), record_path: path, record })
                }
                Ok(_) => fs::remove_file(&path)?,
                Err(error) => tracing::warn!("{}: {error}: left where it is", path.display()),
            },
            Some("tmp") => fs::remove_file(&path)?,
            Some("data") if !path.with_extension("json").exists() => fs::remove_file(&path)?,
            _ => {}
        }
    }
    Ok(found)
}

/// Locks a sub-directory for as long as the file is kept; `None` where somebody else has it.
pub(crate) fn lock(dir: &Path) -> io::Result<Option<File>> {
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(dir.join("lock"))?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Commands lock a folder for the moment that they look into it (see [`super::offline`]): a mount that starts just then waits.
fn lock_patiently(dir: &Path) -> io::Result<Option<File>> {
    const TRIES: u32 = 20;
    for _ in 0..TRIES {
        if let Some(lock) = lock(dir)? {
            return Ok(Some(lock));
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_mount_locks_its_own_and_leaves_others_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (first, found) = Spool::open(dir.path(), "a").unwrap();
        assert!(found.is_empty());
        let (second, _) = Spool::open(dir.path(), "a").unwrap();
        assert_ne!(first.own.dir, second.own.dir);
        let (other, _) = Spool::open(dir.path(), "b").unwrap();
        fs::write(other.data(7), "x").unwrap();
        drop((first, second));
        let (third, _) = Spool::open(dir.path(), "a").unwrap();
        // One of the two was taken over, the other one was empty and went.
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
        assert!(other.data(7).exists() && third.own.dir.exists());
    }
}
