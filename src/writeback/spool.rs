//! The spool directory: one locked sub-directory a mount, a sparse file and a record an entry, and their space.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::Error;
use super::adopt::{self, Contents, Whose};
use super::disk::Disk;
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
    /// Where all changes are made.
    pub disk: Disk,
    /// Where new entries go.
    own: Locked,
    /// Those of earlier runs; their entries stay in them.
    adopted: Vec<Locked>,
}

/// A sub-directory, flock()ed until this is dropped.
struct Locked {
    dir: PathBuf,
    _lock: Option<File>,
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

impl Found {
    /// Removes it. The bytes go first: a record without them says nothing, bytes without a record would be a file of nobody.
    pub fn remove(&self, disk: &Disk) -> io::Result<()> {
        disk.remove(&self.data, false)?;
        disk.remove(&self.record_path, true)
    }
}

impl Spool {
    /// Locks a sub-directory of its own, and goes on with all that earlier mounts left for these buckets and nobody has
    /// locked: see [`super::adopt`].
    pub fn open(disk: Disk, parent: &Path, whose: &Whose) -> io::Result<(Spool, Vec<Found>)> {
        disk.make_dirs(parent)?;
        let _turn = turn(parent)?;
        let (mut locked, mut mixed, mut found) = (Vec::new(), Vec::new(), Vec::new());
        for entry in fs::read_dir(parent)? {
            let entry = entry?;
            let dir = entry.path();
            if !entry.file_type()?.is_dir() || fs::read_to_string(dir.join("identity")).ok().as_deref() != Some(whose.service.as_str()) {
                continue;
            }
            let Some(lock) = lock_patiently(&dir)? else { continue };
            let contents = Contents::of(&disk, &dir, whose)?;
            match (contents.is_empty(), contents.mixed) {
                // One empty directory is enough.
                (true, false) if !locked.is_empty() => fs::remove_dir_all(&dir)?,
                (true, true) => {}
                (false, true) => mixed.push((Locked { dir, _lock: Some(lock) }, contents)),
                (_, false) => {
                    found.extend(contents.found);
                    locked.push(Locked { dir, _lock: Some(lock) });
                }
            }
        }
        let own = match locked.pop() {
            Some(own) => own,
            None => Self::create(&disk, parent, &whose.service)?,
        };
        let mut found = adopt::once_each(&disk, found)?;
        for (folder, contents) in mixed {
            let (moved, all) = contents.move_to(&disk, &own.dir, &found)?;
            found.extend(moved);
            if !all {
                locked.push(folder);
            }
        }
        disk.set_aside(&own.dir);
        Ok((Spool { disk, own, adopted: locked }, found))
    }

    /// That of a mount which writes nothing: it locks nothing, and goes on with nothing.
    pub fn of_nobody(disk: Disk, parent: &Path) -> Spool {
        Spool { disk, own: Locked { dir: parent.to_owned(), _lock: None }, adopted: Vec::new() }
    }

    fn create(disk: &Disk, parent: &Path, identity: &str) -> io::Result<Locked> {
        for _ in 0..100 {
            let dir = parent.join(format!("{:016x}", rand::random::<u64>()));
            match disk.make_dir(&dir) {
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
                made => made?,
            }
            // Locked before it has an identity: a mount that starts at the same time cannot take it for an orphan.
            if let Some(lock) = lock(&dir)? {
                disk.replace(&dir.join("identity"), identity.as_bytes(), true)?;
                return Ok(Locked { dir, _lock: Some(lock) });
            }
        }
        Err(io::Error::other(format!("no sub-directory could be made in {}", parent.display())))
    }

    /// What earlier runs put off, the oldest first.
    pub fn put_off<T: PutOff>(&self) -> Vec<Journalled<T>> {
        let dirs = self.adopted.iter().chain([&self.own]);
        let files = dirs.filter_map(|locked| fs::read_dir(&locked.dir).ok()).flatten().flatten().map(|entry| entry.path());
        let mut journalled: Vec<_> = files.filter(|path| path.extension().is_some_and(|extension| extension == T::EXTENSION)).collect();
        journalled.sort_by_key(|path| number_of(path));
        journalled.into_iter().filter_map(|path| Journalled::read(&self.disk, &path)).collect()
    }

    /// Path of an entry's bytes.
    pub fn data(&self, id: u64) -> PathBuf {
        self.own.dir.join(format!("{id}.data"))
    }

    /// Path of an entry's record.
    pub fn record(&self, id: u64) -> PathBuf {
        self.own.dir.join(format!("{id}.json"))
    }

    /// Bytes that the spool's disk has left for us.
    pub fn free(&self) -> u64 {
        nix::sys::statvfs::statvfs(&self.own.dir).map_or(0, |s| s.blocks_available().saturating_mul(s.fragment_size()))
    }
}

/// The number that names a file of the spool.
pub(super) fn number_of(path: &Path) -> Option<u64> {
    path.file_stem()?.to_str()?.parse().ok()
}

/// Entries with a readable record and their file. Spool files without a record hold nothing that was promised.
pub(super) fn scan(disk: &Disk, dir: &Path) -> io::Result<Vec<Found>> {
    let (mut found, mut orphans) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        match path.extension().and_then(|e| e.to_str()) {
            Some("json") => match Record::load(&path) {
                Ok(record) if path.with_extension("data").exists() => {
                    found.push(Found { data: path.with_extension("data"), record_path: path, record })
                }
                Ok(_) => disk.remove(&path, false)?,
                // A power cut took the bytes of a record that was never meant to be durable.
                Err(_) if fs::metadata(&path)?.len() == 0 => {
                    disk.remove(&path, false)?;
                    orphans.push(path.with_extension("data"));
                }
                Err(error) => tracing::warn!("{}: {error}: left where it is", path.display()),
            },
            Some("tmp") => disk.remove(&path, false)?,
            Some("data") if !path.with_extension("json").exists() => orphans.push(path),
            _ => {}
        }
    }
    orphans.sort();
    orphans.dedup();
    for orphan in orphans.into_iter().filter(|orphan| orphan.exists()) {
        disk.remove(&orphan, false)?;
    }
    Ok(found)
}

/// Mounts that start at the same time look one after the other: while one looks into a folder, it is locked and would be
/// passed over.
fn turn(parent: &Path) -> io::Result<Option<File>> {
    const LONGEST: Duration = Duration::from_secs(20);
    let until = Instant::now() + LONGEST;
    loop {
        match lock(parent)? {
            None if Instant::now() < until => std::thread::sleep(Duration::from_millis(20)),
            turn => return Ok(turn),
        }
    }
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
        let open = |service: &str| {
            let whose = Whose { service: service.into(), bucket: None };
            Spool::open(Disk::default(), dir.path(), &whose).unwrap()
        };
        let (first, found) = open("a");
        assert!(found.is_empty());
        let (second, _) = open("a");
        assert_ne!(first.own.dir, second.own.dir);
        let (other, _) = open("b");
        fs::write(other.data(7), "x").unwrap();
        drop((first, second));
        let (third, _) = open("a");
        // One of the two was taken over, the other one was empty and went.
        assert_eq!(fs::read_dir(dir.path()).unwrap().filter(|entry| entry.as_ref().unwrap().path().is_dir()).count(), 2);
        assert!(other.data(7).exists() && third.own.dir.exists());
    }
}
