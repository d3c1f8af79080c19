//! rename: a file's key changes by a server-side copy and a delete, a tree's by many of them; what is not published yet just
//! changes its target.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::ffi::{OsStr, OsString};

use futures::{StreamExt, TryStreamExt};

use super::attr::Kind;
use super::error::{Error, Result};
use super::file::{row_of, target};
use super::inode::{Object, Place};
use super::listing::Listing;
use super::lookup::LINK_MAX;
use super::temporary::is_junk;
use super::{Caller, Ino, Vfs, attr};
use crate::failpoint;
use crate::s3::multipart::copy_object;
use crate::s3::{CopyMetadata, CopySource, ETag, ErrorKind, ListEntry, ListRequest, ObjectHead, PutOptions, PutOutcome};
use crate::writeback::{Attributes, Expect, Published, Staged};

/// Keys of one DeleteObjects (S3's own limit).
const DELETE_MOST: usize = 1000;

/// One name, and what it is to become.
struct Move {
    to: (Ino, OsString),
    segment: String,
    source: Place,
    target: Place,
    replaced: Option<Ino>,
    exclusive: bool,
}

impl Vfs {
    /// rename(2) and renameat2(2) with RENAME_NOREPLACE.
    pub async fn rename(&self, caller: Caller, parent: Ino, name: &OsStr, new_parent: Ino, new_name: &OsStr, flags: u32) -> Result<()> {
        self.check_removable()?;
        if flags & !libc::RENAME_NOREPLACE != 0 {
            return Err(Error::Invalid);
        }
        if self.is_account(parent) || self.is_account(new_parent) {
            tracing::warn!("a bucket cannot be renamed, and a file cannot be moved beside buckets");
            return Err(Error::NotPermitted);
        }
        let ino = self.within(self.resolve(parent, name)).await?;
        let replaced = match self.within(self.resolve(new_parent, new_name)).await {
            Ok(found) => Some(found),
            Err(Error::NoEntry) => None,
            Err(error) => return Err(error),
        };
        if replaced.is_some() && flags & libc::RENAME_NOREPLACE != 0 {
            return Err(Error::Exists);
        }
        if replaced == Some(ino) {
            return Ok(());
        }
        let kind = self.kind(ino)?;
        if let Some(other) = replaced {
            match (kind, self.kind(other)?) {
                (Kind::Directory, Kind::Directory) => self.within(self.require_empty(other)).await?,
                (Kind::Directory, _) => return Err(Error::NotDirectory),
                (_, Kind::Directory) => return Err(Error::IsDirectory),
                _ => {}
            }
        }
        if kind == Kind::Directory && self.table.lock().is_below(new_parent, ino) {
            return Err(Error::Invalid);
        }
        let (segment, target) = self.place_for_new(new_parent, new_name, kind == Kind::Directory)?;
        let step = Move {
            to: (new_parent, new_name.to_owned()),
            segment,
            source: self.place(ino)?,
            target,
            replaced,
            exclusive: flags & libc::RENAME_NOREPLACE != 0,
        };
        if kind == Kind::Directory {
            self.rename_tree(ino, &step).await?
        } else {
            self.rename_file(caller, ino, &step).await?
        }
        self.touch_parent(parent);
        self.touch_parent(new_parent);
        self.keep_directory(parent);
        Ok(())
    }

    async fn rename_file(&self, caller: Caller, ino: Ino, step: &Move) -> Result<()> {
        let order = self.order(ino)?;
        let _turn = order.lock().await;
        self.catch_up(ino);
        let (staged, object, held, over) = {
            let table = self.table.lock();
            let node = table.get(ino).ok_or(Error::Stale)?;
            let over = step.replaced.and_then(|other| table.get(other)).and_then(|node| node.object.clone());
            (node.file.staged.clone(), node.object.clone(), node.file.temporary, over)
        };
        let in_use = step.replaced.is_some_and(|other| self.handles.is_open(other));
        if let Some(over) = over.as_ref().filter(|_| in_use) {
            let _ = tokio::time::timeout(super::DEADLINE, self.keep_readable(&step.target, over)).await;
        }
        // A temporary name that is a key already is a file like any other.
        let temporary = self.temporary.classify(&step.to.1, caller.pid).filter(|_| over.is_none());
        let unsent = staged.as_ref().is_some_and(|staged| staged.is_dirty());
        // Queued whole contents take nothing of the object along: that is removed under the old name, and they go to the new one.
        let leaves = object.as_ref().filter(|_| {
            let whole = staged.as_ref().is_some_and(|staged| staged.is_dirty() && staged.is_whole());
            whole && !self.config.write_back.is_zero() && temporary.is_none()
        });
        if object.is_some() && leaves.is_none() {
            let unlinked = self.take_delete(&step.target).await?;
            let moved = async {
                if unsent {
                    self.publish_in_turn(ino).await?;
                }
                self.within(self.move_object(ino, step, unlinked.as_ref().and_then(|unlinked| unlinked.what.etag.as_ref()))).await
            };
            let moved = moved.await;
            return self.replaced(&step.target, unlinked, moved).await;
        }
        let Some(staged) = staged else { return Err(Error::Stale) };
        let unlinked = match temporary {
            None => self.take_delete(&step.target).await?,
            // The name is to be free, and nothing is published under it soon.
            Some(_) => self.within(self.settle_delete(&step.target)).await.map(|()| None)?,
        };
        let expect = match (&over, &unlinked) {
            (Some(over), _) => Expect::Version(over.etag.clone()),
            (None, Some(unlinked)) => unlinked.what.replaced_by(),
            (None, None) if step.exclusive => Expect::Absent,
            (None, None) => Expect::NewFile,
        };
        let guess = temporary.as_ref().and_then(|temporary| self.guess(step.to.0, temporary));
        // Under another name it is a whole new content, however it was written.
        if let Some(node) = self.table.lock().get_mut(ino) {
            node.file.appended_from = None;
        }
        staged.set_appended(false);
        staged.retarget_held(target(&step.target), expect, temporary.is_some(), guess).await?;
        if let Some(published) = staged.published() {
            // It was too late for another name: it has an object under the old one.
            staged.retarget_held(target(&step.source), Expect::Version(published.etag), false, None).await?;
            self.catch_up(ino);
            let etag = unlinked.as_ref().and_then(|unlinked| unlinked.what.etag.as_ref());
            let moved = self.within(self.move_object(ino, step, etag)).await;
            return self.replaced(&step.target, unlinked, moved).await;
        }
        staged.set_junk(temporary.is_some() && step.to.1.to_str().is_some_and(is_junk));
        staged.record_again().await?;
        failpoint::pass("rename-recorded");
        let replaces_unlinked = unlinked.is_some();
        match unlinked {
            Some(unlinked) if self.config.write_back.is_zero() => unlinked.forget().await,
            Some(unlinked) => staged.replaces(unlinked),
            None => {}
        }
        let (closed, left) = {
            let mut table = self.table.lock();
            let node = table.get_mut(ino).ok_or(Error::Stale)?;
            node.file.temporary = temporary.is_some();
            // Until ours is published the store holds what was unlinked under this name.
            let left = std::mem::replace(&mut node.file.recovered, replaces_unlinked);
            (node.file.writers == 0, left && !held)
        };
        if left {
            // What an earlier run queued may be a new version of an object that lies under the old name.
            self.within(self.delete(&step.source, None, false)).await?;
        } else if let Some(leaves) = leaves {
            self.within(self.delete(&step.source, Some(leaves.etag.clone()), false)).await?;
            self.memory.remove(step.source.store.bucket(), &step.source.key);
            if let Some(node) = self.table.lock().get_mut(ino) {
                node.object = None;
            }
        }
        let over = match self.relink(ino, step).await {
            // What was replaced had its publication on its way: that is the version which is there now.
            Some(published) if published.key == step.target.key && over.as_ref().is_none_or(|over| over.etag != published.etag) => {
                if temporary.is_none() {
                    staged.retarget(target(&step.target), Expect::Version(published.etag.clone())).await?;
                }
                Some(Object::from(&published))
            }
            _ => over,
        };
        // The store holds it under this name until ours is published: who removes or renames the file must reckon with it.
        if let Some(node) = self.table.lock().get_mut(ino).filter(|_| over.is_some()) {
            node.object = over.map(|over| Object { attributes: None, decoded: true, ..over });
        }
        // A temporary name that was closed has its content whole: the rename is what publishes it. An open one has its close to come.
        if held && temporary.is_none() && closed && staged.is_dirty() {
            if staged.size() == 0 {
                return self.publish_empty_later(ino, &staged).await;
            }
            let published = self.publish_patiently(ino).await;
            drop(_turn);
            self.retire(ino).await;
            return published;
        }
        Ok(())
    }

    /// Moves the node to its new name; what had the name is nobody's any more. Gives what that was published as, if it was here.
    async fn relink(&self, ino: Ino, step: &Move) -> Option<Published> {
        let replaced = {
            let mut table = self.table.lock();
            if let Some(node) = table.get_mut(ino) {
                node.ctime = std::time::SystemTime::now();
            }
            table.relink(ino, step.to.0, &step.to.1, step.segment.clone())
        };
        let replaced = replaced?;
        let staged = self.staged_now(replaced).ok().flatten()?;
        if self.handles.is_open(replaced) {
            // It can be read until it is closed.
            let _ = staged.withdraw().await;
        } else {
            self.discard_staged(replaced).await;
        }
        staged.published()
    }

    /// A published object: copied inside S3, then deleted under its old key, if it still is what was copied.
    /// `unlinked`: the version under the new name that was removed here and is in S3 still.
    async fn move_object(&self, ino: Ino, step: &Move, unlinked: Option<&ETag>) -> Result<()> {
        let (source, destination) = (&step.source, &step.target);
        let _source = self.guards.key(source.store.bucket(), &source.key).await;
        let _target = self.guards.key(destination.store.bucket(), &destination.key).await;
        let pending = self.writeback.cancel_metadata(source.store.bucket(), &source.key).await;
        self.writeback.cancel_metadata(destination.store.bucket(), &destination.key).await;
        self.require_unchanged(step, unlinked).await?;
        // A copy that was still running has given the object another ETag.
        let object = self.table.lock().get(ino).and_then(|node| node.object.clone()).ok_or(Error::Stale)?;
        let known = if object.attributes.is_some() { object.clone() } else { self.current_object(ino, source).await? };
        let current = known.attributes.clone().unwrap_or_default();
        let wanted = self.renamed(&pending.unwrap_or_else(|| current.clone()), &current, ino, source, destination);
        let outcome = self.copy(source, destination, &known, &current, &wanted).await?;
        failpoint::pass("rename-copied");
        match source.store.delete(&source.key, Some(known.etag.clone())).await {
            // Changed by somebody else since it was copied: their version stays, under the old name.
            Err(error) if matches!(error.kind, ErrorKind::PreconditionFailed | ErrorKind::Conflict) => tracing::warn!("{error}"),
            Err(error) if error.kind == ErrorKind::NotImplemented => source.store.delete(&source.key, None).await?,
            other => other?,
        }
        let from = Self::version(source, &known);
        if let Some(staged) = self.staged_now(ino)? {
            // Open for writing still: what is written from now on goes to the new name, where what it started from is too.
            self.move_staged(&staged, &known.etag, destination, copied_object(&known, &outcome)).await?;
        }
        self.relink(ino, step).await;
        let moved = self.moved(ino, outcome, wanted);
        self.memory.remove(source.store.bucket(), &source.key);
        if let Some(moved) = moved {
            let to = Self::version(destination, &moved);
            self.cache.rekey(&from, &to).await;
        }
        Ok(())
    }

    /// EBUSY where somebody else has changed what the rename would replace since it was seen here (promise 12): theirs stays,
    /// and ours under its old name. Not ESTALE: the kernel would look again and rename over theirs by itself. Asked for, because
    /// not every store honours a condition on CopyObject.
    /// EEXIST of RENAME_NOREPLACE likewise is what the store says, not what was listed.
    async fn require_unchanged(&self, step: &Move, unlinked: Option<&ETag>) -> Result<()> {
        let over = step.replaced.and_then(|other| self.table.lock().get(other).and_then(|node| node.object.as_ref()?.etag.clone().into()));
        let over = over.as_ref().or(unlinked);
        if over.is_none() && !step.exclusive {
            return Ok(());
        }
        let refusal = match (step.target.store.head(&step.target.key).await, over) {
            (Ok(_), None) => Error::Exists,
            (Ok(head), Some(over)) if head.etag != *over => Error::Busy,
            (Err(error), _) if error.kind != ErrorKind::NoSuchKey => return Err(error.into()),
            _ => return Ok(()),
        };
        tracing::warn!("{}: not renamed: {} was made or changed by somebody else meanwhile", step.source.key, step.target.key);
        let mut table = self.table.lock();
        if refusal == Error::Busy {
            table.unlink(step.to.0, &step.to.1);
        }
        if let Some(dir) = table.dir_mut(step.to.0) {
            dir.listing = None;
            dir.absent.clear();
        }
        Err(refusal)
    }

    /// The node is the copy from now on.
    fn moved(&self, ino: Ino, outcome: PutOutcome, attributes: Attributes) -> Option<Object> {
        let place = self.place(ino).ok()?;
        let (object, row) = {
            let mut table = self.table.lock();
            let node = table.get_mut(ino)?;
            let same_pages = node.file.kernel_pages.is_some();
            let object = node.object.as_mut()?;
            object.etag = outcome.etag;
            object.version_id = outcome.version_id;
            object.last_modified = outcome.last_modified.unwrap_or_else(std::time::SystemTime::now);
            object.attributes = Some(attributes);
            let object = object.clone();
            node.file.kernel_pages = same_pages.then(|| object.etag.clone());
            node.file.epoch += 1;
            node.checked = Some(std::time::Instant::now());
            (object.clone(), row_of(node, object.last_modified))
        };
        if let Some(row) = row {
            self.memory.put(place.store.bucket(), &place.key, row);
        }
        Some(object)
    }

    /// What the object carries under its new key: a type that its old name gave it follows the new name, a link's redirect its new place.
    fn renamed(&self, attributes: &Attributes, current: &Attributes, ino: Ino, from: &Place, to: &Place) -> Attributes {
        let mut wanted = attributes.clone();
        let by_name = |place: &Place| self.writeback.default_headers(place.store.bucket(), &place.key).content_type;
        let (old, new) = (by_name(from), by_name(to));
        let link = self.table.lock().get(ino).filter(|node| node.kind == Kind::Symlink).and_then(|node| node.target.clone());
        if current.headers.content_type == old && old != new && link.is_none() {
            wanted.headers.content_type = new;
        }
        if let Some(link) = link {
            wanted.headers.website_redirect = self.redirect_of(&to.key, &link);
        }
        wanted
    }

    /// One server-side copy with everything that the source carries, or what is wanted instead.
    async fn copy(&self, from: &Place, to: &Place, object: &Object, current: &Attributes, wanted: &Attributes) -> Result<PutOutcome> {
        let source = CopySource {
            bucket: from.store.bucket().to_owned(),
            key: from.key.clone(),
            if_match: Some(object.etag.clone()),
            version_id: None,
        };
        let changed = wanted.metadata != current.metadata || wanted.headers != current.headers;
        let metadata = if changed {
            CopyMetadata::Replace(Box::new(PutOptions {
                headers: wanted.headers.clone(),
                metadata: wanted.metadata.clone(),
                storage_class: wanted.storage_class.clone(),
                ..PutOptions::default()
            }))
        } else {
            CopyMetadata::Keep { website_redirect: wanted.headers.website_redirect.clone(), storage_class: wanted.storage_class.clone() }
        };
        let head = ObjectHead {
            size: object.size,
            etag: object.etag.clone(),
            last_modified: object.last_modified,
            metadata: wanted.metadata.clone(),
            headers: wanted.headers.clone(),
            storage_class: wanted.storage_class.clone(),
            version_id: None,
            checksum: None,
            restore: None,
            tag_count: u32::try_from(wanted.tags.len()).unwrap_or(u32::MAX),
        };
        Ok(copy_object(to.store.as_ref(), &to.key, source, &head, &wanted.tags, metadata, None).await?)
    }

    /// Moves all that is below a directory. Nothing that waits for its publication gets one under the old name meanwhile.
    async fn rename_tree(&self, dir: Ino, step: &Move) -> Result<()> {
        let queued: Vec<_> = {
            let table = self.table.lock();
            let files = table.below(dir).into_iter().filter_map(|ino| Some((ino, &table.get(ino)?.file)));
            let staged = files.filter(|(_, file)| !file.temporary).filter_map(|(ino, file)| Some((ino, file.staged.clone()?)));
            staged.filter(|(_, staged)| staged.is_queued()).collect()
        };
        for (_, staged) in &queued {
            staged.set_held(true, None);
            // Returns when what is on its way already has arrived, where the listing finds it.
            let _ = staged.retarget(staged.target(), staged.expect()).await;
        }
        let result = self.move_tree(dir, step).await;
        for (ino, staged) in queued {
            staged.set_held(false, None);
            match staged.publish_later(self.config.write_back).await {
                Ok(()) => self.follow_up(ino, &staged),
                Err(error) => tracing::warn!("{}: {error}", staged.target().key),
            }
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
        let mut keys = self.still_the_same(source, &copied).await.inspect_err(|error| {
            tracing::error!("{}: was copied to {} and stays under the old name too: {error:?}", source.key, destination.key);
        })?;
        if source.store.capabilities().real_directories {
            let known: HashSet<&str> = keys.iter().map(|(key, _)| key.as_str()).collect();
            let above: BTreeSet<&str> = known.iter().flat_map(|key| directories_of(key, source.key.len())).collect();
            let implied: Vec<String> = above.into_iter().filter(|key| !known.contains(key)).map(str::to_owned).collect();
            keys.extend(implied.into_iter().map(|key| (key, None)));
        }
        // Markers last, the deepest first: a real directory that loses its marker before its names stays.
        keys.sort_unstable_by(|(one, _), (other, _)| other.cmp(one));
        for batch in keys.chunks(DELETE_MOST) {
            for (key, error) in source.store.delete_many(batch).await? {
                tracing::warn!("{key} was copied to its new name and stays under the old one too: {error}");
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
                    let lasting = |listing: &Listing| listing.entries.iter().all(|entry| entry.object.is_none());
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

    /// The sources that are what was copied, to be deleted: not every store honours the ETags of a DeleteObjects. What somebody
    /// else has changed meanwhile stays where it is.
    async fn still_the_same(&self, source: &Place, copied: &[Copied]) -> Result<Vec<(String, Option<ETag>)>> {
        let now: HashMap<String, ETag> = self.list_tree(source).await?.into_iter().map(|entry| (entry.key, entry.etag)).collect();
        let unchanged = |copy: &&Copied| match (copy.etag(), now.get(&copy.source)) {
            (Some(copied), Some(now)) if copied != *now => {
                tracing::warn!("{}: changed by somebody else while it was renamed: their version stays under the old name", copy.source);
                false
            }
            (_, found) => found.is_some(),
        };
        Ok(copied.iter().filter(unchanged).map(|copy| (copy.source.clone(), copy.etag())).collect())
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
            self.memory.remove(source.store.bucket(), &source.key);
            return Ok(Copied { source: entry.key, objects: None });
        }
        let row = self.memory.get(source.store.bucket(), &source.key, &entry.etag, entry.last_modified).await;
        let mut object = super::inode::Object {
            etag: entry.etag.clone(),
            size: entry.size,
            version_id: None,
            last_modified: entry.last_modified,
            archived: false,
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
                object = super::lookup::object_of(head);
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
            self.memory.put(target.store.bucket(), &target.key, super::remember::Row { etag: outcome.etag.clone(), written, ..row });
            self.memory.remove(source.store.bucket(), &source.key);
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

    /// Staged content goes to `place`, where `copy` is a copy of the version `source` of its object.
    async fn move_staged(&self, staged: &Staged, source: &ETag, place: &Place, copy: Object) -> Result<()> {
        let expect = match staged.expect() {
            Expect::Version(known) if known == *source => Expect::Version(copy.etag.clone()),
            other => other,
        };
        staged.rebase(source, self.base_of(place, &copy));
        Ok(staged.retarget(target(place), expect).await?)
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

/// What a copy of `object` is.
fn copied_object(object: &Object, outcome: &PutOutcome) -> Object {
    Object {
        etag: outcome.etag.clone(),
        version_id: outcome.version_id.clone(),
        last_modified: outcome.last_modified.unwrap_or_else(std::time::SystemTime::now),
        ..object.clone()
    }
}
