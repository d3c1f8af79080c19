//! open for reading, read, lseek.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use bytes::Bytes;
use parking_lot::Mutex;

use super::error::{Error, Result};
use super::file::row_of;
use super::handle::FileHandle;
use super::inode::{Node, Object, Place};
use super::lookup::object_of;
use super::neighbours::Neighbour;
use super::passed::Passable;
use super::versions::JUST_NOW;
use super::{Backing, Caller, Fh, Ino, Kind, Opened, Vfs, attr, process};
use crate::cache::{CacheError, Reader};
use crate::s3::{ETag, ObjectHead};
use crate::writeback::{self, Staged};

/// How often a file is proved anew that becomes another version before there is a handle on it.
const OPENS_MOST: u32 = 8;

/// What a file is opened with.
pub(super) struct Proved {
    /// The kernel's pages of it are still true.
    keep_cache: bool,
    /// Has its bytes already.
    reader: Option<Arc<Reader>>,
    etag: Option<ETag>,
    epoch: u64,
}

/// A handle, and what the kernel is to read instead of it.
pub(super) type Registered = (Fh, Option<Arc<Backing>>);

impl Proved {
    fn of(node: &Node, keep_cache: bool, reader: Option<Arc<Reader>>) -> Self {
        Self { keep_cache, reader, etag: node.object.as_ref().map(|object| object.etag.clone()), epoch: node.file.epoch }
    }
}

/// Never passed through: who writes, and who reads past every cache, which a backing file does at whole blocks only.
fn is_by_us(flags: i32) -> bool {
    flags & libc::O_ACCMODE != libc::O_RDONLY || flags & (libc::O_TRUNC | libc::O_DIRECT) != 0
}

impl Vfs {
    /// open(2) of an existing file.
    pub async fn open(&self, caller: Caller, ino: Ino, flags: i32) -> Result<Opened> {
        let access = flags & libc::O_ACCMODE;
        let (readable, writable) = (access != libc::O_WRONLY, access != libc::O_RDONLY);
        let truncate = flags & libc::O_TRUNC != 0;
        if writable || truncate {
            self.check_writable()?;
        }
        let by_us = is_by_us(flags);
        let mut tries = 0;
        let (Proved { keep_cache, reader, .. }, fh, backing) = loop {
            let opened = self.open_object(ino, readable && !truncate, writable, truncate);
            let proved = if writable || truncate { self.patiently(opened).await? } else { self.within(opened).await? };
            let passable = if by_us { None } else { self.passable(ino).await };
            match self.add_handle(caller, ino, flags, Some(&proved), passable)? {
                Some((fh, backing)) => break (proved, fh, backing),
                None if tries < OPENS_MOST => tries += 1,
                None => return Err(Error::Stale),
            }
        };
        if writable && !truncate {
            let named = self.table.lock().get(ino).map(|node| (node.parent, node.name.clone()));
            if let Some((parent, name)) = named {
                self.opens.note(process::thread_group(caller.pid), parent, name);
            }
        }
        if let Some(reader) = reader {
            self.hand_over(fh, reader);
        }
        if truncate && let Err(error) = self.truncate_open(caller, fh).await {
            self.release(fh).await;
            return Err(error);
        }
        Ok(Opened { fh, keep_cache: keep_cache && !truncate, backing })
    }

    /// Registers a handle and pins its inode. `proved`: what it is opened with; `None` where the node is of another version by now, which
    /// nobody could keep it from becoming as long as no handle was there. `passable`: what it may be passed through to. ESTALE where it is
    /// to change a file that is passed through.
    pub(super) fn add_handle(
        &self,
        caller: Caller,
        ino: Ino,
        flags: i32,
        proved: Option<&Proved>,
        passable: Option<Passable>,
    ) -> Result<Option<Registered>> {
        let access = flags & libc::O_ACCMODE;
        let writable = access != libc::O_RDONLY;
        let mut backing = None;
        {
            let mut table = self.table.lock();
            if let Some(node) = table.get_mut(ino) {
                let by_us = is_by_us(flags);
                let etag = node.object.as_ref().map(|object| object.etag.clone());
                if proved.is_some_and(|proved| proved.etag != etag || proved.epoch != node.file.epoch) {
                    return Ok(None);
                }
                match node.file.open_mode(etag.as_ref(), by_us, passable) {
                    Ok(opened) => backing = opened,
                    Err(_) => {
                        drop(table);
                        return Err(self.forget_name(ino));
                    }
                }
                node.file.writers += u32::from(writable);
            }
            table.pin(ino);
        }
        let fh = self.handles.add_file(FileHandle {
            ino,
            opened: Instant::now(),
            opener: if writable { process::thread_group(caller.pid) } else { 0 },
            readable: access != libc::O_WRONLY,
            writable,
            append: flags & libc::O_APPEND != 0,
            truncated: flags & libc::O_TRUNC != 0,
            wrote: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            passed: AtomicBool::new(backing.is_some()),
            version: proved.and_then(|proved| proved.etag.clone()),
            read: AtomicBool::new(false),
            reader: Mutex::new(None),
        });
        Ok(Some((fh, backing)))
    }

    /// Close-to-open: what another client published is seen now, and is what the handle is opened with. True when the kernel's
    /// pages are still true, and a reader that has its bytes already. `empties`: O_TRUNC, which begins new content at once.
    async fn open_object(&self, ino: Ino, reads: bool, writes: bool, empties: bool) -> Result<Proved> {
        let (object, fresh, staged) = {
            let mut table = self.table.lock();
            let node = table.get_mut(ino).ok_or(Error::Stale)?;
            match node.kind {
                Kind::Directory => return Err(Error::IsDirectory),
                Kind::Symlink => return Err(Error::Invalid),
                Kind::File => {}
            }
            if node.is_local() || node.removed && node.file.staged.is_some() {
                return Ok(Proved::of(node, true, None));
            }
            // ESTALE makes the kernel look the name up again.
            let object = node.object.clone().filter(|_| node.linked).ok_or(Error::Stale)?;
            // The first open after a look costs nothing; the next one may come after another client's change.
            let first = std::mem::take(&mut node.file.unopened);
            let fresh = first && node.checked.is_some_and(|at| at.elapsed() < JUST_NOW);
            // What new content keeps of it must be of the version that it is opened with.
            let here = node.file.staged.is_some() || node.file.retiring;
            (object.clone(), fresh && !(empties && object.attributes.is_none()), here)
        };
        let place = self.place(ino)?;
        if object.archived && reads {
            // A listing names the storage class alone: whether it was restored, a HEAD says.
            let head = place.store.head(&place.key).await?;
            let restored = !head.is_archived() && head.etag == object.etag;
            if restored && let Some(known) = self.table.lock().get_mut(ino).and_then(|node| node.object.as_mut()) {
                known.archived = false;
            }
            if restored {
                let table = self.table.lock();
                return Ok(Proved::of(table.get(ino).ok_or(Error::Stale)?, false, None));
            }
            tracing::error!(
                "s3://{}/{} is archived: restore it first (aws s3api restore-object), then open it again",
                place.store.bucket(),
                place.key
            );
            return Err(Error::Access);
        }
        let mut neighbour = self.take_neighbour(ino, &object.etag).filter(|_| reads && !staged);
        let bucket = place.store.bucket();
        if reads && !self.is_silent(bucket) {
            self.fetch_neighbours(ino);
        }
        // Waited for where nothing is to be proved too: dropped before its answer, it would ask in vain.
        let told = match neighbour.as_mut() {
            // Pinned and here whole, it waits no longer than its own question would.
            Some(neighbour) if self.is_pinned(bucket, &place.key) && self.cache.is_complete(&Self::version(&place, &object)) => {
                self.unless_silent(bucket, async { Ok(neighbour.head().await) }).await.and_then(Result::ok).flatten()
            }
            Some(neighbour) => neighbour.head().await,
            None => None,
        };
        match (fresh, reads) {
            // Nothing more than the read would ask, which can no longer turn to another version.
            (true, true) if !writes && !staged && told.is_none() => self.revalidate(ino, false).await?,
            (true, _) => {}
            (false, true) if !staged => match told {
                Some(head) => self.proved(ino, &place, head)?,
                None => self.revalidate_or_kept(ino, &place, &object).await?,
            },
            // Its bytes are here.
            (false, true) => drop(self.object_now(ino, &place).await?),
            (false, false) => drop(self.current_object(ino, &place).await?),
        }
        let mut table = self.table.lock();
        let node = table.get_mut(ino).ok_or(Error::Stale)?;
        let etag = node.object.as_ref().map(|object| object.etag.clone());
        let reader = neighbour.map(Neighbour::reader).filter(|reader| etag.as_ref() == Some(&reader.version().etag));
        let kept = node.file.kernel_pages.is_some() && node.file.kernel_pages == etag;
        let (proved, parent) = (Proved::of(node, kept, reader), node.parent);
        if let Some(dir) = table.dir_mut(parent).filter(|_| reads) {
            dir.walk.on_opened();
        }
        Ok(proved)
    }

    /// A handle reads what was fetched ahead.
    fn hand_over(&self, fh: Fh, reader: Arc<Reader>) {
        let Ok(handle) = self.handles.file(fh) else { return };
        let Some(epoch) = self.table.lock().get(handle.ino).map(|node| node.file.epoch) else { return };
        *handle.reader.lock() = Some((epoch, reader));
    }

    /// As [`Vfs::revalidate`]. A pinned version that is here whole is opened too while the store is silent.
    async fn revalidate_or_kept(&self, ino: Ino, place: &Place, object: &Object) -> Result<()> {
        let bucket = place.store.bucket();
        if !self.is_pinned(bucket, &place.key) || !self.cache.is_complete(&Self::version(place, object)) {
            return self.revalidate(ino, true).await;
        }
        self.unless_silent(bucket, self.revalidate(ino, true)).await.unwrap_or(Ok(()))
    }

    /// Asks the store whether the object is still the version that we know, at the price of the first block or, `always`, a HEAD where
    /// that is here.
    async fn revalidate(&self, ino: Ino, always: bool) -> Result<()> {
        let (reader, _) = self.reader(ino)?;
        let asked = if always { reader.revalidate().await.map(Some) } else { reader.begin().await };
        let head = match asked {
            Ok(Some(head)) => Some(head),
            Ok(None) => return Ok(()),
            Err(CacheError::Stale) => None,
            Err(error) => return Err(error.into()),
        };
        let place = self.place(ino)?;
        let head = match head {
            Some(head) => head,
            // Replaced: an inode that others have open stays with the old version, and the kernel looks the name up again.
            None if self.handles.is_open(ino) => return Err(self.forget_name(ino)),
            None => self.head_of_its_version(ino, &place).await?.ok_or(Error::Stale)?,
        };
        self.proved(ino, &place, head)
    }

    /// The store says that the object is the version that we know.
    fn proved(&self, ino: Ino, place: &Place, head: ObjectHead) -> Result<()> {
        if self.is_link(&head) {
            return Err(self.turn_into_link(ino, place, head));
        }
        let decoded = attr::decode(&head.metadata);
        let observed = self.table.lock().get_mut(ino).ok_or(Error::Stale)?.observe(object_of(head), &decoded);
        observed.map_err(|_| self.forget_name(ino))
    }

    /// A reader of the published object, and the epoch that it is of.
    fn reader(&self, ino: Ino) -> Result<(Reader, u64)> {
        let place = self.place(ino)?;
        let table = self.table.lock();
        let node = table.get(ino).ok_or(Error::Stale)?;
        let object = node.object.as_ref().ok_or(Error::Stale)?;
        let version = Self::version(&place, object);
        Ok((self.cache.reader(place.store, version), node.file.epoch))
    }

    /// read(2): from the local copy while there is one, else from the version that the handle is pinned to.
    pub async fn read(&self, fh: Fh, offset: u64, size: u32) -> Result<Bytes> {
        let handle = self.handles.file(fh)?;
        if !handle.readable {
            return Err(Error::BadHandle);
        }
        let (staged, retiring) = self.content(handle.ino)?;
        if let Some(order) = retiring {
            drop(order.lock().await);
        }
        if let Some(staged) = staged {
            let read = async {
                match staged.read(offset, size as usize).await {
                    Err(writeback::Error::Discarded) => Ok(None),
                    other => Ok(Some(other?)),
                }
            };
            match self.within(read).await? {
                Some(bytes) => return Ok(bytes),
                // It became the cache's between the look and the read.
                None => drop(self.order(handle.ino)?.lock().await),
            }
        }
        let epoch = {
            let mut table = self.table.lock();
            let node = table.get_mut(handle.ino).ok_or(Error::Stale)?;
            // Not before: pages of another version go when the kernel hears the answer to an open, and the answers to two of them may
            // come to it in any order. A read comes after that of its handle.
            if !handle.read.swap(true, Ordering::Relaxed)
                && handle.version.is_some()
                && node.object.as_ref().map(|object| &object.etag) == handle.version.as_ref()
            {
                node.file.kernel_pages = handle.version.clone();
            }
            node.file.epoch
        };
        let reader = self.handle_reader(&handle, epoch)?;
        let read = async {
            match reader.read(offset, size as usize).await {
                Err(error @ CacheError::Damaged(_)) => {
                    // What was read before and lies in the kernel's pages may be the damaged bytes.
                    if let Some(node) = self.table.lock().get_mut(handle.ino) {
                        node.file.kernel_pages = None;
                    }
                    self.tell(|notify| notify.invalidate_inode(handle.ino));
                    Err(error.into())
                }
                other => Ok(other?),
            }
        };
        let bytes = self.within(read).await?;
        if let Some(head) = reader.head() {
            self.note(handle.ino, &head);
        }
        Ok(bytes)
    }

    /// A GET told what no listing does: owner, mode and times of an object that others wrote.
    fn note(&self, ino: Ino, head: &ObjectHead) {
        let news = {
            let table = self.table.lock();
            let object = table.get(ino).and_then(|node| node.object.as_ref());
            object.is_some_and(|object| !object.decoded && object.etag == head.etag)
        };
        if news && self.is_link(head) {
            // Who has it open reads on: the name is a link from now on.
            if let Ok(place) = self.place(ino) {
                self.turn_into_link(ino, &place, head.clone());
            }
            return;
        }
        let row = {
            let mut table = self.table.lock();
            let Some(node) = table.get_mut(ino) else { return };
            let Some(object) = node.object.as_mut().filter(|object| !object.decoded && object.etag == head.etag) else { return };
            *object = object_of(head.clone());
            let last_modified = object.last_modified;
            node.apply(&attr::decode(&head.metadata));
            row_of(node, last_modified)
        };
        if let (Some(row), Ok(place)) = (row, self.place(ino)) {
            self.memory.put(place.store.bucket(), &place.key, row);
        }
        self.tell(|notify| notify.invalidate_inode(ino));
    }

    /// The local copy, or the turn to wait for while it becomes the cache's.
    #[allow(clippy::type_complexity)]
    fn content(&self, ino: Ino) -> Result<(Option<Arc<Staged>>, Option<Arc<tokio::sync::Mutex<()>>>)> {
        let table = self.table.lock();
        let file = &table.get(ino).ok_or(Error::Stale)?.file;
        Ok((file.staged.clone(), file.retiring.then(|| file.order.clone())))
    }

    /// The handle's reader; a new one when this mount itself changed the file since.
    fn handle_reader(&self, handle: &FileHandle, epoch: u64) -> Result<Arc<Reader>> {
        if let Some((_, reader)) = handle.reader.lock().as_ref().filter(|(of, _)| *of == epoch) {
            return Ok(reader.clone());
        }
        let (reader, of) = self.reader(handle.ino)?;
        let reader = Arc::new(reader);
        *handle.reader.lock() = Some((of, reader.clone()));
        Ok(reader)
    }

    /// lseek(2) SEEK_DATA and SEEK_HOLE: an object has no holes but the one at its end.
    pub async fn lseek(&self, fh: Fh, offset: i64, whence: i32) -> Result<u64> {
        let ino = self.handles.file(fh)?.ino;
        let size = self.attr(ino)?.0.size;
        let offset = u64::try_from(offset).map_err(|_| Error::SeekBeyond)?;
        if offset >= size {
            return Err(Error::SeekBeyond);
        }
        match whence {
            libc::SEEK_DATA => Ok(offset),
            libc::SEEK_HOLE => Ok(size),
            _ => Err(Error::Invalid),
        }
    }
}
