//! A directory's key changes by a copy of everything below it, and a delete once all of that is there and was looked at. The rename is
//! on record until it has ended: the next mount goes on with one that was cut off.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::SystemTime;

use super::super::error::{Error, Result};
use super::super::file::target;
use super::super::guard::KeyGuard;
use super::super::inode::{Object, Place};
use super::super::listing::Listing;
use super::super::marker::is_marker;
use super::super::path::KEY_MAX;
use super::super::{Ino, Vfs};
use super::Move;
use super::progress::{Failed, Running};
use crate::failpoint;
use crate::s3::{ETag, ListEntry, ListRequest};
use crate::writeback::{RenameRecord, RenameStage, Staged, TreeRename};

mod resume;
mod steps;

use steps::{Copied, Tree, grouped};

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
        let unseen = self.pause_unseen(&step.source).await?;
        let result = self.move_tree(dir, step, &unseen).await;
        drop(unseen);
        for paused in queued {
            let (ino, staged) = (paused.ino, paused.staged.clone());
            drop(paused);
            self.follow_up(ino, &staged);
        }
        result
    }

    /// Every object below the prefix is copied, and only when all copies are in are the sources deleted.
    async fn move_tree(&self, dir: Ino, step: &Move, unseen: &Unseen<'_>) -> Result<()> {
        let (source, destination) = (&step.source, &step.target);
        let _guards = self.guard_both((source.store.bucket(), &source.key), (destination.store.bucket(), &destination.key)).await;
        self.still_there(dir, step)?;
        self.settle_deletes_below(source).await?;
        self.settle_deletes_below(destination).await?;
        self.require_room(step).await?;
        self.writeback.finish_metadata_below(source.store.bucket(), &source.key).await;
        let what = rename_of(source, destination, SystemTime::UNIX_EPOCH);
        let (names, running) = (what.names(), self.tree_renames.begin(&what, false));
        let moved = self.move_objects(source, destination, what, &running).await;
        let (tree, copied, ended) = moved.map_err(|failed| {
            let (from, to) = &names;
            let reason = format!("{}; nothing of it is deleted", failed.reason);
            tracing::error!("{from}: the directory was not renamed to {to}: {reason}");
            running.tell("failed", &reason);
            // Some of it may be there.
            self.look_again(step);
            failed.error
        })?;
        for copy in &copied {
            self.forget_object(&Place { store: source.store.clone(), key: copy.source.clone() });
            if let Some((_, object)) = &copy.objects {
                self.note_made(&tree.target_of(tree.below(&copy.source)), object);
            }
        }
        let retargeted = self.retarget_below(dir, &tree, &copied, unseen).await;
        failpoint::pass("tree-deleted");
        self.relink(dir, step).await;
        self.forget_below(dir);
        // Else it is on record still: what is queued goes to the new name at the next mount.
        retargeted?;
        match ended {
            Ended::Whole => tree.record.forget().await,
            Ended::Kept(reason) => {
                running.tell("done", &reason);
                tree.record.forget().await;
            }
            Ended::Later => self.resume_later(tree.record),
        }
        Ok(())
    }

    /// Keeps others out of two trees: always in the same order, so that two renames never wait for each other.
    async fn guard_both(&self, one: (&str, &str), other: (&str, &str)) -> [KeyGuard; 2] {
        let (first, second) = (one.min(other), one.max(other));
        [self.guards.tree(first.0, first.1).await, self.guards.tree(second.0, second.1).await]
    }

    /// Copies, looks and deletes. On failure nothing was deleted, and it is not on record any more.
    async fn move_objects(
        &self,
        source: &Place,
        destination: &Place,
        what: TreeRename,
        running: &Running,
    ) -> Result<(Tree, Vec<Copied>, Ended), Failed> {
        let objects = self.list_tree(source, &running.progress).await?;
        let longest = objects.iter().map(|entry| entry.key.len() - source.key.len()).max().unwrap_or_default();
        if destination.key.len() + longest > KEY_MAX {
            return Err(Failed::new(Error::NameTooLong, format!("a key below the new name would be longer than {KEY_MAX} bytes")));
        }
        let newest = objects.iter().map(|entry| entry.last_modified).max().unwrap_or(what.newest);
        let record = self.writeback.begin_rename(TreeRename { newest, ..what }).await.map_err(Error::from)?;
        failpoint::pass("tree-recorded");
        let mut tree = Tree::new(source.clone(), destination.clone(), record, running.progress.clone(), false);
        let mut copied = Vec::with_capacity(objects.len());
        if let Err(failed) = self.copy_and_look(&mut tree, objects, &mut copied).await {
            let reason = format!(
                "{}; {} of {} objects are under the new name too, and are to be removed there before it is renamed again",
                failed.reason,
                copied.len(),
                tree.progress.objects()
            );
            tree.record.forget().await;
            return Err(Failed { reason, ..failed });
        }
        let ended = match self.delete_sources(&tree, &copied).await {
            Ok(stays) if stays.is_empty() => Ended::Whole,
            Ok(stays) => Ended::Kept(stay(&stays)),
            Err((failed, deleted)) if !deleted && !failed.passes => {
                tree.record.forget().await;
                return Err(Failed {
                    reason: format!(
                        "{}; all of it is under the new name too, and is to be removed there before it is renamed again",
                        failed.reason
                    ),
                    ..failed
                });
            }
            // All of it is under the new name.
            Err((failed, _)) => {
                tracing::warn!("{}: was renamed, and is deleted under the old name later: {}", source.key, failed.reason);
                Ended::Later
            }
        };
        Ok((tree, copied, ended))
    }

    /// Copies what there is, and writes down that all of it is copied once it was looked at.
    async fn copy_and_look(&self, tree: &mut Tree, objects: Vec<ListEntry>, copied: &mut Vec<Copied>) -> Result<(), Failed> {
        tree.progress.enters("copying");
        self.copy_all(tree, objects, copied).await?;
        self.verify(tree, copied).await?;
        failpoint::pass("tree-verified");
        tree.record.all_copied().await.map_err(Error::from)?;
        Ok(())
    }

    /// What is known of a directory that got another name: names stay as they are, ETags may not.
    fn forget_below(&self, dir: Ino) {
        let mut table = self.table.lock();
        for ino in table.below(dir) {
            if let Some(node) = table.get_mut(ino) {
                node.checked = node.checked.filter(|_| ino == dir);
                node.file.kernel_pages = None;
                if let Some(state) = node.dir.as_deref_mut() {
                    let lasting = |listing: &Listing| !listing.entries.has_objects();
                    state.listing = state.listing.take().filter(|listing| state.children.is_empty() && lasting(listing));
                }
            }
        }
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

    /// Files of the tree that are not published yet go to its new place, and expect their own object's copy there.
    async fn retarget_below(&self, dir: Ino, tree: &Tree, copied: &[Copied], unseen: &Unseen<'_>) -> Result<()> {
        let copies: HashMap<&str, &(ETag, Object)> =
            copied.iter().filter_map(|copy| Some((copy.source.as_str(), copy.objects.as_ref()?))).collect();
        let below = self.table.lock().below(dir);
        let seen = below.into_iter().filter_map(|ino| Some((Some(ino), self.staged_now(ino).ok()??)));
        let unseen = unseen.files.iter().filter(|staged| staged.is_dirty()).map(|staged| (None, staged.clone()));
        let files: Vec<(Option<Ino>, Arc<Staged>)> = seen.chain(unseen).collect();
        for (ino, staged) in files {
            let now = staged.target();
            let Some(rest) = now.key.strip_prefix(&tree.from.key) else { continue };
            let place = tree.target_of(rest);
            if is_marker(&staged) {
                self.remember_marker(&place, &staged.attributes());
            }
            match copies.get(now.key.as_str()) {
                Some((source, copy)) => {
                    if let Some(ino) = ino {
                        self.is_copy_now(ino, source, copy);
                    }
                    self.move_staged(&staged, source, &place, copy.clone()).await?;
                }
                None => staged.retarget(target(&place), staged.expect()).await?,
            }
        }
        Ok(())
    }

    /// The object of a file, if it is this version, is its copy from now on.
    fn is_copy_now(&self, ino: Ino, source: &ETag, copy: &Object) {
        if let Some(node) = self.table.lock().get_mut(ino) {
            node.object = node.object.take().map(|known| if known.etag == *source { copy.clone() } else { known });
        }
    }

    /// Nothing that an earlier run left below a directory, and nobody has looked at yet, is published until this is dropped.
    async fn pause_unseen(&self, place: &Place) -> Result<Unseen<'_>> {
        let unseen = Unseen { vfs: self, files: self.recovered.take_below(place.store.bucket(), &place.key) };
        for staged in &unseen.files {
            let pauses = async {
                staged.pause().await;
                Ok(())
            };
            self.patiently(pauses).await?;
        }
        Ok(unseen)
    }

    /// The deletes go on in the background.
    fn resume_later(&self, record: RenameRecord) {
        if let Some(this) = self.shared() {
            self.spawn(async move { this.resume_rename(record, false).await });
        }
    }
}

/// Files that an earlier run left. Dropped, they go on, and belong into the directory that they have by then.
struct Unseen<'a> {
    vfs: &'a Vfs,
    files: Vec<Arc<Staged>>,
}

impl Drop for Unseen<'_> {
    fn drop(&mut self) {
        for staged in self.files.drain(..) {
            staged.resume();
            self.vfs.recovered.put_back(staged);
        }
    }
}

/// How a rename came to its end whose copies are all there.
enum Ended {
    /// Nothing is left under the old name.
    Whole,
    /// Something stays there, which is to be said.
    Kept(String),
    /// The deletes go on later.
    Later,
}

fn rename_of(source: &Place, destination: &Place, newest: SystemTime) -> TreeRename {
    TreeRename {
        bucket: source.store.bucket().to_owned(),
        key: source.key.clone(),
        to_bucket: destination.store.bucket().to_owned(),
        to_key: destination.key.clone(),
        stage: RenameStage::Copying,
        newest,
        found: false,
    }
}

/// Says of keys that they stay under the old name.
fn stay(keys: &[String]) -> String {
    let count = grouped(keys.len() as u64);
    let first = keys.iter().min().map(|key| key.escape_debug().to_string()).unwrap_or_default();
    let (objects, stay) = if keys.len() == 1 { ("object", "stays") } else { ("objects", "stay") };
    format!(
        "{count} {objects} {stay} under the old name, because somebody else has changed or made them under one of the two names, or the store keeps them: {first}"
    )
}
