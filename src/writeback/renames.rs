//! Renames of directories: on record from before the first copy until the last delete, so that one that a crash cut off is ended by the
//! next mount.
//!
//! Beside the record lies a list of the copies that were made. It is appended to and not fsynced until all copies are there: a line
//! that is lost is a copy that is looked at, or made, again.
//!
//! What waits in the spool below the old name goes to the new one when it is found, and is not published before the rename has ended:
//! until then nobody knows which object it is to replace.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::abandoned::Abandoned;
use super::disk::Disk;
use super::entry::{Entry, Shared};
use super::journal::{Journalled, PutOff};
use super::manifest::{Phase, Record};
use super::publish::StoreReader;
use super::recover::{Promise, go_on_in_turn};
use super::spool::{Found, blocking};
use super::{Base, Error, Expect, Target, Writeback};
use crate::s3::ETag;

/// Ends the name of the list of copies.
pub(crate) const COPIES: &str = "copies";

/// How far the rename of a directory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RenameStage {
    /// Nothing was deleted.
    Copying,
    /// Every copy was there, and was looked at.
    Deleting,
}

/// The rename of a directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TreeRename {
    /// The bucket that it is in.
    pub bucket: String,
    /// What its keys begin with, up to a `/`.
    pub key: String,
    /// The bucket that it goes to.
    pub to_bucket: String,
    /// What its keys are to begin with, up to a `/`.
    pub to_key: String,
    /// How far it is.
    pub stage: RenameStage,
    /// LastModified of the newest object that was listed: what is newer came later, and is not part of it.
    pub newest: SystemTime,
    /// A mount has found it: what waited in the spool below the old name goes to the new one, and what came since stays.
    #[serde(default)]
    pub found: bool,
}

impl PutOff for TreeRename {
    const EXTENSION: &'static str = "rename";
    const DURABLE: bool = true;
}

impl TreeRename {
    /// What follows the old name in the key of something below it.
    fn below<'a>(&self, bucket: &str, key: &'a str) -> Option<&'a str> {
        key.strip_prefix(&self.key).filter(|_| self.bucket == bucket)
    }

    /// `s3://bucket/key`, the old and the new one, each on one line whatever the key.
    pub fn names(&self) -> (String, String) {
        let shown = |bucket: &str, key: &str| format!("s3://{bucket}/{}", key.escape_debug());
        (shown(&self.bucket, &self.key), shown(&self.to_bucket, &self.to_key))
    }
}

/// The version of an object that was copied, and that of its copy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyMade {
    /// The source.
    pub from: ETag,
    /// The copy.
    pub to: ETag,
}

/// Copies by what follows the directory's name in their keys.
pub type CopiesMade = HashMap<String, CopyMade>;

/// A line of the list.
#[derive(Serialize, Deserialize)]
struct Line {
    below: String,
    #[serde(flatten)]
    made: CopyMade,
}

/// The record of a rename. Dropped, it stays for the next mount.
pub struct RenameRecord {
    shared: Arc<Shared>,
    journalled: Journalled<TreeRename>,
}

impl Writeback {
    /// Writes down that a directory is about to be renamed; durable when this returns.
    pub async fn begin_rename(&self, what: TreeRename) -> Result<RenameRecord, Error> {
        let journalled = self.shared.journal(what).await?;
        Ok(RenameRecord { shared: self.shared.clone(), journalled })
    }

    /// Renames that an earlier run did not come to end.
    pub fn unfinished_renames(&self) -> Vec<RenameRecord> {
        let unfinished = self.shared.renames.unfinished.lock();
        unfinished.iter().map(|one| RenameRecord { shared: self.shared.clone(), journalled: one.journalled.clone() }).collect()
    }
}

impl RenameRecord {
    /// What it is about.
    pub fn what(&self) -> &TreeRename {
        &self.journalled.what
    }

    /// A copy was made. A list that cannot be written is no reason to fail: the copy is looked at again after a crash.
    pub async fn copied(&self, below: &str, made: CopyMade) {
        let line = serde_json::to_vec(&Line { below: below.to_owned(), made }).map_err(io::Error::other);
        let (disk, path) = (self.shared.spool.disk.clone(), self.copies_path());
        let appended = blocking(move || {
            let mut line = line?;
            line.push(b'\n');
            disk.append(&path, &line)
        });
        if let Err(error) = appended.await {
            tracing::warn!("{}: {error}", self.copies_path().display());
        }
    }

    /// The copies that are on the list.
    pub async fn copies(&self) -> CopiesMade {
        let path = self.copies_path();
        // One that was cut short is as if it were not there.
        let lines = move || Ok(std::fs::read(&path).unwrap_or_default());
        let text = blocking(lines).await.unwrap_or_default();
        let lines = text.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice::<Line>(line).ok());
        lines.map(|Line { below, made }| (below, made)).collect()
    }

    /// Every copy is there: from now on only deletes follow. Durable when this returns, the list of copies too.
    pub async fn all_copied(&mut self) -> Result<(), Error> {
        let (disk, copies) = (self.shared.spool.disk.clone(), self.copies_path());
        blocking(move || if copies.exists() { disk.open(&copies)?.sync() } else { Ok(()) }).await?;
        let what = TreeRename { stage: RenameStage::Deleting, ..self.journalled.what.clone() };
        self.journalled = self.journalled.replace(what).await?;
        Ok(())
    }

    /// It has ended, one way or the other.
    pub async fn forget(self) {
        let (disk, copies) = (self.shared.spool.disk.clone(), self.copies_path());
        self.journalled.forget().await;
        let removed = blocking(move || if copies.exists() { disk.remove(&copies, false) } else { Ok(()) });
        if let Err(error) = removed.await {
            tracing::warn!("{error}");
        }
    }

    /// What waited for the end of the rename goes on, over the copies of what it was to replace.
    pub async fn release(&self, copies: &CopiesMade) {
        let (what, number) = (self.what().clone(), self.journalled.number());
        let waiting = {
            let mut unfinished = self.shared.renames.unfinished.lock();
            let at = unfinished.iter().position(|one| one.journalled.number() == number);
            at.map(|at| unfinished.swap_remove(at).waiting).unwrap_or_default()
        };
        for entry in self.shared.entries() {
            if follow(&entry, &what, copies)
                && let Err(error) = entry.persist(false).await
            {
                tracing::warn!("{}: {error}", entry.name());
            }
        }
        for versions in waiting {
            tokio::spawn(go_on_in_turn(self.shared.clone(), versions));
        }
    }

    fn copies_path(&self) -> PathBuf {
        self.journalled.path().with_extension(COPIES)
    }
}

/// What an entry was to replace, or was begun from, is its copy by now. True where it was changed.
fn follow(entry: &Arc<Entry>, what: &TreeRename, copies: &CopiesMade) -> bool {
    let mut intent = entry.intent.lock();
    let Target { store, key } = intent.target.clone();
    let Some(below) = key.strip_prefix(&what.to_key).filter(|_| store.bucket() == what.to_bucket) else { return false };
    let Some(made) = copies.get(below) else { return false };
    let expects = intent.expect == Expect::Version(made.from.clone());
    if expects {
        intent.expect = Expect::Version(made.to.clone());
    }
    let old = |base: &Base| what.below(&base.bucket, &base.key) == Some(below) && base.etag == made.from;
    let Some(base) = intent.base.take_if(|base| old(base)) else { return expects };
    let reader = StoreReader::of(store.clone(), key.clone(), made.to.clone(), None);
    let etag = made.to.clone();
    intent.base = Some(Base { bucket: store.bucket().to_owned(), key, etag, version_id: None, checksum: None, reader, ..base });
    true
}

/// What earlier runs did not come to end, and the files that wait for that.
#[derive(Default)]
pub(crate) struct Renames {
    unfinished: Mutex<Vec<Unfinished>>,
}

struct Unfinished {
    journalled: Journalled<TreeRename>,
    /// What was promised under each name below the new one, the oldest version first.
    waiting: Vec<Vec<Promise>>,
}

impl Renames {
    pub fn new(journalled: Vec<Journalled<TreeRename>>) -> Self {
        let unfinished = journalled.into_iter().map(|journalled| Unfinished { journalled, waiting: Vec::new() });
        Self { unfinished: Mutex::new(unfinished.collect()) }
    }

    /// Files below the old name go to the new one: those that the run left which was cut off.
    pub fn redirect(&self, disk: &Disk, mut found: Vec<Found>) -> Vec<Found> {
        for one in self.unfinished.lock().iter_mut().filter(|one| !one.journalled.what.found) {
            let what = TreeRename { found: true, ..one.journalled.what.clone() };
            for found in found.iter_mut() {
                if let Err(error) = redirect(disk, found, &what) {
                    tracing::warn!("{}: {error}: it goes on under its old name", found.record_path.display());
                }
            }
            match Journalled::put(disk.clone(), one.journalled.path().to_owned(), what) {
                Ok(journalled) => one.journalled = journalled,
                Err(error) => tracing::warn!("{}: {error}", one.journalled.path().display()),
            }
        }
        found
    }

    /// Keeps what is to be published below the new name until the rename has ended. Gives back what need not wait.
    pub fn keep_waiting(&self, bucket: &str, key: &str, versions: Vec<Promise>) -> Option<Vec<Promise>> {
        let mut unfinished = self.unfinished.lock();
        let is_below = |what: &TreeRename| what.to_bucket == bucket && key.starts_with(&what.to_key);
        let Some(one) = unfinished.iter_mut().find(|one| is_below(&one.journalled.what)) else { return Some(versions) };
        one.waiting.push(versions);
        None
    }
}

/// Rewrites the record of a file that lies below a directory's old name. Its upload, which is one of the old key, is aborted.
fn redirect(disk: &Disk, found: &mut Found, rename: &TreeRename) -> io::Result<()> {
    let Record { bucket, key, guess, .. } = &found.record;
    let Some(below) = rename.below(bucket, key) else { return Ok(()) };
    let guess = guess.as_ref().map(|guess| rename.below(bucket, guess).map_or(guess.clone(), |below| format!("{}{below}", rename.to_key)));
    let key = format!("{}{below}", rename.to_key);
    let moved = Record {
        bucket: rename.to_bucket.clone(),
        key,
        guess,
        upload: None,
        completing: None,
        completes: false,
        sent: Vec::new(),
        phase: match found.record.phase {
            Phase::Uploading | Phase::Completing => Phase::Sealed,
            phase => phase,
        },
        ..found.record.clone()
    };
    if let Some(upload) = found.record.upload.clone() {
        let what = Abandoned { bucket: rename.bucket.clone(), upload };
        Journalled::put(disk.clone(), found.record_path.with_extension(Abandoned::EXTENSION), what)?;
    }
    // What is durable is never replaced by what is not.
    disk.replace(&found.record_path, moved.text()?.as_bytes(), true)?;
    found.record = moved;
    Ok(())
}

/// Removes a list of copies whose rename has ended.
pub(crate) fn tidy(disk: &Disk, copies: &Path) -> io::Result<()> {
    if copies.with_extension(TreeRename::EXTENSION).exists() { Ok(()) } else { disk.remove(copies, false) }
}
