//! What earlier mounts left in a spool directory, and whose it is: a mount goes on with all that is for its bucket (or for
//! any, where every bucket is mounted), whatever else its options say, and keeps nothing of other buckets from their mounts.
//!
//! A folder that holds nothing else is taken over as it is. Out of a mixed one a mount takes its own, one entry at a time, so
//! that at no moment a crash loses one: the bytes get a second name in its folder, then the record is written there, then
//! the old record goes, then the old name of the bytes. Two records of the same bytes are one entry.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::abandoned::Abandoned;
use super::disk::Disk;
use super::journal::{Deletion, MetadataChange, PutOff};
use super::renames::{self, TreeRename};
use super::spool::{Found, number_of, scan};

/// What the names of files end with that tell what was put off.
const JOURNALS: [&str; 4] = [Deletion::EXTENSION, MetadataChange::EXTENSION, Abandoned::EXTENSION, TreeRename::EXTENSION];

/// Which mount's spool is opened.
#[derive(Clone, Debug)]
pub(crate) struct Whose {
    /// The service, however it is spelled.
    pub service: String,
    /// `None`: all of its buckets.
    pub bucket: Option<String>,
}

impl Whose {
    fn owns(&self, bucket: &str) -> bool {
        self.bucket.as_deref().is_none_or(|ours| ours == bucket)
    }
}

/// What a folder holds.
pub(crate) struct Contents {
    /// Ours.
    pub found: Vec<Found>,
    /// Files of ours that tell what was put off.
    journals: Vec<PathBuf>,
    /// It holds something of others, or something that this program cannot read.
    pub mixed: bool,
}

impl Contents {
    /// Looks into a folder that is locked.
    pub fn of(disk: &Disk, dir: &Path, whose: &Whose) -> io::Result<Self> {
        let (found, foreign): (Vec<_>, Vec<_>) = scan(disk, dir)?.into_iter().partition(|found| whose.owns(&found.record.bucket));
        let known: HashSet<&Path> = found.iter().chain(&foreign).map(|found| found.record_path.as_path()).collect();
        let (mut journals, mut mixed) = (Vec::new(), !foreign.is_empty());
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            match path.extension().and_then(|extension| extension.to_str()) {
                Some("json") => mixed |= !known.contains(path.as_path()),
                Some(renames::COPIES) => renames::tidy(disk, &path)?,
                Some(extension) if JOURNALS.contains(&extension) => match buckets_of(&path) {
                    Some(buckets) if buckets.iter().all(|bucket| whose.owns(bucket)) => journals.push(path),
                    Some(_) => mixed = true,
                    // Cut short by a crash: the call had not returned.
                    None => disk.remove(&path, false)?,
                },
                _ => {}
            }
        }
        Ok(Self { found, journals, mixed })
    }

    /// Nothing of ours.
    pub fn is_empty(&self) -> bool {
        self.found.is_empty() && self.journals.is_empty()
    }

    /// Moves what is ours to the folder `own`. What cannot be moved is given as it lies, `false` with it.
    /// `there`: what the mount has already, perhaps from a move that did not end.
    pub fn move_to(self, disk: &Disk, own: &Path, there: &[Found]) -> io::Result<(Vec<Found>, bool)> {
        let (mut moved, mut all) = (Vec::new(), true);
        for found in self.found {
            if there.iter().any(|there| inode(&there.data).ok() == inode(&found.data).ok()) {
                found.remove(disk)?;
                continue;
            }
            let Found { data, record_path, record } = found;
            match move_entry(disk, &data, &record_path, own) {
                Ok((data, record_path)) => moved.push(Found { data, record_path, record }),
                Err(error) => {
                    tracing::warn!("{}: not moved to {}: {error}", record_path.display(), own.display());
                    all = false;
                    moved.push(Found { data, record_path, record });
                }
            }
        }
        for journal in self.journals {
            let to = free_name(own, &journal);
            if let Err(error) = move_journal(disk, &journal, &to) {
                tracing::warn!("{}: not moved to {}: {error}", journal.display(), own.display());
                all = false;
            }
        }
        Ok((moved, all))
    }
}

/// What a crash in the middle of a move has left twice goes from the place that it was moved from, which is the later one here.
pub(crate) fn once_each(disk: &Disk, found: Vec<Found>) -> io::Result<Vec<Found>> {
    let mut seen = HashSet::new();
    let mut kept = Vec::with_capacity(found.len());
    for found in found {
        if seen.insert(inode(&found.data)?) {
            kept.push(found);
        } else {
            found.remove(disk)?;
        }
    }
    Ok(kept)
}

fn move_entry(disk: &Disk, data: &Path, record: &Path, own: &Path) -> io::Result<(PathBuf, PathBuf)> {
    let to = free_name(own, data);
    let to_record = to.with_extension("json");
    // A crash after it leaves a name without a record, which the next look removes.
    disk.link(data, &to)?;
    disk.replace(&to_record, &fs::read(record)?, true)?;
    disk.remove(record, true)?;
    disk.remove(data, false)?;
    Ok((to, to_record))
}

/// A rename's list of copies goes first: one without its record is removed by the next look.
fn move_journal(disk: &Disk, journal: &Path, to: &Path) -> io::Result<()> {
    let copies = journal.with_extension(renames::COPIES);
    if journal.extension().is_some_and(|extension| extension == TreeRename::EXTENSION) && copies.exists() {
        disk.replace(&to.with_extension(renames::COPIES), &fs::read(&copies)?, true)?;
    }
    disk.replace(to, &fs::read(journal)?, true)?;
    disk.remove(journal, true)?;
    if copies.exists() { disk.remove(&copies, false) } else { Ok(()) }
}

/// The same name, or one with the next number that nothing in the folder has.
fn free_name(own: &Path, from: &Path) -> PathBuf {
    let number = number_of(from).unwrap_or_default();
    let extension = from.extension().unwrap_or_default();
    let taken = |name: &PathBuf| ["data", "json"].iter().chain(&JOURNALS).any(|extension| name.with_extension(extension).exists());
    let mut names = (number..).map(|number| own.join(number.to_string()).with_extension(extension));
    names.find(|name| !taken(name)).unwrap_or_else(|| own.join(from.file_name().unwrap_or_default()))
}

fn inode(path: &Path) -> io::Result<(u64, u64)> {
    fs::metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
}

/// The buckets that a journal's file is about.
fn buckets_of(path: &Path) -> Option<Vec<String>> {
    #[derive(serde::Deserialize)]
    struct About {
        bucket: String,
        to_bucket: Option<String>,
    }
    let About { bucket, to_bucket } = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
    Some(std::iter::once(bucket).chain(to_bucket).collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::super::disk::{Change, Watch};
    use super::super::manifest::{Record, tests::record};
    use super::super::spool::Spool;
    use super::*;

    fn whose(bucket: Option<&str>) -> Whose {
        Whose { service: "store".into(), bucket: bucket.map(str::to_owned) }
    }

    /// Two entries and a delete for each of two buckets in one folder.
    fn leave(parent: &Path) {
        let (spool, _) = Spool::open(Disk::default(), parent, &whose(None)).unwrap();
        for (number, bucket) in [(1, "a"), (2, "b"), (3, "a"), (4, "b")] {
            fs::write(spool.data(number), format!("{number} of {bucket}")).unwrap();
            let of = Record { bucket: bucket.into(), key: number.to_string(), ..record() };
            fs::write(spool.record(number), of.text().unwrap()).unwrap();
            let delete = format!("{{\"bucket\":\"{bucket}\",\"key\":\"{number}\",\"etag\":null}}");
            fs::write(spool.record(number + 10).with_extension("delete"), delete).unwrap();
            let abort = format!("{{\"bucket\":\"{bucket}\",\"key\":\"{number}\",\"id\":\"u\",\"begun\":0}}");
            fs::write(spool.record(number + 20).with_extension("abort"), abort).unwrap();
            let time = "{\"secs_since_epoch\":0,\"nanos_since_epoch\":0}";
            let rename = format!(
                "{{\"bucket\":\"{bucket}\",\"key\":\"{number}/\",\"to_bucket\":\"{bucket}\",\"to_key\":\"n/\",\"stage\":\"copying\",\"newest\":{time}}}"
            );
            fs::write(spool.record(number + 30).with_extension("rename"), rename).unwrap();
            fs::write(spool.record(number + 30).with_extension("copies"), number.to_string()).unwrap();
        }
    }

    /// What a mount goes on with: keys with their bytes, and keys to delete.
    fn resumed(parent: &Path, bucket: Option<&str>) -> (Spool, Vec<String>) {
        let (spool, found) = Spool::open(Disk::default(), parent, &whose(bucket)).unwrap();
        let entries = found.iter().map(|found| format!("{}: {}", found.record.key, fs::read_to_string(&found.data).unwrap()));
        let deletes = spool.put_off::<Deletion>();
        let mut deletes: Vec<_> =
            deletes.iter().map(|journalled| format!("not {} of {}", journalled.what.key, journalled.what.bucket)).collect();
        let aborts = spool.put_off::<Abandoned>();
        deletes.extend(aborts.iter().map(|journalled| format!("upload of {} of {}", journalled.what.upload.key, journalled.what.bucket)));
        for renamed in spool.put_off::<TreeRename>() {
            let copies = fs::read_to_string(renamed.path().with_extension("copies")).unwrap();
            deletes.push(format!("rename of {}{copies} of {}", renamed.what.key, renamed.what.bucket));
        }
        deletes.dedup();
        let mut all: Vec<_> = entries.chain(deletes).collect();
        all.sort();
        (spool, all)
    }

    const OF_A: [&str; 8] = [
        "1: 1 of a",
        "3: 3 of a",
        "not 1 of a",
        "not 3 of a",
        "rename of 1/1 of a",
        "rename of 3/3 of a",
        "upload of 1 of a",
        "upload of 3 of a",
    ];
    const OF_B: [&str; 8] = [
        "2: 2 of b",
        "4: 4 of b",
        "not 2 of b",
        "not 4 of b",
        "rename of 2/2 of b",
        "rename of 4/4 of b",
        "upload of 2 of b",
        "upload of 4 of b",
    ];

    #[test]
    fn each_bucket_s_mount_goes_on_with_its_own_at_the_same_time() {
        let dir = tempfile::tempdir().unwrap();
        leave(dir.path());
        let (_first, of_a) = resumed(dir.path(), Some("a"));
        let (_second, of_b) = resumed(dir.path(), Some("b"));
        assert_eq!((of_a, of_b), (OF_A.map(str::to_owned).to_vec(), OF_B.map(str::to_owned).to_vec()));
        assert_eq!(resumed(dir.path(), None).1, Vec::<String>::new(), "they are locked");
    }

    #[test]
    fn all_buckets_go_on_with_what_one_has_left() {
        let dir = tempfile::tempdir().unwrap();
        leave(dir.path());
        drop(resumed(dir.path(), Some("a")));
        let (_all, both) = resumed(dir.path(), None);
        assert_eq!(
            both,
            [OF_A, OF_B].concat().into_iter().map(str::to_owned).collect::<std::collections::BTreeSet<_>>().into_iter().collect::<Vec<_>>()
        );
    }

    /// Fails every change from one on, as a crash there would.
    struct Crash {
        after: usize,
        made: AtomicUsize,
    }

    impl Watch for Crash {
        fn change(&self, _: &Change<'_>) -> io::Result<()> {
            if self.made.fetch_add(1, Ordering::SeqCst) < self.after { Ok(()) } else { Err(io::Error::other("crashed")) }
        }
    }

    #[test]
    fn a_crash_in_the_middle_of_a_move_loses_and_doubles_nothing() {
        for after in 0.. {
            let dir = tempfile::tempdir().unwrap();
            leave(dir.path());
            let crash = Arc::new(Crash { after, made: AtomicUsize::new(0) });
            drop(Spool::open(Disk::watched("boot", crash.clone()), dir.path(), &whose(Some("a"))));
            let (_first, of_a) = resumed(dir.path(), Some("a"));
            let (_second, of_b) = resumed(dir.path(), Some("b"));
            assert_eq!((of_a, of_b), (OF_A.map(str::to_owned).to_vec(), OF_B.map(str::to_owned).to_vec()), "after {after} changes");
            if crash.made.load(Ordering::SeqCst) <= after {
                assert!(after > 15, "all of {after} changes were made");
                return;
            }
        }
    }
}
