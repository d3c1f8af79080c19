//! write, truncate, flush, release, fsync, fallocate, copy_file_range.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use bytes::Bytes;

use super::error::{Error, Result};
use super::handle::FileHandle;
use super::versions::Start;
use super::{Caller, Fh, Ino, Vfs, attr, process};
use crate::failpoint;
use crate::writeback::Staged;

/// Largest piece of a copy_file_range that is held in memory.
const COPY_PIECE: usize = 1 << 20;
/// A reply's length is 32 bits in FUSE; the kernel calls again for the rest.
const COPY_MOST: u64 = 1 << 30;

impl Vfs {
    /// write(2). With O_APPEND the bytes go to the end as it is now, not to the kernel's offset.
    pub async fn write(&self, fh: Fh, offset: u64, data: Bytes, kill_suidgid: bool) -> Result<u32> {
        let handle = self.writable(fh)?;
        let staged = self.staged(&handle).await?;
        let len = data.len() as u64;
        if !handle.append && offset.checked_add(len).is_none_or(|end| end > i64::MAX as u64) {
            return Err(Error::TooLarge);
        }
        handle.writes();
        if handle.append {
            staged.append(data).await?;
        } else {
            staged.write(offset, data).await?;
        }
        self.changed(handle.ino, &staged, kill_suidgid);
        Ok(u32::try_from(len).unwrap_or(u32::MAX))
    }

    fn writable(&self, fh: Fh) -> Result<Arc<FileHandle>> {
        self.handles.file(fh).and_then(|handle| if handle.writable { Ok(handle) } else { Err(Error::BadHandle) })
    }

    /// The content changed: size, times, and privileges that a write ends.
    fn changed(&self, ino: Ino, staged: &Staged, kill_suidgid: bool) {
        let now = SystemTime::now();
        let mut table = self.table.lock();
        let Some(node) = table.get_mut(ino) else { return };
        node.size = staged.size();
        (node.mtime, node.ctime, node.mtime_set) = (now, now, false);
        node.file.kernel_pages = None;
        if kill_suidgid {
            node.stored.mode = node.stored.mode.map(attr::without_privileges);
        }
    }

    /// O_TRUNC of an open: the old object stays until the new content is published.
    pub(super) async fn truncate_open(&self, caller: Caller, fh: Fh) -> Result<()> {
        let handle = self.handles.file(fh)?;
        let order = self.order(handle.ino)?;
        let _turn = order.lock().await;
        let staged = self.stage_anew(handle.ino, Start::Opened(handle.opened)).await?;
        handle.writes();
        self.changed(handle.ino, &staged, kills_privileges(caller));
        Ok(())
    }

    /// ftruncate(2) when `fh` is given; truncate(2) otherwise, which publishes before it returns (promise 4).
    pub(super) async fn truncate(&self, caller: Caller, ino: Ino, fh: Option<Fh>, size: u64) -> Result<()> {
        if fh.is_none() {
            self.check_writable()?;
        }
        let _unpassed = fh.is_none().then(|| self.unpassed(ino)).transpose()?;
        {
            // In turn, so that a file that was just closed is not handed to the cache meanwhile.
            let order = self.order(ino)?;
            let _turn = order.lock().await;
            let start = match fh {
                Some(fh) => Start::Opened(self.handles.file(fh)?.opened),
                None => Start::Named,
            };
            let staged = if size == 0 {
                self.stage_anew(ino, start).await?
            } else {
                let staged = self.staged_from(ino, start).await?;
                staged.truncate(size).await?;
                staged
            };
            self.changed(ino, &staged, kills_privileges(caller));
        }
        match fh.and_then(|fh| self.handles.file(fh).ok()) {
            Some(handle) => {
                handle.writes();
                Ok(())
            }
            None => {
                // Somebody writes it at this moment: their close publishes.
                if self.handles.is_written(ino) {
                    return Ok(());
                }
                let result = self.publish(ino).await;
                self.retire(ino).await;
                result
            }
        }
    }

    /// The FLUSH of a close(2). Only the opener's publishes; the error is close's result.
    pub async fn flush(&self, caller: Caller, fh: Fh) -> Result<()> {
        let handle = self.handles.file(fh)?;
        if !handle.writable || process::thread_group(caller.pid) != handle.opener {
            return Ok(());
        }
        handle.closed.store(true, Ordering::Relaxed);
        if handle.wrote.load(Ordering::Relaxed) || self.is_new_and_empty(handle.ino) {
            return self.close_content(handle.ino, handle.truncated).await;
        }
        Ok(())
    }

    /// Nothing of the file was published yet, and nobody wrote to it.
    fn is_new_and_empty(&self, ino: Ino) -> bool {
        let staged = self.table.lock().get(ino).and_then(|node| node.file.staged.clone());
        staged.is_some_and(|staged| staged.size() == 0 && staged.published().is_none())
    }

    /// Publishes at a close: at once, or a moment later when the file is new or was opened with O_TRUNC, and empty.
    async fn close_content(&self, ino: Ino, truncated: bool) -> Result<()> {
        let order = self.order(ino)?;
        let _turn = order.lock().await;
        let Some(staged) = self.staged_now(ino)? else { return self.none_parked(ino) };
        if !staged.is_dirty() {
            return Ok(());
        }
        let (removed, new) = self.table.lock().get(ino).map(|node| (node.removed, node.object.is_none())).ok_or(Error::Stale)?;
        if removed {
            return Ok(());
        }
        if staged.size() == 0 && (new || truncated) && !staged.is_poisoned() {
            return self.publish_empty_later(ino, &staged).await;
        }
        self.publish_in_turn(ino).await
    }

    /// Fails as the publication did whose content was parked while the file was open: somebody else's close, or nobody, was told.
    fn none_parked(&self, ino: Ino) -> Result<()> {
        self.table.lock().get(ino).and_then(|node| node.file.parked).map_or(Ok(()), Err)
    }

    /// The last close of a handle. Errors reach nobody but the log and status.
    pub async fn release(&self, fh: Fh) {
        let Ok(handle) = self.handles.remove_file(fh) else { return };
        let ino = handle.ino;
        let mut let_go = None;
        let last = {
            let mut table = self.table.lock();
            match table.get_mut(ino) {
                Some(node) => {
                    let_go = node.file.close_mode(&handle);
                    node.file.writers = node.file.writers.saturating_sub(u32::from(handle.writable));
                    node.file.writers == 0 && (handle.writable || node.removed)
                }
                None => false,
            }
        };
        if let_go.is_some() {
            // The last handle of a file that was evicted meanwhile: its room is freed now.
            tokio::task::spawn_blocking(move || drop(let_go));
        }
        let (Some(this), true) = (self.shared(), last) else {
            self.table.lock().unpin(ino);
            return;
        };
        self.spawn(async move {
            failpoint::pass("released");
            this.finish(ino).await;
            this.table.lock().unpin(ino);
        });
    }

    /// Nobody has the file open for writing any more: what came after the close is published, what nobody can reach is dropped.
    async fn finish(&self, ino: Ino) {
        let Ok(order) = self.order(ino) else { return };
        let turn = order.lock().await;
        let Ok(Some(staged)) = self.staged_now(ino) else { return };
        let Some((removed, writers)) = self.table.lock().get(ino).map(|node| (node.removed, node.file.writers)) else { return };
        if writers > 0 {
            // Opened again before this came: what is half-written now is that one's to publish.
            return;
        }
        if removed {
            if !self.handles.is_open(ino) {
                staged.discard().await;
                self.drop_staged(ino);
            }
            return;
        }
        if staged.is_dirty() {
            // The log and status tell: a RELEASE has no caller to answer.
            let _ = if staged.size() > 0 || staged.is_poisoned() {
                self.publish_in_turn(ino).await
            } else if staged.is_queued() {
                Ok(())
            } else {
                // No close: the kernel itself let go of it, as it does where open(2) fails after our part of it.
                self.publish_empty_later(ino, &staged).await
            };
        }
        drop(turn);
        self.retire(ino).await;
    }

    pub(super) fn drop_staged(&self, ino: Ino) {
        let mut table = self.table.lock();
        if let Some(node) = table.get_mut(ino) {
            node.file.staged = None;
            node.file.epoch += 1;
        }
        table.release(ino);
    }

    /// fsync(2): durable in the spool. A file whose content is published is durable in S3.
    pub async fn fsync(&self, fh: Fh, _datasync: bool) -> Result<()> {
        let handle = self.handles.file(fh)?;
        match self.staged_now(handle.ino)? {
            Some(staged) if staged.is_dirty() => Ok(staged.sync().await?),
            None if handle.wrote.load(Ordering::Relaxed) => self.none_parked(handle.ino),
            _ => Ok(()),
        }
    }

    /// fallocate(2): reserves, extends, punches holes, zeroes.
    pub async fn fallocate(&self, caller: Caller, fh: Fh, offset: u64, length: u64, mode: i32) -> Result<()> {
        const KNOWN: i32 = libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE;
        let handle = self.writable(fh)?;
        if length == 0 {
            return Err(Error::Invalid);
        }
        if mode & !KNOWN != 0 {
            return Err(Error::NotSupported);
        }
        let end = offset.checked_add(length).filter(|end| i64::try_from(*end).is_ok()).ok_or(Error::TooLarge)?;
        let staged = self.staged(&handle).await?;
        handle.writes();
        let keep_size = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
        if mode & (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) != 0 {
            let size = staged.size();
            if offset < size {
                staged.punch_hole(offset, length.min(size - offset)).await?;
            }
            if !keep_size && end > size {
                staged.truncate(end).await?;
            }
        } else {
            staged.allocate(offset, length, keep_size).await?;
        }
        self.changed(handle.ino, &staged, kills_privileges(caller));
        Ok(())
    }

    /// copy_file_range(2) between two files of the mount.
    pub async fn copy_file_range(&self, caller: Caller, fh_in: Fh, offset_in: u64, fh_out: Fh, offset_out: u64, len: u64) -> Result<u64> {
        let target = self.writable(fh_out)?;
        let source = self.handles.file(fh_in)?;
        let size = self.attr(source.ino)?.0.size;
        let len = len.min(size.saturating_sub(offset_in)).min(COPY_MOST);
        if source.ino == target.ino && offset_in < offset_out + len && offset_out < offset_in + len {
            return Err(Error::Invalid);
        }
        if offset_in == offset_out && self.copy_in_store(caller, &source, &target, offset_in..offset_in + len).await? {
            return Ok(len);
        }
        let mut copied = 0;
        while copied < len {
            let piece = usize::try_from((len - copied).min(COPY_PIECE as u64)).unwrap_or(COPY_PIECE);
            let data = self.read(fh_in, offset_in + copied, piece as u32).await?;
            if data.is_empty() {
                break;
            }
            copied += u64::from(self.write(fh_out, offset_out + copied, data, kills_privileges(caller)).await?);
        }
        Ok(copied)
    }

    /// A file that is wholly in the store is copied there, when the copy is published. False where its bytes have to come by here.
    async fn copy_in_store(&self, caller: Caller, source: &FileHandle, target: &FileHandle, range: Range<u64>) -> Result<bool> {
        if range.is_empty() || target.append || source.ino == target.ino {
            return Ok(false);
        }
        let staged = self.staged(target).await?;
        target.writes();
        // From the look at the source until it is known who takes its bytes, nothing that takes them away may come in between.
        let (Ok(order), Ok(place)) = (self.order(source.ino), self.place(source.ino)) else { return Ok(false) };
        let Ok(_turn) = order.try_lock() else { return Ok(false) };
        let Some(_guard) = self.guards.try_key(place.store.bucket(), &place.key) else { return Ok(false) };
        let object = {
            let table = self.table.lock();
            let node = table.get(source.ino).ok_or(Error::Stale)?;
            node.object.clone().filter(|object| node.linked && !node.is_local() && !object.archived)
        };
        let Some(object) = object else { return Ok(false) };
        let base = self.base_of(&place, &object);
        failpoint::pass("copy-looked");
        let copied = staged.copy(&base, range).await?;
        if copied {
            self.changed(target.ino, &staged, kills_privileges(caller));
        }
        Ok(copied)
    }
}

/// A change of the content ends set-user-ID and set-group-ID unless root makes it. The kernel says so of a write
/// (FUSE_WRITE_KILL_SUIDGID); of the rest fuser does not pass it on, and who has CAP_FSETID is root.
fn kills_privileges(caller: Caller) -> bool {
    caller.uid != 0
}
