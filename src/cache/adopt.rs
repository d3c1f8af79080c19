//! Cache files that change hands: spool files that become cache files, and files that follow their object to another name.

use std::path::Path;
use std::sync::Arc;

use super::ObjectVersion;
use super::block::{BLOCK, EntryId, sum_of};
use super::disk::{FileName, read_at};
use super::entry::Entry;
use super::evict::Slot;
use super::inner::Inner;

/// Blocks summed between two looks at the state.
const STEP: u64 = 16;

impl Inner {
    /// Makes the file at `path` the version's cache file, or removes it. Answers the entry whose sums are to be computed. Blocks.
    pub fn adopt(&self, version: &ObjectVersion, path: &Path) -> std::io::Result<Option<Arc<Entry>>> {
        let id = EntryId::of(version);
        let Some(disk) = self.disk.as_ref().filter(|_| version.size > 0) else {
            return std::fs::remove_file(path).map(|()| None);
        };
        let len = std::fs::symlink_metadata(path)?.len();
        if len != version.size {
            std::fs::remove_file(path)?;
            return Err(std::io::Error::other(format!(
                "spool file of {len} bytes for an object of {}: not taken into the cache",
                version.size
            )));
        }
        let name = disk.name(id);
        if let Err(error) = std::fs::rename(path, disk.data(name)) {
            tracing::debug!(%error, "spool file not taken into the cache");
            return std::fs::remove_file(path).map(|()| None);
        }
        let file = match disk.open_data(name) {
            Ok(file) => file,
            Err(error) => {
                disk.unlink(name);
                return Err(error);
            }
        };
        let entry = self.new_entry(version);
        _ = entry.loaded.set(());
        {
            let mut state = entry.state();
            state.file = Some((name, Arc::new(file)));
            state.trusted = true;
            state.verified = true;
        }
        let entry = Arc::new(entry);
        let (old, replaced) = {
            let mut index = self.index.lock();
            let replaced = index.forget(id);
            index.entries.insert(id, Arc::downgrade(&entry));
            (index.shelf.insert(id, Slot { serial: name.serial, bytes: version.size, complete: true, proved: false }), replaced)
        };
        self.release(id, old, replaced);
        self.make_room(version.size);
        Ok(Some(entry))
    }

    /// Computes the sums of an adopted file. Blocks for as long as reading the file takes.
    pub fn sum_adopted(&self, entry: &Arc<Entry>) {
        let file = match &entry.state().file {
            Some((_, file)) => Arc::clone(file),
            None => return,
        };
        let count = entry.size.div_ceil(BLOCK);
        let mut buffer = self.buffers.take((STEP * BLOCK) as usize);
        for first in (0..count).step_by(STEP as usize) {
            let start = first * BLOCK;
            let len = (entry.size - start).min(STEP * BLOCK) as usize;
            let part = &mut buffer.as_mut()[..len];
            if let Err(error) = read_at(&file, part, start) {
                tracing::warn!(%error, "an adopted cache file cannot be read; dropped");
                self.detach(entry);
                return;
            }
            let sums: Vec<u32> = part.chunks(BLOCK as usize).map(sum_of).collect();
            let mut state = entry.state();
            if state.detached {
                return;
            }
            for (block, sum) in (first..).zip(sums) {
                state.blocks.set(block, sum);
                state.blocks.prove(block..block + 1);
            }
        }
        entry.state().trusted = false;
        self.account(entry);
        self.note_unsaved(entry);
    }

    /// Moves what is known of `from` to `to`: same bytes, another name. Blocks; the entry was loaded.
    pub fn rekey(&self, entry: &Arc<Entry>, from: &ObjectVersion, to: &ObjectVersion) {
        let (from_id, to_id) = (EntryId::of(from), EntryId::of(to));
        let renamed = {
            let mut state = entry.state();
            state.source = to.clone();
            let file = if state.detached { None } else { state.file.as_mut() };
            match (file, &self.disk) {
                (Some((name, _)), Some(disk)) => {
                    let old = *name;
                    *name = disk.name(to_id);
                    Some((old, *name))
                }
                _ => None,
            }
        };
        let (old, replaced) = {
            let mut index = self.index.lock();
            if index.is_current(from_id, entry) {
                index.entries.remove(&from_id);
            }
            if renamed.is_none() && index.shelf.peek(to_id).is_some() {
                // Nothing to move, and the other name has its blocks already: readers find them there.
                drop(index);
                entry.state().detached = true;
                return;
            }
            let replaced = index.forget(to_id);
            index.entries.insert(to_id, Arc::downgrade(entry));
            if renamed.is_some() {
                index.shelf.remove(from_id);
            }
            (index.shelf.remove(to_id), replaced)
        };
        self.release(to_id, old, replaced);
        let (Some((old, new)), Some(disk)) = (renamed, &self.disk) else { return };
        if let Err(error) = disk.rename(old, new) {
            tracing::debug!(%error, key = to.key, "a cache file did not follow its object");
            self.detach(entry);
            return;
        }
        let slot = {
            let state = entry.state();
            state.slot(new.serial)
        };
        self.index.lock().shelf.insert(to_id, slot);
        self.note_unsaved(entry);
    }

    /// Forgets every version of a key. Blocks.
    pub fn remove(&self, bucket: &str, key: &str) {
        let object = EntryId::object(bucket, key);
        let gone: Vec<_> = {
            let mut index = self.index.lock();
            let mut ids = index.shelf.versions(object);
            ids.extend(index.entries.range(EntryId { object, version: 0 }..=EntryId { object, version: u64::MAX }).map(|(id, _)| *id));
            ids.sort_unstable();
            ids.dedup();
            ids.into_iter().map(|id| (id, index.shelf.remove(id), index.forget(id))).collect()
        };
        for (id, slot, entry) in gone {
            self.release(id, slot, entry);
        }
    }

    /// What was taken out of the index goes: the entry gets no more blocks, the file is unlinked.
    fn release(&self, id: EntryId, slot: Option<Slot>, entry: Option<Arc<Entry>>) {
        if let Some(entry) = entry {
            entry.state().detached = true;
        }
        if let (Some(slot), Some(disk)) = (slot, &self.disk) {
            disk.unlink(FileName { id, serial: slot.serial });
        }
    }
}
