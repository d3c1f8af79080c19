//! A directory's key changes by a copy of everything below it, and a delete once all of that is there.

use std::collections::{BTreeSet, HashSet};

use futures::{StreamExt, TryStreamExt};

use super::super::error::{Error, Result};
use super::super::file::target;
use super::super::inode::{Object, Place};
use super::super::listing::Listing;
use super::super::lookup::{LINK_MAX, object_of};
use super::super::remember::Row;
use super::super::{Ino, Vfs, attr};
use super::{Move, copied_object};
use crate::s3::{DELETE_MOST, ETag, ListEntry, ListRequest};
use crate::writeback::Attributes;

impl Vfs {
    /// Moves all that is below a directory. Nothing that waits for its publication gets one under the old name meanwhile.
    pub(super) async fn rename_tree(&self, dir: Ino, step: &Move) -> Result<()> {
        let files: Vec<Ino> = {
            let table = self.table.lock();
            let is_queued = |ino: &Ino| table.get(*ino).is_some_and(|node| node.file.staged.is_some() && !node.file.temporary);
            table.below(dir).into_iter().filter(is_queued).collect()
        };
        // What is on its way already arrives first, where the listing finds it.
        let queued = self.pause_queued(files.into_iter()).await?;
        let result = self.move_tree(dir, step).await;
        for paused in queued {
            let (ino, staged) = (paused.ino, paused.staged.clone());
            drop(paused);
            self.follow_up(ino, &staged);
        }
        result
    }

    /// Every object below the prefix is copied, and only when all copies are in are the sources deleted.
    async fn move_tree(&self, dir: Ino, step: &Move) -> Result<()> {
        let (source, destination) = (&step.source, &step.target);
        let _source = self.guards.tree(source.store.bucket(), &source.key).await;
        let _target = self.guards.tree(destination.store.bucket(), &destination.key).await;
        self.settle_deletes_below(source).await?;
        self.settle_deletes_below(destination).await?;
        self.require_room(step).await?;
        self.writeback.finish_metadata_below(source.store.bucket(), &source.key).await;
        let objects = self.list_tree(source).await?;
        let copies = futures::stream::iter(objects.into_iter().map(|entry| self.copy_below(source, destination, entry)));
        let copied: Vec<Copied> = match copies.buffer_unordered(self.config.max_connections).try_collect().await {
            Ok(copied) => copied,
            Err(error) => {
                tracing::error!(
                    "{}: the directory was not renamed: {error:?}; all of it is still there, and some of it is under {} too",
                    source.key,
                    destination.key
                );
                return Err(error);
            }
        };
        // What somebody else has changed meanwhile stays where it is.
        let mut keys: Vec<(String, Option<ETag>)> = copied.iter().map(|copy| (copy.source.clone(), copy.etag())).collect();
        if source.store.capabilities().real_directories {
            let known: HashSet<&str> = keys.iter().map(|(key, _)| key.as_str()).collect();
            let above: BTreeSet<&str> = known.iter().flat_map(|key| directories_of(key, source.key.len())).collect();
            let implied: Vec<String> = above.into_iter().filter(|key| !known.contains(key)).map(str::to_owned).collect();
            keys.extend(implied.into_iter().map(|key| (key, None)));
        }
        // Markers last, the deepest first: a real directory that loses its marker before its names stays.
        keys.sort_unstable_by(|(one, _), (other, _)| other.cmp(one));
        for batch in keys.chunks(DELETE_MOST) {
            let refused = source.store.delete_many(batch).await.inspect_err(|error| {
                tracing::error!("{}: was copied to {} and stays under the old name too: {error}", source.key, destination.key);
            })?;
            for (key, error) in refused {
                tracing::warn!("{key} was copied to its new name and stays under the old one too: {error}");
            }
        }
        for copy in &copied {
            self.forget_object(&Place { store: source.store.clone(), key: copy.source.clone() });
            let below = copy.source.get(source.key.len()..).unwrap_or_default();
            if let Some((_, object)) = &copy.objects {
                self.note_made(&Place { store: destination.store.clone(), key: format!("{}{below}", destination.key) }, object);
            }
        }
        self.retarget_below(dir, source, destination, &copied).await?;
        self.relink(dir, step).await;
        let mut table = self.table.lock();
        for ino in table.below(dir) {
            if let Some(node) = table.get_mut(ino) {
                node.checked = node.checked.filter(|_| ino == dir);
                node.file.kernel_pages = None;
                // Names stay as they are, ETags may not.
                if let Some(state) = node.dir.as_deref_mut() {
                    let lasting = |listing: &Listing| !listing.entries.has_objects();
                    state.listing = state.listing.take().filter(|listing| state.children.is_empty() && lasting(listing));
                }
            }
        }
        Ok(())
    }

    /// ENOTEMPTY (EEXIST with RENAME_NOREPLACE) where something lies below the target that nobody here has seen: asked for, not
    /// looked up in a listing, because copies would replace it.
    async fn require_room(&self, step: &Move) -> Result<()> {
        let target = &step.target;
        let below = ListRequest { prefix: target.key.clone(), max_keys: Some(2), ..ListRequest::default() };
        let page = self.within(async { Ok(target.store.list(below).await?) }).await?;
        if step.exclusive && !page.entries.is_empty() {
            return Err(Error::Exists);
        }
        let others = page.entries.iter().any(|entry| entry.key != target.key);
        if others { Err(Error::NotEmpty) } else { Ok(()) }
    }

    /// All objects below a prefix, refused over `rename_limit`.
    async fn list_tree(&self, place: &Place) -> Result<Vec<ListEntry>> {
        let mut objects = Vec::new();
        let mut request = ListRequest { prefix: place.key.clone(), ..ListRequest::default() };
        loop {
            let page = self.within(async { Ok(place.store.list(request.clone()).await?) }).await?;
            objects.extend(page.entries);
            if objects.len() as u64 > self.config.rename_limit {
                tracing::error!(
                    "{}: more than {} objects are not renamed at once: raise rename_limit, or rename its parts",
                    place.key,
                    self.config.rename_limit
                );
                return Err(Error::TooLarge);
            }
            match page.next {
                Some(next) => request.continuation = Some(next),
                None => return Ok(objects),
            }
        }
    }

    async fn copy_below(&self, from: &Place, to: &Place, entry: ListEntry) -> Result<Copied> {
        let below = entry.key.get(from.key.len()..).unwrap_or_default();
        let source = Place { store: from.store.clone(), key: entry.key.clone() };
        let target = Place { store: to.store.clone(), key: format!("{}{below}", to.key) };
        // A marker is made anew: some stores keep none that could be copied (SeaweedFS), and only ours carry anything.
        if entry.size == 0 && entry.key.ends_with('/') {
            let row = self.recall_directory(&source).await;
            let (stored, mtime) =
                row.map_or((attr::Stored::default(), entry.last_modified), |row| (row.stored, row.mtime.unwrap_or(entry.last_modified)));
            self.within(self.put_marker(&target, stored, mtime)).await?;
            return Ok(Copied { source: entry.key, objects: None });
        }
        let row = self.memory.get(source.store.bucket(), &source.key, &entry.etag, entry.last_modified).await;
        let mut object = Object {
            etag: entry.etag.clone(),
            size: entry.size,
            version_id: None,
            last_modified: entry.last_modified,
            archived: false,
            checksum: None,
            attributes: None,
            decoded: false,
        };
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
        if let Some(row) = row {
            let written = outcome.last_modified.unwrap_or_else(std::time::SystemTime::now);
            self.memory.put(target.store.bucket(), &target.key, Row { etag: outcome.etag.clone(), written, ..row });
        }
        let copy = copied_object(&object, &outcome);
        self.cache.rekey(&Self::version(&source, &object), &Self::version(&target, &copy)).await;
        Ok(Copied { source: entry.key, objects: Some((object.etag, copy)) })
    }

    /// Files of the tree that are not published yet go to its new place, and expect their own object's copy there.
    async fn retarget_below(&self, dir: Ino, from: &Place, to: &Place, copied: &[Copied]) -> Result<()> {
        let below = self.table.lock().below(dir);
        for ino in below {
            let Ok(Some(staged)) = self.staged_now(ino) else { continue };
            let now = staged.target();
            let Some(rest) = now.key.strip_prefix(&from.key) else { continue };
            let place = Place { store: to.store.clone(), key: format!("{}{rest}", to.key) };
            match copied.iter().find(|copy| copy.source == now.key).and_then(|copy| copy.objects.as_ref()) {
                Some((source, copy)) => {
                    if let Some(node) = self.table.lock().get_mut(ino) {
                        node.object = node.object.take().map(|known| if known.etag == *source { copy.clone() } else { known });
                    }
                    self.move_staged(&staged, source, &place, copy.clone()).await?;
                }
                None => staged.retarget(target(&place), staged.expect()).await?,
            }
        }
        Ok(())
    }
}

/// The directories that lead to a key, with their slashes, from the one whose key is `shortest` long down.
fn directories_of(key: &str, shortest: usize) -> impl Iterator<Item = &str> {
    key.match_indices('/').map(move |(at, _)| &key[..=at]).filter(move |directory| directory.len() >= shortest)
}

/// An object of a tree that has its copy.
struct Copied {
    source: String,
    /// The version that was copied, and the copy; none of a marker.
    objects: Option<(ETag, Object)>,
}

impl Copied {
    fn etag(&self) -> Option<ETag> {
        self.objects.as_ref().map(|(source, _)| source.clone())
    }
}
