//! unlink and rmdir: at once, or queued (`write_back`).

use std::ffi::OsStr;
use std::time::{Instant, SystemTime};

use super::attr::Kind;
use super::dir_state::DirState;
use super::error::{Error, Result};
use super::inode::{Object, Place};
use super::{Caller, Ino, Root, Vfs};
use crate::failpoint;
use crate::s3::ListRequest;
use crate::writeback::Published;

/// A deleted file that is open stays readable when it is no larger: its bytes are fetched before the DELETE.
const KEEP_READABLE: u64 = 64 << 20;
/// Size of a read while they are fetched.
const PIECE: usize = 1 << 20;

impl Vfs {
    /// unlink(2): sends its DELETE and returns its result; with `write_back` the DELETE is queued.
    pub async fn unlink(&self, _caller: Caller, parent: Ino, name: &OsStr) -> Result<()> {
        self.check_removable()?;
        let ino = self
            .within(async {
                let ino = self.resolve(parent, name).await?;
                if self.kind(ino)? == Kind::Directory {
                    return Err(Error::IsDirectory);
                }
                let order = self.order(ino)?;
                let _turn = order.lock().await;
                self.unlink_in_turn(parent, ino).await?;
                Ok(ino)
            })
            .await?;
        // Its own content was let go of in its turn.
        let others = self.gone(parent, name).into_iter().filter(|other| *other != ino).collect();
        self.let_go(others).await;
        self.keep_directory(parent);
        Ok(())
    }

    pub(super) fn check_removable(&self) -> Result<()> {
        self.check_changeable()?;
        if self.config.allow_delete { Ok(()) } else { Err(Error::NotPermitted) }
    }

    pub(super) fn kind(&self, ino: Ino) -> Result<Kind> {
        Ok(self.table.lock().get(ino).ok_or(Error::Stale)?.kind)
    }

    async fn unlink_in_turn(&self, parent: Ino, ino: Ino) -> Result<()> {
        // A publication that was begun would take the DELETE for one that it replaces, and with it into its grave.
        let _paused = self.pause_queued(std::iter::once(ino)).await?;
        let (place, _guard) = self.hold(|| self.place(ino)).await?;
        self.writeback.cancel_metadata(place.store.bucket(), &place.key).await;
        // After that: a copy that was still running has given the object another ETag.
        let (object, recovered) = {
            let table = self.table.lock();
            let node = table.get(ino).ok_or(Error::Stale)?;
            (node.object.clone(), node.file.recovered)
        };
        let open = self.handles.is_open(ino);
        // Who has new content open reads that.
        let reads_it = open && self.staged_now(ino)?.is_none();
        if let Some(object) = object.as_ref().filter(|_| reads_it) {
            self.keep_readable(&place, object).await;
        }
        if let Some(object) = &object {
            let held = self.is_about_to_be_replaced(parent, &place.key);
            self.delete(&place, Some(object.etag.clone()), held).await?;
            failpoint::pass("unlink-queued");
            self.forget_object(&place);
        }
        let published = if open {
            match self.staged_now(ino)? {
                Some(staged) => staged.withhold().await,
                None => None,
            }
        } else {
            self.cache.remove(place.store.bucket(), &place.key).await;
            self.discard_staged(ino).await
        };
        // A queued file may have become an object at this very moment, and one that was left may stand over an older one.
        // Or it has become one under an earlier name.
        let here = published.filter(|published| published.key == place.key && published.bucket == place.store.bucket());
        let newer = here.map(|published| published.etag).filter(|etag| object.is_none_or(|object| object.etag != *etag));
        if newer.is_some() || recovered {
            self.delete(&place, newer.filter(|_| !recovered), false).await?;
        }
        Ok(())
    }

    /// Nobody can reach the content any more. Gives the object that it has become, if it has.
    pub(super) async fn discard_staged(&self, ino: Ino) -> Option<Published> {
        let staged = self.staged_now(ino).ok().flatten()?;
        staged.discard().await;
        self.drop_staged(ino);
        staged.published()
    }

    /// Fetches what an open handle may still read, as far as that is small; a larger one answers ESTALE where it is not cached.
    pub(super) async fn keep_readable(&self, place: &Place, object: &Object) {
        let version = Self::version(place, object);
        if object.size > KEEP_READABLE || self.cache.is_complete(&version) {
            return;
        }
        let reader = self.cache.reader(place.store.clone(), version);
        let mut at = 0;
        while at < object.size {
            match reader.read(at, PIECE).await {
                Ok(bytes) if !bytes.is_empty() => at += bytes.len() as u64,
                _ => return,
            }
        }
    }

    /// A user of this mount took these files' names: they can be read until they are closed. What cannot be stopped in time ends by
    /// itself.
    pub(super) async fn let_go(&self, files: Vec<Ino>) {
        let lets_go = async {
            for ino in files {
                if !self.handles.is_open(ino) {
                    self.discard_staged(ino).await;
                } else if let Ok(Some(staged)) = self.staged_now(ino) {
                    staged.withhold().await;
                }
            }
            Ok(())
        };
        if self.within(lets_go).await.is_err() {
            tracing::warn!("the upload of a file that was removed or replaced is not stopped yet");
        }
    }

    /// The name is gone from its directory. Gives the files that it meant.
    fn gone(&self, parent: Ino, name: &OsStr) -> Vec<Ino> {
        let removed = {
            let mut table = self.table.lock();
            if let Some(dir) = table.dir_mut(parent) {
                dir.removed.insert(name.to_owned(), Instant::now());
            }
            if let Some(child) = table.child(parent, name)
                && let Some(node) = table.get_mut(child)
            {
                node.ctime = SystemTime::now();
            }
            table.remove(parent, name)
        };
        self.touch_parent(parent);
        removed
    }

    /// rmdir(2): judged by a listing at most `metadata_ttl` old; only the marker goes.
    pub async fn rmdir(&self, _caller: Caller, parent: Ino, name: &OsStr) -> Result<()> {
        self.check_removable()?;
        let rmdir = async {
            let ino = self.resolve(parent, name).await?;
            if self.kind(ino)? != Kind::Directory {
                return Err(Error::NotDirectory);
            }
            if let (true, Root::Account(account)) = (self.is_account(parent), &self.root) {
                let name = name.to_str().ok_or(Error::Invalid)?;
                if !self.config.allow_bucket_changes {
                    tracing::warn!("{name}: a directory here is a bucket: mount with -o allow_bucket_changes to remove one");
                    return Err(Error::NotPermitted);
                }
                self.require_empty(ino).await?;
                // Asked now, not a moment ago: SeaweedFS deletes a bucket with all that is in it.
                let place = self.place(ino)?;
                self.settle_deletes_below(&place).await?;
                let page = place.store.list(ListRequest { max_keys: Some(1), ..ListRequest::default() }).await?;
                if !page.entries.is_empty() {
                    return Err(Error::NotEmpty);
                }
                account.delete_bucket(name).await?;
                self.table.lock().surveys.forget(&place);
                return Ok(Vec::new());
            }
            self.require_empty(ino).await?;
            let (place, _guard) = self.hold_tree(|| self.place(ino)).await?;
            // A marker that is queued is not to come after this, and one that is on its way arrives first.
            let paused = self.pause_queued(std::iter::once(ino)).await?;
            let known = |dir: &DirState| (dir.marker != Some(false), dir.bare);
            let (marked, bare) = self.table.lock().dir(ino).map_or((true, false), known);
            // Its name is gone, though what was below it is in S3 still: the marker's delete hides it until that has gone too.
            let below = self.writeback.deletes_below(place.store.bucket(), &place.key);
            let marked = marked || !bare && place.store.capabilities().real_directories;
            if (marked || below) && self.writeback.queues(place.store.as_ref(), &place.key).await {
                self.delete(&place, None, false).await?;
            } else {
                if below {
                    self.settle_deletes_below(&place).await?;
                }
                if marked {
                    self.delete_marker(&place).await?;
                }
            }
            self.forget_object(&place);
            self.table.lock().surveys.forget(&place);
            Ok(paused)
        };
        let paused = self.within(rmdir).await?;
        let removed = self.gone(parent, name);
        self.let_go(removed).await;
        drop(paused);
        self.keep_directory(parent);
        Ok(())
    }

    /// ENOTEMPTY while the directory holds a name, here or in the store.
    pub(super) async fn require_empty(&self, dir: Ino) -> Result<()> {
        self.attach_recovered(dir);
        let listing = self.known(dir).await?;
        let table = self.table.lock();
        let state = table.dir(dir).ok_or(Error::NotDirectory)?;
        let here = state.children.values().any(|child| table.is_here(*child, listing.started));
        let removed = |name: &OsStr| state.removed.get(name).is_some_and(|at| *at >= listing.started);
        let there = !listing.complete || listing.entries.iter().any(|entry| !removed(&entry.name()));
        if here || there { Err(Error::NotEmpty) } else { Ok(()) }
    }
}
