//! The cache's directory: one sparse file per object version and its sidecar, in a sub-directory that this process has locked.
//! Everything here blocks: call it from the blocking pool.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::SystemTime;

use sha2::{Digest, Sha256};

use super::ObjectVersion;
use super::block::{EntryId, PEEK, Sidecar, peek_complete};
use super::evict::Slot;

/// Mounts of one identity that may share `cache_dir`, each with a sub-directory of its own.
const MAX_MOUNTS: u32 = 64;

/// A cache file's name: id and serial.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileName {
    /// Which version.
    pub id: EntryId,
    /// Which file of it.
    pub serial: u32,
}

impl FileName {
    fn stem(self) -> String {
        format!("{:032x}-{:016x}-{:08x}", self.id.object, self.id.version, self.serial)
    }

    fn parse(stem: &str) -> Option<Self> {
        let mut parts = stem.split('-');
        let object = u128::from_str_radix(parts.next()?, 16).ok()?;
        let version = u64::from_str_radix(parts.next()?, 16).ok()?;
        let serial = u32::from_str_radix(parts.next()?, 16).ok()?;
        let name = Self { id: EntryId { object, version }, serial };
        (parts.next().is_none() && name.stem() == stem).then_some(name)
    }
}

/// What a directory holds, the least recently used first.
pub type Found = Vec<(EntryId, Slot)>;

/// The locked sub-directory.
#[derive(Debug)]
pub struct Disk {
    dir: PathBuf,
    serial: AtomicU32,
    _lock: File,
}

impl Disk {
    /// Locks a sub-directory of `parent` for `identity` and lists what it holds, least recently used first. What a crash left
    /// without a sidecar is removed.
    pub fn open(parent: &Path, identity: &str) -> io::Result<(Self, Found)> {
        let hash = Sha256::digest(identity.as_bytes());
        let hex: String = hash[..8].iter().map(|byte| format!("{byte:02x}")).collect();
        for mount in 0..MAX_MOUNTS {
            let dir = parent.join(format!("blocks-{hex}-{mount}"));
            fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
            let lock = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(dir.join("lock"))?;
            match lock.try_lock() {
                Ok(()) => {
                    let disk = Self { dir, serial: AtomicU32::new(0), _lock: lock };
                    let found = disk.scan()?;
                    disk.tag();
                    return Ok((disk, found));
                }
                Err(fs::TryLockError::WouldBlock) => {}
                Err(fs::TryLockError::Error(error)) => return Err(error),
            }
        }
        Err(io::Error::other(format!("{MAX_MOUNTS} mounts use {} already", parent.display())))
    }

    /// Locks every sub-directory that no mount has, and lists what each holds.
    pub fn open_left(parent: &Path) -> io::Result<Vec<(Self, Found)>> {
        let mut left = Vec::new();
        let items = match fs::read_dir(parent) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(left),
            items => items?,
        };
        for item in items {
            let dir = item?.path();
            let ours = dir.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with("blocks-"));
            let Some(lock) = ours.then(|| OpenOptions::new().write(true).open(dir.join("lock")).ok()).flatten() else { continue };
            if lock.try_lock().is_ok() {
                let disk = Self { dir, serial: AtomicU32::new(0), _lock: lock };
                let found = disk.scan()?;
                left.push((disk, found));
            }
        }
        left.sort_by(|(one, _), (other, _)| one.dir.cmp(&other.dir));
        Ok(left)
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What the sidecar of a cache file says; `None` where it is damaged.
    pub fn sidecar(&self, name: FileName) -> Option<Sidecar> {
        Sidecar::decode(&fs::read(self.sums(name)).ok()?)
    }

    /// Backup programs leave out directories with this file (Cache Directory Tagging Specification). Without it nothing breaks.
    fn tag(&self) {
        let text = "Signature: 8a477f597d28d172789f06886806bc55\n# Cached blocks of S3 objects, made by packmule.\n";
        if let Err(error) = fs::write(self.dir.join("CACHEDIR.TAG"), text) {
            tracing::debug!(%error, "CACHEDIR.TAG not written");
        }
    }

    fn scan(&self) -> io::Result<Found> {
        let mut found: Vec<(SystemTime, FileName, Slot)> = Vec::new();
        let mut last = 0;
        for item in fs::read_dir(&self.dir)? {
            let path = item?.path();
            let stem = path.file_stem().and_then(|stem| stem.to_str()).and_then(FileName::parse);
            let kind = path.extension().and_then(|kind| kind.to_str());
            match (stem, kind) {
                (Some(name), Some("data")) => {
                    last = last.max(name.serial);
                    match self.inspect(name, &path) {
                        Some((used, slot)) => found.push((used, name, slot)),
                        None => self.unlink(name),
                    }
                }
                (Some(name), Some("sums")) => {
                    last = last.max(name.serial);
                    if !self.data(name).exists() {
                        self.unlink(name);
                    }
                }
                (Some(name), Some("new")) => self.unlink(name),
                _ => {}
            }
        }
        self.serial.store(last.wrapping_add(1), Ordering::Relaxed);
        found.sort_by_key(|(used, name, _)| (*used, name.serial));
        Ok(found.into_iter().map(|(_, name, slot)| (name.id, slot)).collect())
    }

    /// When the file was last used, and what the shelf needs; `None` for a file without a sidecar.
    fn inspect(&self, name: FileName, data: &Path) -> Option<(SystemTime, Slot)> {
        let stat = fs::metadata(data).ok()?;
        let mut sums = File::open(self.sums(name)).ok()?;
        let used = sums.metadata().ok()?.modified().ok()?;
        let mut head = [0; PEEK];
        sums.read_exact(&mut head).ok()?;
        // st_blocks counts 512 bytes, whatever the filesystem (stat(2)).
        Some((used, Slot { serial: name.serial, bytes: stat.blocks() * 512, complete: peek_complete(&head), proved: false }))
    }

    /// A fresh name for a version.
    pub fn name(&self, id: EntryId) -> FileName {
        FileName { id, serial: self.serial.fetch_add(1, Ordering::Relaxed) }
    }

    /// Where a cache file lies.
    pub fn data(&self, name: FileName) -> PathBuf {
        self.dir.join(name.stem() + ".data")
    }

    fn sums(&self, name: FileName) -> PathBuf {
        self.dir.join(name.stem() + ".sums")
    }

    /// Makes an empty cache file.
    pub fn create(&self, name: FileName) -> io::Result<File> {
        OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(self.data(name))
    }

    /// Opens a cache file.
    pub fn open_data(&self, name: FileName) -> io::Result<File> {
        OpenOptions::new().read(true).write(true).open(self.data(name))
    }

    /// Opens the cache file of a version with what its sidecar says. Any surprise is a miss. Marks the file as used.
    pub fn load(&self, name: FileName, version: &ObjectVersion) -> Option<(File, Sidecar)> {
        let sidecar = self.sidecar(name)?;
        let found = &sidecar.version;
        if (&found.bucket, &found.key, &found.etag, found.size) != (&version.bucket, &version.key, &version.etag, version.size) {
            return None;
        }
        let data = self.open_data(name).ok()?;
        if let Err(error) = File::open(self.sums(name)).and_then(|sums| sums.set_modified(SystemTime::now())) {
            tracing::debug!(%error, "use of a cache file not noted");
        }
        Some((data, sidecar))
    }

    /// Replaces a sidecar. A torn one is a miss, and one that claims what a power cut has lost finds its sums not to match: nothing is synced.
    pub fn write_sidecar(&self, name: FileName, record: &[u8]) -> io::Result<()> {
        let fresh = self.dir.join(name.stem() + ".new");
        let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&fresh)?;
        file.write_all(record)?;
        fs::rename(&fresh, self.sums(name))
    }

    /// Removes a cache file and its sidecar, sidecar first. Open handles keep reading.
    pub fn unlink(&self, name: FileName) {
        for kind in [".sums", ".new", ".data"] {
            if let Err(error) = fs::remove_file(self.dir.join(name.stem() + kind))
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(%error, file = name.stem() + kind, "a cache file could not be removed");
            }
        }
    }

    /// Gives a cache file another name; its sidecar goes and is written anew.
    pub fn rename(&self, from: FileName, to: FileName) -> io::Result<()> {
        fs::rename(self.data(from), self.data(to))?;
        self.unlink(from);
        Ok(())
    }

    /// Free bytes of the filesystem, as an unprivileged process may use them.
    pub fn available(&self) -> io::Result<u64> {
        let stat = nix::sys::statvfs::statvfs(&self.dir)?;
        Ok(stat.blocks_available() as u64 * stat.fragment_size() as u64)
    }
}

/// Fills `buffer` from `offset`; a file that ends before is an error.
pub fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    file.read_exact_at(buffer, offset)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::cache::block::BlockMap;
    use crate::s3::ETag;

    fn version() -> ObjectVersion {
        ObjectVersion { bucket: "b".into(), key: "k".into(), etag: ETag::new("e"), size: 10, version_id: None }
    }

    #[test]
    fn two_mounts_of_one_identity_have_directories_of_their_own() {
        let parent = tempfile::tempdir().unwrap();
        let (one, _) = Disk::open(parent.path(), "x").unwrap();
        let (two, _) = Disk::open(parent.path(), "x").unwrap();
        assert_ne!(one.dir, two.dir);
        let first = one.dir.clone();
        drop(one);
        assert_eq!(Disk::open(parent.path(), "x").unwrap().0.dir, first);
    }

    #[test]
    fn a_file_with_its_sidecar_is_found_again_and_orphans_are_removed() {
        let parent = tempfile::tempdir().unwrap();
        let (disk, found) = Disk::open(parent.path(), "x").unwrap();
        assert!(found.is_empty());
        let version = version();
        let name = disk.name(EntryId::of(&version));
        disk.create(name).unwrap().write_all_at(b"0123456789", 0).unwrap();
        let mut blocks = BlockMap::new(10);
        blocks.set(0, 1);
        disk.write_sidecar(name, &Sidecar { version: version.clone(), verified: false, blocks }.encode()).unwrap();
        let orphan = disk.name(EntryId::of(&version));
        disk.create(orphan).unwrap();
        drop(disk);

        let (disk, found) = Disk::open(parent.path(), "x").unwrap();
        assert_eq!(found.len(), 1);
        assert!(found[0].1.complete && found[0].1.serial == name.serial);
        assert!(!disk.data(orphan).exists());
        assert!(disk.load(name, &version).is_some());
        assert!(disk.load(name, &ObjectVersion { key: "other".into(), ..version }).is_none());
        disk.unlink(name);
        assert!(!disk.data(name).exists());
    }
}
