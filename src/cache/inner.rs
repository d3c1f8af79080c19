//! What readers, flights and background tasks of a cache share.
//!
//! Locks: a reader's slot for its entry comes first; the index, an entry's state and the recent blocks are leaves, taken one at a time (an entry's state may take the recent
//! blocks' lock) and never held across I/O or `.await`.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore};

use super::block::{BLOCK, EntryId, Sidecar, sum_of};
use super::disk::{Disk, FileName, Found};
use super::distance::Distance;
use super::download::SEGMENT;
use super::entry::Entry;
use super::evict::{Shelf, Slot};
use super::memory::{Buffers, Recent};
use super::pinned::Pinned;
use super::window::Reach;
use super::{CacheConfig, CacheError, ObjectVersion};

/// Most bytes of recent blocks beside a disk cache: what was fetched ahead of a reader near the store ([`Reach::near`]) by a small
/// machine, and what it reads meanwhile.
const RECENT: u64 = 48 << 20;
/// Most idle bytes of read buffers that are kept.
const POOL: u64 = 8 << 20;
/// What a mount takes of `memory_limit` before it reads anything: code, threads, tables, the buffers of the session.
const PROCESS: u64 = 40 << 20;
/// What a GET holds: the segment that it gathers, and what the HTTP client has read of the next one.
const CONNECTION: u64 = SEGMENT as u64 + (512 << 10);
/// KiB for the answers of reads that there are at any `memory_limit`: the largest read of the kernel.
pub const LEAST_ANSWERS: u64 = 1024;
/// GETs that there are at any `memory_limit`.
const FEWEST: usize = 4;
/// The free space is asked for again after so many bytes.
const SPACE_EVERY: u64 = 16 << 20;
/// A sidecar is written when nothing landed for so long …
const QUIET: Duration = Duration::from_secs(3);
/// … or so long after the first block it does not claim …
const LATEST: Duration = Duration::from_secs(60);
/// … or when so many files wait: each holds a descriptor.
const MANY: usize = 64;

/// Shared state of a cache.
#[derive(Debug)]
pub struct Inner {
    /// As given.
    pub config: CacheConfig,
    /// `None`: blocks are kept in memory only.
    pub disk: Option<Disk>,
    /// Blocks that came last.
    pub recent: Recent,
    /// Read buffers.
    pub buffers: Arc<Buffers>,
    /// A permit a GET.
    pub connections: Arc<Semaphore>,
    /// A permit a GET of read-ahead; fewer than connections, so that a read that waits finds one.
    pub ahead: Semaphore,
    /// Permits in KiB for answers of reads that are copied together.
    pub memory: Semaphore,
    processors: u64,
    /// From here to the store.
    pub distance: Arc<Distance>,
    pub(super) index: Mutex<Index>,
    /// What is not evicted.
    pub pinned: Pinned,
    next_uid: AtomicU64,
    unchecked: AtomicU64,
    disk_full: AtomicBool,
    disk_warned: AtomicBool,
    save_soon: Arc<Notify>,
}

/// Which entries are open, and which files there are.
#[derive(Debug)]
pub struct Index {
    /// Entries that somebody holds.
    pub entries: BTreeMap<EntryId, Weak<Entry>>,
    sweep_at: usize,
    /// Cache files.
    pub shelf: Shelf,
    /// Entries whose sidecar is behind, by uid: kept alive until it is written.
    pub unsaved: HashMap<u64, Arc<Entry>>,
}

impl Index {
    /// Takes an entry out; its next reader gets a new one.
    pub fn forget(&mut self, id: EntryId) -> Option<Arc<Entry>> {
        let entry = self.entries.remove(&id)?.upgrade()?;
        self.unsaved.remove(&entry.uid);
        Some(entry)
    }

    /// True when readers of `id` get this entry.
    pub fn is_current(&self, id: EntryId, entry: &Arc<Entry>) -> bool {
        self.entries.get(&id).is_some_and(|other| std::ptr::eq(other.as_ptr(), Arc::as_ptr(entry)))
    }
}

impl Inner {
    /// Opens the directory, or does without it. Blocks.
    pub fn open(config: CacheConfig) -> Self {
        match Disk::open(&config.dir, &config.identity) {
            Ok((disk, found)) => Self::with(config, Some(disk), found),
            Err(error) => {
                tracing::warn!(dir = %config.dir.display(), %error, "cache_dir cannot be used: reading without a disk cache");
                Self::with(config, None, Vec::new())
            }
        }
    }

    /// With what was found in its directory, the least recently used first. Blocks.
    pub fn with(config: CacheConfig, disk: Option<Disk>, found: Found) -> Self {
        let mut shelf = Shelf::new();
        let pinned = disk.as_ref().map(|disk| Pinned::load(disk, &found)).unwrap_or_default();
        for (id, slot) in found {
            if let Some(old) = shelf.insert(id, slot)
                && let Some(disk) = &disk
            {
                disk.unlink(FileName { id, serial: old.serial });
            }
        }
        let memory = config.memory_limit.saturating_sub(PROCESS);
        let recent = if disk.is_some() { (memory / 5).min(RECENT) } else { memory / 3 };
        let connections = config.max_connections.clamp(1, ((memory / 4 / CONNECTION) as usize).max(FEWEST));
        let inner = Self {
            recent: Recent::new(recent as usize),
            buffers: Arc::new(Buffers::new((memory / 8).min(POOL) as usize)),
            connections: Arc::new(Semaphore::new(connections)),
            ahead: Semaphore::new((connections - connections.div_ceil(8)).max(1)),
            memory: Semaphore::new((memory / 16 / 1024).clamp(LEAST_ANSWERS, 1 << 26) as usize),
            index: Mutex::new(Index { entries: BTreeMap::new(), sweep_at: 64, shelf, unsaved: HashMap::new() }),
            pinned,
            processors: std::thread::available_parallelism().map_or(1, |count| count.get() as u64),
            distance: Arc::default(),
            next_uid: AtomicU64::new(0),
            unchecked: AtomicU64::new(SPACE_EVERY),
            disk_full: AtomicBool::new(false),
            disk_warned: AtomicBool::new(false),
            save_soon: Arc::new(Notify::new()),
            disk,
            config,
        };
        inner.make_room(0);
        inner
    }

    /// The largest read-ahead window: what this cache can hold, and no more connections than the store's distance asks for.
    pub fn reach(&self) -> Reach {
        let max = self.max_window();
        if self.distance.is_near() { Reach::near(max, self.processors) } else { Reach::far(max) }
    }

    fn max_window(&self) -> u64 {
        let wished = self.config.read_ahead.unwrap_or(super::window::MAX_WINDOW);
        let room = if self.keeps_on_disk() { self.config.max_size / 4 } else { self.recent.limit() / 4 };
        wished.min(room).min(self.config.max_connections as u64 * super::window::MAX_PIECE)
    }

    /// True while blocks that come are written to the disk.
    pub fn keeps_on_disk(&self) -> bool {
        self.disk.is_some() && !self.disk_full.load(Ordering::Relaxed)
    }

    /// The entry of a version, new or shared. No I/O.
    pub fn entry(&self, version: &ObjectVersion) -> Arc<Entry> {
        let id = EntryId::of(version);
        let mut index = self.index.lock();
        if let Some(entry) = index.entries.get(&id).and_then(Weak::upgrade) {
            index.shelf.touch(id);
            entry.learn_version_id(&version.etag, version.version_id.as_deref());
            return entry;
        }
        let entry = Arc::new(self.new_entry(version));
        if index.entries.len() >= index.sweep_at {
            index.entries.retain(|_, entry| entry.strong_count() > 0);
            index.sweep_at = 64 + index.entries.len() * 2;
        }
        index.entries.insert(id, Arc::downgrade(&entry));
        entry
    }

    /// An entry that nobody knows yet.
    pub fn new_entry(&self, version: &ObjectVersion) -> Entry {
        let uid = self.next_uid.fetch_add(1, Ordering::Relaxed);
        Entry::new(uid, version.clone(), self.config.checks_ranges_over_http, Arc::clone(&self.distance))
    }

    /// Looks for the entry's file, once.
    pub async fn load(self: &Arc<Self>, entry: &Arc<Entry>) {
        if entry.loaded.initialized() {
            return;
        }
        entry
            .loaded
            .get_or_init(|| async {
                let source = entry.source();
                let id = EntryId::of(&source);
                let Some(slot) = self.index.lock().shelf.touch(id) else { return };
                let (inner, entry) = (Arc::clone(self), Arc::clone(entry));
                let loaded =
                    tokio::task::spawn_blocking(move || inner.load_now(&entry, FileName { id, serial: slot.serial }, &source)).await;
                if let Err(error) = loaded {
                    tracing::debug!(%error, "cache file not looked for");
                }
            })
            .await;
    }

    fn load_now(&self, entry: &Arc<Entry>, name: FileName, source: &ObjectVersion) {
        let Some(disk) = &self.disk else { return };
        let proved = self.index.lock().shelf.peek(name.id).is_some_and(|slot| slot.serial == name.serial && slot.proved);
        match disk.load(name, source) {
            Some((file, sidecar)) => {
                let mut state = entry.state();
                state.blocks = sidecar.blocks;
                state.verified = sidecar.verified;
                if state.expected.is_some() && !state.verified && state.blocks.is_complete() {
                    // Complete but never compared with its whole checksum: the last block is fetched again and withheld until it holds.
                    state.blocks.clear(source.size.div_ceil(BLOCK) - 1);
                }
                if proved {
                    state.blocks.prove(0..source.size.div_ceil(BLOCK));
                }
                state.file = Some((name, Arc::new(file)));
                drop(state);
                self.account(entry);
            }
            None => {
                tracing::debug!(key = source.key, "a cache file without a usable sidecar is dropped");
                let mut index = self.index.lock();
                if index.shelf.peek(name.id).is_some_and(|slot| slot.serial == name.serial) {
                    index.shelf.remove(name.id);
                }
                drop(index);
                disk.unlink(name);
            }
        }
    }

    /// True when all blocks of the version are here, by what is known without I/O.
    pub fn is_complete(&self, id: EntryId) -> bool {
        let (entry, slot) = {
            let index = self.index.lock();
            (index.entries.get(&id).and_then(Weak::upgrade), index.shelf.peek(id))
        };
        match entry {
            Some(entry) if entry.loaded.initialized() => entry.state().is_complete(),
            _ => slot.is_some_and(|slot| slot.complete),
        }
    }

    /// Takes in blocks that just came: writes them, sums them, makes them visible. Blocks: runs in the blocking pool.
    /// The landing that completes an object is withheld until its whole checksum holds (promise 16).
    pub fn land(self: &Arc<Self>, entry: &Arc<Entry>, first: u64, data: Bytes) -> Result<(), CacheError> {
        let sums: Vec<u32> = data.chunks(BLOCK as usize).map(sum_of).collect();
        let written = self.file_for(entry).is_some_and(|file| self.write(&file, first, &data));
        let checked = if written { self.note_blocks(entry, first, &sums, &data) } else { self.check_in_memory(entry, first, &data) };
        checked.inspect_err(|error| self.drop_damaged(entry, error))?;
        self.recent.put(entry.uid, first, &data, BLOCK as usize);
        if written {
            self.note_unsaved(entry);
            self.account(entry);
        }
        // Where nothing was written this asks whether there is room again.
        self.make_room(data.len() as u64);
        Ok(())
    }

    fn drop_damaged(&self, entry: &Arc<Entry>, error: &CacheError) {
        tracing::warn!(%error, "damaged in transit; dropped");
        self.take_out(entry, true);
        self.recent.forget(entry.uid);
    }

    /// Lets an entry go on where an evicted one was. Blocks. [`CacheError::Damaged`] when all has come by now and is not the object.
    pub fn succeed(&self, entry: &Arc<Entry>, old: &Arc<Entry>) -> Result<(), CacheError> {
        if !self.config.checks_ranges_over_http || Arc::ptr_eq(entry, old) || old.state().expected.is_none() {
            return Ok(());
        }
        entry.inherit(old, &self.recent);
        let hashed_to = entry.hashed_to();
        let all_here = {
            let state = entry.state();
            state.inherited && state.expected.is_some() && state.completes(hashed_to)
        };
        if all_here {
            entry.verify((0, &Bytes::new()), &self.recent).inspect_err(|error| self.drop_damaged(entry, error))?;
            entry.state().expected = None;
        }
        Ok(())
    }

    fn note_blocks(&self, entry: &Arc<Entry>, first: u64, sums: &[u32], data: &Bytes) -> Result<(), CacheError> {
        let inherited = entry.state().inherited;
        let hashed_to = if inherited { entry.hashed_to() } else { 0 };
        let completes = {
            let mut state = entry.state();
            let new: Vec<u64> = (first..).zip(sums).filter_map(|(block, sum)| state.blocks.set(block, *sum).then_some(block)).collect();
            state.blocks.prove(first..first + sums.len() as u64);
            let check = state.expected.is_some() && !state.verified;
            let completes = check && state.completes(hashed_to);
            if completes {
                new.iter().for_each(|block| _ = state.blocks.clear(*block));
            } else if !check {
                return Ok(());
            }
            completes
        };
        if !completes {
            // At most four times what landed, so that the hash keeps up with many connections and no landing waits long for it.
            if !entry.hash_on((first, data), sums.len() as u64 * 4, &self.recent) {
                entry.hash_later((first, data));
            }
            return Ok(());
        }
        entry.verify((first, data), &self.recent)?;
        let mut state = entry.state();
        if state.inherited {
            // Fetched again, the blocks before would not be the ones that were hashed: compared anew by the next mount.
            state.expected = None;
        } else {
            state.verified = true;
        }
        for (block, sum) in (first..).zip(sums) {
            state.blocks.set(block, *sum);
        }
        state.blocks.prove(first..first + sums.len() as u64);
        Ok(())
    }

    /// Without a file blocks can be hashed only in the order in which they come: small objects, and sequential readers.
    fn check_in_memory(&self, entry: &Arc<Entry>, first: u64, data: &Bytes) -> Result<(), CacheError> {
        if entry.state().expected.is_none() {
            return Ok(());
        }
        entry.hash_on((first, data), u64::MAX, &self.recent);
        if entry.hashed_to() == entry.size.div_ceil(BLOCK) { entry.verify((first, data), &self.recent) } else { Ok(()) }
    }

    /// The entry's file, made now if it is the first block; `None` where blocks stay in memory.
    fn file_for(&self, entry: &Arc<Entry>) -> Option<Arc<File>> {
        let disk = self.disk.as_ref()?;
        let id = {
            let state = entry.state();
            match &state.file {
                _ if self.disk_full.load(Ordering::Relaxed) => return None,
                Some((_, file)) => return Some(Arc::clone(file)),
                None if state.detached => return None,
                None => state.id(),
            }
        };
        let name = disk.name(id);
        let file = match disk.create(name) {
            Ok(file) => Arc::new(file),
            Err(error) => {
                self.warn_disk(&error);
                return None;
            }
        };
        {
            let mut state = entry.state();
            if let Some((_, other)) = &state.file {
                let other = Arc::clone(other);
                drop(state);
                disk.unlink(name);
                return Some(other);
            }
            if state.detached || state.id() != id {
                drop(state);
                disk.unlink(name);
                return None;
            }
            state.file = Some((name, Arc::clone(&file)));
        }
        let mut index = self.index.lock();
        let current = index.is_current(id, entry);
        let old =
            if current { index.shelf.insert(id, Slot { serial: name.serial, bytes: 0, complete: false, proved: false }) } else { None };
        drop(index);
        if let Some(old) = old {
            disk.unlink(FileName { id, serial: old.serial });
        }
        if !current {
            entry.state().detached = true;
            disk.unlink(name);
        }
        Some(file)
    }

    fn write(&self, file: &File, first: u64, data: &Bytes) -> bool {
        match std::os::unix::fs::FileExt::write_all_at(file, data, first * BLOCK) {
            Ok(()) => true,
            Err(error) => {
                self.warn_disk(&error);
                self.look_for_room();
                false
            }
        }
    }

    fn warn_disk(&self, error: &std::io::Error) {
        if !self.disk_warned.swap(true, Ordering::Relaxed) {
            tracing::warn!(dir = %self.config.dir.display(), %error, "the cache cannot write: reading through memory until it can");
        }
    }

    /// Tells the shelf what an entry's file holds now.
    pub fn account(&self, entry: &Entry) {
        let (id, slot) = {
            let state = entry.state();
            let Some((name, _)) = &state.file else { return };
            (name.id, state.slot(name.serial))
        };
        self.index.lock().shelf.account(id, slot);
    }

    /// A sidecar is to be written.
    pub fn note_unsaved(&self, entry: &Arc<Entry>) {
        let now = Instant::now();
        {
            let mut state = entry.state();
            if state.detached {
                return;
            }
            let first = state.unsaved.map_or(now, |(first, _)| first);
            state.unsaved = Some((first, now));
        }
        let mut index = self.index.lock();
        index.unsaved.insert(entry.uid, Arc::clone(entry));
        if index.unsaved.len() == MANY {
            self.save_soon.notify_one();
        }
    }

    /// Evicts until size and free space are within their bounds; `landed` bytes were written. Blocks.
    pub fn make_room(&self, landed: u64) {
        let Some(disk) = &self.disk else { return };
        let used = self.index.lock().shelf.usage().1;
        let over = used.saturating_sub(self.config.max_size);
        let mut need = over;
        if self.unchecked.fetch_add(landed, Ordering::Relaxed) + landed >= SPACE_EVERY {
            // While the disk is full nothing lands that would count: every call asks.
            match disk.available() {
                Ok(free) => {
                    let missing = self.config.min_free_space.saturating_sub(free);
                    need = need.max(missing);
                    let full = missing > used;
                    if full {
                        self.warn_disk(&std::io::Error::other(format!(
                            "{free} bytes free, min_free_space is {}",
                            self.config.min_free_space
                        )));
                    } else {
                        self.unchecked.store(0, Ordering::Relaxed);
                    }
                    self.disk_full.store(full, Ordering::Relaxed);
                }
                Err(error) => self.warn_disk(&error),
            }
        }
        self.evict(need);
    }

    /// As [`Self::make_room`], and asks the disk now. Blocks.
    fn look_for_room(&self) {
        self.unchecked.store(SPACE_EVERY, Ordering::Relaxed);
        self.make_room(0);
    }

    /// Frees the disk for others, until so many bytes are free above `min_free_space` or nothing is left to evict. Blocks.
    pub fn give_way(&self, bytes: u64) {
        let Some(free) = self.disk.as_ref().and_then(|disk| disk.available().ok()) else { return };
        self.evict(self.config.min_free_space.saturating_add(bytes).saturating_sub(free));
    }

    fn evict(&self, need: u64) {
        if need > 0 {
            let pinned = self.pinned.versions();
            self.remove_files(|shelf, has_readers| shelf.evict(need, has_readers, |id| pinned.contains(&id)));
        }
    }

    /// Removes the files that `choose` takes off the shelf, and gives them. Blocks.
    pub fn remove_files(&self, choose: impl FnOnce(&mut Shelf, &dyn Fn(EntryId) -> bool) -> Found) -> Found {
        let Some(disk) = &self.disk else { return Found::new() };
        let (victims, entries) = {
            let mut index = self.index.lock();
            let Index { entries, shelf, .. } = &mut *index;
            let has_readers =
                |id: EntryId| entries.get(&id).and_then(Weak::upgrade).is_some_and(|entry| entry.readers.load(Ordering::Relaxed) > 0);
            let victims = choose(shelf, &has_readers);
            let entries: Vec<_> = victims.iter().filter_map(|(id, _)| index.forget(*id)).collect();
            (victims, entries)
        };
        entries.iter().for_each(|entry| entry.state().detached = true);
        for (id, slot) in &victims {
            disk.unlink(FileName { id: *id, serial: slot.serial });
        }
        victims
    }

    /// Takes an entry out of the cache: its readers go on with what they have, and the file goes. Blocks.
    pub fn detach(&self, entry: &Arc<Entry>) {
        self.take_out(entry, false);
    }

    /// Damaged and no longer found in one step: who turned to another entry in between would find this one, or its file, again.
    fn take_out(&self, entry: &Arc<Entry>, damaged: bool) {
        let name = {
            let mut index = self.index.lock();
            let (id, name) = {
                let mut state = entry.state();
                state.detached = true;
                state.damaged |= damaged;
                (state.id(), state.file.as_ref().map(|(name, _)| *name))
            };
            if index.is_current(id, entry) {
                index.forget(id);
            }
            if let Some(name) = name
                && index.shelf.peek(id).is_some_and(|slot| slot.serial == name.serial)
            {
                index.shelf.remove(id);
            }
            index.unsaved.remove(&entry.uid);
            name
        };
        if let (Some(disk), Some(name)) = (&self.disk, name) {
            disk.unlink(name);
        }
    }

    /// Writes the sidecars that are due, or all. Blocks.
    pub fn save(&self, all: bool) {
        let Some(disk) = &self.disk else { return };
        let due: Vec<Arc<Entry>> = {
            let mut index = self.index.lock();
            let all = all || index.unsaved.len() >= MANY;
            let is_due = |entry: &Entry| {
                entry.state().unsaved.is_none_or(|(first, last)| all || last.elapsed() >= QUIET || first.elapsed() >= LATEST)
            };
            let (due, rest) = std::mem::take(&mut index.unsaved).into_iter().partition(|(_, entry)| is_due(entry));
            index.unsaved = rest;
            HashMap::into_values(due).collect()
        };
        for entry in due {
            let (name, sidecar) = {
                let mut state = entry.state();
                state.unsaved = None;
                match &state.file {
                    Some((name, _)) if !state.detached && !state.trusted => {
                        (*name, Sidecar { version: state.source.clone(), verified: state.verified, blocks: state.blocks.clone() })
                    }
                    _ => continue,
                }
            };
            // The data is not synced before: a block that a power cut loses does not match its sum, and is fetched again.
            if let Err(error) = disk.write_sidecar(name, &sidecar.encode()) {
                tracing::warn!(%error, key = sidecar.version.key, "sidecar not written: these blocks are fetched again after a restart");
            }
            let kept = self.index.lock().shelf.peek(name.id).is_some_and(|slot| slot.serial == name.serial);
            if !kept {
                disk.unlink(name);
            }
        }
    }

    /// Writes sidecars, and leaves others the room that is theirs whether anything is read or not, until the cache is gone.
    pub async fn save_forever(this: Weak<Self>) {
        let Some(soon) = this.upgrade().map(|inner| Arc::clone(&inner.save_soon)) else { return };
        loop {
            _ = tokio::time::timeout(Duration::from_secs(1), soon.notified()).await;
            let Some(inner) = this.upgrade() else { return };
            let work = move || {
                inner.save(false);
                inner.look_for_room();
            };
            if let Err(error) = tokio::task::spawn_blocking(work).await {
                tracing::debug!(%error, "sidecars not written");
            }
        }
    }

    /// Files and bytes on disk.
    pub fn usage(&self) -> (u64, u64) {
        self.index.lock().shelf.usage()
    }
}
