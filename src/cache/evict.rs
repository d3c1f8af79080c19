//! What is on disk, in order of use: who goes when space is wanted. Pure accounting; the caller unlinks.

use std::collections::BTreeSet;

use lru::LruCache;

use super::block::EntryId;

/// A cache file of the shelf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Makes the file's name unique, so that a late unlink never hits a newer file of the same version.
    pub serial: u32,
    /// Bytes of its blocks.
    pub bytes: u64,
    /// All blocks are here.
    pub complete: bool,
    /// All of them matched their sums in this mount.
    pub proved: bool,
}

/// The cache files, least recently used first to go.
#[derive(Debug)]
pub struct Shelf {
    slots: LruCache<EntryId, Slot>,
    ids: BTreeSet<EntryId>,
    bytes: u64,
}

impl Shelf {
    /// An empty shelf.
    pub fn new() -> Self {
        Self { slots: LruCache::unbounded(), ids: BTreeSet::new(), bytes: 0 }
    }

    /// Puts a file in front; gives the one of the same version that it replaces.
    pub fn insert(&mut self, id: EntryId, slot: Slot) -> Option<Slot> {
        let old = self.remove(id);
        self.bytes += slot.bytes;
        self.ids.insert(id);
        self.slots.put(id, slot);
        old
    }

    /// The file of a version, moved in front.
    pub fn touch(&mut self, id: EntryId) -> Option<Slot> {
        self.slots.get(&id).copied()
    }

    /// The file of a version.
    pub fn peek(&self, id: EntryId) -> Option<Slot> {
        self.slots.peek(&id).copied()
    }

    /// Sets what a file holds. False when the file is not on the shelf any more.
    pub fn account(&mut self, id: EntryId, now: Slot) -> bool {
        match self.slots.get_mut(&id) {
            Some(slot) if slot.serial == now.serial => {
                self.bytes = self.bytes - slot.bytes + now.bytes;
                *slot = now;
                true
            }
            _ => false,
        }
    }

    /// Takes a file off the shelf.
    pub fn remove(&mut self, id: EntryId) -> Option<Slot> {
        let slot = self.slots.pop(&id)?;
        self.ids.remove(&id);
        self.bytes -= slot.bytes;
        Some(slot)
    }

    /// Every cached version of a key.
    pub fn versions(&self, object: u128) -> Vec<EntryId> {
        self.ids.range(EntryId { object, version: 0 }..=EntryId { object, version: u64::MAX }).copied().collect()
    }

    /// Files and bytes.
    pub fn usage(&self) -> (u64, u64) {
        (self.slots.len() as u64, self.bytes)
    }

    /// Files that are whole.
    pub fn whole(&self) -> u64 {
        self.slots.iter().filter(|(_, slot)| slot.complete).count() as u64
    }

    /// All files, the least recently used first.
    pub fn oldest_first(&self) -> Vec<(EntryId, Slot)> {
        self.slots.iter().rev().map(|(id, slot)| (*id, *slot)).collect()
    }

    /// Takes all files off but those with readers.
    pub fn clear(&mut self, in_use: impl Fn(EntryId) -> bool) -> Vec<(EntryId, Slot)> {
        let gone: Vec<_> = self.oldest_first().into_iter().filter(|(id, _)| !in_use(*id)).collect();
        for (id, _) in &gone {
            self.remove(*id);
        }
        gone
    }

    /// Takes files off until `need` bytes are freed: the least recently used first, those with readers (`in_use`) last of all, and
    /// those that are `pinned` never.
    pub fn evict(&mut self, need: u64, in_use: impl Fn(EntryId) -> bool, pinned: impl Fn(EntryId) -> bool) -> Vec<(EntryId, Slot)> {
        let mut victims = Vec::new();
        let mut freed = 0;
        for spare_readers in [true, false] {
            for (id, slot) in self.slots.iter().rev() {
                if freed >= need {
                    break;
                }
                if in_use(*id) != spare_readers && !pinned(*id) {
                    victims.push((*id, *slot));
                    freed += slot.bytes;
                }
            }
        }
        for (id, _) in &victims {
            self.remove(*id);
        }
        victims
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u64) -> EntryId {
        EntryId { object: u128::from(n / 10), version: n }
    }

    fn slot(serial: u32, bytes: u64) -> Slot {
        Slot { serial, bytes, complete: false, proved: false }
    }

    fn shelf(of: &[u64]) -> Shelf {
        let mut shelf = Shelf::new();
        for n in of {
            shelf.insert(id(*n), slot(0, 10));
        }
        shelf
    }

    #[test]
    fn the_least_recently_used_goes_first() {
        let mut shelf = shelf(&[1, 2, 3]);
        shelf.touch(id(1));
        let gone: Vec<_> = shelf.evict(11, |_| false, |_| false).iter().map(|v| v.0).collect();
        assert_eq!(gone, [id(2), id(3)]);
        assert_eq!(shelf.usage(), (1, 10));
    }

    #[test]
    fn files_with_readers_go_last() {
        let mut shelf = shelf(&[1, 2, 3]);
        let gone: Vec<_> = shelf.evict(25, |i| i == id(1), |_| false).iter().map(|v| v.0).collect();
        assert_eq!(gone, [id(2), id(3), id(1)]);
    }

    #[test]
    fn what_is_pinned_stays() {
        let mut shelf = shelf(&[1, 2, 3]);
        let gone: Vec<_> = shelf.evict(25, |_| false, |i| i == id(1)).iter().map(|v| v.0).collect();
        assert_eq!((gone, shelf.usage()), (vec![id(2), id(3)], (1, 10)));
    }

    #[test]
    fn a_late_account_of_a_replaced_file_is_ignored() {
        let mut shelf = shelf(&[1]);
        assert!(shelf.account(id(1), slot(0, 30)));
        shelf.insert(id(1), slot(5, 0));
        assert!(!shelf.account(id(1), slot(0, 40)));
        assert_eq!(shelf.usage(), (1, 0));
    }

    #[test]
    fn versions_of_one_key() {
        assert_eq!(shelf(&[11, 12, 21]).versions(1), [id(11), id(12)]);
    }
}
