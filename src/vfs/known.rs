//! What the table keeps of directories that nobody looks at any more is bounded, however many there are: a walk of a tree leaves the
//! names that it saw last.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::sync::{Arc, Weak};

use super::Ino;
use super::attr::Kind;
use super::inode::Table;
use super::listing::Listing;

/// What a node takes of memory, about.
const NODE_BYTES: u64 = 1536;
/// The part of `memory_limit` that nodes may take which only the kernel remembers.
const NODES_PART: u64 = 8;
/// What a listed name takes of memory, about.
const NAME_BYTES: u64 = 200;
/// The part of `memory_limit` that listings may take.
const NAMES_PART: u64 = 10;
/// Names that the kernel is told to forget at once.
const AT_ONCE: usize = 4096;

/// Directories by the time of their listing, the oldest first.
pub(super) struct Known {
    /// Listings that may be in use.
    listings: VecDeque<(Ino, Weak<Listing>)>,
    /// Names in them, at most.
    names: usize,
    most_names: usize,
    /// Directories whose names the kernel may remember.
    remembered: VecDeque<Ino>,
    most_nodes: usize,
}

impl Known {
    /// For a mount that may take so many bytes.
    pub fn new(memory_limit: u64) -> Self {
        let most = |part: u64, bytes: u64| usize::try_from(memory_limit / part / bytes).unwrap_or(usize::MAX);
        Self {
            listings: VecDeque::new(),
            names: 0,
            most_names: most(NAMES_PART, NAME_BYTES),
            remembered: VecDeque::new(),
            most_nodes: most(NODES_PART, NODE_BYTES),
        }
    }
}

impl Table {
    /// Notes that a listing is in use. Gives names of files that the kernel is to forget, each with its directory: what it asks of them
    /// again is answered without a request for as long as their directory's listing is.
    pub(super) fn note_listing(&mut self, dir: Ino, listing: &Arc<Listing>) -> Vec<(Ino, OsString)> {
        self.known.listings.push_back((dir, Arc::downgrade(listing)));
        self.known.remembered.push_back(dir);
        self.known.names += listing.entries.len();
        if self.known.names > self.known.most_names {
            self.drop_old_listings();
        }
        self.old_names()
    }

    /// All but the newest, until there is room.
    fn drop_old_listings(&mut self) {
        let mut listings = std::mem::take(&mut self.known.listings);
        listings.retain(|(_, listing)| listing.strong_count() > 0);
        let mut names = listings.iter().filter_map(|(_, listing)| listing.upgrade()).map(|listing| listing.entries.len()).sum();
        while names > self.known.most_names && listings.len() > 1 {
            let Some((dir, listing)) = listings.pop_front() else { break };
            let Some(listing) = listing.upgrade() else { continue };
            names -= listing.entries.len();
            if let Some(state) = self.dir_mut(dir) {
                state.listing.take_if(|known| Arc::ptr_eq(known, &listing));
            }
            self.release_children(dir);
        }
        (self.known.listings, self.known.names) = (listings, names);
    }

    fn old_names(&mut self) -> Vec<(Ino, OsString)> {
        let mut names = Vec::new();
        let over = self.len().saturating_sub(self.known.most_nodes).min(AT_ONCE);
        while names.len() < over && self.known.remembered.len() > 1 {
            let Some(dir) = self.known.remembered.pop_front() else { break };
            let Some(state) = self.dir(dir) else { continue };
            let idle = |ino: &Ino| self.get(*ino).is_some_and(|node| node.nlookup > 0 && node.kind != Kind::Directory && !node.is_in_use());
            let mut of_it = state.children.iter().filter(|(_, ino)| idle(ino)).map(|(name, _)| (dir, name.clone()));
            names.extend(of_it.by_ref().take(AT_ONCE - names.len()));
            if of_it.next().is_some() {
                drop(of_it);
                self.known.remembered.push_front(dir);
            }
        }
        names
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::{Instant, SystemTime};

    use super::super::inode::Node;
    use super::super::listing::Listed;
    use super::*;

    fn listing(names: usize) -> Arc<Listing> {
        let entry = |n| Listed { segment: format!("{n}").into(), hidden: false, object: None };
        Arc::new(super::super::listing::Merger::default().listing(Instant::now(), (0..names).map(entry).collect(), true))
    }

    fn directory(table: &mut Table, name: &str) -> Ino {
        let ino = table.insert(Node::new(super::super::ROOT, name.into(), name.into(), Kind::Directory, SystemTime::now()));
        table.remember(ino);
        ino
    }

    #[test]
    fn the_listings_used_last_are_kept() {
        // Room for 100 names, and for some nodes.
        let mut table = Table::new(SystemTime::now(), NAMES_PART * NAME_BYTES * 100);
        let dirs: Vec<Ino> = ["a", "b", "c"].iter().map(|name| directory(&mut table, name)).collect();
        for dir in &dirs {
            table.install(*dir, listing(40));
        }
        let kept: Vec<bool> = dirs.iter().map(|dir| table.dir(*dir).unwrap().listing.is_some()).collect();
        assert_eq!(kept, [false, true, true]);
        table.install(dirs[0], listing(1000));
        assert!(table.dir(dirs[0]).unwrap().listing.is_some(), "one that is larger than all room is kept while it is the newest");
    }

    #[test]
    fn the_kernel_is_told_to_forget_what_was_seen_long_ago() {
        let mut table = Table::new(SystemTime::now(), NODES_PART * NODE_BYTES * 10);
        let (old, new) = (directory(&mut table, "old"), directory(&mut table, "new"));
        table.install(old, listing(0));
        for (dir, name) in [(old, "f"), (old, "open"), (new, "g")] {
            let ino = table.insert(Node::new(dir, name.into(), name.into(), Kind::File, SystemTime::now()));
            table.remember(ino);
            if name == "open" {
                table.pin(ino);
            }
        }
        assert_eq!(table.install(new, listing(0)), [], "there is room");
        for n in 0..10 {
            directory(&mut table, &format!("d{n}"));
        }
        table.install(old, listing(0));
        assert_eq!(table.install(new, listing(0)), [(old, OsString::from("f"))]);
    }
}
