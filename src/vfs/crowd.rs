//! How much is known at once. The kernel keeps each name that it was ever told of until it needs the memory itself, and we with it what
//! stands behind the name: after a `find` through a million keys that would be more than a gigabyte. So the kernel is asked to let go of
//! those that it was told of longest ago, and directories that were listed longest ago are listed anew when somebody looks again.

use std::collections::{HashMap, HashSet, VecDeque};
use std::ffi::OsString;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::attr::Kind;
use super::inode::{Node, Table};
use super::{Ino, Vfs};

/// Inodes of the whole mount, about, at a kilobyte each: several readers may be within a directory's buffer of some hundred.
const NODES: usize = 4096;
/// What a listed name takes of memory in bytes, about.
const NAME_BYTES: u64 = 65;
/// The part of `memory_limit` that the names of listings may take, besides those of the newest.
const NAMES_PART: u64 = 10;
/// Names of a listing that is not kept while it is listed anew.
const LARGE: usize = 10_000;
/// So many names the kernel is asked to let go of at once, and then has a moment to do so.
const BATCH: usize = 1024;
const MOMENT: Duration = Duration::from_millis(10);

/// What is kept only because there is room for it.
pub(super) struct Crowd {
    /// Inodes that the kernel was told of, the oldest first. Some are no more.
    granted: VecDeque<Ino>,
    /// Those that the kernel was asked to let go of.
    asked: HashSet<Ino>,
    /// Directories that have a listing, by its age, and the number of its names. Some have a newer one.
    listed: VecDeque<(Ino, usize)>,
    /// How often a directory is in that.
    times: HashMap<Ino, u32>,
    /// Names in that.
    names: usize,
    most_names: usize,
}

impl Crowd {
    /// Of a mount that may take so many bytes of memory.
    pub fn new(memory_limit: u64) -> Self {
        let most_names = usize::try_from(memory_limit / NAMES_PART / NAME_BYTES).unwrap_or(usize::MAX);
        Self { granted: VecDeque::new(), asked: HashSet::new(), listed: VecDeque::new(), times: HashMap::new(), names: 0, most_names }
    }

    /// The kernel was told of an inode.
    pub fn granted(&mut self, ino: Ino, is_new: bool) {
        if self.asked.remove(&ino) || is_new {
            self.granted.push_back(ino);
        }
    }

    /// The inode is no more.
    pub fn gone(&mut self, ino: Ino) {
        self.asked.remove(&ino);
    }

    /// A directory was listed. Gives those whose listings are too many by that.
    pub fn listed(&mut self, dir: Ino, names: usize) -> Vec<Ino> {
        let names = names + 1;
        self.listed.push_back((dir, names));
        self.names += names;
        *self.times.entry(dir).or_default() += 1;
        let mut over = Vec::new();
        while self.names - names > self.most_names
            && let Some((oldest, held)) = self.listed.pop_front()
        {
            self.names -= held;
            // One that was listed again since goes by that.
            let times = self.times.get(&oldest).map_or(0, |times| times.saturating_sub(1));
            if times > 0 {
                self.times.insert(oldest, times);
            } else {
                self.times.remove(&oldest);
                over.push(oldest);
            }
        }
        over
    }
}

impl Table {
    /// The kernel was told of more names than there is room for, and was not asked to let go of them.
    pub(super) fn is_crowded(&self) -> bool {
        self.crowd.granted.len() > NODES
    }

    /// A directory is listed anew: the listing before, too old to be used, would take as much memory again as what comes.
    pub(super) fn make_way(&mut self, dir: Ino) {
        if self.dir(dir).and_then(|state| state.listing.as_ref()).is_some_and(|listing| listing.entries.len() > LARGE) {
            self.drop_listing(dir);
        }
    }

    /// The names, each with its directory, that the kernel is to let go of.
    fn surplus(&mut self) -> Vec<(Ino, OsString)> {
        let mut found = Vec::new();
        // Those in use come up again: not all of them are looked at each time.
        for _ in 0..self.crowd.granted.len().min(2 * BATCH) {
            if !self.is_crowded() || found.len() >= BATCH {
                break;
            }
            let Some(ino) = self.crowd.granted.pop_front() else { break };
            let Some(node) = self.get(ino).filter(|node| node.nlookup > 0) else { continue };
            if is_let_go(node) {
                found.push((node.parent, node.name.clone()));
                self.crowd.asked.insert(ino);
            } else {
                self.crowd.granted.push_back(ino);
            }
        }
        found
    }
}

/// The kernel may let go of its name: a directory may be where a process is, and would lose its path.
fn is_let_go(node: &Node) -> bool {
    node.linked && node.kind != Kind::Directory && !node.is_in_use() && !node.is_local()
}

impl Vfs {
    /// Asks the kernel to let go of names, until there is room.
    pub(super) fn make_room(&self) {
        let Some(vfs) = self.shared().filter(|vfs| !vfs.makes_room.swap(true, Ordering::Relaxed)) else { return };
        self.spawn(async move {
            loop {
                // Notices of changes go before these.
                let mut has_room = false;
                vfs.tell(|notify| has_room = notify.has_room());
                let names = if has_room { vfs.table.lock().surplus() } else { Vec::new() };
                let ends = has_room && names.is_empty() || vfs.closing.is_cancelled();
                for (parent, name) in names {
                    vfs.tell(|notify| notify.invalidate_entry(parent, &name));
                }
                vfs.pause(MOMENT).await;
                if ends {
                    break;
                }
            }
            vfs.makes_room.store(false, Ordering::Relaxed);
        });
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Arc;
    use std::time::{Instant, SystemTime};

    use super::super::listing::{Listed, Listing, Merger};
    use super::*;
    use crate::vfs::ROOT;

    fn listing(names: usize) -> Arc<Listing> {
        let entry = |n| Listed { segment: format!("{n}").into(), hidden: false, object: None };
        Arc::new(Merger::default().listing(Instant::now(), (0..names).map(entry).collect(), true))
    }

    fn named(table: &mut Table, parent: Ino, name: &str, kind: Kind) -> Ino {
        let ino = table.insert(Node::new(parent, name.into(), name.into(), kind, SystemTime::now()));
        table.remember(ino);
        ino
    }

    #[test]
    fn the_listings_used_last_are_kept() {
        // Room for 100 names beside the newest listing's.
        let mut table = Table::new(SystemTime::now(), NAMES_PART * NAME_BYTES * 100);
        let dirs: Vec<Ino> = ["a", "b", "c", "d"].iter().map(|name| named(&mut table, ROOT, name, Kind::Directory)).collect();
        let kept = |table: &Table| dirs.iter().map(|dir| table.dir(*dir).unwrap().listing.is_some()).collect::<Vec<_>>();
        dirs.iter().for_each(|dir| table.install(*dir, listing(40)));
        assert_eq!(kept(&table), [false, true, true, true]);
        table.install(dirs[1], listing(40));
        table.install(dirs[0], listing(1000));
        assert_eq!(kept(&table), [true, true, false, true], "one that is larger than all room is kept while it is the newest");
        table.install(dirs[2], listing(0));
        assert_eq!(kept(&table), [false, false, true, false]);
    }

    #[test]
    fn the_kernel_is_asked_to_let_go_of_what_it_was_told_of_first() {
        let mut table = Table::new(SystemTime::now(), 1 << 30);
        let open = named(&mut table, ROOT, "open", Kind::File);
        table.pin(open);
        let dir = named(&mut table, ROOT, "dir", Kind::Directory);
        let files: Vec<Ino> = (0..NODES + 5).map(|n| named(&mut table, dir, &format!("f{n:05}"), Kind::File)).collect();
        // What is open is among them, and stays.
        let names: Vec<OsString> = table.surplus().into_iter().map(|(_, name)| name).collect();
        assert_eq!(names.len(), 6);
        assert_eq!((names[0].to_str(), names[5].to_str()), (Some("f00000"), Some("f00005")));
        assert_eq!(table.surplus(), [], "it has its time");
        // It was told of this one again before it let go.
        table.remember(files[0]);
        files[1..6].iter().for_each(|ino| table.forget(*ino, 1));
        assert_eq!(table.surplus().len(), 1);
        assert!(table.get(files[0]).is_some() && table.get(open).is_some() && table.get(dir).is_some());
    }
}
