//! What spool folders hold while no mount has locked them. A bucket that vanished, or whose credentials ended, is never
//! mounted again: its files are listed, copied out and thrown away without a mount.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::content::Content;
use super::copy_out::Kept;
use super::disk::{Disk, SpoolFile};
use super::journal::{Deletion, Journalled, PutOff};
use super::manifest::{Phase, Record};
use super::recover::{catch_up, promised, standing};
use super::renames::TreeRename;
use super::spool::{self, Found};
use super::{DeleteStatus, EntryStatus};

/// A folder of the spool that waits for its mount.
#[derive(Debug)]
pub struct Folder {
    /// Where it is.
    pub dir: PathBuf,
    /// Endpoint and bucket (or account) that it belongs to.
    pub identity: String,
    /// The files that it holds.
    pub entries: Vec<EntryStatus>,
    /// The deletes.
    pub deletes: Vec<DeleteStatus>,
    /// The renames of directories.
    pub renames: Vec<TreeRename>,
}

/// The folders below a spool directory that no mount has locked and that hold something.
///
/// # Errors
/// When they cannot be read.
pub fn folders(spool_dir: &Path) -> io::Result<Vec<Folder>> {
    let listed = match fs::read_dir(spool_dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        listed => listed?,
    };
    let (disk, mut folders) = (Disk::default(), Vec::new());
    for entry in listed {
        let dir = entry?.path();
        // One that is being made has no identity yet.
        let Ok(identity) = fs::read_to_string(dir.join("identity")) else { continue };
        let Some(_lock) = spool::lock(&dir)? else { continue };
        let (mut entries, mut deletes, mut renames) = (Vec::new(), Vec::new(), Vec::new());
        for file in fs::read_dir(&dir)? {
            let path = file?.path();
            let Some(id) = spool::number_of(&path) else { continue };
            match path.extension().and_then(|extension| extension.to_str()) {
                Some("json") => entries.extend(kept(&disk, &dir, id)?.map(|kept| kept.status)),
                Some(Deletion::EXTENSION) => deletes.extend(Journalled::read(&disk, &path).as_ref().map(queued)),
                Some(TreeRename::EXTENSION) => renames.extend(Journalled::read(&disk, &path).map(|journalled| journalled.what)),
                _ => {}
            }
        }
        entries.sort_by_key(|entry| entry.id);
        deletes.sort_by_key(|delete| delete.id);
        if !entries.is_empty() || !deletes.is_empty() || !renames.is_empty() {
            folders.push(Folder { dir, identity, entries, deletes, renames });
        }
    }
    folders.sort_by(|a, b| a.dir.cmp(&b.dir));
    Ok(folders)
}

/// Opens an entry of a folder; `None` where a mount has it by now, or it is gone.
///
/// # Errors
/// When it cannot be read.
pub fn open(dir: &Path, id: u64) -> io::Result<Option<Kept>> {
    // What is open stays readable when a mount takes the folder over: the lock need not be held for the copying.
    let Some(_lock) = spool::lock(dir)? else { return Ok(None) };
    kept(&Disk::default(), dir, id)
}

/// Throws an entry of a folder away, or takes a delete back. `None` where a mount has it by now, or it is gone; else whether parts of it may lie in an
/// unfinished upload, which the next mount of the bucket aborts.
///
/// # Errors
/// When it cannot be removed.
pub fn discard(dir: &Path, id: u64) -> io::Result<Option<bool>> {
    let Some(_lock) = spool::lock(dir)? else { return Ok(None) };
    match record(dir, id) {
        Some(found) => {
            found.throw_away(&Disk::default())?;
            Ok(Some(found.record.upload.is_some()))
        }
        None => {
            let path = dir.join(id.to_string()).with_extension(Deletion::EXTENSION);
            Journalled::<Deletion>::read(&Disk::default(), &path)
                .map(|_| Disk::default().remove(&path, true))
                .transpose()
                .map(|done| done.map(|()| false))
        }
    }
}

/// A delete as its next mount will find it.
fn queued(delete: &Journalled<Deletion>) -> DeleteStatus {
    let Deletion { bucket, key, .. } = delete.what.clone();
    DeleteStatus { id: delete.number(), bucket, key, refused: false, reason: None }
}

impl Found {
    /// Opens it for copying; `None` where nothing of it would be kept by a mount either.
    pub(super) fn open(&self, disk: &Disk, id: u64) -> io::Result<Option<Kept>> {
        let file = disk.open(&self.data)?;
        let mut record = self.record.clone();
        catch_up(&mut record, &file, &disk.boot);
        Ok((!is_worthless(&record)).then(|| of(id, file, &record, &disk.boot)))
    }
}

/// Published, or never written to.
pub(super) fn is_worthless(record: &Record) -> bool {
    record.phase == Phase::Published || record.phase == Phase::Writing && record.local.is_empty() && !record.held
}

fn of(id: u64, file: SpoolFile, record: &Record, boot: &str) -> Kept {
    let (phase, reason) = standing(record, promised(record, boot));
    let status = EntryStatus {
        id,
        bucket: record.bucket.clone(),
        key: record.key.clone(),
        phase,
        size: record.size,
        sent: 0,
        speed: 0,
        reason,
        recovered: true,
        held: record.held,
        incomplete: record.poisoned,
        stranded: false,
    };
    Kept { status, file, content: Content::of(record) }
}

fn kept(disk: &Disk, dir: &Path, id: u64) -> io::Result<Option<Kept>> {
    match record(dir, id) {
        Some(found) => found.open(disk, id),
        None => Ok(None),
    }
}

/// An entry's record; one that this program cannot read is left to the one that wrote it.
fn record(dir: &Path, id: u64) -> Option<Found> {
    let record_path = dir.join(format!("{id}.json"));
    let data = record_path.with_extension("data");
    let record = Record::load(&record_path).ok()?;
    data.exists().then_some(Found { data, record_path, record })
}
