//! A file whose content the store does not hold changes the name that it is published under.

use std::sync::Arc;

use super::super::deletes::Taken;
use super::super::error::{Error, Result};
use super::super::file::target;
use super::super::inode::Object;
use super::super::temporary::{Temporary, is_junk};
use super::super::{Ino, Vfs};
use super::{Found, Move};
use crate::failpoint;
use crate::s3::ETag;
use crate::writeback::{Expect, Staged};

impl Vfs {
    /// `temporary`: what the new name is, if it is one under which nothing is published.
    pub(super) async fn rename_staged(
        &self,
        ino: Ino,
        step: &Move,
        found: Found,
        staged: Arc<Staged>,
        temporary: Option<Temporary>,
    ) -> Result<()> {
        let Found { object, held, over, queued, stands, .. } = found;
        let unlinked = match temporary {
            None => self.take_delete(&step.target).await?,
            // The name is to be free, and nothing is published under it soon.
            Some(_) => self.patiently(self.settle_delete(&step.target)).await.map(|()| None)?,
        };
        let expect = match (&queued, &over, &unlinked) {
            (Some(queued), ..) => match queued.expect() {
                Expect::Absent => Expect::NewFile,
                expect => expect,
            },
            (None, Some(over), _) => Expect::Version(over.etag.clone()),
            (None, None, Some(unlinked)) => unlinked.replaced_by(),
            (None, None, None) if step.exclusive => Expect::Absent,
            (None, None, None) => Expect::NewFile,
        };
        let guess = temporary.as_ref().and_then(|temporary| self.guess(step.to.0, temporary));
        let mut leaves = object;
        let ahead = self.leave_ahead(step, leaves.as_ref()).await?;
        failpoint::pass("rename-left");
        if let Err(error) = staged.retarget_held(target(&step.target), expect, temporary.is_some(), guess).await {
            // What the store says to that tells nobody why the rename failed.
            let _ = self.withdraw_ahead(step, ahead).await;
            return Err(error.into());
        }
        if let Some(published) = staged.published() {
            if !staged.is_dirty() {
                // It was too late for another name: it has an object under the old one.
                self.withdraw_ahead(step, ahead).await?;
                staged.retarget_held(target(&step.source), Expect::Version(published.etag), false, None).await?;
                self.catch_up(ino);
                let etag = unlinked.as_ref().and_then(Taken::etag);
                let moved = self.move_object(ino, step, etag).await;
                return self.replaced(unlinked, moved).await;
            }
            // That of an earlier content has the old name, and stays behind.
            self.catch_up(ino);
            leaves = self.table.lock().get(ino).and_then(|node| node.object.clone());
        }
        staged.set_junk(temporary.is_some() && step.to.1.to_str().is_some_and(is_junk));
        let closed = !self.handles.is_written(ino);
        // A temporary name that was closed has its content whole: the rename is what publishes it. An open one has its close to come.
        let publishes = held && temporary.is_none() && closed && staged.is_dirty();
        if publishes && queued.is_some() {
            // What was promised under this name is given up below.
            staged.promise().await?;
        } else {
            staged.record_again().await?;
        }
        failpoint::pass("rename-recorded");
        let replaces_unlinked = unlinked.is_some() || stands;
        if let Some(queued) = &queued {
            staged.inherit(queued);
        }
        match unlinked.and_then(Taken::confirm) {
            Some(unlinked) if self.config.write_back.is_zero() => unlinked.forget().await,
            Some(unlinked) => staged.replaces(unlinked),
            None => {}
        }
        let left = {
            let mut table = self.table.lock();
            let node = table.get_mut(ino).ok_or(Error::Stale)?;
            node.file.temporary = temporary.is_some();
            // Until ours is published the store holds what was unlinked under this name.
            let left = std::mem::replace(&mut node.file.recovered, replaces_unlinked);
            left && !held
        };
        self.leave_behind(ino, step, leaves, ahead, left).await?;
        self.relink(ino, step).await;
        // The store holds it under this name until ours is published: who removes or renames the file must reckon with it.
        if let Some(node) = self.table.lock().get_mut(ino).filter(|_| over.is_some()) {
            node.object = over.map(|over| Object { attributes: None, decoded: true, ..over });
        }
        if publishes {
            return self.publish_renamed(ino, step, staged).await;
        }
        Ok(())
    }

    /// Writes down that what lies under the old name is to be deleted, where that is queued: before the new name is recorded, so that a
    /// crash in between never leaves the content under the one and what it was to replace under the other. The content's publication
    /// under the old name takes it back. Gives the version that is deleted.
    async fn leave_ahead(&self, step: &Move, object: Option<&Object>) -> Result<Option<ETag>> {
        let Some(object) = object else { return Ok(None) };
        let ahead = async {
            if !self.writeback.queues(step.source.store.as_ref(), &step.source.key).await {
                return Ok(None);
            }
            self.delete(&step.source, Some(object.etag.clone()), false).await?;
            Ok(Some(object.etag.clone()))
        };
        self.within(ahead).await
    }

    /// What [`Vfs::leave_ahead`] wrote down is not to be: the content keeps the old name.
    async fn withdraw_ahead(&self, step: &Move, ahead: Option<ETag>) -> Result<()> {
        if ahead.is_none() {
            return Ok(());
        }
        let taken = self.take_delete(&step.source).await;
        self.replaced(taken?, Ok(())).await
    }

    /// Deletes what lies under the old name: the object that the content was begun from, or, where an earlier run left the file, one
    /// that nobody knows. `ahead`: the version of which that is done.
    async fn leave_behind(&self, ino: Ino, step: &Move, object: Option<Object>, ahead: Option<ETag>, unknown: bool) -> Result<()> {
        if unknown {
            // What was queued may be a new version of it.
            return self.within(self.delete(&step.source, None, false)).await;
        }
        let Some(object) = object else { return Ok(()) };
        if ahead.as_ref() != Some(&object.etag) {
            self.within(self.delete(&step.source, Some(object.etag), false)).await?;
        }
        self.forget_object(&step.source);
        if let Some(node) = self.table.lock().get_mut(ino) {
            node.object = None;
        }
        Ok(())
    }

    async fn publish_renamed(&self, ino: Ino, step: &Move, staged: Arc<Staged>) -> Result<()> {
        if staged.size() == 0 {
            return self.publish_empty_later(ino, &staged).await;
        }
        match self.publish_patiently(ino).await {
            Err(Error::Stale) => Err(self.refuse(step, Some((ino, staged)))),
            other => other,
        }
    }
}
