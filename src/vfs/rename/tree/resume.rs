//! A directory's rename that was cut off is ended: by the next mount, or, where all copies are there and the store does not answer, by
//! this one. What others did meanwhile is left alone: their object under the new name is never replaced, theirs under the old one
//! never deleted.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;

use super::super::super::Vfs;
use super::super::super::error::Error;
use super::super::super::inode::Place;
use super::super::super::remember::Row;
use super::super::progress::{Failed, Progress};
use super::stay;
use super::steps::{Copied, Tree, found, is_marker, listed_object};
use crate::s3::{ETag, ListEntry};
use crate::writeback::{CopiesMade, RenameRecord, RenameStage};

/// Pauses between attempts: the first, and the longest.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Attempts that come to nothing because others change what was listed.
const CHANGES_MOST: u32 = 3;

/// What is to be done with the objects under the old name.
#[derive(Default)]
struct Sorted {
    /// They have their copies.
    copied: Vec<Copied>,
    /// They have none yet.
    missing: Vec<ListEntry>,
    /// They stay where they are.
    stays: Vec<String>,
    /// Only their bytes tell whether what has the new name is their copy.
    doubtful: Vec<(ListEntry, ListEntry)>,
}

impl Vfs {
    /// Ends what earlier runs did not come to end, in the background.
    pub(in super::super::super) fn resume_renames(self: &Arc<Self>) {
        for record in self.writeback.unfinished_renames() {
            let this = self.clone();
            self.spawn(async move { this.resume_rename(record, true).await });
        }
    }

    /// Goes on until it has ended, or something else than an outage is in its way: then it stays on record for the next mount.
    pub(super) async fn resume_rename(&self, mut record: RenameRecord, earlier: bool) {
        let what = record.what().clone();
        let (from, to) = what.names();
        let running = self.tree_renames.begin(&what, earlier);
        let (mut pause, mut copies, mut changes) = (PAUSE.0, record.copies().await, 0);
        loop {
            // Not while it waits for the store: nobody else is to wait for that longer than he would by himself.
            let guards = self.guard_both((&what.bucket, &what.key), (&what.to_bucket, &what.to_key)).await;
            let failed = match self.go_on(record, &running.progress, &mut copies).await {
                (ended, Ok(stays)) => {
                    ended.release(&copies).await;
                    if !stays.is_empty() {
                        let reason = stay(&stays);
                        tracing::warn!("{from}: renamed to {to}: {reason}");
                        running.tell("done", &reason);
                    }
                    ended.forget().await;
                    drop(running);
                    return self.refresh().await;
                }
                (same, Err(failed)) => {
                    record = same;
                    failed
                }
            };
            // Others have changed or removed something since it was listed.
            changes += u32::from(matches!(failed.error, Error::Stale | Error::NoEntry));
            let again = failed.passes || matches!(failed.error, Error::Stale | Error::NoEntry) && changes <= CHANGES_MOST;
            if !again || self.closing.is_cancelled() {
                let reason = format!("{}; both names are readable, and the next mount goes on", failed.reason);
                tracing::error!("{from}: the rename to {to} was not ended: {reason}");
                running.tell("failed", &reason);
                // After an outage the next mount comes to the copies first; what was refused may stay so for long.
                if !again {
                    record.release(&copies).await;
                }
                return;
            }
            if pause == PAUSE.0 {
                tracing::warn!("{from}: the rename to {to} waits for the store: {}", failed.reason);
            }
            running.progress.waits(&failed.reason);
            drop(guards);
            self.pause(pause).await;
            pause = (pause * 2).min(PAUSE.1);
        }
    }

    /// One attempt. Gives the keys that stay under the old name.
    async fn go_on(
        &self,
        record: RenameRecord,
        progress: &Arc<Progress>,
        copies: &mut CopiesMade,
    ) -> (RenameRecord, Result<Vec<String>, Failed>) {
        let what = record.what();
        let (from, to) = match (self.place_in(&what.bucket, &what.key).await, self.place_in(&what.to_bucket, &what.to_key).await) {
            (Ok(from), Ok(to)) => (from, to),
            (Err(failed), _) | (_, Err(failed)) => return (record, Err(failed)),
        };
        progress.enters("listing");
        let mut tree = Tree::new(from, to, record, progress.clone(), true);
        let result = self.try_to_end(&mut tree, copies).await;
        (tree.record, result)
    }

    async fn place_in(&self, bucket: &str, key: &str) -> Result<Place, Failed> {
        let store = self.store_of(bucket).await?.ok_or_else(|| {
            Failed::new(Error::Invalid, format!("s3://{bucket} is not on this mount: a mount of every bucket goes on with it"))
        })?;
        Ok(Place { store, key: key.to_owned() })
    }

    async fn try_to_end(&self, tree: &mut Tree, copies: &mut CopiesMade) -> Result<Vec<String>, Failed> {
        let (from, to) = (&tree.from, &tree.to);
        self.settle_deletes_below(from).await?;
        self.settle_deletes_below(to).await?;
        self.writeback.finish_metadata_below(from.store.bucket(), &from.key).await;
        let objects = self.list_tree(from, &tree.progress).await?;
        if objects.is_empty() {
            return Ok(Vec::new());
        }
        let mut theirs: HashMap<String, ListEntry> = HashMap::new();
        self.list_below(to, |entries| {
            theirs.extend(entries.into_iter().filter_map(|entry| Some((entry.key.get(to.key.len()..)?.to_owned(), entry))));
        })
        .await?;
        let mut sorted = sort(tree, objects, &theirs, copies);
        self.compare(tree, &mut sorted).await?;
        self.remember_copies(tree, &sorted.copied).await;
        for copy in &sorted.copied {
            tree.progress.copied(copy.size);
        }
        let Sorted { mut copied, missing, mut stays, .. } = sorted;
        if tree.record.what().stage == RenameStage::Copying {
            let any = !missing.is_empty();
            tree.progress.enters("copying");
            let made = self.copy_all(tree, missing, &mut copied).await;
            note(tree, &copied, copies);
            stays.extend(made?);
            if any {
                self.verify(tree, &copied).await?;
            }
            tree.record.all_copied().await.map_err(Error::from)?;
        } else {
            // Made by others since all was copied, or their copies were removed by them.
            stays.extend(missing.into_iter().map(|entry| entry.key));
            note(tree, &copied, copies);
        }
        stays.extend(self.delete_sources(tree, &copied).await.map_err(|(failed, _)| failed)?);
        Ok(stays)
    }

    /// An object whose copy cannot be told by its ETag has the same checksum where it is one.
    async fn compare(&self, tree: &Tree, sorted: &mut Sorted) -> Result<(), Failed> {
        let looks = std::mem::take(&mut sorted.doubtful).into_iter().map(|(entry, copy)| self.look_at_both(tree, entry, copy));
        let mut looks = futures::stream::iter(looks).buffer_unordered(self.config.max_connections);
        while let Some(look) = looks.next().await {
            match look? {
                (entry, copy, true) => sorted.copied.push(copy_of(entry, &copy)),
                (entry, _, false) => sorted.stays.push(entry.key),
            }
        }
        Ok(())
    }

    async fn look_at_both(&self, tree: &Tree, entry: ListEntry, copy: ListEntry) -> Result<(ListEntry, ListEntry, bool), Failed> {
        let (from, to) = (&tree.from.store, &tree.to.store);
        let heads = async { Ok((found(from.head(&entry.key).await)?, found(to.head(&copy.key).await)?)) };
        let same = match self.within_told(heads).await? {
            (Some(one), Some(other)) => {
                one.etag == entry.etag && other.etag == copy.etag && one.checksum.is_some() && one.checksum == other.checksum
            }
            _ => false,
        };
        Ok((entry, copy, same))
    }

    /// What this machine remembers of objects is true of the copies that an earlier run made, too.
    async fn remember_copies(&self, tree: &Tree, copied: &[Copied]) {
        let files = copied.iter().filter_map(|copy| copy.objects.as_ref().map(|(etag, object)| (copy, etag, object)));
        let (bucket, made) = (tree.to.store.bucket(), files.collect::<Vec<_>>());
        let asked = made.iter().map(|(copy, etag, object)| (copy.source.clone(), ETag::clone(etag), object.last_modified)).collect();
        let rows = self.memory.get_many(tree.from.store.bucket(), asked).await;
        for ((copy, _, object), row) in made.into_iter().zip(rows) {
            if let Some(row) = row {
                let place = tree.target_of(tree.below(&copy.source));
                self.memory.put(bucket, &place.key, Row { etag: object.etag.clone(), written: object.last_modified, ..row });
            }
        }
    }
}

/// What is on the list of copies is told by it, the rest by its ETag and size.
fn sort(tree: &Tree, objects: Vec<ListEntry>, under_new_name: &HashMap<String, ListEntry>, copies: &CopiesMade) -> Sorted {
    let (mut sorted, newest) = (Sorted::default(), tree.record.what().newest);
    let real = tree.from.store.capabilities().real_directories;
    for entry in objects {
        let below = tree.below(&entry.key);
        let (made, other) = (copies.get(below), under_new_name.get(below));
        match (made, other) {
            // It came after the rename was begun, or was changed since. A real directory changes with what is in it.
            _ if entry.last_modified > newest && !(real && is_marker(&entry)) => sorted.stays.push(entry.key),
            (Some(made), _) if made.from != entry.etag => sorted.stays.push(entry.key),
            (_, None) => sorted.missing.push(entry),
            (_, Some(other)) if is_marker(&entry) && is_marker(other) => {
                sorted.copied.push(Copied { source: entry.key, size: 0, objects: None });
            }
            (Some(made), Some(other)) if made.to == other.etag && entry.size == other.size => sorted.copied.push(copy_of(entry, other)),
            (None, Some(other)) if entry.etag == other.etag && entry.size == other.size => sorted.copied.push(copy_of(entry, other)),
            (None, Some(other)) if entry.size == other.size => sorted.doubtful.push((entry, other.clone())),
            _ => sorted.stays.push(entry.key),
        }
    }
    sorted
}

fn copy_of(entry: ListEntry, copy: &ListEntry) -> Copied {
    Copied { source: entry.key, size: entry.size, objects: Some((entry.etag, listed_object(copy))) }
}

fn note(tree: &Tree, copied: &[Copied], copies: &mut CopiesMade) {
    copies.extend(copied.iter().filter_map(|copy| Some((tree.below(&copy.source).to_owned(), copy.made()?))));
}
