//! What a directory's rename consists of, begun just now or by an earlier run: listing, copying, a look at every copy, deleting.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use futures::StreamExt;

use super::super::super::error::{Error, Result};
use super::super::super::inode::{Object, Place};
use super::super::super::lookup::{LINK_MAX, object_of};
use super::super::super::remember::Row;
use super::super::super::{Vfs, attr};
use super::super::copied_object;
use super::super::progress::{Failed, Progress};
use crate::failpoint;
use crate::s3::sweep::Lister;
use crate::s3::{self, DELETE_MOST, ETag, ErrorKind, ListEntry, ListPage, ListRequest, PutOutcome, Store};
use crate::writeback::{Attributes, CopyMade, RenameRecord};

/// A directory whose key changes.
pub(super) struct Tree {
    pub from: Place,
    pub to: Place,
    pub record: RenameRecord,
    pub progress: Arc<Progress>,
    /// Others may have put something under the new name since it was listed: each name is looked at before it is copied to.
    pub looks: bool,
    /// ETags that look like MD5s are none.
    pub opaque: AtomicBool,
}

impl Tree {
    pub fn new(from: Place, to: Place, record: RenameRecord, progress: Arc<Progress>, looks: bool) -> Self {
        Self { from, to, record, progress, looks, opaque: AtomicBool::new(false) }
    }

    /// What follows the directory's name in a key of the source.
    pub fn below<'a>(&self, key: &'a str) -> &'a str {
        key.get(self.from.key.len()..).unwrap_or_default()
    }

    pub fn target_of(&self, below: &str) -> Place {
        Place { store: self.to.store.clone(), key: format!("{}{below}", self.to.key) }
    }
}

/// An object of a tree that has its copy.
pub(super) struct Copied {
    pub source: String,
    pub size: u64,
    /// The version that was copied, and the copy; none of a marker.
    pub objects: Option<(ETag, Object)>,
}

impl Copied {
    pub fn made(&self) -> Option<CopyMade> {
        self.objects.as_ref().map(|(from, copy)| CopyMade { from: from.clone(), to: copy.etag.clone() })
    }
}

/// An object that a listing tells of, as far as it does.
pub(super) fn listed_object(entry: &ListEntry) -> Object {
    Object {
        etag: entry.etag.clone(),
        size: entry.size,
        version_id: None,
        last_modified: entry.last_modified,
        archived: false,
        checksum: None,
        attributes: None,
        decoded: false,
    }
}

/// A directory's own object.
pub(super) fn is_marker(entry: &ListEntry) -> bool {
    entry.size == 0 && entry.key.ends_with('/')
}

impl Vfs {
    /// Ends with the store's own words where it fails.
    pub(super) async fn within_told<T: Send>(&self, work: impl Future<Output = s3::Result<T>> + Send) -> Result<T, Failed> {
        let mut told = None;
        let work = async {
            work.await.map_err(|error| {
                told = Some(Failed::from(error.clone()));
                Error::from(error)
            })
        };
        let result = self.within(work).await;
        result.map_err(|error| told.unwrap_or_else(|| error.into()))
    }

    /// Gives every object below a prefix to `take`, page by page, in one listing that asks for several pages at once.
    pub(super) async fn list_below(&self, place: &Place, mut take: impl FnMut(Vec<ListEntry>) + Send) -> Result<(), Failed> {
        let request = ListRequest { prefix: place.key.clone(), ..ListRequest::default() };
        let first = self.within_told(place.store.list(request.clone())).await?;
        let mut sweep = self.sweep(&request, &first, lister(place.store.clone()));
        take(first.entries);
        while let Some(pages) = &mut sweep {
            match self.within_told(pages.next()).await? {
                Some(swept) => take(swept.page.entries),
                None => break,
            }
        }
        Ok(())
    }

    /// All objects below a prefix; refused over `rename_limit`, and then counted.
    pub(super) async fn list_tree(&self, place: &Place, progress: &Progress) -> Result<Vec<ListEntry>, Failed> {
        let limit = self.config.rename_limit;
        let (mut objects, mut count, mut bytes) = (Vec::new(), 0u64, 0u64);
        let mut take = |entries: Vec<ListEntry>| {
            count += entries.len() as u64;
            bytes += entries.iter().map(|entry| entry.size).sum::<u64>();
            // What is not to be renamed is only counted.
            if count > limit {
                objects = Vec::new();
            } else {
                objects.extend(entries);
            }
            progress.found(count, bytes);
        };
        self.list_below(place, &mut take).await?;
        if count <= limit {
            return Ok(objects);
        }
        let (bucket, key, count) = (place.store.bucket(), place.key.escape_debug(), grouped(count));
        let reason = format!(
            "s3://{bucket}/{key} holds {count} objects, more than rename_limit={limit}: mount with a greater one, or rename what is in it"
        );
        Err(Failed::new(Error::TooLarge, reason))
    }

    /// Copies objects, many at once. The first failure lets no other begin; what had begun comes to its end. Gives those that were
    /// not copied because somebody else's object has the new name.
    pub(super) async fn copy_all(&self, tree: &Tree, entries: Vec<ListEntry>, copied: &mut Vec<Copied>) -> Result<Vec<String>, Failed> {
        let failed = AtomicBool::new(false);
        let copies = entries.into_iter().map(|entry| self.copy_unless(tree, entry, &failed));
        let (mut kept, mut result) = (Vec::new(), Ok(()));
        let mut copies = futures::stream::iter(copies).buffer_unordered(self.config.max_connections);
        while let Some(copy) = copies.next().await {
            match copy {
                Ok(Some((_, Some(copy)))) => copied.push(copy),
                Ok(Some((key, None))) => kept.push(key),
                Ok(None) => {}
                Err(error) => result = result.and(Err(error)),
            }
        }
        result.map(|()| kept)
    }

    /// Copies one object and notes it, unless another copy has failed. Gives its key, and its copy unless the new name is somebody
    /// else's.
    async fn copy_unless(&self, tree: &Tree, entry: ListEntry, failed: &AtomicBool) -> Result<Option<(String, Option<Copied>)>, Failed> {
        if failed.load(Relaxed) {
            return Ok(None);
        }
        let (key, size) = (entry.key.clone(), entry.size);
        let copied = self.copy_below(tree, entry).await.inspect_err(|_| failed.store(true, Relaxed))?;
        if let Some(made) = copied.as_ref().and_then(Copied::made) {
            tree.record.copied(tree.below(&key), made).await;
        }
        failpoint::pass("tree-copied");
        tree.progress.copied(size);
        Ok(Some((key, copied)))
    }

    /// Copies one object. `None` where the new name is somebody else's.
    async fn copy_below(&self, tree: &Tree, entry: ListEntry) -> Result<Option<Copied>, Failed> {
        let source = Place { store: tree.from.store.clone(), key: entry.key.clone() };
        let target = tree.target_of(tree.below(&entry.key));
        // A marker is made anew: some stores keep none that could be copied (SeaweedFS), and only ours carry anything.
        if is_marker(&entry) {
            let row = self.recall_directory(&source).await;
            if row.is_none() && !source.store.capabilities().real_directories {
                // What it carries is not known here, and a listing does not tell.
                let kept = Attributes { storage_class: entry.storage_class.clone(), ..Attributes::default() };
                self.copy(&source, &target, &listed_object(&entry), &kept, &kept).await?;
            } else {
                let (stored, mtime) = row
                    .map_or((attr::Stored::default(), entry.last_modified), |row| (row.stored, row.mtime.unwrap_or(entry.last_modified)));
                self.within_told(self.put_marker(&target, stored, mtime)).await?;
            }
            return Ok(Some(Copied { source: entry.key, size: 0, objects: None }));
        }
        if tree.looks && self.within_told(async { found(target.store.head(&target.key).await) }).await?.is_some() {
            return Ok(None);
        }
        let row = self.memory.get(source.store.bucket(), &source.key, &entry.etag, entry.last_modified).await;
        let mut object = listed_object(&entry);
        let link = entry.sha1 && entry.size <= LINK_MAX;
        let single = entry.size <= source.store.capabilities().max_single_copy;
        let current = match single && !link {
            // CopyObject carries everything over but the class; only what is sent anew must be known.
            true => Attributes { storage_class: entry.storage_class.clone(), ..Attributes::default() },
            false => {
                let head = source.store.head(&source.key).await?;
                let tags = if head.tag_count > 0 { source.store.get_tags(&source.key).await? } else { Vec::new() };
                object = object_of(head);
                Attributes { tags, ..object.attributes.clone().unwrap_or_default() }
            }
        };
        let mut wanted = current.clone();
        if let Some(link) = row.as_ref().and_then(|row| row.target.as_deref()).filter(|link| !link.is_empty()) {
            wanted.headers.website_redirect = self.redirect_of(&target.key, link);
        }
        let outcome = self.copy(&source, &target, &object, &current, &wanted).await?;
        if single {
            self.check_answer(tree, &source, &object, &target, &outcome).await?;
        }
        if let Some(row) = row {
            let written = outcome.last_modified.unwrap_or_else(std::time::SystemTime::now);
            self.memory.put(target.store.bucket(), &target.key, Row { etag: outcome.etag.clone(), written, ..row });
        }
        let copy = copied_object(&object, &outcome);
        self.cache.rekey(&Self::version(&source, &object), &Self::version(&target, &copy)).await;
        Ok(Some(Copied { source: entry.key, size: object.size, objects: Some((object.etag, copy)) }))
    }

    /// Where both ETags are MD5s, a copy has its source's. Those of encrypted objects look like one and are none: what differs is
    /// looked at once, and says nothing from then on where checksums do not say that the bytes differ.
    async fn check_answer(&self, tree: &Tree, source: &Place, object: &Object, to: &Place, outcome: &PutOutcome) -> Result<(), Failed> {
        let comparable = object.etag.md5().is_some() && outcome.etag.md5().is_some();
        if !comparable || object.etag == outcome.etag || tree.opaque.load(Relaxed) {
            return Ok(());
        }
        let (one, other) = (source.store.head(&source.key).await?, to.store.head(&to.key).await?);
        let differ = one.checksum.zip(other.checksum).is_some_and(|(one, other)| one.kind() == other.kind() && one != other);
        if differ {
            let reason = format!("s3://{}/{}: its copy holds other bytes", source.store.bucket(), source.key.escape_debug());
            return Err(Failed::new(Error::Io, reason));
        }
        tree.opaque.store(true, Relaxed);
        Ok(())
    }

    /// One listing of the new name must hold every copy, with its size.
    pub(super) async fn verify(&self, tree: &Tree, copied: &[Copied]) -> Result<(), Failed> {
        // Where directories are real ones a marker may be none that is listed.
        let real = tree.to.store.capabilities().real_directories;
        let mut missing: HashMap<&str, u64> =
            copied.iter().filter(|copy| copy.objects.is_some() || !real).map(|copy| (tree.below(&copy.source), copy.size)).collect();
        if missing.is_empty() {
            return Ok(());
        }
        tree.progress.enters("verifying");
        let mut differs = None;
        let mut take = |entries: Vec<ListEntry>| {
            for entry in entries {
                let below = entry.key.get(tree.to.key.len()..).unwrap_or_default();
                if let Some(size) = missing.remove(below).filter(|size| *size != entry.size) {
                    differs.get_or_insert_with(|| format!("{} has {} bytes and not {size}", entry.key.escape_debug(), entry.size));
                }
            }
        };
        self.list_below(&tree.to, &mut take).await?;
        let gone = missing.keys().min().map(|below| format!("{}{} is not there", tree.to.key.escape_debug(), below.escape_debug()));
        match differs.or(gone) {
            Some(what) => Err(Failed::new(Error::Io, format!("after it was copied, s3://{}/{what}", tree.to.store.bucket()))),
            None => Ok(()),
        }
    }

    /// Deletes what was copied, as the version that was. Gives the keys that stay; on failure, whether something was deleted.
    pub(super) async fn delete_sources(&self, tree: &Tree, copied: &[Copied]) -> Result<Vec<String>, (Failed, bool)> {
        let store = &tree.from.store;
        tree.progress.deletes();
        // What is copied from them, and not published yet, is copied from where they are now.
        for (copy, (etag, object)) in copied.iter().filter_map(|copy| Some((copy, copy.objects.as_ref()?))) {
            let place = tree.target_of(tree.below(&copy.source));
            self.writeback.move_copies(store.bucket(), &copy.source, etag, &self.base_of(&place, object));
        }
        let (mut keys, mut markers): (Vec<_>, Vec<_>) = copied
            .iter()
            .map(|copy| (copy.source.clone(), copy.objects.as_ref().map(|(etag, _)| etag.clone())))
            .partition(|(_, etag)| etag.is_some());
        let real = store.capabilities().real_directories;
        if real {
            let known: HashSet<&str> = copied.iter().map(|copy| copy.source.as_str()).collect();
            let above: BTreeSet<&str> = known.iter().flat_map(|key| directories_of(key, tree.from.key.len())).collect();
            markers.extend(above.into_iter().filter(|key| !known.contains(key)).map(|key| (key.to_owned(), None)));
        }
        // Markers last, the deepest first: a real directory that loses its marker before its names stays.
        markers.sort_unstable_by(|(one, _), (other, _)| other.cmp(one));
        if keys.len() + markers.len() <= DELETE_MOST {
            keys.append(&mut markers);
        }
        let (mut stays, mut deleted) = (Vec::new(), false);
        let one_by_one = if real { 1 } else { self.config.max_connections };
        for (keys, lanes) in [(keys, self.config.max_connections), (markers, one_by_one)] {
            let batches: Vec<_> = keys.chunks(DELETE_MOST).map(|batch| delete_batch(tree, batch)).collect();
            let mut batches = futures::stream::iter(batches).buffer_unordered(lanes);
            let mut failed = None;
            while let Some(batch) = batches.next().await {
                match batch {
                    Ok((count, refused)) => {
                        deleted |= refused.len() < count;
                        for (key, error) in refused {
                            tracing::warn!("{key} was copied to its new name and stays under the old one too: {error}");
                            stays.push(key);
                        }
                    }
                    Err(error) => failed = failed.or(Some(error)),
                }
            }
            if let Some(error) = failed {
                return Err((error.into(), deleted));
            }
        }
        Ok(stays)
    }
}

/// Gives how many keys it was about, and those that stay.
async fn delete_batch(tree: &Tree, batch: &[(String, Option<ETag>)]) -> s3::Result<(usize, Vec<(String, s3::S3Error)>)> {
    let refused = tree.from.store.delete_many(batch).await?;
    failpoint::pass("tree-batch-deleted");
    tree.progress.deleted(batch.len());
    Ok((batch.len(), refused))
}

fn lister(store: Arc<dyn Store>) -> Lister {
    Arc::new(move |request| {
        let store = store.clone();
        Box::pin(async move { store.list(request).await as s3::Result<ListPage> })
    })
}

/// What a HEAD answered; `None` where there is no such object.
pub(super) fn found<T>(answer: s3::Result<T>) -> s3::Result<Option<T>> {
    match answer {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind == ErrorKind::NoSuchKey => Ok(None),
        Err(error) => Err(error),
    }
}

/// The directories that lead to a key, with their slashes, from the one whose key is `shortest` long down.
fn directories_of(key: &str, shortest: usize) -> impl Iterator<Item = &str> {
    key.match_indices('/').map(move |(at, _)| &key[..=at]).filter(move |directory| directory.len() >= shortest)
}

/// A number as people read it: `1,234,567`.
pub(super) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.char_indices() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped() {
        assert_eq!([0, 999, 1_000, 123_456, 1_234_567].map(grouped), ["0", "999", "1,000", "123,456", "1,234,567"]);
    }
}
