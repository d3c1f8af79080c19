//! rename: a file's key changes by a server-side copy and a delete, a tree's by many of them; what is not published yet just
//! changes its target.

use std::ffi::{OsStr, OsString};
use std::sync::Arc;

use super::attr::Kind;
use super::error::{Error, Result};
use super::file::{row_of, target};
use super::inode::{Object, Place, Relinked};
use super::path::name_of;
use super::queued::split;

use super::{Caller, Ino, Vfs};
use crate::failpoint;
use crate::s3::multipart::copy_object;
use crate::s3::{self, CopyMetadata, CopySource, ETag, ErrorKind, ObjectHead, PutOptions, PutOutcome, delete_version};
use crate::writeback::{Attributes, Expect, OnConflict, Staged, Writeback};

mod progress;
mod refused;
mod staged;
mod tree;

pub use progress::{RenameReport, TreeRenames};
use refused::Asked;
pub use refused::RefusedRenames;

/// One name, and what it is to become.
#[derive(Clone)]
struct Move {
    asked: Asked,
    to: (Ino, OsString),
    segment: String,
    source: Place,
    target: Place,
    replaced: Option<Ino>,
    exclusive: bool,
}

/// What a rename of a file finds.
struct Found {
    staged: Option<Arc<Staged>>,
    object: Option<Object>,
    /// It waits for its publication, and takes nothing from its object.
    is_queued_whole: bool,
    /// Its name is a temporary one.
    held: bool,
    /// The object that has the new name.
    over: Option<Object>,
    /// What was to replace that version in S3 is replaced itself: the version is still what ours finds there.
    queued: Option<Arc<Staged>>,
    /// An object that nobody here knows may lie under the new name.
    stands: bool,
}

/// A queued file that is not published meanwhile. Dropped, by an end as by a deadline, it goes on.
pub(super) struct Paused {
    ino: Ino,
    staged: Arc<Staged>,
}

impl Drop for Paused {
    fn drop(&mut self) {
        self.staged.resume();
    }
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
        let ino = self.patiently(self.resolve(parent, name)).await?;
        let asked = Asked { caller: caller.pid, from: (parent, name.to_owned()), to: (new_parent, new_name.to_owned()) };
        if self.was_refused(&asked) {
            return Err(Error::Stale);
        }
        let replaced = match self.patiently(self.resolve(new_parent, new_name)).await {
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
                (Kind::Directory, Kind::Directory) => self.patiently(self.require_empty(other)).await?,
                (Kind::Directory, _) => return Err(Error::NotDirectory),
                (_, Kind::Directory) => return Err(Error::IsDirectory),
                _ => {}
            }
        }
        if kind == Kind::Directory && self.table.lock().is_below(new_parent, ino) {
            return Err(Error::Invalid);
        }
        let (segment, target) = self.place_for_new(new_parent, new_name, kind == Kind::Directory)?;
        self.patiently(self.settle_other_kind(&target)).await?;
        let step = Move {
            asked,
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
        let turn = order.lock().await;
        // An upload that nobody waits for must not end under a name that is about to be another file's, or in the middle of a copy.
        let paused = self.pause_queued([Some(ino), step.replaced].into_iter().flatten()).await?;
        let renamed = self.rename_in_turn(caller, ino, step).await;
        drop((paused, turn));
        // What was closed under a temporary name is published by now, unless it waits.
        self.retire(ino).await;
        renamed
    }

    /// Pauses what is queued of these files; what had been on its way already is taken in.
    pub(super) async fn pause_queued(&self, files: impl Iterator<Item = Ino>) -> Result<Vec<Paused>> {
        let mut paused = Vec::new();
        for ino in files {
            if let Some(staged) = self.staged_now(ino).ok().flatten().filter(|staged| staged.is_queued()) {
                paused.push(Paused { ino, staged: staged.clone() });
                let pauses = async {
                    staged.pause().await;
                    Ok(())
                };
                self.patiently(pauses).await?;
            }
            self.catch_up(ino);
        }
        Ok(paused)
    }

    async fn rename_in_turn(&self, caller: Caller, ino: Ino, step: &Move) -> Result<()> {
        let found = self.find(ino, step)?;
        let in_use = step.replaced.is_some_and(|other| self.handles.is_open(other));
        if let Some(over) = found.over.as_ref().filter(|_| in_use) {
            let _ = tokio::time::timeout(super::deadline::DEADLINE, self.keep_readable(&step.target, over)).await;
        }
        // A temporary name that is a key already is a file like any other.
        let temporary = self.temporary.classify(&step.to.1, caller.pid).filter(|_| found.over.is_none());
        match found.staged.clone() {
            // Queued whole contents take nothing of the object along: that is removed under the old name, and they go to the new one.
            Some(staged) if found.object.is_none() || found.is_queued_whole && temporary.is_none() => {
                self.rename_staged(ino, step, found, staged, temporary).await
            }
            None if found.object.is_none() => Err(Error::Stale),
            staged => self.rename_object(ino, step, staged.is_some_and(|staged| staged.is_dirty()), found.queued).await,
        }
    }

    fn find(&self, ino: Ino, step: &Move) -> Result<Found> {
        let table = self.table.lock();
        let node = table.get(ino).ok_or(Error::Stale)?;
        let other = step.replaced.and_then(|other| table.get(other));
        let whole = node.file.staged.as_ref().is_some_and(|staged| staged.is_dirty() && staged.is_whole());
        Ok(Found {
            staged: node.file.staged.clone(),
            object: node.object.clone(),
            is_queued_whole: whole && !self.config.write_back.is_zero(),
            held: node.file.temporary,
            over: other.and_then(|other| other.object.clone()),
            queued: other.and_then(|other| other.file.staged.clone()).filter(|queued| queued.is_dirty()),
            stands: other.is_some_and(|other| other.file.recovered),
        })
    }

    /// A file that has an object moves with it. `unsent`: it has changes, which are published first. `queued`: what was to replace the
    /// version in S3 under the new name, and is replaced itself.
    async fn rename_object(&self, ino: Ino, step: &Move, unsent: bool, queued: Option<Arc<Staged>>) -> Result<()> {
        let unlinked = self.take_delete(&step.target).await?;
        let moved = async {
            if unsent {
                self.publish_in_turn(ino).await?;
            }
            let below = match queued.map(|queued| queued.expect()) {
                Some(Expect::Version(etag)) => Some(etag),
                _ => unlinked.as_ref().and_then(|unlinked| unlinked.etag().cloned()),
            };
            self.move_object(ino, step, below.as_ref()).await
        };
        let moved = moved.await;
        self.replaced(unlinked, moved).await
    }

    /// Moves the node to its new name; what had the name is nobody's any more.
    async fn relink(&self, ino: Ino, step: &Move) {
        let Relinked { replaced, forgotten } = {
            let mut table = self.table.lock();
            if let Some(node) = table.get_mut(ino) {
                node.ctime = std::time::SystemTime::now();
            }
            if table.dir(ino).is_some() {
                table.surveys.forget(&step.source);
                table.surveys.forget(&step.target);
            }
            table.relink(ino, step.to.0, &step.to.1, step.segment.clone())
        };
        self.let_go(replaced).await;
        for ino in forgotten {
            let Ok(Some(staged)) = self.staged_now(ino) else { continue };
            let moved = async { Ok(staged.retarget(target(&step.target), staged.expect()).await?) };
            if let Err(error) = self.within(moved).await {
                tracing::error!("{}: what others have replaced stays under the old name: {error:?}", step.source.key);
            }
        }
    }

    /// A published object: copied inside S3, then deleted under its old key, if it still is what was copied. Where that fails, the old
    /// name is what it was.
    /// `unlinked`: the version under the new name that was removed here and is in S3 still.
    async fn move_object(&self, ino: Ino, step: &Move, unlinked: Option<&ETag>) -> Result<()> {
        let (source, theirs) = (&step.source, &step.target);
        let guards = async {
            let source = self.guards.key(source.store.bucket(), &source.key).await;
            Ok((source, self.guards.key(theirs.store.bucket(), &theirs.key).await))
        };
        let _guards = self.within(guards).await?;
        self.still_there(ino, step)?;
        let known = async {
            let pending = self.writeback.cancel_metadata(source.store.bucket(), &source.key).await;
            self.writeback.cancel_metadata(theirs.store.bucket(), &theirs.key).await;
            self.writeback.release_copies(theirs.store.bucket(), &theirs.key).await;
            let beside = self.beside_theirs(step, unlinked).await?;
            // A copy that was still running has given the object another ETag.
            let object = self.table.lock().get(ino).and_then(|node| node.object.clone()).ok_or(Error::Stale)?;
            let known = if object.attributes.is_some() { object } else { self.current_object(ino, source).await? };
            Ok((pending, beside, known))
        };
        let (pending, beside, known) = self.within(known).await?;
        let step = beside.as_ref().unwrap_or(step);
        let destination = &step.target;
        let current = known.attributes.clone().unwrap_or_default();
        let wanted = self.renamed(&pending.unwrap_or_else(|| current.clone()), &current, ino, source, destination);
        let outcome = self.copy(source, destination, &known, &current, &wanted).await?;
        self.writeback.move_copies(
            source.store.bucket(),
            &source.key,
            &known.etag,
            &self.base_of(destination, &copied_object(&known, &outcome)),
        );
        failpoint::pass("rename-copied");
        let deleted = async { Ok(delete_version(source.store.as_ref(), &source.key, Some(known.etag.clone())).await) };
        match self.within(deleted).await {
            // Changed by somebody else since it was copied: their version stays, under the old name.
            Ok(Err(error)) if matches!(error.kind, ErrorKind::PreconditionFailed | ErrorKind::Conflict) => tracing::warn!("{error}"),
            Ok(Ok(())) => {}
            failed => {
                tracing::error!("{}: was copied to {} and stays under the old name too", source.key, destination.key);
                self.look_again(step);
                failed?.map_err(Error::from)?;
            }
        }
        let from = Self::version(source, &known);
        if let Some(staged) = self.staged_now(ino)? {
            // Open for writing still: what is written from now on goes to the new name, where what it started from is too.
            self.move_staged(&staged, &known.etag, destination, copied_object(&known, &outcome)).await?;
        }
        self.relink(ino, step).await;
        let moved = self.moved(ino, outcome, wanted);
        self.forget_object(source);
        if let Some(moved) = moved {
            let to = Self::version(destination, &moved);
            self.cache.rekey(&from, &to).await;
        }
        if beside.is_some() {
            self.writeback.kept_beside(theirs.store.bucket(), &theirs.key, &destination.key);
        }
        Ok(())
    }

    /// ESTALE where a directory above one of the names got another one meanwhile: both are looked up again.
    fn still_there(&self, ino: Ino, step: &Move) -> Result<()> {
        let (_, target) = self.place_for_new(step.to.0, &step.to.1, self.kind(ino)? == Kind::Directory)?;
        if self.place(ino)?.is(&step.source) && target.is(&step.target) { Ok(()) } else { Err(Error::Stale) }
    }

    /// What somebody else has made of the name that a published object gets, since it was seen here, is not replaced silently
    /// (promise 12): gives the name beside it that ours gets instead, or fails. Asked for, because not every store honours a condition on
    /// CopyObject. EEXIST of RENAME_NOREPLACE likewise is what the store says, not what was listed.
    async fn beside_theirs(&self, step: &Move, unlinked: Option<&ETag>) -> Result<Option<Move>> {
        let over = step.replaced.and_then(|other| self.table.lock().get(other).and_then(|node| node.object.as_ref()?.etag.clone().into()));
        let over = over.as_ref().or(unlinked);
        let policy = self.writeback.on_conflict();
        if !step.exclusive && (over.is_none() || policy == OnConflict::Overwrite) {
            return Ok(None);
        }
        match (step.target.store.head(&step.target.key).await, over) {
            (Ok(_), None) => {}
            (Ok(head), Some(over)) if head.etag != *over => {}
            (Err(error), _) if error.kind != ErrorKind::NoSuchKey => return Err(error.into()),
            _ => return Ok(None),
        }
        self.look_again(step);
        let (from, to) = (&step.source.key, &step.target.key);
        if step.exclusive {
            tracing::warn!("{from}: not renamed: {to} was made by somebody else meanwhile");
            return Err(Error::Exists);
        }
        if policy == OnConflict::Fail {
            tracing::warn!("{from}: not renamed: {to} was changed by somebody else meanwhile");
            return Err(self.refuse(step, None));
        }
        let key = Writeback::key_beside(to);
        tracing::warn!("{to}: changed by somebody else meanwhile: {from} is kept beside it as {key}");
        let segment = split(&key).1.to_owned();
        let to = (step.to.0, name_of(&segment));
        let target = Place { store: step.target.store.clone(), key };
        Ok(Some(Move { to, segment, target, replaced: None, ..step.clone() }))
    }

    /// What the new name means is looked for anew.
    fn look_again(&self, step: &Move) {
        let (parent, name) = &step.asked.to;
        {
            let mut table = self.table.lock();
            table.unlink(*parent, name);
            if let Some(dir) = table.dir_mut(*parent) {
                dir.listing = None;
                dir.absent.clear();
            }
        }
        // The kernel takes a rename that was answered well for what it asked for.
        self.tell(|notify| notify.invalidate_entry(*parent, name));
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
        self.note_made(&place, &object);
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
    async fn copy(&self, from: &Place, to: &Place, object: &Object, current: &Attributes, wanted: &Attributes) -> s3::Result<PutOutcome> {
        let source = CopySource {
            bucket: from.store.bucket().to_owned(),
            key: from.key.clone(),
            if_match: Some(object.etag.clone()),
            version_id: None,
            checksum: object.checksum,
        };
        let mut tags = wanted.tags.clone();
        if tags.is_empty() && object.size > to.store.capabilities().max_single_copy {
            // Copied in parts they are to be sent again, and not every store's HEAD tells that there are some.
            tags = match from.store.get_tags(&from.key).await {
                Err(error) if error.kind.passes() => return Err(error),
                // Whoever may not read them, or whose store has none.
                asked => asked.unwrap_or_default(),
            };
        }
        let acl = from.store.get_acl(&from.key).await?;
        let changed = wanted.metadata != current.metadata || wanted.headers != current.headers;
        let metadata = if changed {
            CopyMetadata::Replace(Box::new(PutOptions {
                headers: wanted.headers.clone(),
                metadata: wanted.metadata.clone(),
                storage_class: wanted.storage_class.clone(),
                acl,
                ..PutOptions::default()
            }))
        } else {
            CopyMetadata::Keep {
                website_redirect: wanted.headers.website_redirect.clone(),
                storage_class: wanted.storage_class.clone(),
                acl,
            }
        };
        let head = ObjectHead {
            size: object.size,
            etag: object.etag.clone(),
            last_modified: object.last_modified,
            metadata: wanted.metadata.clone(),
            headers: wanted.headers.clone(),
            storage_class: wanted.storage_class.clone(),
            version_id: None,
            checksum: object.checksum,
            restore: None,
            tag_count: u32::try_from(tags.len()).unwrap_or(u32::MAX),
        };
        let outcome = copy_object(to.store.as_ref(), &to.key, source, &head, &tags, metadata, self.config.close_timeout).await?;
        self.writeback.supersede(to.store.bucket(), &to.key).await;
        Ok(outcome)
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

/// What a copy of `object` is.
fn copied_object(object: &Object, outcome: &PutOutcome) -> Object {
    Object {
        etag: outcome.etag.clone(),
        version_id: outcome.version_id.clone(),
        last_modified: outcome.last_modified.unwrap_or_else(std::time::SystemTime::now),
        ..object.clone()
    }
}
